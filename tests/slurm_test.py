"""The batch script of tpu/ for SLURM; nothing here is a cluster."""

import signal
import time

import pytest
from fake_cloud import HOSTILE, Cloud, line, wait_until

JOB = (*HOSTILE, "--workdir=/shared/it's mine")
BATCH = {"SLURM_JOB_ID": "7", "JAXCL_RETRIES": "2"}


@pytest.fixture
def cloud(tmp_path):
    with Cloud(tmp_path) as made:
        made.script(made.bin / "python", "exit 1")  # only srun runs it
        yield made


def batch(cloud, *args, **more):
    return cloud.run("slurm.sbatch", *(args or JOB), **{**BATCH, "SLURM_SUBMIT_DIR": str(cloud.tree), **more})


def requeued(cloud):
    calls = [call["argv"] for call in cloud.calls("scontrol")]
    assert all(argv == ["requeue", "7"] for argv in calls)
    return len(calls)


def test_arguments_reach_the_tasks_as_they_are(cloud):
    (cloud.tree / "my venv").mkdir()
    python = str(cloud.tree / "my venv" / "python")
    cloud.script(cloud.tree / "my venv" / "python", "exit 1")
    done = batch(cloud, SLURM_CPUS_PER_TASK="8", JAXCL_PYTHON=python)
    assert done.returncode == 0, done
    (call,) = cloud.calls("srun")
    start = call["argv"].index(python)
    assert call["argv"][start:] == [python, "-m", "jaxcl.main", *JOB]
    assert call["env"] == {"JAXCL_STOPPED": "75", "SRUN_CPUS_PER_TASK": "8"}
    assert {"--kill-on-bad-exit=0", "--wait=600", "--gpu-bind=none"} <= set(call["argv"][:start])
    assert not list(cloud.tree.rglob("owned"))


@pytest.mark.parametrize(("status", "back"), [(0, 0), (2, 0), (3, 0), (75, 1), (143, 1), (4, 1), (1, 1), (134, 1)])
def test_the_exit_status_decides_whether_it_goes_back_into_the_queue(cloud, status, back):
    cloud.says(srun=[status])
    assert batch(cloud).returncode == status
    assert requeued(cloud) == back


def test_failures_in_a_row_end_it(cloud):
    cloud.says(srun=[1, 75, 1, 1, 1])  # one that was stopped is none, and begins the count anew
    for _ in range(5):
        done = batch(cloud)
    assert "failure 3 in a row: stays down" in done.stdout
    assert requeued(cloud) == 4
    assert not list(cloud.tree.glob(".jaxcl-*"))


@pytest.mark.parametrize("kept", ["", "many", "-1", "$(touch owned)", "08"])
def test_a_count_that_is_none_begins_anew(cloud, kept):
    (cloud.tree / ".jaxcl-7.failures").write_text(kept)
    cloud.says(srun=[1])
    done = batch(cloud, JAXCL_RETRIES="9")
    assert done.returncode == 1
    assert f"failed with 1: retry {9 if kept == '08' else 1} of 9" in done.stdout
    assert requeued(cloud) == 1
    assert not list(cloud.tree.rglob("owned"))


def test_a_count_that_cannot_be_kept_is_that_of_the_starts(cloud):
    cloud.says(srun=[1])
    for starts in range(3):
        done = batch(cloud, SLURM_SUBMIT_DIR=str(cloud.tree / "absent"), SLURM_RESTART_COUNT=str(starts))
        assert done.returncode == 1
        assert "cannot be written: starts are counted in place of failures" in done.stdout
        assert done.stderr == ""
    assert "failure 3 in a row: stays down" in done.stdout
    assert requeued(cloud) == 2
    cloud.says(srun=[75])
    assert batch(cloud, SLURM_SUBMIT_DIR=str(cloud.tree / "absent")).returncode == 75


def test_what_slurm_ends_is_waited_for_and_left_to_slurm(cloud):
    """What is cancelled must not come back; what is preempted SLURM queues itself. srun would kill its tasks."""
    cloud.says(srun=["wait"])
    running = cloud.start("slurm.sbatch", *JOB, **BATCH, SLURM_SUBMIT_DIR=str(cloud.tree))
    wait_until((cloud.place / "listening").exists)
    for _ in range(2):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert running.poll() is None  # the run still saves
    (cloud.place / "release").write_text("75")
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 75, said
    assert "ends with 75, by SLURM" in said
    assert requeued(cloud) == 0


def test_a_queue_that_does_not_take_it_back_is_said(cloud):
    cloud.says(srun=[75], scontrol=[1])
    done = batch(cloud)
    assert done.returncode == 75
    assert "scontrol requeue failed: the same sbatch command continues the run" in done.stdout


def test_what_it_asks_of_the_scheduler(cloud):
    text = (cloud.tree / "tpu" / "slurm.sbatch").read_text()
    options = [text.removeprefix("#SBATCH ") for text in text.splitlines() if text.startswith("#SBATCH ")]
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append"} <= set(options)


def test_mistakes_are_one_line(cloud):
    assert "no arguments" in line(cloud.run("slurm.sbatch", **BATCH))
    assert "start it with sbatch" in line(cloud.run("slurm.sbatch", *JOB))
    assert "JAXCL_RETRIES=many: write a number" in line(batch(cloud, JAXCL_RETRIES="many"))
    assert "no --workdir; write" in line(batch(cloud, "--config=x"))
    assert "write --workdir=FOLDER" in line(batch(cloud, "--config=x", "--workdir", "/shared/x"))
    assert "mount the storage" in line(batch(cloud, "--workdir=gs://bucket/x"))
    assert "/no/such: not found, or cannot be executed; set JAXCL_PYTHON" in line(batch(cloud, JAXCL_PYTHON="/no/such"))
    assert cloud.calls("srun") == []
    shown = cloud.run("slurm.sbatch", "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Trains on GPUs of a SLURM cluster")
    assert "#SBATCH" not in shown.stdout
    (cloud.bin / "srun").unlink()
    assert "srun: not found on PATH" in line(batch(cloud))
