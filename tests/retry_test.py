"""Why a job ended and what follows: the table, waits, limits, the same step twice, and a command seen through."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from jaxcl import goodput, retry
from jaxcl.retry import Entry, Limits
from jaxcl.schema import UserError

HANG = "error: no step for 3600 s after step 12 (config.watch.hang_s); the stacks are in"
GONE = "error: another process or its machine is gone (DEADLINE_EXCEEDED); start all of them again"
COPIES = "error: step 20: devices hold different copies of params/w: a bit has flipped"

TABLE = [
    # status, log, cause in the ledger -> cause, action
    (0, "", "finished", "finished", "end"),
    (2, "error: config.stream: unknown", None, "user", "end"),
    (2, "No space left on device", None, "user", "end"),  # what the run says of itself counts more than words
    (3, "error: steps 1 to 8 were all skipped", "bad steps", "training", "end"),
    (130, "", "SIGINT", "interrupted", "end"),
    (-2, "", None, "interrupted", "end"),
    (75, "stopped by SIGTERM", "SIGTERM", "preempted", "now"),
    (143, "", None, "preempted", "now"),
    (-15, "", None, "preempted", "now"),
    (4, COPIES, "machine", "machine", "elsewhere"),
    (4, "", None, "machine", "elsewhere"),
    (4, HANG, "hang", "hang", "wait"),
    (4, "", "hang", "hang", "wait"),
    (4, GONE, "JaxRuntimeError", "coordinator", "wait"),
    (1, "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating", None, "memory", "wait"),
    (1, "", "MemoryError", "memory", "wait"),
    (-9, "", None, "killed", "wait"),
    (137, "oom-kill: constraint", None, "memory", "wait"),
    (1, "error: checkpoint 12 was not written: [Errno 28] No space left on device", "not saved", "disk", "wait"),
    (1, "OSError: [Errno 122] Disk quota exceeded: '/runs/a'", None, "disk", "wait"),
    (1, "OSError: [Errno 30] Read-only file system: '/runs/a'", "OSError", "disk", "wait"),
    (1, "OSError: [Errno 5] Input/output error", "OSError", "disk", "wait"),
    (1, "", "not saved", "disk", "wait"),
    (-11, "", None, "crash", "wait"),
    (134, "F0000 Check failed: coordination service shut down", None, "coordinator", "wait"),
    (1, "Traceback ... ValueError", "ValueError", "unknown", "wait"),
    (77, "", None, "unknown", "wait"),
]


@pytest.mark.parametrize(("status", "log", "ledger", "cause", "action"), TABLE)
def test_every_end_has_a_cause_and_a_policy(status, log, ledger, cause, action):
    assert retry.classify(status, log, ledger) == cause
    assert retry.decide([Entry(0.0, cause)], Limits()).action == action


def test_the_table_covers_every_cause_but_the_clouds():
    assert {row[3] for row in TABLE} == set(retry.POLICIES) - {"cloud"}


@pytest.mark.parametrize(
    ("causes", "cause"),
    [
        (["finished", "preempted"], "preempted"),
        (["coordinator", "killed", "coordinator"], "killed"),
        (["coordinator", "user"], "user"),
        (["preempted", "hang"], "hang"),
    ],
)
def test_of_several_processes_the_one_that_others_only_noticed_counts(causes, cause):
    assert retry.worst(causes) == cause


def run_of(causes, limits, every=1000.0, **more):
    history, found = [], []
    for i, cause in enumerate(causes):
        entry = cause if isinstance(cause, Entry) else Entry(every * i, cause)
        history.append(entry)
        found.append(retry.decide(history, limits, **more))
    return found


def test_waits_double_up_to_a_bound_and_a_key_spreads_them():
    limits = Limits(retries=9, backoff=10.0, most=100.0)
    waits = {key: [v.wait for v in run_of(["unknown"] * 9, limits, key=key)] for key in ("a", "b")}
    for found in waits.values():
        for i, wait in enumerate(found):
            whole = min(10.0 * 2**i, 100.0)
            assert whole / 2 <= wait < whole
    assert waits["a"] != waits["b"]
    assert waits["a"] == [v.wait for v in run_of(["unknown"] * 9, limits, key="a")]
    spread = [retry.uniform(f"job {i}") for i in range(1000)]
    assert 0.45 < sum(spread) / 1000 < 0.55
    assert min(spread) < 0.02
    assert max(spread) > 0.98


def test_failures_in_a_row_end_it_and_a_good_hour_or_a_save_begins_anew():
    limits = Limits(retries=2)
    assert [v.action for v in run_of(["unknown"] * 3, limits)] == ["wait", "wait", "end"]
    last = run_of(["unknown", "killed", "unknown"], limits)[-1]
    assert last.text == "the job failed; gave up after 2 retries"
    for between in ("preempted", Entry(2500.0, "unknown", None, retry.HEALTHY_S)):
        found = run_of(["unknown", "unknown", between, "unknown"], limits)
        assert "end" not in [v.action for v in found]
    short = Entry(2500.0, "unknown", None, retry.HEALTHY_S - 1)
    assert run_of(["unknown", "unknown", short], limits)[-1].action == "end"


def test_some_causes_have_fewer_retries_than_others():
    limits = Limits(retries=5)
    for cause in ("memory", "disk"):
        assert [v.action for v in run_of([cause] * 3, limits)] == ["wait", "wait", "end"]
    for cause in ("hang", "crash"):
        assert [v.action for v in run_of([cause] * 4, limits)] == ["wait"] * 3 + ["end"]
    assert [v.action for v in run_of(["machine"] * 4, limits)] == ["elsewhere"] * 3 + ["end"]
    assert [v.action for v in run_of(["killed", "memory"] * 2, limits)][-1] == "wait"


def test_the_same_step_twice_is_no_chance():
    limits = Limits()
    once = Entry(0.0, "hang", 40)
    assert run_of([once, Entry(9.0, "hang", 41)], limits)[-1].action == "wait"
    found = run_of([once, Entry(9.0, "unknown", 40)], limits)[-1]
    assert found.action == "end"
    assert "at step 40 as before" in found.text
    assert run_of([once, Entry(5.0, "preempted"), Entry(9.0, "hang", 40)], limits)[-1].action == "end"
    assert run_of([Entry(0.0, "unknown", 0), Entry(9.0, "unknown", 0)], limits)[-1].action == "end"
    for cause in retry.CHANCE:
        assert run_of([Entry(0.0, cause, 40), Entry(9.0, cause, 40)], limits)[-1].action != "end"
    assert run_of([Entry(0.0, "killed"), Entry(9.0, "killed")], limits)[-1].action == "wait"  # steps are not known


def test_an_hour_has_room_for_so_many_starts():
    limits = Limits(retries=99, hour=3, backoff=0.0)
    found = run_of(["preempted"] * 5, limits, every=60.0)
    assert [v.wait for v in found] == [0.0, 0.0, 3600.0 - 120, 3600.0 - 120, 3600.0 - 120]
    assert {v.action for v in found} == {"now"}
    assert run_of(["preempted"] * 5, limits, every=2000.0)[-1].wait == 0.0


def command(tmp_path, statuses):
    """A command that ends each time with the next status, and enters in a ledger the step it reached, or nothing."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, pathlib, signal, sys\n"
        "from jaxcl import goodput\n"
        f"place, statuses = pathlib.Path({str(tmp_path)!r}), {statuses!r}\n"
        "count = len(list(place.glob('start.*')))\n"
        "(place / f'start.{count}').touch()\n"
        "status, step, cause = statuses[min(count, len(statuses) - 1)]\n"
        "print('started', os.environ['JAXCL_STOPPED'], file=sys.stderr)\n"
        "ledger = goodput.Ledger(place)\n"
        "if step is not None: ledger.started(0.0)\n"
        "if cause: ledger.ended(step, cause)\n"
        "if status < 0: os.kill(os.getpid(), -status)\n"
        "sys.exit(status)\n"
    )
    return [sys.executable, str(script), f"--workdir={tmp_path}"]


