"""Learning rates as pure functions of the step: cosine, re-warmed cosine, WSD, infinite.

A schedule is a function of (step, configuration) and of nothing else: nothing is stored, so a resumed run with other
options uses them from its next step. `step` is the number of finished updates: an int, a NumPy array (computed in
float64, for plots) or a traced int32 (float32). Beyond its end every schedule stays at its last value.

  make(name="cosine", peak=3e-4, warmup=100, end=3e-5)                    steps: from the stream
  make(name="rewarm_cosine", peak=3e-4, warmup=0.01, end=3e-5)            one warmup + cosine for each stage
  make(name="wsd", peak=3e-4, warmup=100, decay=0.1, shape="1-sqrt")      stable, then decays over its last tenth
  make(name="infinite", peak=3e-4, constant=1.65e-4, end=3e-5, warmup=100, cooldown=600)
      ... anneal=1300, anneal_from=2700                                   the same with a branch that anneals
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl import schema
from jaxcl.schema import UserError

Schedule = Callable[[Any], Any]  # step -> learning rate


def make(*, name: str, ends: Sequence[int] = (), field: str = "schedule", **options: Any) -> Schedule:
    """Returns the schedule `name` built from `options`, the keywords of the function of that name.

    Args:
      name: constant, cosine, rewarm_cosine, wsd or infinite.
      ends: the step at which each stage of the stream ends, increasing; fills in `steps` and `ends` if left out.
      field: the configuration field, for messages.
      **options: see the functions below.

    Raises:
      UserError: unknown name or option, or a value that makes no schedule.
    """
    choices = {f.__name__: f for f in (constant, cosine, rewarm_cosine, wsd, infinite)}
    if name not in choices:
        raise UserError(f"config.{field}.name={name!r}: no such schedule{schema.nearest(name, list(choices))}")
    wanted = inspect.signature(choices[name]).parameters
    if ends and "steps" in wanted and options.get("steps") is None:
        options["steps"] = int(ends[-1])
    if ends and "ends" in wanted and options.get("ends") is None:
        options["ends"] = [int(end) for end in ends]
    return schema.call(choices[name], options, field=field)


def constant(*, peak: float, warmup: int = 0) -> Schedule:
    """Linear warmup to `peak` over `warmup` steps, then `peak`."""
    _require(peak > 0, "peak", peak, "must be above 0")
    _require(warmup >= 0, "warmup", warmup, "must not be negative")
    return lambda step: _warm(step, 0.0, peak, 0, warmup) + 0.0 * _part(step, 0, 1)


def cosine(*, peak: float, steps: int, warmup: int | float = 0, end: float = 0.0) -> Schedule:
    """Linear warmup, then half a cosine down to `end` at `steps`.

    Changing `steps` changes the rate of every step after the warmup: use wsd or infinite where the end is not known.

    Args:
      peak: highest rate.
      steps: total number of steps, warmup included.
      warmup: steps; or, below 1, the fraction of `steps`.
      end: rate at `steps` and afterwards.
    """
    return rewarm_cosine(peak=peak, ends=[steps], warmup=warmup, end=end)


def rewarm_cosine(
    *, peak: float | Sequence[float], ends: Sequence[int], warmup: int | float = 0.01, end: float = 0.0
) -> Schedule:
    """Re-warms and re-decays in every stage (Gupta et al. 2308.04014; Ibrahim et al. 2403.08763).

    The first warmup starts at 0, the others where the stage before ended, so that the rate has no jump.

    Args:
      peak: highest rate, one for all stages or one for each.
      ends: the step at which each stage ends.
      warmup: steps in each stage; or, below 1, the fraction of the stage (about 0.01 in the papers).
      end: rate at the end of each stage.
    """
    starts = [0, *ends[:-1]]
    peaks = list(peak) if isinstance(peak, Sequence) else [peak] * len(ends)
    _require(len(ends) > 0 and all(a < b for a, b in zip(starts, ends, strict=True)), "ends", ends, "must increase")
    _require(len(peaks) == len(ends), "peak", peak, f"needs one value, or one for each of {len(ends)} stages")
    _require(min(peaks) > 0, "peak", peak, "must be above 0")
    _require(0 <= end <= min(peaks), "end", end, "must lie between 0 and peak")
    lengths = [_steps(warmup, b - a) for a, b in zip(starts, ends, strict=True)]
    _require(
        all(0 <= w < b - a for w, a, b in zip(lengths, starts, ends, strict=True)),
        "warmup",
        warmup,
        "must be shorter than every stage",
    )

    def schedule(step: Any) -> Any:
        value = 0.0
        for start, stop, top, length in zip(starts, ends, peaks, lengths, strict=True):
            warm = _warm(step, end if start else 0.0, top, start, length)
            down = _cosine(top, end, _part(step, start + length, stop))
            stage = _where(step, start + length, warm, down)
            value = _where(step, start, value, stage) if start else stage
        return value

    return schedule


def wsd(
    *,
    peak: float,
    steps: int | None = None,
    warmup: int | float = 0,
    decay: int | float = 0.1,
    end: float = 0.0,
    shape: Literal["1-sqrt", "linear", "exponential"] = "1-sqrt",
    anneal_from: int | None = None,
) -> Schedule:
    """Warmup, stable, decay (Hu et al. 2404.06395; the 1-sqrt decay is of Hägele et al. 2405.18392).

    A longer horizon leaves every step before the decay as it was.

    Args:
      peak: rate of the stable phase.
      steps: total number of steps; not needed with `anneal_from`.
      warmup: steps; or, below 1, the fraction of `steps`.
      decay: length of the decay in steps; or, below 1, the fraction of `steps`.
      end: rate after the decay; above 0 if `shape` is exponential.
      shape: with x from 0 to 1, rate - end falls as 1 - sqrt(x) or 1 - x, or the rate is peak (end / peak)^x.
      anneal_from: the step at which the decay starts: a branch of a run that goes on elsewhere.
    """
    fractions = 0 < warmup < 1 or 0 < decay < 1
    _require(steps is not None or (anneal_from is not None and not fractions), "steps", steps, "missing; give a number")
    total = steps or 0
    warm, length = _steps(warmup, total), _steps(decay, total)
    start = total - length if anneal_from is None else anneal_from
    _require(peak > 0, "peak", peak, "must be above 0")
    _require(0 <= end <= peak, "end", end, "must lie between 0 and peak")
    _require(end > 0 or shape != "exponential", "end", end, "must be above 0 for an exponential decay")
    _require(length > 0, "decay", decay, "must be at least one step; use name='constant' for none")
    _require(warm >= 0, "warmup", warmup, "must not be negative")
    _require(warm <= start, "warmup", warmup, f"must end before the decay starts at step {start}")

    def schedule(step: Any) -> Any:
        x = _part(step, start, start + length)
        xp = _numpy(step)
        if shape == "exponential":
            down = peak * xp.exp(math.log(end / peak) * x)
        else:
            down = end + (peak - end) * (1 - (xp.sqrt(x) if shape == "1-sqrt" else x))
        return _where(step, start, _warm(step, 0.0, peak, 0, warm), down)

    return schedule


def infinite(
    *,
    peak: float,
    constant: float,
    warmup: int = 0,
    cooldown: int = 0,
    shape: Literal["cosine", "inverse_sqrt"] = "cosine",
    timescale: float = 10.0,
    end: float = 0.0,
    anneal: int | None = None,
    anneal_from: int | None = None,
) -> Schedule:
    """Warmup, cooldown to a constant, and that constant for as long as data arrives (Ibrahim et al. 2403.08763).

    The next task resumes from a checkpoint of the constant phase; a branch off it, with `anneal_from` at its step,
    anneals to a model for release and is not trained further.

      warmup    peak n / warmup
      cooldown  x from 0 to 1: cosine from peak to constant, or
                peak + (constant - peak) h(x) / h(1) with h(x) = 1 / sqrt(1 + timescale x) - 1
      constant
      anneal    x from 0 to 1 over `anneal` steps: constant (end / constant)^x, which is `end` after exactly `anneal`

    Args:
      peak: highest rate.
      constant: rate of the constant phase (0.55 peak in the paper).
      warmup, cooldown: lengths in steps.
      shape: of the cooldown.
      timescale: of the inverse square root.
      end: rate after the annealing.
      anneal: its length in steps; needs `anneal_from`.
      anneal_from: the step of the constant phase at which it starts; None = never.
    """
    settled = warmup + cooldown
    _require(warmup >= 0, "warmup", warmup, "must not be negative")
    _require(cooldown >= 0, "cooldown", cooldown, "must not be negative")
    _require(peak > 0, "peak", peak, "must be above 0")
    _require(0 < constant <= peak, "constant", constant, "must lie above 0 and not above peak")
    _require(cooldown > 0 or constant == peak, "cooldown", cooldown, "must be above 0 unless constant equals peak")
    _require(timescale > 0, "timescale", timescale, "must be above 0")
    if anneal is not None or anneal_from is not None:
        _require(anneal is not None and anneal > 0, "anneal", anneal, "needs a length in steps")
        settles = anneal_from is not None and anneal_from >= settled
        _require(settles, "anneal_from", anneal_from, f"must lie in the constant phase, from step {settled} on")
        _require(0 < end <= constant, "end", end, "must lie above 0 and not above constant")

    def schedule(step: Any) -> Any:
        xp = _numpy(step)
        x = _part(step, warmup, settled)
        if shape == "cosine":
            down = _cosine(peak, constant, x)
        else:
            down = peak + (constant - peak) * (1 / xp.sqrt(1 + timescale * x) - 1) / (1 / math.sqrt(1 + timescale) - 1)
        value = _where(step, settled, _where(step, warmup, _warm(step, 0.0, peak, 0, warmup), down), constant)
        if anneal is None or anneal_from is None:
            return value
        fall = math.log(end / constant) * _part(step, anneal_from, anneal_from + anneal)
        return _where(step, anneal_from, value, constant * xp.exp(fall))

    return schedule


def _numpy(step: Any) -> Any:
    """Returns jax.numpy for a JAX value, NumPy for the rest."""
    return jnp if isinstance(step, jax.Array) else np


def _part(step: Any, start: int, stop: int) -> Any:
    """Returns how far `step` is on its way from `start` to `stop`, within [0, 1]."""
    xp = _numpy(step)
    return xp.clip((xp.asarray(step) - start) / max(stop - start, 1), 0.0, 1.0)


def _where(step: Any, start: int, before: Any, after: Any) -> Any:
    """Returns `after` from step `start` on."""
    xp = _numpy(step)
    return xp.where(xp.asarray(step) >= start, after, before)


def _warm(step: Any, low: float, high: float, start: int, length: int) -> Any:
    """Returns the line from `low` at `start` to `high`, reached `length` steps later."""
    return low + (high - low) * _part(step, start, start + length) if length else high


def _cosine(high: float, low: float, x: Any) -> Any:
    """Returns half a cosine, from `high` at x = 0 to `low` at x = 1."""
    return low + (high - low) * 0.5 * (1 + _numpy(x).cos(math.pi * x))


def _steps(value: float, total: int) -> int:
    """Returns a length in steps; values strictly between 0 and 1 are fractions of `total`."""
    return round(value * total) if 0 < value < 1 else int(value)


def _require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raises UserError unless `holds`."""
    if not holds:
        raise UserError(f"config.schedule.{name}={value!r}: {remedy}")
