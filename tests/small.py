"""A run of seconds for the tests of the loop: a tiny transformer, three small domains, every kind of state."""

import functools
import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from jaxcl import domains, metrics, plan, program, train
from jaxcl.data import tokenizer

STAGES = 3
STEPS = 8  # of a stage
TOTAL = STAGES * STEPS
WORDS = ("wind", "river", "stone", "lamp", "harbour", "letter", "garden", "winter", "market", "bridge", "cloud", "road")


def corpus(folder, documents=70):
    """Writes one file of paragraphs per domain and returns their paths; the same text every time."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for i in range(STAGES):
        rng = np.random.default_rng(i)
        words = WORDS[i : i + 9]  # the domains differ
        text = "\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(documents))
        paths[f"d{i}"] = folder / f"d{i}.txt"
        if not paths[f"d{i}"].exists():
            paths[f"d{i}"].write_text(text)
    return {name: str(path) for name, path in paths.items()}


def config(folder, **overrides):
    """Returns a config for `train.run`; overrides replace sections, or single keys of them as `section__key`."""
    paths = corpus(pathlib.Path(folder) / "text")
    made = {
        "label": "small",
        "seed": 3,
        "model": {"name": "transformer", "preset": "tiny", "layers": 1, "embed": 16, "mlp": 32},
        "sources": {name: {"name": "text", "path": path, "split": "paragraph"} for name, path in paths.items()},
        "packing": {"length": 32, "directory": str(pathlib.Path(folder) / "cache")},
        "stream": {
            "batch": 8,
            "steps": STEPS,
            "stages": [{"name": f"stage {name}", "mixture": {name: 1.0}} for name in paths],
            "replay": {"fraction": 0.25, "mode": "replace", "over": "earlier"},
        },
        "method": "er(capacity=24, fraction=0.25) + reptile(every=5, keep=0.5)",
        "optim": {"name": "adamw", "weight_decay": 0.1, "clip": 1.0},
        "schedule": {"name": "infinite", "peak": 1e-2, "constant": 5e-3, "warmup": 3, "cooldown": 8},
        "guard": {"spike": 20.0, "warmup": 4, "window": 8},
        "evaluation": {"every": 4, "rows": 8, "alignment": True},
        "checkpoint": {"every_steps": 3, "every_minutes": None, "keep": 3},
        "tensorboard": False,
    }
    return overridden(made, overrides)


def overridden(settings, changes):
    """Returns a config whose sections, or single keys of them as `section__key`, are others."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings[section] = {**settings[section], name: value} if name else value
    return settings


def stream(settings):
    """Returns the stream of a config."""
    _, pieces = train.split(settings)
    corpora = domains.of_text(pieces["sources"], tokenizer.make(), domains.Packing(**pieces["packing"]))
    rows = {name: corpus.train for name, corpus in corpora.items()}
    return plan.stream_of(rows, pieces["seed"], 1, **pieces["stream"])


@functools.lru_cache(maxsize=1)
def shared(folder):
    """Returns settings, the loop's part and the program on one device: one compilation serves many runs.

    Call it with a folder of the test session. What is tested is the loop, so the compiler need not try hard.
    """
    settings = config(folder)
    loop, pieces = train.split(settings)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        made = program.build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}})
        state = made.create()
        state, _ = made.step(state, made.place(0))
        state = made.end_task(state, made.place_task(0))
        made.evaluate(state.params)
        made.compare(state.params)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    return settings, loop, made


@functools.lru_cache(maxsize=1)
def straight(folder):
    """Returns the folder of a run of the shared program without incident. It is made once, so change a copy alone."""
    workdir = pathlib.Path(folder) / "straight"
    with pytest.MonkeyPatch.context() as monkeypatch:
        reuse(folder, monkeypatch)
        assert train.run(config(folder), str(workdir)) == 0
    return workdir


def session(folder, workdir, **loop):
    """Returns a session of the shared program: `train` it, then `close` it."""
    settings, own, made = shared(folder)
    place = pathlib.Path(workdir)
    return train.Session(made, own._replace(**loop), place, {**settings, **loop})


def write(settings, path):
    """Writes a config file for the command line and returns its path."""
    text = f"import json\nimport ml_collections\n\nTEXT = {json.dumps(settings)!r}\n\n\n"
    path = pathlib.Path(path)
    path.write_text(text + "def get_config():\n    return ml_collections.ConfigDict(json.loads(TEXT))\n")
    return path


def environment(folder):
    """Returns variables for workers: compile once, and quickly."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder) / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def records(workdir, *kinds):
    """Returns what metrics.jsonl says, without the clock; all kinds but events unless named."""
    found = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
    kinds = kinds or ("train", "eval", "ledger")
    return [{k: v for k, v in r.items() if k != "time"} for r in found if r["kind"] in kinds]


def events(workdir):
    """Returns (step, event) of every event."""
    return [(r["step"], r["event"]) for r in records(workdir, "event")]


def results(workdir):
    """Returns report.json without the clock."""
    found = json.loads((pathlib.Path(workdir) / "report.json").read_text())
    return {k: v for k, v in found.items() if k != "time"}


def checkpoint(workdir):
    """Returns step, leaf -> [shape, dtype, checksum of the bits] and the host part of the newest checkpoint."""
    folder = newest(workdir)
    return int(folder.name), manifest(folder)["leaves"], json.loads((folder / "host.json").read_text())


def newest(workdir):
    """Returns the folder of the newest checkpoint of a run."""
    whole = [p.parent for p in pathlib.Path(workdir).glob("checkpoints/*/MANIFEST") if p.parent.name.isdecimal()]
    return max(whole, key=lambda p: int(p.name))


def manifest(folder):
    """Returns the manifest of a checkpoint."""
    return json.loads((folder / "MANIFEST").read_text().splitlines()[0])


def outcome(workdir):
    """Returns all that must be equal bit for bit between runs that were and were not interrupted."""
    return {"checkpoint": checkpoint(workdir), "records": records(workdir), "report": results(workdir)}


def tree_of(folder):
    """Returns file -> bytes below a folder, to see that nothing was touched."""
    folder = pathlib.Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def reuse(folder, monkeypatch, poison=lambda step, batch: batch):
    """Makes `train.run` in this process use what `shared` has compiled; `poison` may change a batch on its way."""
    _, _, made = shared(folder)
    build = program.build

    @functools.wraps(build)
    def again(**pieces):
        new = build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}})
        same = {name: getattr(made, name) for name in ("create", "step", "end_task", "evaluate", "compare")}
        return new._replace(place=lambda step, *recall: poison(step, new.place(step, *recall)), **same)

    monkeypatch.setattr(program, "build", again)
    monkeypatch.setattr(train.allocator, "keep_pages", lambda: True)


def strike(monkeypatch, name, step, method="account"):
    """Sends this process a signal while the loop is at `step`."""
    original = getattr(train.Session, method)

    def changed(self, *rest, **named):
        if self.step == step:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, *rest, **named)

    monkeypatch.setattr(train.Session, method, changed)
