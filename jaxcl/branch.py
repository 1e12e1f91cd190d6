"""Command line that branches a run off another: python -m jaxcl.branch RUN NEW [--step=N] [--vocab=M].

With an infinite schedule the run itself stays at its constant rate and goes on with every new task. A branch off the
constant phase anneals to a model for release and is not trained further (Ibrahim et al. 2403.08763, section 6):

  python -m jaxcl.branch runs/main runs/release --step=300
  python -m jaxcl.main --config=configs/quickstart.py --workdir=runs/release \\
      --config.schedule.anneal_from=300 --config.schedule.anneal=60 --config.schedule.end=1e-4

With --vocab the branch has more tokens: new rows in the embedding, the head and everything that belongs to them. It is
continued with config.model.vocab=M and a tokenizer that extends the old one. The rows before the step were packed with
the old tokenizer, so the branch does not check them against those of its own sources; its ledger goes on counting.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax

from jaxcl import checkpoint, console, folder, manifests, metrics, network, saved, vocabulary
from jaxcl.random import key_for
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves
from jaxcl.types import TrainState


def make(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    vocab: int | None = None,
    new_rows: vocabulary.How = "mean",
) -> int:
    """Makes `target` the folder of a new run that goes on from a checkpoint of the run in `source`; returns its step.

    The checkpoint and the records up to it are copied; `source` is not touched. The new run may have another config:
    what must agree (the leaves of the state, the rows before the step) is checked when it starts. A branch that was
    cut short is made anew.

    Args:
      source: folder of a run.
      target: absent or empty.
      step: of a checkpoint; None = the newest.
      vocab: number of tokens of the branch; None = as many as the run has.
      new_rows: how those that are new begin, see `jaxcl.vocabulary.grow`.

    Raises:
      UserError: no such checkpoint or a damaged one; or `target` holds something; or `vocab` is smaller than the run's.
    """
    about = folder.about(source)
    grown = None if vocab is None else _grown(about, source, step, vocab, new_rows)
    if folder.branched(target) is False:
        shutil.rmtree(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is not empty; branch into a new folder")
    target.mkdir(parents=True, exist_ok=True)
    folder.write(target / folder.BRANCH, {"source": str(source), "step": step, "whole": False})
    try:
        if grown:
            step, state, host = grown
            with checkpoint.Checkpoints(target / "checkpoints") as checkpoints:
                checkpoints.save(step, state, host)
        else:
            step = saved.copy(source / "checkpoints", target / "checkpoints", step=step)
    except UserError:
        shutil.rmtree(target)
        raise
    shutil.copyfile(source / "metrics.jsonl", target / "metrics.jsonl")
    if (source / "reservoir").exists():  # rewound when the branch starts
        shutil.copytree(source / "reservoir", target / "reservoir")
    metrics.truncate(target / "metrics.jsonl", step)
    folder.write(target / folder.BRANCH, {"source": str(source), "step": step, "whole": True})
    return step


def _grown(
    about: dict[str, Any], source: Path, step: int | None, vocab: int, how: vocabulary.How
) -> tuple[int, TrainState, dict[str, Any]]:
    """Returns a checkpoint with more tokens: step, state as nested dicts on the first device, and host part."""
    config = about["config"]
    if not config.get("packing"):
        raise UserError(f"{source}: --vocab={vocab}: only the vocabulary of a run on text can grow; leave it out")
    if config.get("adapter"):
        raise UserError(
            f"{source}: --vocab={vocab}: an adapter has no vocabulary; export it merged (python -m jaxcl.hf export) "
            f"and continue that with config.model.vocab={vocab}"
        )
    if vocab >= 2**31:
        raise UserError(f"--vocab={vocab}: must be below 2^31")
    words = network.tokenizer_of(config.get("tokenizer"), config["model"])
    made = network.make(config["model"], words, config["packing"]["length"])
    if made.shape is None:
        raise UserError(f"{source}: --vocab={vocab}: only a transformer has a vocabulary that can grow; leave it out")
    if vocab < made.shape.vocab:
        raise UserError(f"--vocab={vocab}: the run in {source} has {made.shape.vocab} tokens; give at least as many")
    step, leaves, host = saved.read(source / "checkpoints", step=step)
    nested = manifests.nest(leaves)
    names = [name for name, _ in named_leaves(jax.eval_shape(made.model.init, jax.random.key(0)))]
    if [name for name, _ in named_leaves(nested["params"])] != names:
        raise UserError(f"{source}: --vocab={vocab}: some of its parameters are frozen; merge the adapter and export")
    state = TrainState(nested["step"], nested["params"], nested.get("opt_state", {}), nested.get("memory", {}))
    key, multiple = key_for(config.get("seed", 0), "new_rows"), made.shape.vocab_multiple
    rows = -(-vocab // multiple) * multiple
    state = vocabulary.grow_state(state, made.model.axes, made.shape.vocab, vocab, how=how, key=key, size=rows)
    return step, state, host | {"stream": None, "held_out": None}


def main(argv: list[str]) -> None:
    """Makes the branch and says how to go on."""
    parser = console.Parser(prog="python -m jaxcl.branch", description="Starts a new run from a checkpoint of another.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run to branch off")
    parser.add_argument("new", metavar="NEW", type=Path, help="folder of the new run: absent or empty")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest by default")
    parser.add_argument("--vocab", type=int, metavar="M", help="tokens of the new run, if it has more")
    parser.add_argument("--new_rows", choices=network.NEW_ROWS, default="mean", help="how their rows begin")
    options = parser.parse_args(argv)
    step = make(options.run, options.new, step=options.step, vocab=options.vocab, new_rows=options.new_rows)
    print(f"{options.new}: branched off {options.run} at step {step}; continue it with")
    more = f"--config.model.vocab={options.vocab} " if options.vocab else ""
    print(f"  python -m jaxcl.main --config=FILE --workdir={options.new} {more}[--config.KEY=VALUE ...]")


if __name__ == "__main__":
    console.cli(main)