@pytest.mark.parametrize(
    ("statuses", "status", "starts", "waited"),
    [
        ([(75, 3, "SIGTERM"), (-9, 0, None), (1, 7, "OSError"), (0, 9, "finished")], 0, 4, 3),
        ([(1, 7, "ValueError"), (1, 7, "ValueError"), (0, 9, "finished")], 1, 2, 1),
        ([(1, 7, "ValueError"), (1, 8, "ValueError"), (2, 0, None)], 2, 3, 2),
        ([(-9, 0, None)], 137, 3, 2),
        ([(1, 7, "OSError"), (1, None, None)], 1, 3, 2),  # the step of the first says nothing of the others
    ],
)
def test_a_command_is_seen_through(tmp_path, capsys, statuses, status, starts, waited):
    slept = []
    limits = Limits(retries=2, backoff=7.0)
    assert retry.see_through(command(tmp_path, statuses), limits, slept.append) == status
    assert len(list(tmp_path.glob("start.*"))) == starts
    assert len(slept) == waited
    assert "started 75" in capsys.readouterr().err


def test_a_command_that_runs_for_an_hour_each_time_is_started_again(monkeypatch):
    now, statuses = [0.0], [1] * 10 + [0]

    def attend(command):
        now[0] += retry.HEALTHY_S
        return statuses.pop(0), ""

    monkeypatch.setattr(retry, "attend", attend)
    monkeypatch.setattr(retry, "time", SimpleNamespace(time=lambda: now[0]))
    assert retry.see_through(["job"], Limits(retries=2), lambda seconds: None) == 0
    assert statuses == []


