"""Stands in for gcloud, kubectl, srun and other tools that the scripts of tpu/ call: fake_tools.py TOOL ARG...

It appends {"tool", "argv", "worker"} to $FAKE/calls.jsonl and plays $FAKE/scenario.json: for a kind of call a list of
answers ("hang" for none), of which the last one stays; `slices`, `workers` of each, `silent` ones, and whether `python`
is "old" there.
`ssh` runs the command for real, in a home for each worker, by `sh`: what only bash understands fails.
"""

import json
import os
import shutil
import signal
import sys
import time

FAKE = os.environ["FAKE"]
WORKER = os.environ.get("FAKE_WORKER", "")
LATEST = time.monotonic() + 300


def wait():
    """Passes a moment; nothing outlives its test by long."""
    if time.monotonic() > LATEST:
        sys.exit(99)
    time.sleep(0.02)


def scenario():
    with open(f"{FAKE}/scenario.json") as file:
        return json.load(file)


def answer(kind, default=None):
    """Returns the next answer of a kind."""
    path = f"{FAKE}/count.{kind.replace('/', '-')}"
    count = os.path.getsize(path) if os.path.exists(path) else 0
    with open(path, "a") as file:
        file.write("x")
    answers = scenario().get(kind, [default])
    return answers[min(count, len(answers) - 1)]


def keep(path, value):
    with open(f"{FAKE}/{path}", "w") as file:
        json.dump(value, file)


def recall(path, default):
    try:
        with open(f"{FAKE}/{path}") as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def record(tool, argv, **more):
    line = json.dumps({"tool": tool, "argv": argv, "worker": WORKER, **more}) + "\n"
    handle = os.open(f"{FAKE}/calls.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())
    os.close(handle)


def fail(text, status=1):
    if text == "hang":  # a child of the tool has the pipe, as python has in gcloud, a shell script
        import subprocess

        child = subprocess.Popen(["sleep", "300"])
        keep("hanging", child.pid)
        child.wait()
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    sys.exit(status)


def homes(argv):
    """Yields (worker, its home) of those that --node and --worker name."""
    given = dict(arg.split("=", 1) for arg in argv if arg.startswith(("--node=", "--worker=")))
    setup = scenario()
    for node in range(setup.get("slices", 1)):
        for worker in range(setup.get("workers", 1)):
            if given.get("--node", "0") in ("all", str(node)) and given.get("--worker", "0") in ("all", str(worker)):
                home = f"{FAKE}/homes/{node}.{worker}"
                os.makedirs(home, exist_ok=True)
                yield f"{node}.{worker}", home


def clear():
    """Ends what runs on the machines, and removes their disks."""
    base = f"{FAKE}/homes"
    for home in os.listdir(base) if os.path.isdir(base) else ():
        jobs = f"{base}/{home}/jaxcl-jobs"
        for job in os.listdir(jobs) if os.path.isdir(jobs) else ():
            try:
                with open(f"{jobs}/{job}/pid") as file:
                    os.kill(int(file.read()), signal.SIGKILL)
            except (OSError, ValueError):
                pass
    shutil.rmtree(base, ignore_errors=True)


def ssh(argv):
    if status := answer("ssh", 0):
        if status == "hang":
            fail("hang")
        fail("[255] ssh: connect to host port 22: Connection refused", status)
    command = next(arg.split("=", 1)[1] for arg in argv if arg.startswith("--command="))
    import subprocess

    codes = []
    for worker, home in homes(argv):
        if worker in scenario().get("silent", ()):
            continue
        env = {**os.environ, "HOME": home, "FAKE_WORKER": worker, "JAXCL_MOUNT": f"{home}/mnt"}
        env["PATH"] = f"{FAKE}/worker_bin:{env['PATH']}"
        remote = " ".join(command.split(" "))  # as gcloud hands it to ssh, and ssh to the shell
        codes.append(subprocess.run(["sh", "-c", remote], cwd=home, env=env, check=False).returncode)
    sys.exit(next((code for code in codes if code), 0))


def gcloud(argv):
    what, verb = argv[2], argv[3]
    if what == "tpu-vm":
        node = recall("node", "READY")
        node = answer("nodes", node)
        return print(f"{node}\t{scenario().get('workers', 1)}")
    if verb == "ssh":
        return ssh(argv)
    if verb == "scp":
        for _, home in homes(argv):
            shutil.copy(argv[4], f"{home}/{argv[5].split(':', 1)[1]}")
        return None
    states = recall("states", scenario().get("states", ["absent"]))
    if verb == "describe":
        if error := answer("describe"):
            fail(error)
        if states[0] == "absent":
            fail("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/x' was not found.")
        print(states[0])
        keep("states", states[1:] or states)
    elif verb == "create":
        if error := answer("create"):
            fail(error)
        if states[0] != "absent":
            fail("ALREADY_EXISTS: Resource already exists.")
        keep("states", answer("grants", ["ACTIVE"]))
    elif verb == "delete":
        clear()
        keep("states", ["absent"])
    return None


def job(argv):
    """A run: its answers are for each start on a worker, an exit status or what it does until SIGTERM."""
    answers = scenario().get("jobs", [0])
    path = f"{FAKE}/starts.{WORKER}"
    count = os.path.getsize(path) if os.path.exists(path) else 0
    with open(path, "a") as file:
        file.write("x")
    found = answers[min(count, len(answers) - 1)]
    if isinstance(found, dict):
        found = found[WORKER]
    if found == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if found in ("save", "killed"):
        status = int(os.environ["JAXCL_STOPPED"]) if found == "save" else 137
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    record("job", argv, env={name: value for name, value in os.environ.items() if name.startswith("JAXCL_")})
    while isinstance(found, str):
        wait()
    sys.exit(found)


def python(argv):
    """An interpreter on a worker: makes environments, installs nothing, trains nothing."""
    if argv[:2] == ["-m", "jaxcl.main"]:
        return job(argv[2:])
    if argv[:2] == ["-m", "jaxcl.retry"]:
        os.execv(sys.executable, [sys.executable, *argv])
    if argv[0] == "-c":
        sys.exit(1 if scenario().get("python") == "old" else 0)
    record("python", argv)
    if argv[1] in ("venv", "uv"):
        os.makedirs(f"{argv[-1]}/bin", exist_ok=True)
        shutil.copy(f"{FAKE}/worker_bin/python3", f"{argv[-1]}/bin/python")
    return None


def srun(argv):
    """Ends with its answer, or with what comes into $FAKE/release if that is "wait". A signal kills its tasks."""
    record("srun", argv, env={name: os.environ.get(name) for name in ("JAXCL_STOPPED", "SRUN_CPUS_PER_TASK")})
    found = answer("srun", 0)
    if isinstance(found, str):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(137))
        keep("listening", True)
        while (found := recall("release", None)) is None:
            wait()
    sys.exit(found)


def main():
    tool, argv = sys.argv[1], sys.argv[2:]
    if tool == "python":
        return python(argv)
    if tool == "srun":
        return srun(argv)
    if tool == "gcloud":
        record(tool, argv)
        return gcloud(argv)
    record(tool, argv, **({"stdin": sys.stdin.read()} if argv[-1] == "--filename=-" else {}))
    if status := answer(tool, 0):
        if status == "hang":
            fail("hang")
        sys.exit(status)
    if tool == "sudo":
        os.execvp(argv[0], argv)
    return None


if __name__ == "__main__":
    main()
