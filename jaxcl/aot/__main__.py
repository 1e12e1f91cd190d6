"""Command line: python -m jaxcl.aot --topology=v5p:8x8x4 --config=FILE [--config.KEY=VALUE ...].

Compiles the train step of a config for machines that are not here, and says whether it fits, what it needs and what it
does. Nothing runs; neither data nor weights are read. Exit status: 0 it fits, 1 it does not, 2 something is wrong.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcl import console
from jaxcl.aot import knobs, show, topology
from jaxcl.schema import UserError


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
      UserError: whatever is wrong with the command line or the config.
      SystemExit: with status 1 if the program does not fit.
    """
    parser = console.Parser(prog="python -m jaxcl.aot", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--topology", required=True, help=f"KIND:SIZES; {topology.EXAMPLES}")
    parser.add_argument("--config", required=True, help="file with get_config(), as for jaxcl.main")
    parser.add_argument("--variant", help="of a sweep; default: the first")
    parser.add_argument(
        "--search", choices=("batch", "microbatches"), nargs="?", const="batch", help="largest that fits"
    )
    parser.add_argument("--quick", action="store_true", help="do not try what would make a program fit")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options, rest = parser.parse_known_args(argv)
    target = topology.parse(options.topology)
    os.environ.update(topology.ENVIRONMENT)  # before JAX is imported
    from jaxcl import main as flags  # noqa: PLC0415

    config, _ = flags.read(["jaxcl.aot", f"--config={options.config}", *rest])
    if options.out and not options.out.parent.is_dir():
        raise UserError(f"--out={options.out}: no folder {options.out.parent}; make it first")
    devices = topology.devices(target)
    from jaxcl.aot import abstract  # noqa: PLC0415

    one, notes = abstract.one_run(config, options.variant)
    session = Session(target, devices, options.config, notes)
    run = session.search if options.search else session.report
    result = run(one, options.search or options.quick)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["fits"] else 1)


class Session:
    """Compilations for one topology."""

    def __init__(self, target: topology.Topology, devices: list[Any], name: str, notes: list[str]):
        self.target, self.devices, self.name, self.notes = target, devices, name, notes

    def compile(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is known of the train step of a config, as it is written to JSON.

        Raises:
          UserError: the config is wrong, or the compiler refuses the program, and not for its size.
        """
        from jaxcl.aot import abstract, examine  # noqa: PLC0415

        step = abstract.make(config, self.devices)
        verdict = examine.examine(step, self.target)
        return {
            "config": self.name,
            "topology": self.target.name,
            "device": self.devices[0].device_kind,
            "fits": verdict.fits,
            "needed_gib": verdict.needed,
            "available_gib": verdict.available,
            **step.facts(),
            "floors": examine.floors(step, self.target, verdict),
            **verdict.details,
            "notes": [*self.notes, *step.notes],
            "seconds": round(verdict.seconds, 1),
            "versions": topology.versions(self.target),
        }

    def report(self, config: Mapping[str, Any], quick: bool) -> dict[str, Any]:
        """Shows one program, and if it does not fit what would make it; returns both."""
        result = self.compile(config)
        print("\n".join(show.table(result)), flush=True)
        if result["fits"]:
            return result
        print("what would help:", flush=True)
        tried = [self.attempt(knob, quick) for knob in knobs.single(config, result["mesh"])]
        if quick or not any(found.get("fits") for found in tried):
            for knob in knobs.together(config, result["mesh"]):
                tried.append(self.attempt(knob, quick))
                if tried[-1].get("fits"):
                    break
        if not quick and not any(found.get("fits") for found in tried):
            print("none of these is enough: take more devices, or cut with --config.mesh.tensor=N as well", flush=True)
        return result | {"knobs": tried}

    def attempt(self, knob: knobs.Knob, quick: bool) -> dict[str, Any]:
        """Shows and returns what a change of the config achieves."""
        found: dict[str, Any] = {"name": knob.name, "flags": knob.flags}
        if not quick:
            try:
                made = self.compile(knob.config)
                found |= {key: made[key] for key in ("fits", "needed_gib", "available_gib", "seconds")}
            except UserError as error:
                found["failed"] = str(error)
        print(show.knob(found), flush=True)
        return found

    def search(self, config: Mapping[str, Any], what: str) -> dict[str, Any]:
        """Shows and returns the program with the largest batch, or the fewest microbatches, that fits."""
        from jaxcl import mesh  # noqa: PLC0415

        sizes = mesh.make(**{**(config.get("mesh") or {}), "devices": self.devices}).shape
        shards, rows = math.prod(sizes[axis] for axis in mesh.BATCH), config["stream"]["batch"]
        key = {"batch": "stream.batch", "microbatches": "microbatches"}[what]
        unit = shards * config.get("microbatches", 1) if what == "batch" else 1
        seen: dict[int, dict[str, Any]] = {}

        def fits(number: int) -> bool:
            knob = knobs.changed(config, what, {key: number * unit})
            seen[number] = self.compile(knob.config)
            need, has = seen[number]["needed_gib"], seen[number]["available_gib"]
            verdict = "fits" if seen[number]["fits"] else "does not fit"
            print(show.line(f"{what}={number * unit}", f"{verdict}: {show.gib(need)} of {show.gib(has)}"), flush=True)
            return seen[number]["fits"]

        if what == "batch":
            best = knobs.largest(fits, max(rows // unit, 1)) or None
        else:
            best = knobs.fewest(fits, knobs.divisors(max(rows // shards, 1)))
        tried = {number * unit: found["needed_gib"] for number, found in sorted(seen.items())}
        shown = seen[best or (min(seen) if what == "batch" else max(seen))]
        print("\n".join(show.table(shown)), flush=True)
        if best:
            print(f"{'largest batch' if what == 'batch' else 'fewest microbatches'}: --config.{key}={best * unit}")
        return shown | {"search": {"key": key, "best": best and best * unit, "needed_gib": tried}}


def cli() -> None:
    """Entry point."""
    console.cli(main)


if __name__ == "__main__":
    cli()
