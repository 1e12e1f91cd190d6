"""Several runs one after the other in one group of processes: elastic.py RUNS.json.

RUNS.json is a list of [config, workdir, step]; a run is stopped at that step as by SIGTERM, or never if it is 0. All of
them share what is imported and joined once. Reports the exit statuses.
"""

import contextlib
import functools
import json
import pathlib
import sys

import processes

processes.join()
from jaxcl import distributed, train  # noqa: E402


@contextlib.contextmanager
def stops(step: int):
    yield lambda number: "SIGTERM" if step and number >= step else None


leave, distributed.shutdown = distributed.shutdown, lambda: None  # a group of processes can be joined only once
found = []
for config, workdir, step in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    distributed.stop_on_signal = functools.partial(stops, step)
    found.append(train.run(config, workdir, final=False))
distributed.shutdown = leave
processes.report(found)
