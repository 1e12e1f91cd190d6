"""Machines that are none: runs the scripts of tpu/ against `tests/workers/fake_tools.py`, with no other tools around.

with Cloud(tmp_path, slices=2, states=["ACTIVE"]) as cloud:    `tests/workers/fake_tools.py` knows what a scenario says
    done = cloud.run("status.sh", *NAMED)                      exit status, stdout, stderr
    cloud.calls("gcloud")                                      what was called, in order
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
KIND = ("--accelerator=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--capacity=spot")
JOB = ("--", "--config=configs/pod.py:1b", "--workdir=/mnt/runs/1b")
NAMED = ("--name=mine", "--zone=us-east5-b", "--project=my-project")
FAKES = ("gcloud", "kubectl", "srun", "scontrol")
ON_WORKERS = {"sudo": "sudo", "python3": "python", "python3.13": "python"}
TOOLS = [
    *(
        "awk",
        "basename",
        "bash",
        "cat",
        "chmod",
        "cksum",
        "date",
        "dirname",
        "env",
        "flock",
        "grep",
        "gzip",
        "id",
        "mkdir",
    ),
    *("mktemp", "mv", "nohup", "rm", "sed", "setsid", "sh", "sleep", "sort", "tail", "tar", "timeout", "tr", "true"),
]

HOSTILE = [
    "plain",
    "",
    "two words",
    "  edges  ",
    "it's",
    "''",
    'say "so"',
    "$HOME $(touch owned) `touch owned` ${PATH}",
    "a\nb\n\nc\n",
    "tab\there",
    "back\\slash \\n \\' end\\",
    "; touch owned; #",
    "&& touch owned | cat > owned",
    "*?[a-z]~!{a,b}",
    "--config.stream.stages=[{'name': 'a', \"mixture\": {'old': 1.0}}]",
    "$(NAME) $$ $",
    "-n",
    "--",
    "ümläut 日本 \u202e",
    "%s %n",
]


# A program that becomes another one, which an interrupt ends.
HEARS = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


class Cloud:
    """A folder with a scenario, fake tools, and the few real ones that the scripts need."""

    def __init__(self, place: Path, **scenario):
        self.place, self.tree = place / "fake", place / "tree"
        self.bin = self.place / "bin"
        for folder in (self.bin, self.place / "worker_bin", self.place / "home", self.tree / "jaxcl"):
            folder.mkdir(parents=True)
        shutil.copytree(ROOT / "tpu", self.tree / "tpu")
        (self.tree / "configs").mkdir()
        for name in ("__init__", "console", "goodput", "retry", "schema"):  # the standard library is enough for them
            shutil.copy(ROOT / "jaxcl" / f"{name}.py", self.tree / "jaxcl")
        for name in ("README.md", "LICENSE", "pyproject.toml"):
            (self.tree / name).touch()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        (self.bin / "python3").symlink_to(os.path.realpath(sys.executable))
        for name in FAKES:
            self.fake(self.bin / name, name)
        for name, tool in ON_WORKERS.items():
            self.fake(self.place / "worker_bin" / name, tool)
        self.script(self.bin / "hostname", 'echo "host-${FAKE_WORKER:-none}"')
        self.script(self.place / "worker_bin" / "mountpoint", 'test -e "$HOME/mounted"')
        self.script(self.place / "worker_bin" / "mount.nfs", "exit 1")
        self.script(self.place / "worker_bin" / "mount", ': >"$HOME/mounted"')
        self.says(**scenario)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.clear()

    def says(self, **scenario):
        """Sets the scenario anew."""
        for path in [*self.place.glob("count.*"), *self.place.glob("starts.*")]:
            path.unlink()
        (self.place / "scenario.json").write_text(json.dumps(scenario))

    def script(self, path, text):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def fake(self, path, tool):
        worker = ROOT / "tests" / "workers" / "fake_tools.py"
        self.script(path, f"exec '{sys.executable}' -I -S '{worker}' {tool} \"$@\"")

    def env(self, **more):
        return {"PATH": str(self.bin), "HOME": str(self.place / "home"), "FAKE": str(self.place), **more}

    def run(self, script, *args, timeout=180, **more):
        """Runs a script of tpu/ to its end."""
        command = [str(self.tree / "tpu" / script), *args]
        options = {"capture_output": True, "text": True, "timeout": timeout, "stdin": subprocess.DEVNULL}
        return subprocess.run(command, env=self.env(**more), cwd=self.tree, check=False, **options)

    def start(self, script, *args, session=False, **more):
        """Starts a script, in a session of its own if asked for, and returns at once.

        It hears Ctrl-C, which tests that were started in the background would have it ignore.
        """
        command = [sys.executable, "-I", "-S", "-c", HEARS, str(self.tree / "tpu" / script), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env(**more), cwd=self.tree, start_new_session=session, **pipes)

    def calls(self, tool):
        """Returns the calls of a tool, each a dict with `argv`."""
        path = self.place / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["tool"] == tool]

    def forget(self):
        (self.place / "calls.jsonl").unlink(missing_ok=True)

    def verbs(self):
        """Returns what was asked of gcloud, in order, without looking at what exists."""
        named = [call["argv"][3] if call["argv"][2] == "queued-resources" else "node" for call in self.calls("gcloud")]
        return [name for name in named if name not in ("describe", "node")]

    def clear(self):
        """Kills what still runs on the workers."""
        for path in self.place.glob("homes/*/jaxcl-jobs/*/pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def line(done, status=2):
    """Returns the one line that a script failed with; nothing else was written."""
    assert done.returncode == status, done
    assert done.stdout == ""
    (text,) = done.stderr.splitlines()
    return text


def wait_until(condition, seconds=60):
    """Blocks until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
