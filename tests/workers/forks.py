"""An interpreter that has imported what workers need, and is forked for each of them: an import costs five CPU-seconds.

It reads one line of JSON for a worker, {"arguments": [name, ...], "environment": {...}, "log": FILE}, and answers with
the process number; when the worker ends, its exit status is in LOG.status. It leaves when its input is closed. No
device is touched before the fork, and there is no thread.
"""

import gc
import json
import os
import pathlib
import runpy
import select
import signal
import sys

import jax
import optax  # noqa: F401  as all below: imported here once
from orbax.checkpoint import v1 as ocp  # noqa: F401

from jaxcl import main, program, train  # noqa: F401
from jaxcl.hf import __main__ as command  # noqa: F401

WORKERS = pathlib.Path(__file__).parent
ENVIRONMENT = dict(os.environ)


def serve() -> dict | None:
    """Forks until the input is closed. Returns the request in a fork, and None in this process."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    logs: dict[int, str] = {}
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            reap(logs)
        if 0 in ready:
            request = received()
            if request is None:
                return None
            child = os.fork()
            if not child:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake)
                os.close(woken)
                return request
            logs[child] = request["log"]
            os.write(1, f"{child}\n".encode())


def received() -> dict | None:
    """Returns a request, or None at the end of the input."""
    data = b""
    while not data.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return None
        data += part
    return json.loads(data)


def reap(logs: dict[int, str]) -> None:
    """Writes the exit status of every fork that has ended."""
    while logs:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        path = pathlib.Path(f"{logs.pop(child)}.status")
        path.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
        path.with_suffix(".part").rename(path)  # whole or not at all


def become(request: dict) -> None:
    """Takes the place of an interpreter that was started with the arguments and the environment of a request."""
    os.environ.clear()
    os.environ.update(request["environment"])
    for target, name, flags in ((0, os.devnull, os.O_RDONLY), (1, request["log"], os.O_WRONLY | os.O_APPEND)):
        source = os.open(name, flags)
        os.dup2(source, target)
        os.close(source)
    os.dup2(1, 2)
    for name, text in request["environment"].items():  # which jax has read when it was imported
        if ENVIRONMENT.get(name) != text and name.lower() in jax.config.values:
            known = jax.config.values[name.lower()]
            kind = {bool: lambda text: text not in ("", "0"), type(None): str}.get(type(known), type(known))
            jax.config.update(name.lower(), kind(text))
    sys.argv = [str(WORKERS / f"{request['arguments'][0]}.py"), *request["arguments"][1:]]


gc.freeze()  # what is never looked at stays shared with the forks
REQUEST = serve()
if REQUEST is not None:
    become(REQUEST)
    runpy.run_path(sys.argv[0], run_name="__main__")
