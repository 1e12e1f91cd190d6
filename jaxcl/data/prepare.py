"""Tokenise and pack once: documents become fixed-size rows in ArrayRecord files that any step can reach.

    corpus = make(embedded.make(domain="prose"), tokenizer.make(), directory="runs/data", name="prose", length=256)
    corpus.train, corpus.held_out                          # Rows for stream.make and for evaluation

Every document is written as `bos, tokens, eos`; of a conversation only what the assistant says is trained, and what
ends its turns (`chat.py`). The documents of a split are joined and cut into rows of L + 1 tokens
that do not overlap; targets are shifted by one within the row, so `eos` is predicted, `bos` never is, and the
first token of a row is context only. The last row is padded. A document goes to the held-out split by the hash of its
text, so equal documents stay together and the split does not depend on order or on other documents (only where no
document would be held out, the one with the lowest hash is).

A record is the CRC-32 of a packed row (`rows.pack`) and the row. The folder is built under a temporary name and
renamed when complete; its name carries a hash of everything the rows depend on, so a changed source, tokenizer
or length builds a new folder and never overwrites one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data import shards
from jaxcl.data.rows import Rows, pack, unpack, width
from jaxcl.data.sources import Chat, Document, Source, text_of_document
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.schema import UserError

_FORMAT = 2
_CHUNK = 1024, 2**22  # documents tokenised at a time, and characters in them: encodings take 100 bytes per token
_SPLITS = ("train", "held_out")
_BEGIN = 2  # flag of a token that begins a document; that of one that is trained is 1


class Corpus(NamedTuple):
    """A prepared source."""

    train: Rows
    held_out: Rows
    manifest: dict[
        str, Any
    ]  # format, length, source, licence, tokenizer, and per split: rows, tokens, bytes, files ...
    path: str


def make(
    source: Source,
    tokenizer: Tokenizer,
    *,
    directory: str,
    name: str,
    length: int,
    held_out: float = 0.05,
) -> Corpus:
    """Returns the rows of a source; builds them unless the folder is there already.

    Args:
      source: documents.
      tokenizer: text to tokens.
      directory: parent of the folder of rows; `~` is the home folder.
      name: of the source, part of the folder's name.
      length: L, targets per row.
      held_out: share of the documents kept for evaluation, in [0, 1).

    Raises:
      UserError: no documents, or none on one side of the split; a folder that is damaged.
    """
    if length < 1 or not 0 <= held_out < 1:
        raise UserError(f"config.packing: length={length}, held_out={held_out}: need length >= 1 and 0 <= held_out < 1")
    directory = os.path.expanduser(directory)
    key = {"format": _FORMAT, "length": length, "held_out": held_out, "tokenizer": tokenizer.fingerprint}
    key |= {"source": source.description, "listing": source.listing}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = os.path.join(directory, f"{name}-{digest[:16]}")
    if not os.path.exists(path):
        os.makedirs(directory, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f".{name}-{digest[:16]}-", dir=directory)
        try:
            _build(source, tokenizer, partial, length, held_out)
            _publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return load(path)


def load(path: str) -> Corpus:
    """Opens a folder of rows.

    Raises:
      UserError: the manifest or a file of rows is missing, truncated or damaged.
    """
    try:
        with open(os.path.join(path, "manifest.json"), encoding="utf-8") as stream:
            manifest = json.load(stream)
        checksum = manifest.pop("checksum")
    except (OSError, ValueError, KeyError) as error:
        raise shards.damaged(os.path.join(path, "manifest.json"), "missing or damaged") from error
    if checksum != _checksum(manifest):
        raise shards.damaged(os.path.join(path, "manifest.json"), "damaged")
    return Corpus(_open(path, "train", manifest), _open(path, "held_out", manifest), manifest, path)


def _open(path: str, split: str, manifest: dict[str, Any]) -> Rows:
    """Returns the rows of a split."""
    entry, length = manifest["splits"][split], manifest["length"]
    read = shards.reader(path, entry["files"], width(length))
    tokens = shards.load_counts(os.path.join(path, f"{split}.tokens.npy"), entry["rows"], entry["tokens"])
    ratio = entry["bytes"] / entry["stored"] if entry["stored"] else None
    return Rows(tokens, lambda index: unpack(read(index), length), entry["fingerprint"], ratio, words=read)


def _build(source: Source, tokenizer: Tokenizer, folder: str, length: int, held_out: float) -> None:
    """Writes the rows and the manifest of a source into an empty folder."""
    splits, lowest = _split(source, tokenizer, folder, length, int(held_out * 2**64))
    if held_out and splits["train"]["documents"] > 1 and not splits["held_out"]["documents"]:
        splits, _ = _split(source, tokenizer, folder, length, lowest + 1)
    counts = {split: entry["documents"] for split, entry in splits.items()}
    if not sum(counts.values()):
        raise UserError(f"config.sources: {source.description} holds no text; check the path and the column")
    if not counts["train"] or (held_out and not counts["held_out"]):
        raise UserError(
            f"config.sources: {source.description} has too few different documents (of {sum(counts.values())}) "
            f"for held_out={held_out}; add documents, lower held_out, or in text files use split='paragraph'"
        )
    manifest = {
        "format": _FORMAT,
        "length": length,
        "held_out": held_out,
        "source": source.description,
        "licence": source.licence,
        "removed": source.removed(),  # by cleaning, documents by reason
        "tokenizer": {"name": tokenizer.name, "vocab": tokenizer.vocab, "fingerprint": tokenizer.fingerprint},
        "splits": splits,
    }
    with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as stream:
        json.dump({**manifest, "checksum": _checksum(manifest)}, stream, indent=1)


def _split(source: Source, tokenizer: Tokenizer, folder: str, length: int, limit: int) -> tuple[dict[str, Any], int]:
    """Writes the rows of both splits; documents whose 64-bit hash lies below `limit` are held out.

    Returns:
      The entries of the manifest and the lowest hash of all documents.
    """
    writers = {split: _Writer(folder, split, length) for split in _SPLITS}
    lowest = 2**64
    for documents in _chunks(source.documents()):
        for document, (tokens, trained, size) in zip(documents, _encoded(documents, tokenizer), strict=True):
            data = text_of_document(document).encode("utf-8", "surrogatepass")
            value = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
            writers[_SPLITS[value < limit]].add(tokens, trained, size)
            lowest = min(value, lowest)
    return {split: writer.close() for split, writer in writers.items()}, lowest


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields tokens uint32 [n] with bos and eos, which are trained bool [n], and the bytes of text that these hold."""
    texts = iter(tokenizer.encode_many([d for d in documents if isinstance(d, str)]))
    for document in documents:
        if isinstance(document, Chat):
            if tokenizer.chat is None:
                raise UserError(f"config.tokenizer: {tokenizer.name!r} has no chat format; use another, or plain text")
            tokens, trained = tokenizer.chat(document)
            size = len(tokenizer.decode(tokens[trained]).encode("utf-8", "surrogatepass"))
        else:
            tokens = np.concatenate([next(texts), np.array([tokenizer.eos], np.uint32)])
            trained, size = np.ones(len(tokens), bool), len(document.encode("utf-8", "surrogatepass"))
        begin = np.array([tokenizer.bos], np.uint32)
        yield np.concatenate([begin, tokens]), np.concatenate([[True], trained]), size


