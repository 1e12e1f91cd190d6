"""Faults one by one: what the run says, how its ledger of time names it, and that it ends as if nothing had been.

Elsewhere: steps that are not finite, more of spikes (guard_test, train_test), kills at any point, in a save
too (resume_test), a signal to one of several processes (train_processes_test).
"""

import dataclasses
import errno
import functools
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import small

from jaxcl import checkpoint, goodput, manifests, program, train, watch

QUICK = True
PAIR = {"data": 1, "fsdp": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module")
def straight(folder):
    return small.outcome(small.straight(folder))


def run(folder, workdir, plant=lambda patch: None, poison=lambda step, batch: batch, **loop):
    with pytest.MonkeyPatch.context() as patch:
        small.reuse(folder, patch, poison=poison)
        plant(patch)
        return train.run(small.config(folder, **loop), str(workdir))


def causes(workdir):
    return [one.cause for one in goodput.attempts(workdir)]


def test_a_loader_that_throws_ends_the_attempt_and_the_next_goes_on(folder, straight, tmp_path):
    def throw(step, batch):
        if step == 13:
            raise OSError(errno.EIO, "Input/output error", "/data/rows")
        return batch

    with pytest.raises(OSError, match="Input/output error"):
        run(folder, tmp_path / "run", poison=throw)
    assert run(folder, tmp_path / "run") == 0
    assert causes(tmp_path / "run") == ["OSError", "finished"]
    assert small.outcome(tmp_path / "run") == straight


def test_a_full_disk_ends_the_attempt_and_the_checkpoint_before_is_whole(folder, straight, tmp_path, capsys):
    def full(patch):
        write = manifests.write

        def fails(path, text):
            if path.name == "MANIFEST" and path.parent.name == "12":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, text)

        patch.setattr(manifests, "write", fails)

    assert run(folder, tmp_path / "run", full) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert small.checkpoint(tmp_path / "run")[0] == 9
    assert run(folder, tmp_path / "run") == 0
    assert causes(tmp_path / "run") == ["not saved", "finished"]
    assert small.outcome(tmp_path / "run") == straight


@pytest.mark.parametrize(
    ("most", "own", "begin", "status"), [(100, False, "error: checkpoint 3 in ", 1), (20, True, "error: /", 2)]
)
def test_what_cannot_be_written_is_said_in_one_line(folder, straight, tmp_path, most, own, begin, status):
    """Files may not become larger than that many KB: a checkpoint, or rows of a corpus that is prepared."""
    path = small.write(small.config(tmp_path if own else folder, mesh={"data": 1}), tmp_path / "config.py")
    command = f"ulimit -f {most}; exec {sys.executable} -m jaxcl.main --config={path} --workdir={tmp_path / 'run'}"
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=processes.environment() | off, check=False
    )
    assert found.returncode == status, found.stderr
    assert "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if not line.startswith("step ")]
    assert line.startswith(begin)
    assert "was not written" in line or "File too large" in line


def test_a_slow_disk_costs_time_alone(folder, straight, tmp_path):
    def slow(patch):
        commit = checkpoint.Checkpoints._commit

        def later(self, *rest):
            time.sleep(0.3)
            return commit(self, *rest)

        patch.setattr(checkpoint.Checkpoints, "_commit", later)

    assert run(folder, tmp_path / "run", slow) == 0
    assert small.outcome(tmp_path / "run") == straight
    assert goodput.summary(tmp_path / "run")["seconds"]["save"] > 0.3


def test_a_truncated_checkpoint_is_passed_over(folder, straight, tmp_path):
    def stop(patch):
        small.strike(patch, "SIGTERM", 13)

    assert run(folder, tmp_path / "run", stop) == 0
    newest = small.newest(tmp_path / "run")
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    assert run(folder, tmp_path / "run") == 0
    told = [r["message"] for r in small.records(tmp_path / "run", "event") if r["event"] == "restore"]
    assert f"checkpoint {newest.name} is unusable" in told[0]
    assert goodput.summary(tmp_path / "run")["repeated_steps"] == int(newest.name) - 12
    assert small.outcome(tmp_path / "run") == straight


def test_a_step_that_is_not_finite_once_leaves_no_trace(folder, straight, tmp_path):
    seen = []

    def once(step, batch):
        if step == 13 and not seen:
            seen.append(step)
            return jax.tree.map(lambda x: x * jnp.inf if x.dtype == jnp.float32 else x, batch)
        return batch

    assert run(folder, tmp_path / "run", poison=once, watch={"repeat": True}) == 0
    assert causes(tmp_path / "run") == ["rolled back", "finished"]
    assert small.outcome(tmp_path / "run") == straight


