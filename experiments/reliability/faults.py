"""Faults one by one: exit status, line of the ledger, what the launcher does, time lost, whether the end is the same.

python -m experiments.reliability.faults --workdir=runs/faults [--only=NAME:NAME] [--out=FILE]

Each fault strikes a run of 24 steps on two devices once; a launcher that asks `jaxcl.retry` starts it again until it
has finished. Attempts are forks of this process, which has imported everything: a start costs that much less. The end
is that of the run without a fault if the bits of the last checkpoint are, and all that was recorded but the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import errno
import functools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import split_digits
from experiments.benchmarks import train_step
from jaxcl import checkpoint, goodput, main, manifests, metrics, program, retry, train

AT = 13  # the step that is struck; checkpoints are at 4, 8, 12 ...
LIMITS = retry.Limits(retries=3, backoff=0.0)


def config():
    """Returns a run of three tasks of eight steps: a perceptron on digits, with replay."""
    made = main.plain(split_digits.get_config())
    names = list(made["sources"])[:3]
    made["sources"] = {name: made["sources"][name] | {"count": 32, "held_out": 16} for name in names}
    made["model"]["hidden"] = (16,)
    made["stream"] = {"batch": 8, "stages": [{**stage, "steps": 8} for stage in made["stream"]["stages"][:3]]}
    made |= {"method": "er(capacity=24, fraction=0.25)", "mesh": {"data": 2}, "tensorboard": False}
    made["evaluation"] = {"every": 8, "rows": 8}
    made["checkpoint"] = {"every_steps": 4, "every_minutes": None, "keep": 3}
    return made | {"guard": {"spike": 20.0, "warmup": 4, "window": 8}, "watch": {"repeat": True, "digest_every": 1}}


def rows(change):
    """Plants a change of the batch of step AT, on its way to the devices."""
    build = program.build

    @functools.wraps(build)
    def again(**pieces):
        new = build(**pieces)
        return new._replace(
            place=lambda step, *x: change(new.place(step, *x)) if step + 1 == AT else new.place(step, *x)
        )

    program.build = again


def times(factor, always=False):
    """Returns a change that multiplies the weights of the targets, once or whenever the rows come."""
    seen = []

    def change(batch):
        if seen and not always:
            return batch
        seen.append(AT)
        with jax.transfer_guard("allow"):
            return jax.tree.map(lambda x: x * factor if x.dtype == jnp.float32 else x, batch)

    return change


def wild(factor):
    """Plants parameters `factor` times as large for step AT, once: as a fault of the machine would."""
    build, seen = program.build, []

    @functools.wraps(build)
    def again(**pieces):
        new = build(**pieces)

        def step(state, batch):
            if int(state.step) + 1 != AT or seen:
                return new.step(state, batch)
            seen.append(AT)
            grown = jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), state.params)
            return new.step(dataclasses.replace(state, params=grown), batch)

        def allowed(state, batch):
            with jax.transfer_guard("allow"):
                return step(state, batch)

        return new._replace(step=allowed)

    program.build = again


def throws():
    def change(batch):
        raise OSError(errno.EIO, "Input/output error", "/data/rows")

    rows(change)


def at_step(act):
    """Plants something to do once step AT is dispatched."""
    account = train.Session.account

    def changed(self, step):
        account(self, step)
        if step + 1 == AT:
            act(self)

    train.Session.account = changed


def flip(session):
    """Flips the last bit of one number in one of two copies of a parameter."""
    names = jax.tree.leaves_with_path(session.state.params)
    path, leaf = max(names, key=lambda pair: pair[1].size)
    with jax.transfer_guard("allow"):
        parts = [np.asarray(shard.data).copy() for shard in leaf.addressable_shards]
        parts[1].reshape(-1).view(np.int32)[7] ^= 1
        placed = [jax.device_put(p, shard.device) for p, shard in zip(parts, leaf.addressable_shards, strict=True)]
        wrong = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)
    params = jax.tree.map_with_path(lambda where, x: wrong if where == path else x, session.state.params)
    session.state = dataclasses.replace(session.state, params=params)


def write(act):
    """Plants something to do in place of writing the manifest of step 12, which gets its path."""
    original = manifests.write

    def changed(path, text):
        if path.name == "MANIFEST" and path.parent.name == "12":
            act(path)
        return original(path, text)

    manifests.write = changed


def full(path):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def slow():
    commit = checkpoint.Checkpoints._commit

    def later(self, *rest):
        time.sleep(1.0)
        return commit(self, *rest)

    checkpoint.Checkpoints._commit = later


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def term(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def sleep(*_):
    time.sleep(10**6)


def half_a_line(*_):
    """Plants a kill in the middle of a line of the metrics."""
    original = metrics.Jsonl.write

    def changed(self, record):
        if record["kind"] == "train" and record["step"] == AT:
            self._file.write('{"kind":"train","st')
            self._file.flush()
            kill()
        return original(self, record)

    metrics.Jsonl.write = changed


def newest(workdir):
    whole = [path.parent for path in (workdir / "checkpoints").glob("*/MANIFEST") if path.parent.name.isdecimal()]
    return max(whole, key=lambda path: int(path.name))


def truncate(workdir):
    """Cuts the largest file of the newest checkpoint short, while nobody runs."""
    data = max((path for path in newest(workdir).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])


def lose(workdir):
    """Loses the first place."""
    shutil.rmtree(workdir / "checkpoints")


# name -> what is planted in the first attempt; and what is done to the folder before the second
FAULTS = {
    "NaN in a gradient, once": (lambda: rows(times(jnp.nan)), None),
    "NaN in the rows, always": (lambda: rows(times(jnp.nan, always=True)), None),
    "ten times the parameters, for a step": (lambda: wild(10.0), None),
    "a flipped bit in one copy": (lambda: at_step(flip), None),
    "the loader throws": (throws, None),
    "a slow disk": (slow, None),
    "a full disk": (lambda: write(full), None),
    "a hang": (lambda: at_step(sleep), None),
    "SIGKILL in a step": (lambda: at_step(kill), None),
    "SIGKILL in a save": (lambda: write(kill), None),
    "SIGKILL in a line of metrics": (half_a_line, None),
    "SIGTERM": (lambda: at_step(term), None),
    "a truncated checkpoint": (lambda: at_step(term), truncate),
    "the first place is lost": (lambda: at_step(kill), lose),
}


def attempt(settings, workdir, plant, log):
    """Returns the exit status of a start, in a fork."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            os.environ["JAXCL_STOPPED"] = str(retry.STOPPED)
            plant()
            code = train.run(settings, str(workdir), final=False)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(workdir):
    """Returns what must be equal bit for bit."""
    leaves = json.loads((newest(workdir) / "MANIFEST").read_text().splitlines()[0])["leaves"]
    records = [r for r in metrics.read(workdir / "metrics.jsonl") if r["kind"] in ("train", "eval", "ledger")]
    return leaves, [{key: value for key, value in r.items() if key != "time"} for r in records]


