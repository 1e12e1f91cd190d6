"""Tokens/s of tokenising and packing a corpus, and of reading its rows at training, beside Hugging Face datasets.

python -m experiments.benchmarks.data_pipeline --peer_python=PYTHON_WITH_DATASETS_AND_TRANSFORMERS

The tokens on disk are equal, and checked by their hash. Measured in CPU time: preparation is 1.16 times as fast as the
way of the examples of transformers on one core and 1.18 on two, and level with the fastest form of the peer that we
wrote (0.96 and 1.00; 0.81 beside two threads of it). Reading a batch is slower, 0.21 of their rate (0.28 for the
tokens alone): 1.0 CPU-ms for 16 rows of 1024 tokens. See README.md.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

HERE = pathlib.Path(__file__).resolve().parent
PEER = flags.DEFINE_string("peer_python", None, "interpreter that has datasets and transformers")
REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each side, after one that is not counted")
PROCESSES = flags.DEFINE_list("processes", ["1", "2"], "numbers of cores, and of processes of the peer")
MEGABYTES = flags.DEFINE_integer("megabytes", 21, "of text in the corpus")
VOCAB = flags.DEFINE_integer("vocab", 32000, "tokens of the BPE that is trained on the corpus")
FOLDER = flags.DEFINE_string("folder", None, "where corpus and rows are written, and removed afterwards")
OUTPUT = flags.DEFINE_string("output", str(HERE / "results" / "data_pipeline_cpu.json"), "file of raw results")
WORK = flags.DEFINE_string("work", None, "internal: be the jaxcl side of this work")
LENGTH, BATCH = 1024, 16


def texts(most: int) -> Iterator[str]:
    """Yields `most` bytes of this installation's text: the embedded sources, then the modules of its packages."""
    from jaxcl.data.sources import Document, embedded, limited

    def all_of_it() -> Iterator[Document]:
        for domain in ("prose", "code", "headers"):
            yield from embedded.make(domain=domain).documents()
        paths = pathlib.Path(sysconfig.get_paths()["purelib"]).rglob("*.py")
        for path in sorted(paths, key=lambda p: hashlib.sha256(str(p.relative_to(p.anchor)).encode()).digest()):
            yield path.read_text(encoding="utf-8", errors="ignore")

    return map(str, limited(all_of_it(), most))


def write(root: pathlib.Path) -> dict[str, Any]:
    """Writes corpus.jsonl and tokenizer.json; returns what they are."""
    from jaxcl import bpe

    documents = list(texts(MEGABYTES.value * 10**6))
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    (root / "corpus.jsonl").write_bytes(data)
    (root / "tokenizer.json").write_text(bpe.train(iter(documents[::3]), VOCAB.value), encoding="utf-8")
    size = sum(len(text.encode()) for text in documents)
    return {"documents": len(documents), "bytes": size, "sha256": hashlib.sha256(data).hexdigest()}


def spent() -> tuple[float, float]:
    """Returns seconds on the wall and CPU-seconds of this process and of the children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Returns what a function returns, and its seconds."""
    wall, cpu = spent()
    value = call()
    after = spent()
    return value, {"wall_s": after[0] - wall, "cpu_s": after[1] - cpu}


def ours(work: dict[str, Any]) -> None:
    """Prepares the corpus, reads all rows once in batches, and prints what that took."""
    import array_record.python.array_record_module  # noqa: F401  (as the other imports, not part of the time)
    import jax
    import numpy as np
    import tokenizers

    from jaxcl.data import prepare, stream, tokenizer
    from jaxcl.data.sources import jsonl

    tok = tokenizer.make(name="hf", path=work["tokenizer"])
    folder = f"{work['folder']}/rows"
    corpus, preparing = timed(
        lambda: prepare.make(
            jsonl.make(path=work["corpus"]), tok, directory=folder, name="corpus", length=LENGTH, held_out=0
        )
    )
    rows = corpus.train
    assert rows.words is not None
    words = rows.words(np.arange(len(rows)))
    stored = words[:, 1 : LENGTH + 2][np.arange(LENGTH + 1) < words[:, :1]]
    steps = len(rows) // BATCH
    batches = stream.make({"corpus": rows}, [{"name": "only", "steps": steps, "mixture": {"corpus": 1.0}}], batch=BATCH)

    def read(count: int) -> int:
        return sum(int(np.asarray(batches.at(step).targets).sum()) for step in range(count))

    def read_words() -> int:
        return sum(int(rows.words(batches.index(step).row)[:, 2 : LENGTH + 2].sum()) for step in range(steps))

    read(4)
    total, reading = timed(lambda: read(steps))
    same, tokens_only = timed(read_words)
    assert total == same
    told = {"tokens": len(stored), "sha256": hashlib.sha256(stored.astype(np.uint32).tobytes()).hexdigest()}
    told |= {"rows": len(rows), "special": 2 * corpus.manifest["splits"]["train"]["documents"], "prepare": preparing}
    count = {"tokens": steps * BATCH * LENGTH}
    versions = {m.__name__: m.__version__ for m in (jax, tokenizers, np)}
    print(json.dumps(told | {"read": reading | count, "read_tokens": tokens_only | count, "versions": versions}))


