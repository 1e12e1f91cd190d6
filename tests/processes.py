"""Launcher for tests with several JAX processes on one machine.

In the test:    results = run(WORKER, "arg", processes=2, devices=2)      one JSON value for each process
In the worker:  processes.join()                                          first thing; then jax is ready
                processes.report({"loss": ...})                           last thing
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
WORKERS = pathlib.Path(__file__).parent / "workers"
TURN = itertools.count()


class Fork:
    """A worker that `workers/forks.py` has forked: what tests need of a `subprocess.Popen`."""

    def __init__(self, pid: int, status: pathlib.Path):
        self.pid, self.returncode, self._status = pid, None, status

    def poll(self) -> int | None:
        """Returns the exit status, None while it runs."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Returns the exit status once it is known."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Process(NamedTuple):
    """A running worker; `log` holds what it writes."""

    popen: Fork | subprocess.Popen
    log: pathlib.Path


@functools.cache
def interpreter(number: int) -> subprocess.Popen:
    """Returns one that is forked for workers; each number orders sets in its own way."""
    settings = {**environment(), "PYTHONHASHSEED": str(number)}
    command = [sys.executable, str(WORKERS / "forks.py")]
    return subprocess.Popen(command, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def environment() -> dict[str, str]:
    """Returns the environment of workers."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def start(
    worker: str,
    *args: object,
    processes: int = 1,
    devices: int = 1,
    env: dict | None = None,
    hosts: list[list[str]] | None = None,
    address: str = "127.0.0.1",
) -> list[Process]:
    """Starts `tests/workers/{worker}.py` in `processes` processes with `devices` CPU devices each.

    Neighbours, and one that goes on with what the last one left, come from different interpreters: nothing may depend
    on the order of a set. With `hosts`, the commands that run something on each of them, a worker has an interpreter of
    its own; `address` is that of the first.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = pathlib.Path(tempfile.mkdtemp(prefix="jaxcl-processes-"))
    started = []
    for i in range(processes):
        settings = {
            **environment(),
            "JAXCL_TEST_DEVICES": str(devices),
            **({"JAX_COORDINATOR_ADDRESS": f"{address}:{port}"} if processes > 1 else {}),
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
            **(env or {}),
        }
        log = logs / f"{i}.log"
        arguments = [worker, *map(str, args)]
        made = _beyond(hosts[i], arguments, settings, log) if hosts else _fork(arguments, settings, log)
        started.append(Process(made, log))
    return started


def _fork(arguments: list[str], settings: dict[str, str], log: pathlib.Path) -> Fork:
    log.touch()
    request = {"arguments": arguments, "environment": settings, "log": str(log)}
    server = interpreter(1 + next(TURN) % 2)
    server.stdin.write(json.dumps(request).encode() + b"\n")
    return Fork(int(server.stdout.readline()), log.with_name(f"{log.name}.status"))


def _beyond(host: list[str], arguments: list[str], settings: dict[str, str], log: pathlib.Path) -> subprocess.Popen:
    command = [*host, sys.executable, str(WORKERS / f"{arguments[0]}.py"), *arguments[1:]]
    with log.open("w") as file:
        return subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT)


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
