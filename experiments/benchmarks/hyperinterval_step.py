"""Compares a step of HyperInterval with the published one on torch: CPU-seconds, one thread each, and peak memory.

python -m experiments.benchmarks.hyperinterval_step --peer_python=PYTHON_WITH_TORCH [--sizes=split,split_tasks,permuted]

The step of `jaxcl.methods.hyperinterval` with the published loss, compiled as the loop compiles it, beside
hyperinterval_torch.py, for t earlier tasks that all enter the regulariser; storage is for t + 1 tasks. jaxcl keeps
freed memory, as its loop does; torch runs with an allocator that does so too ("tuned") and as it comes. Three processes
take turns, or run one after the other where they do not fit into memory together (--apart). Peaks are of each process
from its start. --growth=4of5,4of10,9of10 measures jaxcl alone, for 4 earlier tasks with storage for 5 and so on: one
process each, in turns. In a stream of ten tasks the first and the last step are the same program with another mask.
Before that both sides take four steps from the same parameters: `parity` are the greatest relative
differences of their losses. Raw results go to results/hyperinterval_step.json.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator

from absl import app, flags

from experiments.benchmarks import train_step
from jaxcl import allocator

HERE = pathlib.Path(__file__).resolve().parent
SIZES = flags.DEFINE_list("sizes", ["split", "split_tasks"], "names of the shapes to run")
EARLIER = flags.DEFINE_list("earlier", ["0", "1", "4", "9"], "numbers of earlier tasks t")
SIDES = flags.DEFINE_list("sides", ["jaxcl", "tuned", "default"], "what to run; tuned and default are torch")
APART = flags.DEFINE_bool("apart", False, "one side after the other")
GROWTH = flags.DEFINE_list("growth", [], "numbers of earlier tasks with storage for so many, instead of the sides")
WARM = flags.DEFINE_integer("warm", 1, "steps of each side that are not counted")
PARITY = flags.DEFINE_bool("parity", True, "compare the losses too")
RESULT = flags.DEFINE_string("result", str(HERE / "results" / "hyperinterval_step.json"), "raw results, added to")
# Of glibc's malloc: without them every array of some size is mapped and zeroed anew.
KEPT = "17179869184"
TUNED = {"MALLOC_MMAP_THRESHOLD_": KEPT, "MALLOC_TRIM_THRESHOLD_": KEPT, "MALLOC_TOP_PAD_": "268435456"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A target network, its hypernetwork, and t = `task` earlier tasks."""

    universal: bool
    widths: tuple[int, ...]
    embedding: int
    hidden: tuple[int, ...]
    rows: int
    gamma: float
    beta: float
    task: int = 0
    storage: int = 0  # tasks that the targets are stored for; 0 = task + 1
    start: str = ""  # file of the parameters to start from


SHAPES = {
    "split": Shape(True, (784, 400, 400, 2), 24, (100,), 64, 10.0, 0.001),
    "split_tasks": Shape(False, (784, 400, 400, 2), 72, (75, 75), 128, 1.0, 0.01),
    "permuted": Shape(True, (1024, 1000, 1000, 10), 24, (100, 100), 128, 5.0, 0.005),
}


def batch_of(shape: Shape):
    """Returns the rows that both sides train on."""
    import numpy as np

    from jaxcl.types import Batch

    draw, one = np.random.default_rng(1), np.ones(shape.rows, np.int32)
    inputs = draw.random((shape.rows, shape.widths[0]), np.float32)
    targets = draw.integers(0, shape.widths[-1], shape.rows).astype(np.int32)
    return Batch(inputs, targets, np.ones(shape.rows, np.float32), one, 0 * one, shape.task * one)


