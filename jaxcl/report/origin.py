"""Where the tokens of a run came from: its sources, and the ledger of what was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from jaxcl.report import page, words
from jaxcl.report.run import Run

SHOWN = 12  # hexadecimal digits of a fingerprint


def section(run: Run) -> str:
    """Returns both tables."""
    tables = data(run) + ledger(run)
    return f"<h2>Where the tokens came from</h2>{tables}" if tables else ""


def data(run: Run) -> str:
    """Returns the sources as `jaxcl.data.provenance` describes them: the rows for training, below them the held-out."""
    rows, tokenizers = [], []
    for name, about in sorted(_sources(run).items(), key=lambda item: _place(run, item[0])):
        splits = [about.get(split, {}) for split in ("train", "held_out")]
        cells = [
            _both(*(words.count(split.get(key, 0)) for split in splits)) for key in ("documents", "rows", "tokens")
        ]
        size = _both(*(words.measure(split.get("bytes", 0), "B") for split in splits))
        prints = _both(*(f"<code>{escape(str(split.get('fingerprint', ''))[:SHOWN])}</code>" for split in splits))
        text = f'<td class="text">{escape(describe(about.get("source", {})))}{removed(about)}</td>'
        licence = f'<td class="text">{escape(about.get("licence") or "not stated")}</td>'
        rows.append([escape(name), text, licence, *cells, size, prints])
        tokenizers.append(about.get("tokenizer", {}))
    known = {f"{t['name']}, {t['vocab']:,} tokens" for t in tokenizers if "name" in t and "vocab" in t}
    hint = "First line: for training. Second: held out, evaluated on alone. Tokens are targets of the loss."
    hint += f" Tokenizer: {escape(words.join(sorted(known)))}." if known else ""
    heads = [
        "source",
        *map(page.text_head, ("description", "licence")),
        "documents",
        "rows",
        "tokens",
        "text",
        "fingerprint",
    ]
    return page.table("Data", heads, rows, hint=hint)


def ledger(run: Run) -> str:
    """Returns the tokens trained on by source, with the share of its corpus that the new ones are."""
    largest = max((row.get("new_tokens", 0) + row.get("replayed_tokens", 0) for row in run.ledger.values()), default=0)
    if not largest:
        return ""
    rows, sources = [], _sources(run)
    for source in sorted(run.ledger, key=lambda name: _place(run, name)):
        row = run.ledger[source]
        new, old = row.get("new_tokens", 0), row.get("replayed_tokens", 0)
        there = sources.get(source, {}).get("train", {}).get("tokens", 0)
        widths = (("new", 100 * new / largest), ("old", 100 * old / largest))
        bar = "".join(f'<i class="{kind}" style="width:{width:.1f}%"></i>' for kind, width in widths)
        cells = [words.count(new), words.percent(new, there), words.count(old), words.percent(old, new + old)]
        rows.append([escape(source), *cells, f'<td><div class="bar" aria-hidden="true">{bar}</div></td>'])
    new, old = (sum(row.get(f"{kind}_tokens", 0) for row in run.ledger.values()) for kind in ("new", "replayed"))
    there = sum(about.get("train", {}).get("tokens", 0) for about in sources.values())
    total = [words.count(new), words.percent(new, there), words.count(old), words.percent(old, new + old)]
    rows.append(["<strong>all</strong>", *total, ""])
    heads = [
        "source",
        "new",
        "of the corpus",
        "replayed",
        "share replayed",
        "<span class='key c0'></span>new <span class='key c1'></span>replayed",
    ]
    return page.table("Token ledger", heads, rows)


def describe(source: Mapping[str, Any]) -> str:
    """Returns the description of a source in words: `embedded: domain prose, max_bytes 3,000,000`."""
    options = []
    for key, value in source.items():
        if key != "name":
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            shown = f"({describe({'name': '', **value})[2:]})" if isinstance(value, Mapping) else shown
            options.append(f"{key} {', '.join(map(str, shown)) if isinstance(shown, list) else shown}")
    name = str(source.get("name", "–"))
    return f"{name}: {', '.join(options)}" if options else name


def removed(about: Mapping[str, Any]) -> str:
    """Returns a line on what cleaning removed: `removed: 1,234 duplicate, 5 too short`; empty if nothing was."""
    counts = [f"{words.count(n)} {reason.replace('_', ' ')}" for reason, n in (about.get("removed") or {}).items()]
    return f'<br><span class="pm">removed: {escape(words.join(counts))}</span>' if counts else ""


def _sources(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the sources by name; a run that was recorded without them has none."""
    return run.about.get("facts", {}).get("sources") or {}


def _place(run: Run, source: str) -> int:
    return run.domains.index(source) if source in run.domains else len(run.domains)


def _both(train: str, held_out: str) -> str:
    return f'{train}<br><span class="pm">{held_out}</span>'
