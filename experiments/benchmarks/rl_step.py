"""Compares a step of reinforcement learning with TRL's GRPOTrainer on torch: CPU-seconds, one thread each, in turns.

python -m experiments.benchmarks.rl_step --peer_python=PYTHON_WITH_TORCH_AND_TRL [--vocabularies=512,4096]

The same Llama samples 8 completions of exactly 64 tokens for each of 4 prompts, they are rewarded, and one update
with AdamW follows. Three processes take turns: jaxcl with hard tokens, jaxcl with 63 soft thoughts and a token as the
answer, and TRL. Raw results go to results/rl_step_cpu.json.

With --gpu it is a Llama of 0.5 B parameters in bfloat16 (8 prompts of 128 tokens x 8 completions of 256; seconds
on the wall of one GPU), for the interpreter that runs this and the peer's, both with a GPU: results/rl_step_gpu.json.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import statistics
import sys
import time

from absl import app, flags

from experiments.benchmarks import train_step
from jaxcl import allocator

HERE = pathlib.Path(__file__).resolve().parent
VOCABULARIES = flags.DEFINE_list("vocabularies", ["512", "4096"], "sizes of the vocabulary to run")
GPU = flags.DEFINE_bool("gpu", False, "compare on a GPU")
RESULT = flags.DEFINE_string("result", None, "file of raw results; by default results/rl_step_cpu.json or _gpu.json")
SIDES = ("hard", "soft", "trl")
# What is compared: name, numerator, denominator, part of the step.
RATIOS = (
    ("sampling_trl_over_hard", "trl", "hard", "sample_"),
    ("step_trl_over_hard", "trl", "hard", ""),
    ("sampling_hard_over_soft", "hard", "soft", "sample_"),
    ("step_hard_over_soft", "hard", "soft", ""),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings and as many key heads as query heads, and what it samples."""

    vocab: int
    layers: int = 4
    embed: int = 256
    heads: int = 4
    mlp: int = 688
    prompts: int = 4
    group: int = 8
    prompt: int = 16
    drawn: int = 64
    gpu: bool = False

    @property
    def unit(self) -> str:
        """Which clock counts."""
        return "wall_s" if self.gpu else "cpu_s"


def shape_of(vocab: int) -> Shape:
    """Returns the small Llama, or the one for a GPU."""
    large = {"layers": 24, "embed": 896, "heads": 14, "mlp": 4864, "prompts": 8, "prompt": 128, "drawn": 256}
    return Shape(vocab, gpu=True, **large) if GPU.value else Shape(vocab)


def clocks() -> dict[str, float]:
    """Returns both clocks."""
    return {"cpu_s": time.process_time(), "wall_s": time.perf_counter()}


def since(before: dict[str, float], part: str) -> dict[str, float]:
    """Returns what both clocks say since then, as `part` and the unit."""
    return {f"{part}{unit}": now - before[unit] for unit, now in clocks().items()}


def random_problems(shape: Shape):
    """Returns 512 prompts that have no right answer."""
    import numpy as np

    from jaxcl.rl import tasks, verify

    prompts = np.random.default_rng(0).integers(3, shape.vocab, (512, shape.prompt)).astype(np.int32)
    return tasks.Problems(
        description={"name": "random"},
        vocab=shape.vocab,
        names=(),
        pad=0,
        bos=1,
        eos=2,
        prompts=prompts,
        segments=np.ones_like(prompts),
        answers=np.zeros((512, 1), np.int32),
        verifier=verify.make("tokens"),
        thoughts=shape.drawn - 1,
        baselines={},
    )


def practice_of(shape: Shape, policy: str):
    """Returns what is drawn and rewarded: odd tokens are right."""
    import numpy as np

    from jaxcl import practice
    from jaxcl.rl.judge import Judge
    from jaxcl.rl.pool import EVENTS, Verdicts

    class Odd(Judge):
        """Rewards odd tokens."""

        def __call__(self, numbers, kind, token):
            rewards = (token[:, -1] % 2).astype(np.float32)
            return Verdicts(rewards, np.zeros(len(rewards), bool), dict.fromkeys(EVENTS, 0), None)

    problems = random_problems(shape)
    options = practice.Options(policy, "grpo", {"group": shape.group, "thoughts": shape.drawn - 1, "answer": 1})
    own = practice.make({"random": problems._replace(held_out=problems)}, None, [{}], options)
    return own._replace(judge=Odd([problems], own.judge.pools))