def measure(command: list[str], work: dict[str, Any], root: pathlib.Path) -> dict[str, Any]:
    """Returns what a fresh process prints that does the work on the first cores."""
    folder = root / "out"
    folder.mkdir()
    cores = sorted(os.sched_getaffinity(0))[: work["processes"]]
    environment = os.environ | {"RAYON_NUM_THREADS": str(work["processes"]), "HF_HUB_OFFLINE": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "home")}
    run = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cores)), *command, json.dumps(work | {"folder": str(folder)})],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env=environment,
    )
    shutil.rmtree(folder)
    if run.returncode:
        raise SystemExit(f"{command[0]}: status {run.returncode}\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def case(processes: int, root: pathlib.Path) -> dict[str, Any]:
    """Returns raw and derived results for a number of processes."""
    work = {"corpus": str(root / "corpus.jsonl"), "tokenizer": str(root / "tokenizer.json"), "length": LENGTH}
    work |= {"batch": BATCH, "processes": processes, "lean": False, "threads": False}
    us = [sys.executable, "-m", "experiments.benchmarks.data_pipeline", "--work"]
    them = [PEER.value, str(HERE / "hf_data_pipeline.py")]
    sides = {"jaxcl": (us, work), "datasets": (them, work), "lean": (them, work | {"lean": True})}
    if processes > 1:
        sides["lean_threads"] = (them, work | {"lean": True, "threads": True})
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for i in range(REPEATS.value + 1):
        for name in list(sides)[:: (-1) ** i]:  # in turn, and the other way round every second time
            command, what = sides[name]
            told = measure(command, what, root)
            raw[name] += [told] if i else []
            print(processes, i, name, told["prepare"], told["read"], flush=True)  # progress
    if len({(run["tokens"], run["sha256"]) for runs in raw.values() for run in runs}) != 1:
        raise SystemExit(f"not the same tokens: {[(name, runs[0]['tokens']) for name, runs in raw.items()]}")
    rates = {name: [rated(run) for run in runs] for name, runs in raw.items()}
    ratios = {
        name: [{k: mine[k] / their[k.replace("read_tokens/", "read/")] for k in mine} for mine, their in pairs]
        for name, pairs in ((n, list(zip(rates["jaxcl"], rates[n], strict=True))) for n in sides if n != "jaxcl")
    }
    spread = {"tokens_per_second": rates, "jaxcl_rate_over_theirs": ratios}
    summary = {what: {name: spread_of(runs) for name, runs in of.items()} for what, of in spread.items()}
    return {"processes": processes, **summary, "raw": raw}


def rated(run: dict[str, Any]) -> dict[str, float]:
    """Returns tokens per second of each phase and clock."""
    phases = [phase for phase in ("prepare", "read", "read_tokens") if phase in run]
    return {f"{p}/{c}": run[p].get("tokens", run["tokens"]) / run[p][c] for p in phases for c in ("wall_s", "cpu_s")}


def spread_of(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Returns the median, the least and the most of every figure."""
    figures = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        key: [float(f"{x:.4g}") for x in (statistics.median(values), min(values), max(values))]
        for key, values in figures.items()
    }


def machine() -> dict[str, Any]:
    """Returns what the numbers depend on besides the code."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    about = {"cpu": model, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    return about | {"python": platform.python_version()}


def main(_) -> None:
    if WORK.value:
        ours(json.loads(WORK.value))
        return
    if PEER.value is None:
        raise app.UsageError("give --peer_python, an interpreter that has datasets and transformers")
    told = [arg for arg in sys.argv[1:] if not arg.startswith("--folder")]
    command = ["--peer_python=PYTHON" if arg.startswith("--peer_python") else arg for arg in told]
    results: dict[str, Any] = {
        "command": " ".join(["python -m experiments.benchmarks.data_pipeline", *command]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    root = pathlib.Path(tempfile.mkdtemp(dir=FOLDER.value))
    try:
        results |= {"corpus": write(root), "vocab": VOCAB.value, "length": LENGTH, "batch": BATCH, "cases": []}
        for processes in PROCESSES.value:
            results["cases"].append(case(int(processes), root))
            print(json.dumps(results["cases"][-1]["jaxcl_rate_over_theirs"], indent=1), flush=True)
            pathlib.Path(OUTPUT.value).write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    app.run(main)
