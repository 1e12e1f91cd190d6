"""Command line: python -m jaxcl.aot --topology=v5p:8x8x4 --config=FILE [--config.KEY=VALUE ...].

Compiles the train step of a config for machines that are not here, and says whether it fits, what it needs and what it
does. Nothing runs; neither data nor weights are read. Exit status: 0 it fits, 1 it does not, 2 something is wrong,
130 interrupted (then --out has what was found until then).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxcl import console
from jaxcl.aot import knobs, show, topology
from jaxcl.schema import UserError

USAGE = "usage: python -m jaxcl.aot --topology=KIND:SIZES --config=FILE [--config.KEY=VALUE ...]"
INTERRUPTED = 130
SEARCH = (
    "find the largest stream.batch (or the fewest microbatches) that fits: compiles up to about ten programs, and ends "
    "when the batch is known to 1 part in 16"
)


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
      UserError: whatever is wrong with the command line or the config.
      SystemExit: with status 1 if the program does not fit, with 130 after Ctrl-C.
    """
    parser = console.Parser(prog="python -m jaxcl.aot", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--topology", required=True, help=f"KIND:SIZES; {topology.EXAMPLES}")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices of that topology; mesh.replica crosses them")
    parser.add_argument("--config", required=True, help="file with get_config(), as for jaxcl.main")
    parser.add_argument("--variant", help="of a sweep; default: the first")
    parser.add_argument("--search", choices=("batch", "microbatches"), nargs="?", const="batch", help=SEARCH)
    parser.add_argument("--quick", action="store_true", help="do not try what would make a program fit")
    parser.add_argument("--out", help="JSON file to write; must not exist")
    options, rest = parser.parse_known_args(argv)
    if any(re.match(r"--?workdir(=|$)", arg) for arg in rest):
        raise UserError("--workdir: nothing is trained here; leave it out, or name a file for the results with --out")
    out = None if options.out is None else writable(options.out)
    target = topology.parse(options.topology, options.slices)
    os.environ.update(topology.ENVIRONMENT)  # before JAX is imported
    from jaxcl import main as flags  # noqa: PLC0415

    config, _ = flags.read(["jaxcl.aot", f"--config={options.config}", *rest], USAGE)
    devices = topology.devices(target)
    from jaxcl.aot import abstract  # noqa: PLC0415

    one, notes = abstract.one_run(config, options.variant)
    session = Session(target, devices, options.config, notes)
    run = session.search if options.search else session.report
    try:
        result = patiently(lambda: run(one, options.search or options.quick))
    except KeyboardInterrupt:
        result = session.partial and session.partial | {"interrupted": True}
    if out and result:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if result is None or "interrupted" in result:
        kept = f"{out} has what was found until then" if out and result else "nothing was written"
        print(f"interrupted; {kept}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0 if result["fits"] else 1)


def writable(text: str) -> Path:
    """Returns the file of --out.

    Raises:
      UserError: it exists, or cannot be written.
    """
    path = Path(text)
    if not text or path.is_dir():
        raise UserError(f"--out={text}: {'is a folder' if text else 'empty'}; name a JSON file")
    if path.exists():
        raise UserError(f"--out={text}: exists; write to another --out, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"--out={text}: no folder {path.parent}; make it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--out={text}: cannot be written ({error.strerror}); choose another folder") from error
    return path


def patiently(run: Callable[[], Any]) -> Any:
    """Returns `run()`, called in a thread: the main one would hear Ctrl-C only when the compiler is done."""
    done: list[Any] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            done.append(run())
        except BaseException as error:  # the main thread raises it
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if raised:
        raise raised[0]
    return done[0]


class Session:
    """Compilations for one topology."""

    def __init__(self, target: topology.Topology, devices: list[Any], name: str, notes: list[str]):
        self.target, self.devices, self.name, self.notes = target, devices, name, notes
        self.partial: dict[str, Any] | None = None  # what is known while `report` or `search` goes on

    def compile(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is known of the train step of a config, as it is written to JSON.

        Raises:
          UserError: the config is wrong, or the compiler refuses the program, and not for its size.
        """
        from jaxcl.aot import abstract, examine  # noqa: PLC0415

        step = abstract.make(config, self.devices)
        verdict = examine.examine(step, self.target)
        floors = examine.floors(step, self.target, verdict)
        return {
            "config": self.name,
            "topology": self.target.name,
            "slices": self.target.slices,
            "device": self.devices[0].device_kind,
            "fits": verdict.fits,
            "needed_gib": verdict.needed,
            "available_gib": verdict.available,
            **step.facts(),
            "floors": floors,
            "mfu_bound": examine.bounds(floors, step.remat),
            **verdict.details,
            "no_kernel": step.no_kernel(self.target.platform),
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
        tried: list[dict[str, Any]] = []
        self.partial = result | {"knobs": tried}
        for knob in knobs.single(config, result["mesh"], self.target.slices):
            tried.append(self.attempt(knob, quick))
        if quick or not any(found.get("fits") for found in tried):
            for knob in knobs.together(config, result["mesh"], self.target.slices):
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
        pick = max if what == "batch" else min
        seen: dict[int, dict[str, Any]] = {}

        def share(number: int) -> float:
            found = self.compile(knobs.changed(config, what, {key: number * unit}).config)
            seen[number] = found
            need, has, verdict = (
                found["needed_gib"],
                found["available_gib"],
                "fits" if found["fits"] else "does not fit",
            )
            text = f"{verdict}: {show.gib(need)} of {show.gib(has)}, {found['seconds']:.0f} s"
            print(show.line(f"{what}={number * unit}", text), flush=True)
            fitting = [n for n, other in seen.items() if other["fits"]]
            best = pick(fitting) if fitting else None  # so far
            # What nearly fits is worth showing if nothing does.
            shown = seen[best or (min(seen) if what == "batch" else max(seen))]
            tried = {n * unit: other["needed_gib"] for n, other in sorted(seen.items())}
            self.partial = shown | {"search": {"key": key, "best": best and best * unit, "needed_gib": tried}}
            return need / has if found["fits"] else math.inf

        if what == "batch":
            knobs.largest(share, max(rows // unit, 1))
        else:
            knobs.fewest(lambda number: share(number) <= 1, knobs.divisors(max(rows // shards, 1)))
        assert self.partial
        print("\n".join(show.table(self.partial)), flush=True)
        if best := self.partial["search"]["best"]:
            print(f"{'largest batch' if what == 'batch' else 'fewest microbatches'}: --config.{key}={best}")
        return self.partial


def cli() -> None:
    """Entry point. After Ctrl-C the process ends at once: the compiler may be in the middle of its work."""
    try:
        console.cli(main)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    cli()
