"""The scripts of tpu/ for Cloud TPU, against tools that record what they are called with; nothing here is a cloud."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import HOSTILE, JOB, KIND, NAMED, ROOT, Cloud, line, wait_until

SCRIPTS = sorted(path.name for path in (ROOT / "tpu").iterdir() if path.suffix in (".sh", ".sbatch"))
RUNNABLE = [name for name in SCRIPTS if name not in ("settings.sh", "worker.sh", "gke.sh", "slurm.sbatch")]


@pytest.fixture
def cloud(tmp_path):
    with Cloud(tmp_path) as made:
        yield made


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_stop_at_the_first_error(name):
    path = ROOT / "tpu" / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    if name != "settings.sh":
        assert path.stat().st_mode & 0o111
        assert path.read_text().startswith("#!/usr/bin/env bash\n# ")
        assert "\nset -euo pipefail\n" in path.read_text()


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not tool:
        pytest.skip("shellcheck is not installed")
    names = [str(ROOT / "tpu" / name) for name in SCRIPTS]
    done = subprocess.run([tool, "-x", *names], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", RUNNABLE)
def test_help_and_mistakes_are_said_before_anything_is_called(cloud, name):
    done = cloud.run(name, "--help")
    assert done.returncode == 0
    assert name in done.stdout
    given = [flag for flag in NAMED if not flag.startswith("--zone")]
    assert "--zone: missing" in line(cloud.run(name, *given))
    assert "--colour: not a flag" in line(cloud.run(name, *NAMED, "--colour=red"))
    assert "not valid" in line(cloud.run(name, "--name=Mine; touch owned", *NAMED[1:]))
    assert "not valid" in line(cloud.run(name, *NAMED[:2], "--project=my-project\n--quiet"))
    assert "--name: write --name=VALUE" in line(cloud.run(name, "--name", "mine"))
    assert "not valid" in line(cloud.run(name, *NAMED, "--job=../../x"))
    for flag in ("job", "nodes", "limit"):
        assert f"--{flag}=: empty; write --{flag}=VALUE" in line(cloud.run(name, *NAMED, f"--{flag}="))
    assert "not valid" in line(cloud.run(name, *NAMED, "--limit=2m"))
    if name not in ("run.sh", "babysit.sh"):
        assert "--: this command is given no job" in line(cloud.run(name, *NAMED, "--", "--config=x"))
    assert "takes no value" in line(cloud.run(name, *NAMED, "--dry-run=false"))
    assert not (cloud.tree / "owned").exists()
    assert cloud.calls("gcloud") == []


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_missing_tool_is_one_line_with_the_remedy(cloud, name):
    (cloud.bin / "gcloud").unlink()
    more = {"create.sh": KIND, "babysit.sh": (*KIND, "--yes", *JOB), "run.sh": JOB, "delete.sh": ("--yes",)}
    text = line(cloud.run(name, *NAMED, *more.get(name, ())))
    assert "gcloud: not found on PATH; install the Google Cloud CLI" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--capacity=spot",), ["--node-id=mine", "--spot"]),
        (("--capacity=on-demand", "--wait=6h"), ["--node-id=mine", "--valid-until-duration=6h"]),
        (
            (
                *("--capacity=reserved", "--nodes=4", "--internal"),
                *("--network=vpc", "--subnetwork=east", "--service-account=runs@p.iam"),
            ),
            [
                *("--node-count=4", "--node-prefix=mine", "--reserved"),
                *("--network=vpc", "--subnetwork=east", "--service-account=runs@p.iam", "--internal-ips"),
            ],
        ),
    ],
)
def test_a_request_says_what_was_asked_for(cloud, flags, expected):
    done = cloud.run("create.sh", *NAMED, *KIND[:2], *flags)
    assert done.returncode == 0, done
    (call,) = cloud.calls("gcloud")
    start = ["compute", "tpus", "queued-resources", "create", "mine"]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    place = ["--zone=us-east5-b", "--project=my-project", "--quiet"]
    assert call["argv"] == [*start, *kind, *expected, *place]


def test_what_a_request_costs_must_be_said(cloud):
    assert "--capacity: missing; write --capacity=spot, on-demand or reserved" in line(
        cloud.run("create.sh", *NAMED, *KIND[:2])
    )
    assert "--wait=6" in line(cloud.run("create.sh", *NAMED, *KIND, "--wait=6"))


def test_flags_come_from_the_environment_but_no_consent_does(cloud):
    env = {"JAXCL_TPU_NAME": "mine", "JAXCL_TPU_ZONE": "us-east5-b", "JAXCL_TPU_PROJECT": "my-project"}
    assert cloud.run("delete.sh", "--dry-run", **env).returncode == 0
    assert "needs --yes" in line(cloud.run("delete.sh", JAXCL_TPU_YES="yes", **env))
    assert cloud.calls("gcloud") == []


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("create.sh", (*KIND, "--nodes=2")),
        ("run.sh", ("--", *HOSTILE, "--workdir=/mnt/x")),
        ("resume.sh", ()),
        ("stop.sh", ("--seconds=1",)),
        ("logs.sh", ("--worker=all", "--lines=5")),
        ("delete.sh", ("--yes",)),
        ("setup.sh", ("--share=10.0.0.2:/runs", "--internal")),
    ],
)
def test_a_dry_run_shows_exactly_what_would_be_called(cloud, name, flags):
    """Read back by a shell, every line is the call that is made without --dry-run."""
    cloud.says(states=["absent" if name == "create.sh" else "ACTIVE"], jobs=["save"])
    if name in ("run.sh", "resume.sh", "stop.sh", "logs.sh"):
        assert cloud.run("setup.sh", *NAMED).returncode == 0
    if name in ("resume.sh", "stop.sh", "logs.sh"):
        assert cloud.run("run.sh", *NAMED, "--", *HOSTILE, "--workdir=/mnt/x").returncode == 0
    cloud.forget()
    shown = cloud.run(name, *NAMED, "--dry-run", *flags)
    assert shown.returncode == 0, shown
    assert cloud.calls("gcloud") == []
    lines = []
    for text in shown.stdout.splitlines():  # printf %q leaves no newline inside of a command
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], check=True, capture_output=True).stdout
        lines.append([word.decode() for word in words.split(b"\0")[:-1]])
    done = cloud.run(name, *NAMED, *flags)
    assert done.returncode == 0, done
    made = [call["argv"] for call in cloud.calls("gcloud")]
    shown_to_gcloud = [words[1:] for words in lines if words[0] == "gcloud"]

    def steady(argv):
        return [word if "/jaxcl.tar.gz" not in word else "TAR" for word in argv]

    assert [steady(argv) for argv in shown_to_gcloud] == [steady(argv) for argv in made]
    assert made


def start_job(cloud, *args, **scenario):
    cloud.says(**({"states": ["ACTIVE"], "jobs": [0]} | scenario))
    assert cloud.run("setup.sh", *NAMED, f"--nodes={scenario.get('slices', 1)}").returncode == 0
    return cloud.run("run.sh", *NAMED, f"--nodes={scenario.get('slices', 1)}", "--", *args)


def test_arguments_reach_the_job_byte_for_byte_and_again_when_it_resumes(cloud):
    args = [*HOSTILE, "--workdir=/mnt/runs/it's mine"]
    done = start_job(cloud, *args, slices=2, workers=2)
    assert done.returncode == 0, done
    wait_until(lambda: len(cloud.calls("job")) == 4)
    assert {call["worker"] for call in cloud.calls("job")} == {"0.0", "0.1", "1.0", "1.1"}
    for call in cloud.calls("job"):
        assert call["argv"] == args
        assert call["env"]["JAXCL_CLUSTER"] == "tpu"
        assert call["env"]["JAXCL_STOPPED"] == "75"
    cloud.forget()
    assert cloud.run("resume.sh", *NAMED, "--nodes=2").returncode == 0
    wait_until(lambda: len(cloud.calls("job")) == 4)
    assert [call["argv"] for call in cloud.calls("job")] == [args] * 4
    assert not list(cloud.place.rglob("owned"))
    assert not list(cloud.tree.rglob("owned"))
    kept = cloud.place / "home" / ".jaxcl" / "tpu" / "mine.main"
    there = list(cloud.place.glob("homes/*/jaxcl-jobs/main/args"))
    assert len(there) == 4
    for path in (kept, kept.parent, *there):
        assert path.stat().st_mode & 0o077 == 0


def test_a_job_must_outlive_its_machine(cloud):
    assert "has no --workdir" in line(cloud.run("run.sh", *NAMED, "--", "--config=x"))
    assert "write --workdir=/mnt/runs/NAME" in line(cloud.run("run.sh", *NAMED, "--", "--workdir", "/mnt/runs/x"))
    assert "mount the storage" in line(cloud.run("run.sh", *NAMED, "--", "--workdir=gs://bucket/run"))
    done = cloud.run("run.sh", *NAMED, "--dry-run", "--", "--workdir=runs/x")
    assert done.returncode == 0
    assert "warning: --workdir=runs/x is on the disk of a TPU VM" in done.stderr
    assert "the job: missing" in line(cloud.run("run.sh", *NAMED))
    assert "not known here; start it with run.sh" in line(cloud.run("resume.sh", *NAMED))


@pytest.mark.parametrize("share", ["gs://b", "-oProxy:/x", "nas", "nas:runs", "nas://runs", "nas-:/x"])
def test_what_is_shared_is_a_host_and_a_folder(cloud, share):
    assert f"--share={share}: not valid; write --share=HOST:/FOLDER" in line(
        cloud.run("setup.sh", *NAMED, f"--share={share}")
    )
    assert cloud.run("setup.sh", *NAMED, "--dry-run", "--share=10.0.0.2:/").returncode == 0


def test_how_long_a_call_may_take(cloud):
    """Looking is short, doing is long, saving may take what it is given, and a log is followed until Ctrl-C."""
    (cloud.bin / "timeout").unlink()
    cloud.script(cloud.bin / "timeout", 'shift 2; echo "$1 $2 $6" >>"$FAKE/timed"; shift; exec "$@"')
    cloud.says(states=["ACTIVE"], jobs=["save"])
    for name, *flags in (
        ("setup.sh",),
        ("run.sh", *JOB),
        ("status.sh",),
        ("status.sh", "--limit=7"),
        ("logs.sh",),
        ("stop.sh", "--seconds=08"),
        ("stop.sh", "--limit-long=0"),
        ("delete.sh", "--yes", "--limit-long=60"),
    ):
        done = cloud.run(name, *NAMED, *flags)
        assert done.returncode == 0, done
    timed = (cloud.place / "timed").read_text().split("\n")
    assert timed[:3] == ["1800 gcloud scp", "1800 gcloud ssh", "1800 gcloud ssh"]
    assert timed[3:6] == ["120 gcloud describe", "120 gcloud describe", "600 gcloud ssh"]
    assert timed[6:] == [
        *["7 gcloud describe"] * 2,
        "35 gcloud ssh",
        "1800 gcloud ssh",
        "1808 gcloud ssh",
        "60 gcloud delete",
        "",
    ]


def mounts(cloud):
    return [call["argv"][-1] for call in cloud.calls("sudo") if call["argv"][0] == "mount"]


def test_setup_installs_and_mounts_once(cloud):
    cloud.says(states=["ACTIVE"], workers=2)
    (cloud.tree / "jaxcl" / "mark").write_text("first")
    for _ in range(2):
        done = cloud.run("setup.sh", *NAMED, "--share=10.0.0.2:/runs")
        assert done.returncode == 0, done
        assert done.stdout == "jaxcl host=host-0.0 state=ready\njaxcl host=host-0.1 state=ready\n"
    venv = [call["argv"] for call in cloud.calls("python") if call["argv"][1] == "venv"]
    assert len(venv) == 2  # one a worker
    home = cloud.place / "homes" / "0.0"
    nfs = ["mount", "-t", "nfs", "-o", "hard,nolock", "10.0.0.2:/runs", f"{home}/mnt"]
    assert next(call["argv"] for call in cloud.calls("sudo") if call["argv"][0] == "mount") == nfs
    assert len(mounts(cloud)) == 2
    installed = next(call["argv"] for call in cloud.calls("python") if "pip" in call["argv"])
    assert installed[-2:] == ["--editable", f"{home}/jaxcl[tpu]"]
    assert (home / "jaxcl" / "jaxcl" / "mark").read_text() == "first"
    (cloud.tree / "jaxcl" / "mark").write_text("second")
    assert cloud.run("setup.sh", *NAMED).returncode == 0
    assert (home / "jaxcl" / "jaxcl" / "mark").read_text() == "second"


def test_storage_is_mounted_again_after_the_machine_was_started_again(cloud):
    """A run that found an empty folder in its place would begin anew, on a disk that goes with the machine."""
    cloud.says(states=["ACTIVE"])
    assert cloud.run("setup.sh", *NAMED, "--share=10.0.0.2:/runs").returncode == 0
    assert cloud.run("setup.sh", *NAMED).returncode == 0  # remembers
    (cloud.place / "homes" / "0.0" / "mounted").unlink()
    assert cloud.run("run.sh", *NAMED, *JOB).returncode == 0
    assert len(mounts(cloud)) == 2
    cloud.script(cloud.place / "worker_bin" / "mount", "exit 32")
    (cloud.place / "homes" / "0.0" / "mounted").unlink()
    wait_until(lambda: "running" not in status_lines(cloud))
    assert cloud.run("run.sh", *NAMED, *JOB).returncode == 32
    assert len(cloud.calls("job")) == 1


def test_an_old_python_on_the_machine_is_not_used(cloud):
    cloud.says(states=["ACTIVE"], python="old")
    assert cloud.run("setup.sh", *NAMED).returncode == 0
    said = [shlex.join(call["argv"]) for call in cloud.calls("python")]
    assert said[0] == "-m pip install --quiet --user uv"
    assert said[1].startswith("-m uv venv --quiet --seed --python 3.12 ")


def status_lines(cloud):
    done = cloud.run("status.sh", *NAMED)
    assert done.returncode == 0, done
    return [text.split("state=")[1] for text in done.stdout.splitlines() if text.startswith("jaxcl ")]


def test_a_job_that_runs_is_neither_started_twice_nor_overwritten(cloud):
    assert start_job(cloud, "--workdir=/w", jobs=["save"]).returncode == 0
    wait_until(lambda: cloud.calls("job"))
    assert status_lines(cloud) == ["running"]
    again = cloud.run("run.sh", *NAMED, "--", "--workdir=/w")
    assert again.returncode == 5
    assert "job main is running; resume.sh stops it and goes on" in again.stderr
    over = cloud.run("setup.sh", *NAMED)
    assert over.returncode == 5
    assert "stop it first" in over.stderr
    assert cloud.run("stop.sh", *NAMED).returncode == 0
    assert status_lines(cloud) == ["stopped"]
    assert len(cloud.calls("job")) == 1
    folder = cloud.place / "homes" / "0.0" / "jaxcl-jobs" / "main"
    assert (folder / "exit").read_text() == "75\n"  # SIGTERM reached the run, which saved
    log = cloud.run("logs.sh", *NAMED).stdout
    assert "starts" in log
    assert "ends with 75" in log


def test_a_job_that_does_not_end_is_killed_and_one_that_vanished_is_lost(cloud):
    assert start_job(cloud, "--workdir=/w", jobs=["deaf", "save"]).returncode == 0
    wait_until(lambda: cloud.calls("job"))
    done = cloud.run("stop.sh", *NAMED, "--seconds=0")
    assert done.returncode == 0, done
    assert "killed" in done.stderr
    assert status_lines(cloud) == ["stopped"]
    folder = cloud.place / "homes" / "0.0" / "jaxcl-jobs" / "main"
    assert (folder / "exit").read_text() == "137\n"
    assert cloud.run("resume.sh", *NAMED).returncode == 0
    assert status_lines(cloud) == ["running"]
    assert cloud.run("stop.sh", *NAMED).returncode == 0
    (folder / "exit").unlink()
    (folder / "stopped").unlink()
    (folder / "pid").write_text("1\n")  # as after a start of the machine: the number means nothing
    assert status_lines(cloud) == ["lost"]


def test_deleting_asks_and_says_what(cloud):
    cloud.says(states=["ACTIVE"])
    assert "deleting mine in us-east5-b of my-project" in line(cloud.run("delete.sh", *NAMED))
    assert cloud.calls("gcloud") == []
    assert cloud.run("delete.sh", *NAMED, "--yes").returncode == 0
    assert cloud.calls("gcloud")[0]["argv"][3:6] == ["delete", "mine", "--force"]


def test_the_readme_names_every_script_and_what_it_names_exists():
    text = (ROOT / "tpu" / "README.md").read_text()
    for name in SCRIPTS:
        assert name in text, name
    main = (ROOT / "README.md").read_text()
    assert "JAXCL_STOPPED" in main
    assert "tpu/babysit.sh" in main
    for name in re.findall(r"(?<![\w/])tpu/[\w./]+", text + main):
        assert (ROOT / name.rstrip(".")).exists(), name
    for flag in re.findall(r"`(--[a-z-]+)[=`]", text):
        known = "".join((ROOT / "tpu" / name).read_text() for name in (*SCRIPTS, "jobset.py"))
        assert flag in known or f" {flag[2:]} " in known.replace("'", " "), flag
