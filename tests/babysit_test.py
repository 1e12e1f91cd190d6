"""The babysitter of tpu/: jobs that are queued, taken back, fail, and end; nothing here is a cloud."""

import os
import shlex
import signal
import time

import pytest
from fake_cloud import HOSTILE, JOB, KIND, NAMED, Cloud, line, wait_until

SEEN = ("--yes", "--poll=1", "--backoff=0", "--share=nas:/runs", *NAMED, *KIND)


@pytest.fixture
def cloud(tmp_path):
    with Cloud(tmp_path) as made:
        (made.bin / "sleep").unlink()
        made.script(made.bin / "sleep", 'test "$1" = 1 || exec /bin/sleep "$1"')  # --poll
        yield made


def babysit(cloud, *flags, job=JOB, **scenario):
    cloud.says(**scenario)
    return cloud.run("babysit.sh", *SEEN, *flags, *job)


def test_from_the_queue_to_the_end(cloud):
    grants = [["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]]
    done = babysit(cloud, "--delete", grants=grants, jobs=[0], workers=2)
    assert done.returncode == 0, done
    verbs = cloud.verbs()
    assert verbs[:2] == ["create", "ssh"]
    assert verbs[2:4] == ["scp", "ssh"]
    assert verbs[-1] == "delete"
    assert verbs.count("create") == 1
    assert [call["argv"] for call in cloud.calls("job")] == [list(JOB[1:])] * 2
    assert any("nas:/runs" in call["argv"] for call in cloud.calls("sudo"))


@pytest.mark.parametrize("how", ["request", "slice"])
def test_what_is_taken_back_is_requested_again_and_continues(cloud, how):
    """Either the request says so, or it still says ACTIVE and one of its slices does not."""
    if how == "request":
        grants, nodes = [[*["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED"], ["ACTIVE"]], ["READY"]
    else:
        grants, nodes = [["ACTIVE"]], [*["READY"] * 5, "PREEMPTED", "READY"]
    job = ("--", *HOSTILE, "--workdir=/mnt/w")
    done = babysit(cloud, "--nodes=2", "--retries=0", job=job, grants=grants, nodes=nodes, jobs=["save", 0], slices=2)
    assert done.returncode == 0, done
    verbs = cloud.verbs()
    assert (verbs.count("create"), verbs.count("delete"), verbs.count("scp")) == (2, 1, 2)
    assert verbs.index("delete") < len(verbs) - verbs[::-1].index("create") - 1
    assert [call["argv"] for call in cloud.calls("job")] == [list(job[1:])] * 4
    creates = [call["argv"] for call in cloud.calls("gcloud") if call["argv"][3] == "create"]
    assert creates[0] == creates[1]


def test_the_status_of_a_job_that_must_not_be_repeated_is_the_babysitters(cloud):
    for status in (2, 3):
        done = babysit(cloud, grants=[["ACTIVE"]], jobs=[status])
        assert done.returncode == status, done
        assert f"the job ends with {status}" in done.stderr
        assert "costs until delete.sh is run" in done.stderr
        assert "delete" not in cloud.verbs()
        cloud.run("delete.sh", *NAMED, "--yes")
        cloud.forget()


def test_a_run_that_was_stopped_is_continued_and_is_no_failure(cloud):
    done = babysit(cloud, "--retries=0", grants=[["ACTIVE"]], workers=2, jobs=[75, {"0.0": 0, "0.1": 143}, 0])
    assert done.returncode == 0, done
    assert len(cloud.calls("job")) == 6


def test_failures_are_retried_up_to_the_limit(cloud):
    done = babysit(cloud, "--retries=2", grants=[["ACTIVE"]], jobs=[1, 134, 0])
    assert done.returncode == 0, done
    assert "the job failed, exit status 1; retry 1 of 2 in 0 s" in done.stderr
    assert "the process crashed, exit status 134; retry 2 of 2 in 0 s" in done.stderr
    assert cloud.verbs().count("create") == 1
    cloud.run("delete.sh", *NAMED, "--yes")
    cloud.forget()
    done = babysit(cloud, "--retries=2", grants=[["ACTIVE"]], jobs=[1])
    assert done.returncode == 1
    assert "gave up after 2 retries" in done.stderr
    assert len(cloud.calls("job")) == 3


def test_after_a_fault_of_the_machine_it_goes_on_with_other_machines(cloud):
    done = babysit(cloud, "--retries=1", grants=[["ACTIVE"]], workers=2, jobs=[{"0.0": 4, "0.1": 75}, 0])
    assert done.returncode == 0, done
    assert "a fault of the machine, exit status 4; retry 1 of 1" in done.stderr
    assert [verb for verb in cloud.verbs() if verb in ("create", "delete")] == ["create", "delete", "create"]


def test_the_wait_doubles_with_every_failure(cloud):
    (cloud.bin / "sleep").unlink()
    cloud.script(cloud.bin / "sleep", 'echo "$1" >>"$FAKE/slept"')
    cloud.says(create=["RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded."])
    done = cloud.run("babysit.sh", "--yes", "--backoff=200", "--retries=4", *NAMED, *KIND, *JOB)
    assert done.returncode == 1
    assert "Quota limit 'TPUV5s' has been exceeded" in done.stderr
    slept = [int(text) for text in (cloud.place / "slept").read_text().split()]
    assert len(slept) == 4
    assert all(whole / 2 <= wait <= whole for whole, wait in zip((200, 400, 800, 900), slept, strict=True))
    assert cloud.verbs() == ["create"] * 5


def test_a_quota_that_frees_itself_is_waited_for_and_a_refusal_is_not(cloud):
    done = babysit(cloud, create=["RESOURCE_EXHAUSTED: Quota exceeded", ""], jobs=[0])
    assert done.returncode == 0, done
    cloud.run("delete.sh", *NAMED, "--yes")
    cloud.forget()
    done = babysit(cloud, create=["PERMISSION_DENIED: The caller does not have permission"])
    assert done.returncode == 1
    assert "was refused: ERROR: (gcloud) PERMISSION_DENIED" in done.stderr
    assert cloud.verbs() == ["create"]


def test_a_request_that_fails_is_made_again(cloud):
    done = babysit(cloud, "--retries=1", grants=[["PROVISIONING", "FAILED"], ["ACTIVE"]], jobs=[0])
    assert done.returncode == 0, done
    assert [verb for verb in cloud.verbs() if verb != "ssh"] == ["create", "delete", "create", "scp"]


def test_one_connection_that_fails_costs_a_retry(cloud):
    done = babysit(cloud, "--retries=1", grants=[["ACTIVE"]], ssh=[255, 0, 0, 0], jobs=[0])
    assert done.returncode == 0, done
    assert "the workers cannot be reached; retry 1 of 1" in done.stderr
    assert len(cloud.calls("job")) == 1


def test_an_interface_that_does_not_answer_is_no_reason_to_delete(cloud):
    done = babysit(cloud, "--retries=1", describe=["INTERNAL: try later"])
    assert done.returncode == 1
    assert "the state of the request is not known" in done.stderr
    assert cloud.verbs() == []


def gone(cloud):
    """What hung has been ended, the child too."""
    try:
        os.kill(int((cloud.place / "hanging").read_text()), 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("call", "flags"), [("describe", ()), ("create", ()), ("ssh", ("--limit=1", "--limit-long=5", "--nodes=1"))]
)
def test_a_call_that_hangs_is_ended_and_costs_a_retry(cloud, call, flags):
    answers = {"describe": ["hang", ""], "create": ["hang", ""], "ssh": [0, "hang", 0]}[call]
    grants = [["ACTIVE"]]
    limits = ("--limit=5", "--limit-long=5", *flags)
    done = babysit(cloud, "--retries=2", *limits, grants=grants, jobs=[0], **{call: answers})
    assert done.returncode == 0, done
    assert f"gcloud compute tpus queued-resources {call}: no answer within 5 s, ended" in done.stderr
    assert "retry 1 of 2 in 0 s" in done.stderr
    assert len(cloud.calls("job")) == 1
    wait_until(lambda: gone(cloud))


def test_a_signal_ends_what_hangs_and_the_babysitter(cloud):
    cloud.says(describe=["hang"])
    watching = cloud.start("babysit.sh", *SEEN, *JOB, session=True)
    wait_until((cloud.place / "hanging").exists)
    time.sleep(0.2)
    os.killpg(watching.pid, signal.SIGINT)  # Ctrl-C
    _, said = watching.communicate(timeout=20)
    assert watching.returncode == -signal.SIGINT, said
    wait_until(lambda: gone(cloud))
    assert cloud.verbs() == []


def test_what_cannot_be_timed_is_said_once(cloud):
    (cloud.bin / "timeout").unlink()
    done = babysit(cloud, grants=[["ACTIVE"]], jobs=[0])
    assert done.returncode == 0, done
    assert done.stderr.count("timeout: not found on PATH") == 1


ACCOUNT = """You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials.

If you have already logged in with a different account, run:

  $ gcloud config set account ACCOUNT

to select an already authenticated account to use."""


@pytest.mark.parametrize("text", [ACCOUNT, "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied.\na\nb\nc\nd"])
def test_looking_that_is_refused_is_not_repeated_and_said_in_full(cloud, text):
    done = babysit(cloud, describe=[text])
    assert done.returncode == 1
    assert f"ERROR: (gcloud) {text.splitlines()[0]}\n" in done.stderr
    assert text.splitlines()[-1] in done.stderr
    assert "looking was refused. mine is left as it is, and costs" in done.stderr
    assert len(cloud.calls("gcloud")) == 1
    shown = cloud.run("status.sh", *NAMED)
    assert shown.returncode == 1
    assert text.splitlines()[0] in shown.stderr


def test_a_run_on_the_disk_of_a_machine_is_warned_of(cloud):
    unshared = [flag for flag in SEEN if not flag.startswith("--share")]
    for flags, folders, words in (
        (SEEN, ["/mnt/runs/8b"], None),
        (SEEN, ["/tmp/y", "/mnt/runs/8b"], None),
        (unshared, ["/mnt/runs/8b"], "with it, without --share"),
        (SEEN, ["/mnt/runs/../x"], "--workdir=/mnt/runs/../x may lie anywhere"),
        (SEEN, ["/mnt/runs/x", "/tmp/y"], "--workdir=/tmp/y is not below /mnt/runs"),
        (SEEN, ["runs/x"], "--workdir=runs/x is on the disk of a TPU VM"),
    ):
        done = cloud.run("babysit.sh", *flags, "--dry-run", "--", *(f"--workdir={folder}" for folder in folders))
        assert done.returncode == 0, done
        assert done.stderr.count("warning: ") == (words is not None), done
        assert (words or "") in done.stderr
    assert "--share=gs://b: not valid" in line(cloud.run("babysit.sh", *SEEN, "--share=gs://b", *JOB))
    assert "--poll=0: not valid; write --poll=SECONDS, at least 1" in line(
        cloud.run("babysit.sh", *SEEN, "--poll=0", *JOB)
    )


def test_a_worker_that_says_nothing_is_no_success(cloud):
    """gcloud only warns of a slice that it cannot prepare, and ends with 0."""
    done = babysit(cloud, "--retries=1", states=["ACTIVE"], workers=2, silent=["0.1"], jobs=[0])
    assert done.returncode == 1
    assert "not all of the 2 workers answer" in done.stderr


def test_workers_that_do_not_agree_are_started_together_again(cloud):
    jobs = [{"0.0": 134, "0.1": "save"}, 0]  # one died; the other waits for it
    done = babysit(cloud, "--retries=1", grants=[["ACTIVE"]], workers=2, jobs=jobs)
    assert done.returncode == 0, done
    assert "some workers run and some do not; stops them all" in done.stderr
    assert len(cloud.calls("job")) == 4


def test_stopping_by_hand_ends_the_babysitter_and_a_new_one_takes_over(cloud):
    cloud.says(grants=[["ACTIVE"]], jobs=["save", 0])
    watching = cloud.start("babysit.sh", *SEEN, *JOB)
    wait_until(lambda: cloud.calls("job"))
    assert cloud.run("stop.sh", *NAMED).returncode == 0
    _, said = watching.communicate(timeout=60)
    assert watching.returncode == 130, said
    assert "the job was stopped by hand; resume.sh goes on with it" in said
    assert cloud.run("resume.sh", *NAMED).returncode == 0
    done = cloud.run("babysit.sh", *SEEN)  # without arguments: those of before
    assert done.returncode == 0, done
    assert [call["argv"] for call in cloud.calls("job")] == [list(JOB[1:])] * 2
    assert cloud.verbs().count("create") == 1


def test_how_a_job_ended_before_is_not_how_this_one_ends(cloud):
    """The machines remember it; whoever starts the babysitter again has mended something, or asks for another job."""
    assert babysit(cloud, grants=[["ACTIVE"]], jobs=[2, 0]).returncode == 2
    done = cloud.run("babysit.sh", *SEEN, *JOB)
    assert done.returncode == 0, done
    assert len(cloud.calls("job")) == 2
    assert cloud.run("babysit.sh", *SEEN, *JOB).returncode == 0
    assert len(cloud.calls("job")) == 2  # it has finished, and is the same
    other = ("--", "--config=other.py", "--workdir=/mnt/runs/other")
    assert cloud.run("babysit.sh", *SEEN, *other).returncode == 0
    assert cloud.calls("job")[-1]["argv"] == list(other[1:])
    assert cloud.verbs().count("scp") == 1


def test_another_job_of_the_name_is_left_alone(cloud):
    cloud.says(states=["ACTIVE"], jobs=["save"])
    assert cloud.run("setup.sh", *NAMED).returncode == 0
    assert cloud.run("run.sh", *NAMED, *JOB).returncode == 0
    done = cloud.run("babysit.sh", *SEEN, "--", "--config=other.py", "--workdir=/mnt/runs/other")
    assert "job main of mine runs with other arguments; stop it" in line(done)
    assert len(cloud.calls("job")) == 1


def test_a_dry_run_shows_what_an_undisturbed_job_takes_and_does_nothing(cloud):
    done = cloud.run("babysit.sh", *SEEN[1:], "--nodes=2", "--delete", "--dry-run", *JOB)
    assert done.returncode == 0, done
    shown = [shlex.split(text) for text in done.stdout.splitlines()]
    verbs = [words[4] for words in shown if words[0] == "gcloud"]
    assert verbs == ["create", "describe", "scp", "ssh", "ssh", "describe", "describe", "ssh", "delete"]
    assert [words[5] for words in shown if words[3] == "tpu-vm"] == ["mine-0", "mine-1"]
    assert cloud.calls("gcloud") == []
    assert not (cloud.place / "home" / ".jaxcl").exists()


def test_the_babysitter_asks_before_it_may_delete(cloud):
    rest = [flag for flag in SEEN if flag != "--yes"]
    assert "deleting and requesting mine again" in line(cloud.run("babysit.sh", *rest, *JOB))
    assert cloud.calls("gcloud") == []
