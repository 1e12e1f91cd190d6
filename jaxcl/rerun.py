"""Command line that takes a suspect step again, on this machine: python -m jaxcl.rerun RUN --step=N.

It goes from the checkpoint before the step over the same rows and compares what every step gives with metrics.jsonl of
the run, which it only reads. It does so twice. What that says of the fault:

    this      the two replays differ: this machine does not repeat itself
    elsewhere the steps before already differ from the record: this machine or its software rounds differently, and bits
              say nothing; give --within
    data      the record comes out again: the rows or the settings are at fault, wherever it runs
    hardware  another value comes out here, and the run itself had got the recorded one twice: its machine errs reliably
    transient another value comes out here, and the run had it once

Source: Megatron-LM's rerun state machine tells a fault that goes away in place from one that goes away elsewhere; its
second device is here the machine on which this is called. The checksum of the state after the step is shown, so that
machines can be compared with each other. Exit status: 0, whatever the verdict; 2 if it cannot be found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxcl import checkpoint, checksum, console, folder, mesh, metrics, program, train, watch
from jaxcl.schema import UserError

Gave = tuple[float, float]  # loss and gradient norm
WORDS = {
    "this": "this machine does not repeat itself; look for the fault here",
    "elsewhere": "the steps before it differ from the record as well: this machine rounds differently; give --within",
    "data": "its rows or the settings are at fault: the record comes out on this machine too",
    "hardware": "the machine of the run errs reliably: it gave the record twice, and this one gives another value",
    "transient": "a fault that passed: the machine of the run gave the record once, and this one gives another value",
}


class Replay(NamedTuple):
    """Steps taken again."""

    first: int  # step of the checkpoint
    gave: dict[int, Gave]
    sums: dict[str, list[Any]]  # of the parameters after the last step, as `jaxcl.checksum.table` has them


def verdict(step: int, record: Mapping[int, Gave], replays: Sequence[Replay], twice: bool, within: float = 0.0) -> str:
    """Returns which of the five cases it is.

    Args:
      step: the suspect one.
      record: what the run gave, by step.
      replays: two of them.
      twice: whether the run got the recorded values again when it repeated the step.
      within: relative difference up to which values count as equal.
    """
    one, two = replays
    if any(not watch.same(one.gave[n], two.gave[n]) for n in one.gave) or one.sums != two.sums:
        return "this"
    if not all(alike(one.gave[n], record[n], within) for n in one.gave if n != step and n in record):
        return "elsewhere"
    if alike(one.gave[step], record[step], within):
        return "data"
    return "hardware" if twice else "transient"


def alike(a: Gave, b: Gave, within: float) -> bool:
    """Returns whether two steps gave the same, up to a relative difference; what is not finite equals itself."""
    pairs = zip(a, b, strict=True)
    return all(math.isclose(x, y, rel_tol=within) or not (math.isfinite(x) or math.isfinite(y)) for x, y in pairs)


def recorded(place: Path, step: int) -> tuple[dict[int, Gave], bool]:
    """Returns what the steps of a run gave, and whether it repeated `step` with the same result.

    Raises:
      UserError: the step is not in the records.
    """
    path = place / "metrics.jsonl"
    records = metrics.read(path) if path.exists() else []

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    gave = {r["step"]: (number(r["loss"]), number(r["grad_norm"])) for r in records if r["kind"] == "train"}
    if step not in gave:
        raise UserError(f"--step={step}: not in {path}; the steps there end with {max(gave, default=0)}")
    told = [r["message"] for r in records if r["kind"] == "event" and r["event"] == "repeated" and r["step"] == step]
    return gave, any(" again: " in text for text in told)


def replay(made: program.Program, loop: train.Loop, place: Path, first: int, step: int) -> Replay:
    """Takes the steps from the checkpoint at `first` up to `step` again.

    Raises:
      UserError: the checkpoint is damaged, or of other rows than these sources give.
    """
    found = checkpoints_of(made, loop, place).restore(made.abstract, step=first)
    assert found
    now = {"stream": made.stream.fingerprint(found.step), "held_out": made.held_out}
    folder.check_data(place, found.step, found.host, now)
    state, gave = found.state, {}
    for number in range(first + 1, step + 1):
        state, values = made.step(state, made.place(number - 1))
        kept = mesh.fetch({name: values[name] for name in ("loss", "grad_norm")})
        gave[number] = (float(kept["loss"]), float(kept["grad_norm"]))
        if number in made.stream.boundaries and number != step:
            state = made.end_task(state, made.place_task(made.stream.boundaries.index(number)))
    return Replay(first, gave, checksum.table(state.params))


def checkpoints_of(made: program.Program, loop: train.Loop, place: Path) -> checkpoint.Checkpoints:
    """Returns the checkpoints of a run, in the first place alone."""
    options = {name: value for name, value in (loop.checkpoint or {}).items() if name != "second"}
    return checkpoint.Checkpoints(place / "checkpoints", made.base, **options)


def rerun(place: Path, step: int, within: float = 0.0) -> dict[str, Any]:
    """Returns the verdict on a step of the run in `place`, and what it rests on.

    Raises:
      UserError: there is no such step, or no checkpoint before it; or the run draws its rows while it runs.
    """
    loop, pieces = train.split(folder.about(place)["config"])
    record, twice = recorded(place, step)
    made = program.build(**pieces)
    if made.rollouts is not None or made.stream.contents:
        raise UserError(f"{place}: its rows are drawn or kept while it runs; only those at rest can be replayed")
    kept = checkpoints_of(made, loop, place).steps()
    before = [number for number in kept if number < step]
    if not before:
        left = ", ".join(map(str, kept)) or "none"
        remedy = "replay a later step, and keep more with config.checkpoint.keep_every"
        raise UserError(f"--step={step}: no checkpoint before it is left (there are: {left}); {remedy}")
    replays = [replay(made, loop, place, before[-1], step) for _ in range(2)]
    return {
        "step": step,
        "verdict": verdict(step, record, replays, twice, within),
        "from_checkpoint": before[-1],
        "recorded": record[step],
        "here": [one.gave[step] for one in replays],
        "earlier_equal": all(watch.same(replays[0].gave[n], record[n]) for n in range(before[-1] + 1, step)),
        "repeated_by_the_run": twice,
        "checksums": replays[0].sums,
        "device": f"{jax.devices()[0].device_kind} at {jax.devices()[0].platform}",
    }


def main(argv: Sequence[str]) -> None:
    """Prints the verdict."""
    parser = console.Parser(prog="python -m jaxcl.rerun", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of the run; it is only read")
    parser.add_argument("--step", type=int, required=True, help="the suspect step, as metrics.jsonl numbers it")
    parser.add_argument("--within", type=float, default=0.0, help="relative difference that counts as none (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if not 0.0 <= options.within < 1.0:
        raise UserError(f"--within={options.within}: must be at least 0 and below 1")
    found = rerun(Path(options.run), options.step, options.within)
    if options.json:
        print(json.dumps(metrics.plain(found), indent=1))
        return
    print(f"step {options.step}, taken again from the checkpoint at {found['from_checkpoint']} on {found['device']}")
    print(f"  recorded  {watch.show(found['recorded'])}")
    for gave in found["here"]:
        print(f"  here      {watch.show(gave)}")
    print(f"  {found['verdict']}: {WORDS[found['verdict']]}")


if __name__ == "__main__":
    console.cli(main)