def _publish(partial: str, path: str) -> None:
    """Makes a finished folder durable and gives it its name, unless another process was first."""
    os.chmod(partial, 0o755)  # mkdtemp makes it private
    for entry in [*os.scandir(partial)]:
        shards.sync(entry.path)
    shards.sync(partial)
    try:
        os.rename(partial, path)
    except OSError:
        if not os.path.isdir(path):
            raise
    shards.sync(os.path.dirname(path) or ".")


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yields documents in lists, so that a tokenizer can work in parallel."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(text_of_document(document))
        if len(chunk) == _CHUNK[0] or size >= _CHUNK[1]:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _checksum(manifest: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of a manifest."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


class _Writer:
    """Packs the documents of one split into rows and writes them."""

    def __init__(self, folder: str, split: str, length: int):
        self.folder, self.split, self.length = folder, split, length
        self.documents = self.bytes = self.stored = 0
        self.pending: list[np.ndarray] = []  # documents and the rest of the last cut, uint32
        self.flags: list[np.ndarray] = []  # what is trained, and where documents begin: uint8, like `pending`
        self.size = 0
        self.tokens: list[np.ndarray] = []
        self.out = shards.Writer(folder, split)
        self.digest = hashlib.sha256(f"{length}/".encode())

    def add(self, document: np.ndarray, trained: np.ndarray, size: int) -> None:
        """Takes one document with its special tokens; `size` is its trained text in bytes."""
        flags = trained.astype(np.uint8)
        flags[0] |= _BEGIN
        self.pending.append(document)
        self.flags.append(flags)
        self.documents, self.bytes, self.stored = self.documents + 1, self.bytes + size, self.stored + trained[1:].sum()
        self.size += len(document)
        if self.size >= 2**20:
            self._cut(self.size - self.size % (self.length + 1))

    def _cut(self, end: int) -> None:
        """Writes the first `end` pending tokens as rows."""
        tokens, flags = np.concatenate(self.pending), np.concatenate(self.flags)
        self.pending, self.flags, self.size = [tokens[end:]], [flags[end:]], len(tokens) - end
        span = self.length + 1
        missing = -end % span
        tokens, flags = (
            np.concatenate([x[:end], np.zeros(missing, x.dtype)]).reshape(-1, span) for x in (tokens, flags)
        )
        begun, trained = flags >= _BEGIN, (flags & 1).astype(bool)
        counts = np.full(len(tokens), span)
        counts[-1] -= missing
        words = pack(tokens, begun, counts, trained)
        self.tokens.append((trained & ~begun)[:, 1:].sum(axis=1))  # those with a weight; padding is not trained
        self.digest.update(words.tobytes())
        self.out.write(words)

    def close(self) -> dict[str, Any]:
        """Writes what is left and returns the split's entry in the manifest."""
        if self.size:
            self._cut(self.size)
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.int64)
        shards.save_counts(os.path.join(self.folder, f"{self.split}.tokens.npy"), tokens)
        return {
            "rows": len(tokens),
            "tokens": int(tokens.sum()),  # targets in the loss
            "stored": int(self.stored),  # tokens of the documents that are trained, each eos of a text among them
            "bytes": self.bytes,  # of the text in them; special tokens have none
            "documents": self.documents,
            "fingerprint": self.digest.hexdigest(),
            "files": self.out.close(),
        }
