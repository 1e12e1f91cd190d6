"""Where the training data came from: one entry per source, for the run directory and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.data.prepare import Corpus


def table(corpora: Mapping[str, Corpus]) -> dict[str, dict[str, Any]]:
    """Returns for every source (JSON) its description, licence, tokenizer, the number of documents that cleaning
    removed by reason, and per split documents, rows, tokens, bytes and fingerprint.
    """
    keep = ("documents", "rows", "tokens", "bytes", "fingerprint")
    return {
        name: {
            "source": corpus.manifest["source"],
            "licence": corpus.manifest["licence"],
            "tokenizer": corpus.manifest["tokenizer"],
            "removed": corpus.manifest.get("removed", {}),
            **{split: {key: entry[key] for key in keep} for split, entry in corpus.manifest["splits"].items()},
        }
        for name, corpus in corpora.items()
    }
