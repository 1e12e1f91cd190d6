"""Options of replay: which share of the rows, how, and out of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from jaxcl import schema
from jaxcl.data import mixture
from jaxcl.data.reservoir import Contents
from jaxcl.data.rows import Rows
from jaxcl.schema import UserError


class Replay(NamedTuple):
    """The replay of one stage; see `stream.py` for what the words mean."""

    fraction: Fraction
    mode: str
    over: str
    capacity: int | None = None  # rows of the reservoir


def make(own: Mapping[str, Any] | None, stage: int, default: Mapping[str, Any] | None) -> Replay:
    """Returns the replay that holds in a stage.

    Args:
      own: options of the stage; those left out are taken from `default`.
      stage: number of the stage.
      default: options of the stream; they hold from the second stage on.

    Raises:
      UserError: an option is unknown, missing or out of range.
    """
    field = "stream.replay" if own is None else f"stream.stages[{stage}].replay"
    options = dict(default or {"fraction": 0.0}) if own is None else {**(default or {}), **own}
    schema.check(_options, options, field=field)
    if not 0 <= options["fraction"] < 1:
        raise UserError(f"config.{field}.fraction={options['fraction']}: must be at least 0 and less than 1")
    chosen = _options(**options)
    if chosen.over == "reservoir" and chosen.capacity is None:
        raise UserError(f"config.{field}.capacity: missing; say how many rows the reservoir holds, such as 100000")
    if chosen.over != "reservoir" and chosen.capacity is not None:
        raise UserError(f"config.{field}.capacity={chosen.capacity}: only over='reservoir' has one; leave it out")
    if chosen.capacity is not None and chosen.capacity < 1:
        raise UserError(f"config.{field}.capacity={chosen.capacity}: must be at least 1 row")
    if stage == 0 and own is None:
        return chosen._replace(fraction=Fraction(0))
    if stage == 0 and chosen.fraction and chosen.over == "earlier":
        raise UserError(f"config.{field}.over='earlier': nothing comes before the first stage; use over='seen'")
    return chosen


def _options(
    *,
    fraction: float,
    mode: Literal["replace", "extend"] = "replace",
    over: Literal["earlier", "seen", "reservoir"] = "earlier",
    capacity: int | None = None,
) -> Replay:
    """Returns the replay; its signature is the schema."""
    return Replay(mixture.exact(fraction).limit_denominator(10**6), mode, over, capacity)


def contents(replays: Sequence[Replay], rows: Mapping[str, Rows], seed: int) -> Contents | None:
    """Returns what the reservoir of a stream holds, or None if no stage has one.

    Raises:
      UserError: stages with different capacities, or rows that are not packed text.
    """
    capacities = sorted({replay.capacity for replay in replays if replay.capacity is not None})
    if not capacities:
        return None
    if len(capacities) > 1:
        raise UserError(f"config.stream.stages: replay.capacity is {capacities}; one reservoir serves all stages")
    other = [name for name, table in rows.items() if table.words is None]
    if other:
        raise UserError(
            f"config.stream.replay.over='reservoir': the rows of {other[0]} are no packed text; use over='seen'"
        )
    return Contents(capacities[0], seed)
