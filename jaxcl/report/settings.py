"""Whether runs side by side differ in more than what is compared: method, replay, learning rate and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from jaxcl.report import words

COMPARED = ("seed", "label", "method", "policy", "objective", "stream.replay", "stream.stages", "schedule", "optim")
IDLE = ("checkpoint", "packing.directory", "tensorboard", "wandb", "rollback")  # change no number
ROWS = ("sources", "tokenizer", "packing.length", "packing.held_out", "evaluation.rows")  # what is held out
SHOWN = 5


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the dotted keys whose values are not the same in all configs, those that matter to a comparison."""
    tables = [dict(_leaves(config)) for config in configs]
    keys = sorted({key for table in tables for key in table if not _below(key, (*COMPARED, *IDLE))})
    return [key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)]


def same_rows(keys: Sequence[str]) -> bool:
    """Returns whether runs that differ in `keys` were evaluated on the same held-out rows."""
    return not any(_below(key, ROWS) for key in keys)


def warning(keys: Sequence[str]) -> str | None:
    """Returns a sentence that names the keys, None if there are none."""
    if not keys:
        return None
    shown = [f"<code>{escape(key)}</code>" for key in keys[:SHOWN]]
    more = [f"{len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
    text = (
        "<strong>These runs differ in more than method, replay, learning rate and seed</strong>: "
        f"{words.join([*shown, *more])}."
    )
    if same_rows(keys):
        return f"{text} A difference between them may come from there."
    return f"{text} Their losses are not on the same held-out rows, so none is called the best."


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for all that is no section; a list is one value."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        elif item not in (None, {}):  # an empty section or None says as much as a missing one
            yield f"{prefix}{key}", item


def _below(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
