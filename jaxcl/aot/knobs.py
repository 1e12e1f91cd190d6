"""What could make a program fit, one change of the config at a time; and searches for the largest that does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxcl.mesh import BATCH
from jaxcl.schema import UserError

MAX_PROBES = 24  # steps of a search upwards
MAX_JUMP = 8  # doublings in one of them
PARTS = 16  # a search ends when it knows the number to one part of so many
SHORTEST = 256  # tokens: shorter rows are not cut in half


class Knob(NamedTuple):
    """A change of a config."""

    name: str
    values: dict[str, Any]  # dotted key -> value
    config: dict[str, Any]

    @property
    def flags(self) -> str:
        """Returns the change as it is written on the command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.values.items())


def changed(config: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> Knob:
    """Returns the knob that sets dotted keys of a config."""
    new = copy.deepcopy(dict(config))
    for key, value in values.items():
        *path, last = key.split(".")
        here = new
        for part in path:
            if not isinstance(here.get(part), dict):
                here[part] = {}
            here = here[part]
        here[last] = value
    return Knob(name, dict(values), new)


def single(config: Mapping[str, Any], mesh: Mapping[str, int], slices: int = 1) -> list[Knob]:
    """Returns the changes that take less memory; all but the last two train the same model on the same rows.

    Args:
      config: that of the program that is too large.
      mesh: sizes of the axes of its mesh.
      slices: of the topology, which `replica` alone may cross.
    """
    model, shards = config["model"], math.prod(mesh.get(axis, 1) for axis in BATCH)
    transformer = model.get("name", "transformer") == "transformer"
    out = []
    if transformer and model.get("remat", "none") != "full":
        out.append(changed(config, "remat", {"model.remat": "full"}))
    cut = shards // (slices * mesh.get("expert", 1))
    if mesh.get("fsdp", 1) < cut:
        out.append(changed(config, "fsdp", {"mesh.replica": slices, "mesh.data": 1, "mesh.fsdp": cut}))
    most = config["stream"]["batch"] // shards  # with one row for each device
    if most > config.get("microbatches", 1):
        out.append(changed(config, "microbatches", {"microbatches": most}))
    if transformer and model.get("compute_dtype", "float32") != "bfloat16":
        out.append(changed(config, "bfloat16", {"model.compute_dtype": "bfloat16"}))
    length = (config.get("packing") or {}).get("length", 0)  # of tables there is none
    if length >= SHORTEST:
        out.append(changed(config, "length", {"packing.length": length // 2}))
    return out


def together(config: Mapping[str, Any], mesh: Mapping[str, int], slices: int = 1) -> list[Knob]:
    """Returns all changes that keep the length as one, and then all of them; for when no single one is enough."""
    found, out = single(config, mesh, slices), []
    for names in ([k for k in found if k.name != "length"], found):
        if len(names) > 1 and (not out or len(out[0].name.split(" + ")) < len(names)):
            values = dict(pair for knob in names for pair in knob.values.items())
            out.append(changed(config, " + ".join(knob.name for knob in names), values))
    return out


def largest(share: Callable[[int], float], start: int) -> int:
    """Returns a number that fits, such that one larger by a part of PARTS, or by 1, does not; 0 if 1 does not fit.

    Multiplied by powers of two until it does not fit, then bisected: so it is a round multiple of `start`. The power is
    the largest that would still fit if the need went on growing as it did, in a straight line.

    Args:
      share: number -> need as a share of what there is; it fits up to 1.
      start: the number that is tried first.

    Raises:
      UserError: the search does not end.
    """
    low, before, high = 0, 0.0, max(start, 1)
    for _ in range(MAX_PROBES):
        found = share(high)
        if found > 1:
            return _bisect(share, low, high)
        free, growth = 1 - found, (found - before) / (high - low) * high  # of one more `high`
        doublings = math.floor(math.log2(1 + free / growth)) if growth > 0 else 1
        low, before, high = high, found, high * 2 ** max(1, min(doublings, MAX_JUMP))
    raise UserError(f"--search: {low} still fits; that is more than any machine needs")


def _bisect(share: Callable[[int], float], low: int, high: int) -> int:
    """Returns a number that fits, between one that does (or 0) and one that does not."""
    while high - low > max(1, low // PARTS):
        octaves = (high // low).bit_length() - 1 if low else 0
        middle = low << (octaves // 2) if octaves > 1 else (low + high) // 2
        low, high = (middle, high) if share(middle) <= 1 else (low, middle)
    return low


def fewest(fits: Callable[[int], bool], choices: list[int]) -> int | None:
    """Returns the first of ascending choices that fits, if all after it do; None if the last does not."""
    if not choices or not fits(choices[-1]):
        return None
    low, high = -1, len(choices) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(choices[middle]) else (middle, high)
    return choices[high]


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