def see_through(settings, workdir, plant=lambda: None, between=None):
    """Starts the run until it has finished; returns how every attempt ended."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    ends, history = [], []
    while True:
        log, began = workdir.parent / f"{workdir.name}.{len(ends)}.log", time.time()
        status = attempt(settings, workdir, plant if not ends else lambda: None, log)
        ended, step = retry.failed_at(workdir, began)
        history.append(retry.Entry(time.time(), retry.classify(status, log.read_text(), ended), step))
        verdict = retry.decide(history, LIMITS)
        said = [line for line in log.read_text().splitlines() if line.startswith(("error:", "stopped"))]
        line = goodput.last_line(workdir)
        ends.append(
            {"status": status, "ledger": line, "cause": history[-1].cause, "action": verdict.action, "said": said}
        )
        if verdict.action == "end":
            return ends
        if between and len(ends) == 1:
            between(workdir)


def strike(name, place, straight):
    """Returns the row of one fault; `straight` is the run without."""
    plant, between = FAULTS[name]
    settings, workdir = config(), place / name.replace(" ", "_")
    settings["watch"]["hang_s"] = 90.0 if name == "a hang" else None
    if name == "the first place is lost":
        settings["checkpoint"]["second"] = str(place / "second" / str(time.time_ns()))
    ends = see_through(settings, workdir, plant, between)
    times_, events = goodput.summary(workdir), metrics.read(workdir / "metrics.jsonl")
    lost = {key: times_["seconds"][key] - straight["goodput"]["seconds"][key] for key in goodput.LOST}
    return {
        "ends": ends,
        "goodput": times_,
        "lost_s": sum(lost.values()),
        "events": [[r["step"], r["event"], r["message"]] for r in events if r["kind"] == "event"],
        "equal": outcome(workdir) == straight["outcome"],
    }


def show(name, row):
    """Returns a line of the table."""
    first, last = row["ends"][0], row["ends"][-1]
    assert last["status"] == 0, f"{name}: {row['ends']}"
    causes = ", ".join(f"{n} {cause}" for cause, n in row["goodput"]["failures"].items()) or "none"
    cells = (name, first["status"], causes, f"{first['cause']}: {first['action']}")
    more = (row["goodput"]["repeated_steps"], f"{row['lost_s']:.1f}", "yes" if row["equal"] else "**no**")
    return f"| {' | '.join(map(str, (*cells, *more)))} |"


def cli():
    """Prints the table and writes the raw results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/faults")
    parser.add_argument("--only", help="names of faults, with colons between them")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "faults.json"))
    options = parser.parse_args()
    place = Path(options.workdir).absolute()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)  # faults are compared, not speeds
    see_through(config(), place / "first")  # compiles, so that all that are compared start alike
    straight = {"ends": see_through(config(), place / "straight"), "goodput": goodput.summary(place / "straight")}
    straight["outcome"] = outcome(place / "straight")
    print("| fault | exit status | failures in the ledger | launcher | steps repeated | lost, s | same end |")
    print("|---" * 7 + "|")
    record = {
        "command": "python -m experiments.reliability.faults",
        "date": datetime.date.today().isoformat(),
        "machine": train_step.machine(),
        "versions": {"jax": jax.__version__},
        "straight": {"goodput": straight["goodput"]},
        "faults": {},
    }
    Path(options.out).parent.mkdir(exist_ok=True)
    for name in options.only.split(":") if options.only else FAULTS:
        record["faults"][name] = strike(name, place, straight)
        print(show(name, record["faults"][name]), flush=True)
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli()
