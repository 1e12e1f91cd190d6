"""A process of several dies, or one of them is sent a signal: the others leave, and the run ends as without them.

Every group of processes compiles each program for itself; all methods and counts take part with JAXCL_ALL_LAYOUTS=1.
"""

import time

import layouts
import processes
import pytest
import small

from jaxcl import goodput, watch

STEPS = 8  # of a stage
SAVED = 3
KILLED, STOPPED = 8, 10  # the first is the last step of a stage, the second of the next one
CASES = [(name, count) for name in layouts.METHODS for count in (2, 4)] if layouts.ALL_LAYOUTS else [("mer", 2)]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_one_process_dies_and_one_is_sent_a_signal(tmp_path, tmp_path_factory, name, count):
    folder = tmp_path_factory.getbasetemp() / "small"
    folder.mkdir(exist_ok=True)
    config = small.write(layouts.settings(name, STEPS, SAVED), tmp_path / "config.py")

    def start(workdir, point="none", count=count):
        arguments = ("run", point, f"--config={config}", f"--workdir={tmp_path / workdir}")
        env = {**small.environment(folder), "JAXCL_STOPPED": "75"}
        return processes.start(*arguments, processes=count, devices=4 // count, env=env)

    victim = count // 2  # neither the coordinator nor, of four, the last
    started = start("run", f"SIGKILL:step:{KILLED}@{victim}")
    started[victim].popen.wait(timeout=300)
    began = time.monotonic()
    processes.finish(started, timeout=90, codes=(watch.MACHINE, -9))
    assert time.monotonic() - began < 60
    assert [one.popen.returncode for one in started] == [-9 if i == victim else watch.MACHINE for i in range(count)]
    assert small.checkpoint(tmp_path / "run")[0] in (SAVED, 2 * SAVED)  # the second waits for the first
    processes.finish(start("run", f"SIGTERM:step:{STOPPED}@{count - 1}"), codes=(75,))
    step = small.checkpoint(tmp_path / "run")[0]
    assert STOPPED <= step < 2 * STEPS
    assert not (tmp_path / "run" / "report.json").exists()
    processes.finish(start("run"))
    processes.finish(start("straight", count=1))
    assert small.outcome(tmp_path / "run") == small.outcome(tmp_path / "straight")
    assert [one.cause for one in goodput.attempts(tmp_path / "run")] == ["JaxRuntimeError", "SIGTERM", "finished"]
