"""Launcher for tests with several JAX processes on one machine.

In the test:    results = run(WORKER, "arg", processes=2, devices=2)      one JSON value for each process
In the worker:  processes.join()                                          first thing; then jax is ready
                processes.report({"loss": ...})                           last thing
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
WORKERS = pathlib.Path(__file__).parent / "workers"


class Process(NamedTuple):
    """A running worker; `log` holds what it writes."""

    popen: subprocess.Popen
    log: pathlib.Path


def start(
    worker: str,
    *args: object,
    processes: int = 1,
    devices: int = 1,
    env: dict | None = None,
    hosts: list[list[str]] | None = None,
    address: str = "127.0.0.1",
) -> list[Process]:
    """Starts `tests/workers/{worker}.py` in `processes` interpreters with `devices` CPU devices each.

    With `hosts`, the commands that run something on each of them; `address` is that of the first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = pathlib.Path(tempfile.mkdtemp(prefix="jaxcl-processes-"))
    started = []
    for i in range(processes):
        settings = {
            **{name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")},
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAXCL_TEST_DEVICES": str(devices),
            **({"JAX_COORDINATOR_ADDRESS": f"{address}:{port}"} if processes > 1 else {}),
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
            **(env or {}),
        }
        log = logs / f"{i}.log"
        with log.open("w") as file:
            command = [*(hosts[i] if hosts else ()), sys.executable, str(WORKERS / f"{worker}.py"), *map(str, args)]
            started.append(Process(subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT), log))
    return started


def finish(started: list[Process], timeout: float = 600, codes: tuple[int, ...] = (0,)) -> list[Any]:
    """Waits for all processes and returns what each reported; kills them all and shows their logs if one fails."""
    end = time.monotonic() + timeout
    try:
        for process in started:
            process.popen.wait(max(end - time.monotonic(), 0.1))
        late = False
    except subprocess.TimeoutExpired:
        late = True
    for process in started:
        process.popen.kill()
        process.popen.wait()
    found = [process.popen.returncode for process in started]
    if late or any(code not in codes for code in found):
        logs = "\n".join(f"--- process {i}\n{process.log.read_text()}" for i, process in enumerate(started))
        raise AssertionError(f"{'timeout; ' if late else ''}exit codes {found}, expected {codes}\n{logs}")
    return [_reported(process.log) for process in started]


def run(worker: str, *args: object, processes: int = 1, devices: int = 1, timeout: float = 600, **options: Any) -> list:
    """Starts the worker, waits, and returns what each process reported."""
    return finish(start(worker, *args, processes=processes, devices=devices, **options), timeout)


def wait_for(started: list[Process], text: str, timeout: float = 300) -> None:
    """Blocks until every process has written `text`: the moment to send a signal."""
    end = time.monotonic() + timeout
    while not all(text in process.log.read_text() for process in started):
        if time.monotonic() > end or any(process.popen.poll() is not None for process in started):
            finish(started, timeout=0.1, codes=())
        time.sleep(0.05)


def join() -> None:
    """Configures JAX in a worker and joins the other processes."""
    import jax

    from jaxcl import distributed

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(os.environ["JAXCL_TEST_DEVICES"]))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    distributed.initialize()


def report(value: Any) -> None:
    """Writes the result of a worker and leaves together with the others."""
    from jaxcl import distributed

    distributed.shutdown()
    print("RESULT " + json.dumps(value), flush=True)


def _reported(log: pathlib.Path) -> Any:
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None
