"""Exports FOLDER to OUT/MOMENT and is killed at that moment, for each: killed_export.py FOLDER OUT. Then to the end.

Reports moment -> [signal, names in OUT after the kill].
"""

import os
import pathlib
import signal
import sys

import hf_folder
import processes

from jaxcl.hf import __main__ as command
from jaxcl.hf import write

folder, out = map(pathlib.Path, sys.argv[1:])
limit = write.Writer.__init__.__kwdefaults__
limit["shard_bytes"] = 4000  # many shards


def export(name: str) -> None:
    """Runs the command in this process."""
    processes.join()
    found = hf_folder.weights_of(folder, *hf_folder.load(folder))
    command.weights.load = lambda run, step=None: found
    command.main(["export", "run", str(out / name)])


def killed(moment: str, calls: int) -> list:
    """Exports in a fork that is killed when it calls a function of the writer for the `calls`-th time."""
    if not (child := os.fork()):
        where = write if moment == "_sync" else write.Writer
        plain, left = getattr(where, moment), [calls]

        def counted(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)

        setattr(where, moment, counted)
        export(moment)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [-status, sorted(str(path.relative_to(out)) for path in out.rglob("*"))]


# Between two tensors, before config.json, and when every file is there but the folder has no name yet.
found = {moment: killed(moment, calls) for moment, calls in (("add", 9), ("json", 1), ("_sync", 1))}
for name in found:
    export(name)
processes.report(found)