def jaxcl_step(shape: Shape, policy: str):
    """Returns a function that takes one whole step and returns what it took, and the versions."""
    import flax
    import jax
    import numpy as np
    import optax

    from jaxcl import compose, optim
    from jaxcl import mesh as meshes
    from jaxcl.data.rows import batch_of
    from jaxcl.models import transformer

    sizes = {name: getattr(shape, name) for name in ("vocab", "layers", "embed", "heads", "mlp")}
    more = {"compute_dtype": "bfloat16"} if shape.gpu else {"unroll": shape.layers}
    model = transformer.make(**sizes, tied=True, **more)
    own = practice_of(shape, policy)
    mesh = meshes.make()
    explorer, rows_of = own.explorer(mesh, model, 0), own.corpora()["random"].train
    spent, compiled, draw = {}, [], np.random.default_rng(1)

    def explore(params, step):
        numbers = draw.integers(0, 512, shape.prompts)
        prompts = explorer.place(own.trim(batch_of(rows_of.fetch(numbers), np.zeros(shape.prompts, np.int32)), 0))
        before = clocks()
        rolled = jax.block_until_ready(explorer.roll(params, prompts, step))
        spent.update(since(before, "sample_"))
        return explorer.judge(rolled, prompts, numbers)

    whole = meshes.replicated(mesh)
    params = jax.jit(model.init, out_shardings=whole)(jax.random.key(0))
    rows, _ = explore(params, 0)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
    tx = optim.make(lr=1e-4, weight_decay=0.0)
    method = compose.make("cpt", compose.Setting(model, tx, example, 1, own.loss({})[0]))
    state = jax.jit(method.init, out_shardings=whole)(params)
    update, taken = jax.jit(method.step, donate_argnums=0), 0
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    def take() -> dict:
        nonlocal state, taken
        known = len(compiled)
        rows, told = explore(state.params, taken)
        before = clocks()
        state, metrics = update(state, rows, jax.random.key(0))
        jax.block_until_ready(state)
        loss, taken = float(metrics["loss"]), taken + 1
        spent.update(since(before, "train_"))
        return {"loss": loss, "reward": told["reward"], "compilations": len(compiled) - known, **spent}

    versions = {"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__}
    return take, {"params": transformer.count(model), "versions": versions}


def serve(take, about: dict) -> None:
    """Prints `about`, then takes one step for every line on stdin and prints what it took."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        before = clocks()
        told = take()
        print(json.dumps(told | since(before, "")), flush=True)


def measure(vocab: int, environment: dict[str, str]) -> dict:
    """Returns the raw and the derived results of one vocabulary."""
    shape = shape_of(vocab)
    keep = train_step.KEEP_PAGES.value
    command = [sys.executable, "-m", "experiments.benchmarks.rl_step", f"--keep_pages={keep}", f"--gpu={GPU.value}"]
    told = json.dumps(dataclasses.asdict(shape) | {"keep_pages": keep})
    peer = [train_step.PEER_PYTHON.value, str(HERE / "trl_step.py"), told]
    sides = {
        name: train_step.Side(peer if name == "trl" else [*command, f"--worker={name}:{vocab}"], environment)
        for name in SIDES
    }
    if len({side.about["params"] for side in sides.values()}) > 1:
        raise RuntimeError(f"not the same model: {[side.about for side in sides.values()]}")
    compiled = dict.fromkeys(("hard", "soft"), 0)
    for i in range(2 + train_step.REPEATS.value):
        for name, side in sides.items():
            result = side.step()
            if i >= 1 and name in compiled:
                compiled[name] += result["compilations"]
            if i >= 2:
                side.repeats.append(result)
    for side in sides.values():
        side.close()
    parts = [f"{part}{shape.unit}" for part in ("sample_", "train_", "")]
    spent = {name: {part: [r[part] for r in side.repeats] for part in parts} for name, side in sides.items()}
    least, middle = (
        {name: {part: f(values) for part, values in of.items()} for name, of in spent.items()}
        for f in (min, statistics.median)
    )
    return {
        "shape": dataclasses.asdict(shape),
        "params": sides["hard"].about["params"],
        "versions": {name: side.about["versions"] for name, side in sides.items()},
        "compilations_after_the_first_step": compiled,
        "minima": least,
        "medians": middle,
        "ratios_of_minima": {n: least[a][p + shape.unit] / least[b][p + shape.unit] for n, a, b, p in RATIOS},
        "ratios_of_medians": {n: middle[a][p + shape.unit] / middle[b][p + shape.unit] for n, a, b, p in RATIOS},
        "drawn_tokens_a_step": shape.prompts * shape.group * shape.drawn,
        "repeats": {name: side.repeats for name, side in sides.items()},
    }


def show(vocab: int, case: dict) -> None:
    """Prints the table of one vocabulary."""
    later = case["compilations_after_the_first_step"]
    print(f"V={vocab}, {case['params']:,} parameters; compilations after the first step: {later}")
    print(f"{'':6} {'sample':>15} {'train':>15} {'whole step':>15}   seconds, least (median)")
    for name in SIDES:
        pairs = ((case["minima"][name][part], case["medians"][name][part]) for part in case["minima"][name])
        print(f"{name:6} " + " ".join(f"{f'{a:.3f} ({b:.3f})':>15}" for a, b in pairs))
    for name, *_ in RATIOS:
        print(f"{name:24} {case['ratios_of_minima'][name]:.2f} ({case['ratios_of_medians'][name]:.2f})", flush=True)


def main(argv: list[str]) -> None:
    if train_step.WORKER.value:
        policy, vocab = train_step.WORKER.value.split(":")
        if train_step.KEEP_PAGES.value:
            allocator.keep_pages()
        serve(*jaxcl_step(shape_of(int(vocab)), policy))
        return
    if train_step.PEER_PYTHON.value is None:
        raise app.UsageError("give --peer_python, an interpreter that has torch and trl")
    # XLA runs independent operations on one thread per core that it sees, whatever its flags say.
    if not GPU.value:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    vocabularies = ["151936"] if GPU.value else VOCABULARIES.value
    environment = os.environ | ({} if GPU.value else train_step.ENVIRONMENT)
    results = {
        "command": "python -m experiments.benchmarks.rl_step --peer_python=PYTHON "
        f"--vocabularies={','.join(vocabularies)} --repeats={train_step.REPEATS.value} --gpu={GPU.value}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": train_step.machine(),
        "environment": {} if GPU.value else train_step.ENVIRONMENT,
        "keep_pages": train_step.KEEP_PAGES.value,
        "cases": {},
    }
    output = pathlib.Path(RESULT.value or HERE / "results" / f"rl_step_{'gpu' if GPU.value else 'cpu'}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    for vocab in map(int, vocabularies):
        case = results["cases"][str(vocab)] = measure(vocab, environment)
        case["load_average_after"] = os.getloadavg()[0]
        show(vocab, case)
        output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
