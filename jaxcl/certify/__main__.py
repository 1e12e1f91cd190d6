"""Command line of certificates: python -m jaxcl.certify RUN [--step=N].

Certifies a checkpoint of a run anew, on its held-out rows, and compares it with what its records promised. Exit codes:
0 every promise is kept, 1 one is not, 2 nothing can be guaranteed, or bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console

from jaxcl import certify, console, domains, folder, manifests, program, saved, train, tree
from jaxcl.report import certificates, run, terminal
from jaxcl.schema import UserError
from jaxcl.types import Params


def check(path: Path, step: int | None = None) -> dict[str, Any]:
    """Returns the figures of `jaxcl.report.certificates.of`, with what is certified of a checkpoint as the last entry.

    Args:
      path: folder of a run.
      step: of a checkpoint; None = the newest.

    Raises:
      UserError: no run, no boxes, other held-out rows, the ledger of another network, or a run that guarantees nothing.
    """
    config = folder.about(path)["config"]
    adapter = config.get("adapter")  # a name, or a dict with one
    if not adapter or (adapter if isinstance(adapter, str) else adapter.get("name")) == "lora":
        raise UserError(f"{path}: config.adapter makes no boxes of weights; there is nothing to certify")
    _, pieces = train.split(config)
    made = program.build(**pieces)
    step, params = saved.params(path / "checkpoints", step=step)
    fitting(path, made.abstract.params, params)
    found = dict(tree.named_leaves(params))
    params = tree.map_named(lambda name, leaf: jax.device_put(found[name], leaf.sharding), made.abstract.params)
    held = manifests.host(epath.Path(path / "checkpoints" / str(step))).get("held_out")
    if held != made.held_out:
        raise UserError(f"{path}: the held-out rows are not those of the run; restore the sources of its config")
    told = run.load(path)
    past = {k: record for k, record in told.certificates.items() if told.boundaries[k] <= step}
    assert made.compare
    now = made.compare(params)["certificate"]
    over = {domain for domain, one in now.items() if one["over"]}
    if not over:
        raise UserError(f"{path}: no task is over at step {step}, its newest checkpoint; let the run finish one")
    recorded = {domain for record in past.values() for domain, one in record.items() if one.get("over")}
    if lost := over & set(told.own) - recorded:
        raise UserError(f"{path}: metrics.jsonl holds no promise of {', '.join(sorted(lost))}; restore it from a copy")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params["generator"])):
        raise UserError(
            f"{path}: the weights are not finite, so that nothing is guaranteed; train anew with a lower "
            "config.adapter.gamma or config.schedule.peak"
        )
    if not any(one["promised"] is not None for one in now.values()):
        given = (pieces["sources"], {}, None, pieces["model"], pieces["adapter"], pieces["stream"]["stages"])
        boxed = domains.make(domains.Sections(*given)).network.boxed
        assert boxed
        if boxed.universal:  # boxes of task networks need not meet
            certify.common(boxed, params, told.tasks)  # names the task that misses the others
        raise UserError(
            f"{path}: the run was trained with config.method.project=False and kept no ledger, so that nothing is "
            "guaranteed; train anew with --config.method.project=true"
        )
    block = certificates.compared(told.tasks, told.own, {**past, len(told.tasks): now})
    return block | {"stages": len(pieces["stream"]["stages"])}


def fitting(path: Path, wanted: Params, found: Params) -> None:
    """Raises UserError unless parameters are those of the network that the config describes."""
    shapes = [{name: tuple(leaf.shape) for name, leaf in tree.named_leaves(side)} for side in (wanted, found)]
    for name in [*shapes[0], *shapes[1]]:
        here, there = (side.get(name) for side in shapes)
        if here != there:
            raise UserError(
                f"{path}: the ledger is of another network: {name} has the shape {there} in the checkpoint and {here} "
                "by run.json; restore run.json"
            )


def main(arguments: Sequence[str]) -> None:
    """Prints the promises of a run and whether they are kept."""
    parser = console.Parser(prog="python -m jaxcl.certify", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="of a checkpoint; the newest unless given")
    options = parser.parse_args(arguments)
    block = check(options.run, options.step)
    Console().print(terminal.promises(block))
    if (done := len(block["tasks"])) < block["stages"]:
        print(f"{done} of {block['stages']} tasks are over; the others are promised nothing yet")
    if none := [one["task"] for one in block["tasks"] if not one["promised"]]:
        print(f"nothing could be promised of {', '.join(none)}: no row was certified")
    if not block["kept"]:
        print("a promise is broken: an accuracy is below what was certified", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    console.cli(main)
