"""The command line, which a signal hits at a given point: run.py POINT --config=FILE --workdir=FOLDER ...

POINT is `none`, or SIGNAL:WHERE:STEP, or SIGNAL:WHERE:STEP@PROCESS for one process alone; HANG is a signal that never
ends. WHERE is one of
  step      the step is dispatched, nothing is known of it yet
  end_task  the stage that ends at STEP is closed and evaluated, nothing is saved
  save      the checkpoint is on disk but for its manifest
  record    half a line of its metrics is written
  commit    rows are on their way to the reservoir: STEP of them are on disk, the header does not count them yet
In options {process} is the number of the process.
"""

import os
import signal
import sys
import time

import processes


def hook(point: str) -> None:
    """Plants the signal."""
    from jaxcl import checkpoint, metrics, train
    from jaxcl.data import stripe

    name, where, step = point.split(":")
    owner, method = {
        "step": (train.Session, "account"),
        "end_task": (train.Session, "end_task"),
        "save": (checkpoint.Checkpoints, "_commit"),
        "record": (metrics.Jsonl, "write"),
        "commit": (stripe.Stripe, "_write_head"),
    }[where]
    original = getattr(owner, method)

    def strike() -> None:
        if name == "HANG":
            time.sleep(10**6)
        os.kill(os.getpid(), getattr(signal, name))

    def changed(self, first, *rest, **named):
        if where == "save" and first == int(step):
            strike()
        if where == "commit" and first.count == int(step):
            strike()
        if where == "record" and first["kind"] == "train" and first["step"] == int(step):
            self._file.write('{"kind":"train","st')
            self._file.flush()
            strike()
        result = original(self, first, *rest, **named)
        if (where == "step" and first + 1 == int(step)) or (where == "end_task" and self.step == int(step)):
            strike()
        if name == "SIGTERM" and where == "step" and first + 1 > int(step):
            time.sleep(0.5)  # the other processes hear of the signal through a service, in a time of its own
        return result

    setattr(owner, method, changed)


processes.join()
POINT, _, PROCESS = sys.argv.pop(1).partition("@")
if POINT != "none" and PROCESS in ("", os.environ["JAX_PROCESS_ID"]):
    hook(POINT)
sys.argv = [argument.replace("{process}", os.environ["JAX_PROCESS_ID"]) for argument in sys.argv]
from jaxcl import main  # noqa: E402

main.cli()