def test_a_loss_ten_times_as_high_changes_nothing_but_the_counters(folder, tmp_path):
    """A step that reads its parameters wrongly, once: the guard gives back what it was given."""
    seen = []

    def parts(state):
        return jax.device_get((state.params, state.opt_state, state.memory["inner"]))

    def plant(patch):
        build = program.build

        @functools.wraps(build)
        def again(**pieces):
            new = build(**pieces)

            @jax.transfer_guard("allow")
            def step(state, batch):
                if int(state.step) + 1 != 13:
                    return new.step(state, batch)
                wrong = jax.tree.map(lambda x: 30 * x, state.params)
                given = dataclasses.replace(state, params=wrong)
                before = parts(given)
                after, values = new.step(given, batch)
                seen.append((before, parts(after)))
                return dataclasses.replace(after, params=state.params), values

            return new._replace(step=step)

        patch.setattr(program, "build", again)

    assert run(folder, tmp_path / "run", plant) == 0
    ((before, after),) = seen
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    losses = {r["step"]: r["loss"] for r in small.records(tmp_path / "run", "train")}
    assert 10 * max(losses[n] for n in (12, 14)) < losses[13] < float("inf")
    assert small.events(tmp_path / "run") == [(13, "skipped")]


def test_a_flipped_bit_in_one_copy_leaves_no_trace(tmp_path, recipe, monkeypatch, capsys):
    faults, build, account = recipe("reliability", "faults"), program.build, train.Session.account
    settings, two = faults.config(), {"devices": jax.devices()[:2]}
    made = build(**train.split(settings)[1] | {"mesh": two})
    compiled = {name: getattr(made, name) for name in ("create", "step", "end_task", "evaluate")}

    @functools.wraps(build)
    def again(**pieces):
        return build(**pieces | {"mesh": two})._replace(**compiled)

    def flipped(self, step):
        account(self, step)
        if step + 1 == faults.AT:
            faults.flip(self)

    monkeypatch.setattr(program, "build", again)
    monkeypatch.setattr(train.allocator, "keep_pages", lambda: True)
    assert train.run(settings, str(tmp_path / "other")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.Session, "account", flipped)
        assert train.run(settings, str(tmp_path / "run")) == watch.MACHINE
    assert "step 13: devices hold different copies of params/" in capsys.readouterr().err
    assert small.checkpoint(tmp_path / "run")[0] == 12
    assert train.run(settings, str(tmp_path / "run")) == 0
    assert causes(tmp_path / "run") == ["machine", "finished"]
    assert small.outcome(tmp_path / "run") == small.outcome(tmp_path / "other")


def command(folder, workdir, point, count, mesh, hang_s=None):
    settings = small.config(folder, mesh=mesh, stream__steps=4, watch={"hang_s": hang_s})
    del settings["guard"]
    config = small.write(settings, workdir.parent / "config.py")
    env = small.environment(folder)
    return processes.start("run", point, f"--config={config}", f"--workdir={workdir}", processes=count, env=env)


def test_a_hang_ends_the_process_with_a_status_for_the_launcher(folder, tmp_path):
    started = command(folder, tmp_path / "run", "HANG:step:6", 1, {}, hang_s=15.0)
    processes.finish(started, timeout=120, codes=(watch.MACHINE,))
    assert "no step for" in started[0].log.read_text()
    assert "Traceback" not in started[0].log.read_text()
    assert (
        "time.sleep" in (tmp_path / "run" / "hang-0.txt").read_text()
        or "in changed" in (tmp_path / "run" / "hang-0.txt").read_text()
    )
    assert causes(tmp_path / "run") == ["hang"]
    processes.finish(command(folder, tmp_path / "run", "none", 1, {}))
    processes.finish(command(folder, tmp_path / "other", "none", 1, {}))
    assert causes(tmp_path / "run") == ["hang", "finished"]
    assert small.outcome(tmp_path / "run") == small.outcome(tmp_path / "other")


def test_when_the_coordinator_dies_the_other_leaves_in_time(folder, tmp_path):
    """For other processes see departures_test."""
    started = command(folder, tmp_path / "run", "SIGKILL:step:6@0", 2, PAIR)
    started[0].popen.wait(timeout=300)
    began = time.monotonic()
    processes.finish(started, timeout=90, codes=(watch.MACHINE, -9))
    assert time.monotonic() - began < 60  # JAX itself would notice after 100 s
    assert started[0].popen.returncode == -9
    log = started[1].log.read_text()
    assert "another process or its machine is gone" in log
    assert "Traceback" not in log
    processes.finish(command(folder, tmp_path / "run", "none", 2, PAIR))
    processes.finish(command(folder, tmp_path / "other", "none", 2, PAIR))
    assert small.outcome(tmp_path / "run") == small.outcome(tmp_path / "other")