def jaxcl_step(shape: Shape):
    """Returns a function that takes one step and returns its losses, and what is known of the program."""
    import jax
    import jax.numpy as jnp

    from jaxcl import compose, losses, optim, tree
    from jaxcl import mesh as meshes
    from jaxcl.methods import hyperinterval
    from jaxcl.models import hypernetwork, mlp
    from jaxcl.random import key_for
    from jaxcl.types import TrainState

    tasks, steps = shape.storage or shape.task + 1, 1000
    target = mlp.make(inputs=shape.widths[0], hidden=shape.widths[1:-1], classes=shape.widths[-1])
    sizes = {"embedding": shape.embedding, "hidden": shape.hidden, "gamma": shape.gamma, "start": "published"}
    made = hypernetwork.make(target, tasks=tasks, universal=shape.universal, **sizes)
    mesh = meshes.make(data=1, devices=jax.devices()[:1])
    batch = meshes.place(mesh, batch_of(shape))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    tx = optim.make(lr=1e-3, name="adam", clip=None)
    setting = compose.Setting(made.model, tx, example, tasks, losses.cross_entropy, boxed=made)
    published = {"schedule": "published", "average": "twice", "point": "middle", "project": False}
    method = hyperinterval.make(setting, steps=steps, beta=shape.beta, **published)

    def initial() -> TrainState:
        return method.init(made.model.init(key_for(0, "init")))

    def later(state: TrainState) -> TrainState:
        """Returns the state in the second half of the task, with its targets."""
        every = jnp.arange(tasks)
        centre, radius = made.boxes(state.params["generator"], every, jnp.ones(tasks))
        memory = {"age": jnp.int32(steps), "targets": {"centre": centre, "radius": radius}}
        done = {"done": (every < shape.task).astype(jnp.float32), "current": jnp.float32(shape.task)}
        params = {**state.params, "ledger": {**state.params["ledger"], **done}}
        return TrainState(state.step, params, state.opt_state, memory)

    def step(state: TrainState, rows):
        return method.step(state, rows, key_for(0, "step", state.step))

    shapes = jax.eval_shape(initial)
    shardings = meshes.state_shardings(mesh, made.model.axes, shapes, params=shapes.params)
    state = jax.jit(initial, out_shardings=shardings)()
    state = jax.jit(meshes.on(mesh, later), out_shardings=shardings, donate_argnums=0)(state)
    told = (shardings, meshes.replicated(mesh))
    compiled = jax.jit(meshes.on(mesh, step), out_shardings=told, donate_argnums=0).lower(state, batch).compile()
    if shape.start:
        save(shape.start, state.params["generator"])

    def take() -> dict:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        return {"loss": float(metrics["loss"]), "drift": float(metrics["drift"])}

    layers = {name: state.params["generator"][name] for name in ("hidden", "head")}
    return take, {
        "params": tree.size(layers),
        "versions": {"jax": jax.__version__},
        "program_bytes": sizes_of(compiled),
    }