def test_a_signal_reaches_the_command_and_ends_both(tmp_path):
    script = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    script += "print('ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    whole = [sys.executable, "-m", "jaxcl.retry", "--", sys.executable, "-c", script]
    with subprocess.Popen(whole, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr.readline() == "ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=120) == 75
        assert running.stderr.read() == ""


def test_the_ledger_of_another_attempt_says_nothing(tmp_path):
    ledger = goodput.Ledger(tmp_path, clock=lambda: 100.0)
    ledger.ended(12, "hang")
    assert retry.failed_at(tmp_path, 99.0) == ("hang", 12)
    assert retry.failed_at(tmp_path, 101.0) == (None, None)
    assert retry.failed_at(tmp_path / "none", 0.0) == (None, None)
    ledger.beat(13)  # then it was killed
    assert retry.failed_at(tmp_path, 0.0) == (None, None)
    with (tmp_path / goodput.FILE).open("a") as file:
        file.write('{"event": "end", "ti')
    ledger.ended(14, "SIGTERM")
    assert retry.failed_at(tmp_path, 0.0) == (None, None)


def test_workers_are_judged_by_what_they_report(tmp_path, capsys):
    lines = [
        "jaxcl job=main host=a args=1-2 state=exit code=4 cause=coordinator",
        "jaxcl job=main host=b args=1-2 state=exit code=139 cause=crash step=12",
    ]
    history = tmp_path / "history"
    flags = ("judge", f"--history={history}", "--backoff=0", "--report=" + "\n".join(lines))
    retry.main(flags)
    assert capsys.readouterr().out == "wait 0 139 the process crashed, exit status 139; retry 1 of 5\n"
    retry.main(flags)
    assert capsys.readouterr().out.startswith("end 0 139 the process crashed, exit status 139, at step 12 as before")
    assert [json.loads(line)[1:3] for line in history.read_text().splitlines()] == [["crash", 12]] * 2
    retry.main(("judge", "--report=state=exit code=2 \nstate=lost"))
    assert capsys.readouterr().out.startswith("end 0 2 bad input")
    retry.main(("judge", "--report=state=lost", "--backoff=0"))
    assert capsys.readouterr().out.startswith("wait 0 137 killed")


def test_of_the_steps_that_workers_report_the_last_counts():
    lines = "state=exit code=139 cause=crash step=12\nstate=exit code=4 cause=coordinator step=11"
    assert retry.read(lines) == ("crash", 139, 12)


@pytest.mark.parametrize(("seconds", "last"), [(4000, "wait"), (10, "end")])
def test_a_judge_is_told_how_long_the_job_ran(tmp_path, capsys, seconds, last):
    for i in range(4):
        flags = (f"--history={tmp_path / 'history'}", "--retries=2", f"--ran={seconds}", f"--now={5000 * i}")
        retry.main(("judge", *flags, "--cause=cloud"))
    actions = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert actions == ["wait", "wait", last, last]


def test_the_end_is_named_from_the_log_of_the_last_start(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text(f"\n== 2026-01-01T00:00:00Z: starts\n{HANG}\n\n== 2026-01-01T02:00:00Z: starts\nTraceback\n")
    retry.main(("name", "--status=1", f"--log={log}"))
    assert capsys.readouterr().out == "cause=unknown\n"
    with log.open("a") as file:
        file.write(GONE)
    goodput.Ledger(tmp_path).ended(5, "JaxRuntimeError")
    retry.main(("name", "--status=4", f"--log={log}", "--ran=10", "--", f"--workdir={tmp_path}"))
    assert capsys.readouterr().out == "cause=coordinator step=5\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no command; write python -m jaxcl.retry -- COMMAND"),
        (("--retries=-1", "--", "true"), "--retries=-1: must be at least 0"),
        (("judge", "--hour=0", "--cause=cloud"), "--hour=0: must be at least 1"),
        (("judge", "--cause=rain"), "--cause=rain: no such cause; choose from user, "),
        (("judge", "--report=state=running"), "no worker has ended"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        retry.main(flags)


def test_nothing_but_the_standard_library_is_needed():
    began = time.monotonic()
    script = "import sys, jaxcl.retry; print([m for m in ('jax', 'numpy', 'absl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", time.monotonic() - began
