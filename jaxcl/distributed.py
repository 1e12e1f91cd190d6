"""Several processes: joining them, stopping them together, leaving together.

distributed.cache_compilations()            so that a second start need not compile
distributed.initialize()                    before anything else touches JAX; nothing happens without a cluster
with distributed.stop_on_signal() as stopped:
    ...
    if reason := stopped(step):             the same answer on every process, so all of them save and leave
        break
distributed.together(action)                fails on all processes if it fails on one
distributed.agree(workdir=..., config=...)  fails on all processes if they were not given the same
distributed.stopped_status()                exit status of a run that SIGTERM stopped
distributed.shutdown()                      last: a process that leaves early makes the others abort
with distributed.leaving(status):           instead, if another process is gone
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxcl.schema import UserError

GONE = re.compile(r"[Cc]oordination service|[Bb]arrier (timed out|failed)|waiting at barrier|heartbeat")
OWN = re.compile(r"RESOURCE_EXHAUSTED|INVALID_ARGUMENT|CpuCallback")  # what a process has done itself
APPEAR_S = 300  # seconds in which all processes must appear
ABSENT = 4  # exit status of a process that waited for the first in vain: another machine may be gone


def initialize() -> bool:
    """Joins the processes of a cluster and returns whether there is one.

    A cluster is there if JAX_COORDINATOR_ADDRESS is set (with JAX_NUM_PROCESSES and JAX_PROCESS_ID for launchers that
    JAX does not know); if JAXCL_CLUSTER is set, as the launcher of a Cloud TPU slice does; if Slurm, Open MPI or a
    Kubernetes JobSet started more than one process; or if the environment names several hosts of a TPU slice.

    Raises:
      RuntimeError: the other processes did not appear.
      SystemExit: nobody answers at the address of process 0; the status is 4.
      UserError: what the environment says of the cluster is no cluster; see also `stopped_status`.
    """
    stopped_status()  # what is wrong with it is said now, not after days
    if jax.distributed.is_initialized():
        return True
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        _join(env["JAX_COORDINATOR_ADDRESS"], _whole("JAX_NUM_PROCESSES", 1), _whole("JAX_PROCESS_ID", 0))
    elif (
        "JAX_COORDINATOR_ADDRESS" in env
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "JAXCL_CLUSTER" in env
        or "JOBSET_NAME" in env
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or any(_whole(name, 1, "1") > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    ):
        try:
            jax.distributed.initialize()  # JAX asks the scheduler for the rest
        except (ValueError, LookupError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"cluster: the environment names one that JAX does not find ({text}); start the processes by its "
                "launcher, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            ) from error
    else:
        return False
    return True


def _whole(name: str, least: int, default: str = "") -> int:
    """Returns a whole number of the environment.

    Raises:
      UserError: it is none, or missing without a default.
    """
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise UserError(f"{name}={text!r}: must be a whole number from {least} on")
    return int(text)


def _join(address: str, count: int, own: int) -> None:
    """Joins `count` processes, of which this is number `own`; says whom it waits for if that takes long."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r}: must be HOST:PORT of process 0, as in 10.0.0.2:1234")
    if own >= count:
        raise UserError(f"JAX_PROCESS_ID={own}: must be below JAX_NUM_PROCESSES={count}; processes are numbered from 0")
    whom = f"process 0 at JAX_COORDINATOR_ADDRESS={address}" if own else f"the other {count - 1} processes"
    said = threading.Timer(10, print, (f"waiting for {whom}, {APPEAR_S} s at most",), {"flush": True})
    said.daemon = True
    said.start()
    try:
        if own and not _answers(host.strip("[]"), int(port)):
            print(f"error: {whom} did not answer in {APPEAR_S} s; is that where it runs?", file=sys.stderr, flush=True)
            raise SystemExit(ABSENT)
        jax.distributed.initialize(address, count, own, initialization_timeout=APPEAR_S)
    finally:
        said.cancel()


def _answers(host: str, port: int) -> bool:
    """Returns whether somebody takes connections, or begins to in time; JAX itself would abort the process."""
    end = time.monotonic() + APPEAR_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            return True
        time.sleep(0.2)
    return False