def sizes_of(compiled) -> dict[str, int]:
    """Returns the bytes of the buffers of a program; `temp` are its temporaries."""
    memory = compiled.memory_analysis()
    return {part: getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")}


def save(path: str, generator) -> None:
    """Writes the parameters for the peer."""
    import numpy as np

    layers = [generator["hidden"][f"layer_{i}"] for i in range(len(generator["hidden"]))]
    found = {f"weight_{i}": np.asarray(layer["kernel"]).T for i, layer in enumerate(layers)}
    found |= {f"bias_{i}": np.asarray(layer["bias"]) for i, layer in enumerate(layers)}
    head = {"weight": generator["head"]["weight"], "bias": generator["head"]["bias"]}
    found |= {f"{name}_{len(layers)}": np.asarray(x) for name, x in head.items()}
    np.savez(path, **found, **{name: np.asarray(x) for name, x in generator["embedding"].items()})


def serve(take, about: dict) -> None:
    """Prints `about`, then takes one step for every line on stdin and prints what it took."""
    import time

    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        told = take()
        told |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        told["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(told), flush=True)


def side(name: str, shape: Shape) -> train_step.Side:
    """Starts one of the processes."""
    environment, told = os.environ | train_step.ENVIRONMENT, json.dumps(dataclasses.asdict(shape))
    if name == "jaxcl":
        command = [sys.executable, "-m", "experiments.benchmarks.hyperinterval_step", f"--worker={told}"]
        return train_step.Side(command, environment)
    tuned = TUNED if name == "tuned" else {}
    return train_step.Side(
        [train_step.PEER_PYTHON.value, str(HERE / "hyperinterval_torch.py"), told], environment | tuned
    )


def alike(shape: Shape) -> dict[str, float]:
    """Returns the greatest relative differences between the losses of both sides over four steps."""
    with tempfile.TemporaryDirectory() as folder:
        shape = dataclasses.replace(shape, start=f"{folder}/start.npz")
        found = []
        for name in ("jaxcl", "tuned"):  # the first one writes the file
            one = side(name, shape)
            found.append([one.step() for _ in range(4)])
            one.close()
    pairs = list(zip(*found, strict=True))
    return {key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in pairs) for key in ("loss", "drift")}


def timed(shape: Shape) -> dict[str, train_step.Side]:
    """Returns the sides with their repeats, in turns or one after the other."""
    sides = {}
    for group in [[name] for name in SIDES.value] if APART.value else [SIDES.value]:
        sides |= in_turns({name: side(name, shape) for name in group})
    if len({one.about["params"] for one in sides.values()}) > 1:
        raise RuntimeError(f"not the same hypernetwork: {[one.about for one in sides.values()]}")
    return sides


def in_turns(sides: dict[str, train_step.Side]) -> dict[str, train_step.Side]:
    """Lets every side take its steps, ends them and returns them."""
    for i in range(WARM.value + train_step.REPEATS.value):
        for one in sides.values():
            result = one.step()
            if i >= WARM.value:
                one.repeats.append(result)
    for one in sides.values():
        one.close()
    return sides


def growth(shape: Shape) -> dict:
    """Returns what a step costs with several numbers of earlier tasks, and medians over that of the first of them."""
    load, found = os.getloadavg()[0], {}
    for name in GROWTH.value:
        task, storage = map(int, name.split("of"))
        found[name] = side("jaxcl", dataclasses.replace(shape, task=task, storage=storage))
    cpu = {name: [r["cpu_s"] for r in one.repeats] for name, one in in_turns(found).items()}
    middle = {name: statistics.median(values) for name, values in cpu.items()}
    base = cpu[GROWTH.value[0]]
    return {
        "load_average": load,
        "cpu_s_min": {name: min(values) for name, values in cpu.items()},
        "cpu_s_median": middle,
        # A turn of all is a pair: what else the machine does falls on its members alike.
        "ratio_to_first": {n: statistics.median(b / a for a, b in zip(base, v, strict=True)) for n, v in cpu.items()},
        "peak_rss_mb": {name: one.repeats[-1]["peak_rss_mb"] for name, one in found.items()},
        "load_average_after": os.getloadavg()[0],
        "repeats": {name: one.repeats for name, one in found.items()},
    }


def measure(shape: Shape) -> dict:
    """Returns the raw and the derived results of one shape and t."""
    case = {"load_average": os.getloadavg()[0]}
    if PARITY.value:
        case["parity"] = alike(shape)
    sides = timed(shape)
    cpu = {name: [r["cpu_s"] for r in one.repeats] for name, one in sides.items()}
    least, middle = ({name: f(values) for name, values in cpu.items()} for f in (min, statistics.median))
    return case | {
        "about": {name: one.about for name, one in sides.items()},
        "cpu_s_min": least,
        "cpu_s_median": middle,
        "peak_rss_mb": {name: one.repeats[-1]["peak_rss_mb"] for name, one in sides.items()},
        "ratio_of_minima": {n: least[n] / least["jaxcl"] for n in least if "jaxcl" in least},
        "ratio_of_medians": {n: middle[n] / middle["jaxcl"] for n in middle if "jaxcl" in middle},
        "load_average_after": os.getloadavg()[0],
        "repeats": {name: one.repeats for name, one in sides.items()},
    }


def cases(name: str) -> Iterator[tuple[str, dict]]:
    """Yields title and results of what the flags ask for of one size."""
    if GROWTH.value:
        told = f"--growth={','.join(GROWTH.value)} --sizes={name} --repeats={train_step.REPEATS.value}"
        command = {"command": f"python -m experiments.benchmarks.hyperinterval_step {told}"}
        yield f"{name} growth", command | {"shape": dataclasses.asdict(SHAPES[name])} | growth(SHAPES[name])
        return
    for t in map(int, EARLIER.value):
        shape = dataclasses.replace(SHAPES[name], task=t)
        yield f"{name} {t}", {"shape": dataclasses.asdict(shape)} | measure(shape)


def show(title: str, case: dict) -> None:
    """Prints the figures of one case."""
    parts = (
        f"{name} {case['cpu_s_min'][name]:.3f} ({case['cpu_s_median'][name]:.3f}) {case['peak_rss_mb'][name]:.0f} MB"
        for name in case["cpu_s_min"]
    )
    print(f"{title}: " + ", ".join(parts), case.get("parity", ""), f"load {case['load_average']:.1f}", flush=True)


def main(argv: list[str]) -> None:
    if train_step.WORKER.value:
        allocator.keep_pages()
        told = json.loads(train_step.WORKER.value)
        serve(*jaxcl_step(Shape(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})))
        return
    if train_step.PEER_PYTHON.value is None and SIDES.value != ["jaxcl"] and not GROWTH.value:
        raise app.UsageError("give --peer_python, an interpreter that has torch")
    # XLA runs independent operations on one thread per core that it sees, whatever its flags say.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    output = pathlib.Path(RESULT.value)
    results = json.loads(output.read_text()) if output.exists() else {"cases": {}}
    about = {
        "command": "python -m experiments.benchmarks.hyperinterval_step --peer_python=PYTHON "
        f"--repeats={train_step.REPEATS.value}{' --apart' if APART.value else ''}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": train_step.machine(),
    }
    results |= {"environment": train_step.ENVIRONMENT, "tuned": TUNED}
    output.parent.mkdir(parents=True, exist_ok=True)
    print("CPU-seconds of a step, least (median), and peak memory")
    for name in SIZES.value:
        for title, case in cases(name):
            results["cases"][title] = about | case
            show(title, case)
            output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