def cache_compilations() -> str | None:
    """Keeps compiled programs in ~/.cache/jaxcl/compiled, so that a run that starts again does not compile again.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false or a home that cannot be written
    leaves it out. Returns the folder, None if there is none.
    """
    known, wanted = (
        getattr(jax.config, f"jax_{name}") for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if known or not wanted:
        return known
    place = os.path.join(os.path.expanduser("~"), ".cache", "jaxcl", "compiled")
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)  # what lies there will be executed
    except OSError:
        return None
    if not os.access(place, os.W_OK) or os.stat(place).st_uid != os.getuid():
        return None
    jax.config.update("jax_compilation_cache_dir", place)
    return place


def shutdown() -> None:
    """Waits for the other processes and leaves; harmless without a cluster."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def leaving(status: int) -> Iterator[None]:
    """Ends this process at once where the block fails in company: all that waits for the others would be in vain.

    With other processes, an error of the runtime means that one of them is gone, unless it names something that this
    process has done, such as running out of memory: then the exit status is 1, as in a process without company. A
    checkpoint that could not be written because the processes did not meet means the same.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        runtime = isinstance(error, jax.errors.JaxRuntimeError)
        unmet = getattr(error, "cause", None) == "not saved" and GONE.search(text)
        if jax.process_count() == 1 or not (runtime or unmet):
            raise
        own = runtime and OWN.search(text)
        told = text[:400] if own else f"another process or its machine is gone ({text[:200]}); start all of them again"
        print(f"error: {told}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if own else status)


def together(action: Callable[[], object]) -> None:
    """Calls `action` on every process and returns once all have done it.

    Raises:
      UserError: that of `action`; and on the other processes, so that none waits for one that has left.
    """
    error = None
    try:
        action()
    except UserError as found:
        error = found
    failed = [error is not None]
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.int32(failed[0])).tolist()
    if error:
        raise error
    if any(failed):
        raise UserError(f"process {failed.index(True)} cannot go on; its own message says why")


def agree(**given: Any) -> None:
    """Returns if all processes were given the same (JSON); what differs would make them train different models.

    Raises:
      UserError: on the process that was given something else it names the first key; the others name that process.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(given, sort_keys=True, default=str).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text[:size].ljust(size), np.uint8)
    first = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))

    def compare() -> None:
        name, there, here = next(_different(first, json.loads(text)), ("", None, None))
        if name:
            raise UserError(
                f"{name}={here!r} on process {jax.process_index()}, and {there!r} on process 0: start all processes "
                "with the same command line"
            )

    together(compare)


def _different(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value there, value here) of what differs."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            yield from _different(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b


def stopped_status() -> int:
    """Returns the exit status of a run that SIGTERM stopped: JAXCL_STOPPED, or 0.

    To a scheduler 0 means that the work is done. One that sends SIGTERM when it takes a machine back, and starts again
    what did not succeed, sets JAXCL_STOPPED to a status that it knows; those in `tpu/` set 75 (EX_TEMPFAIL).

    Raises:
      UserError: JAXCL_STOPPED is no exit status.
    """
    text = os.environ.get("JAXCL_STOPPED", "0")
    if not (text.isascii() and text.isdecimal() and int(text) < 126):
        raise UserError(f"JAXCL_STOPPED={text!r}: must be an exit status, 0 to 125")
    return int(text)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], str | None]]:
    """Turns SIGTERM and the first Ctrl-C into an agreed end; a second Ctrl-C interrupts at once.

    Yields a function of the step, to be asked once for every step by every process: the reason to stop after
    this step, or None. With several processes a signal to any of them reaches all through JAX's preemption service,
    which settles on a step that none has passed; acting on a local flag would leave the others waiting forever.
    """
    seen: list[str] = []
    together = jax.process_count() > 1

    def handler(number: int, frame: FrameType | None) -> None:
        del frame
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(signal.Signals(number).name)
        if together:
            os.kill(os.getpid(), signal.SIGTERM)  # the one that the preemption service listens to

    # The service installs its own handler of SIGTERM when the processes join; it must stay.
    numbers = [signal.SIGINT] if together else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, handler) for number in numbers}

    def stopped(step: int) -> str | None:
        if together:
            return (seen[0] if seen else "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None
        return seen[0] if seen else None

    try:
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)
