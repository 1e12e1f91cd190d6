"""Writes a GKE JobSet for a run on TPU slices, as JSON, which is YAML: `python3 tpu/jobset.py FLAGS -- ARGS`.

    python3 tpu/jobset.py --name=mine --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 --claim=runs \\
        -- --config=configs/pod.py:1b --workdir=/mnt/runs/1b

What the manifest says: a Job per slice, a pod per machine, on a node pool of its own; the headless service is JobSet's.
A job that ends with 2 (bad input) or 3 (training cannot go on) fails the set; whatever else ends a pod, preemption too,
deletes all pods and starts all of them anew, up to --restarts times, and the run continues from its last checkpoint.
SIGTERM comes --grace seconds before SIGKILL, and a run that saved then ends with 75, which is no success.

Nothing is pasted into text: the values are data, and `$` is doubled where Kubernetes would replace $(NAME).
Needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from typing import Any, NoReturn

STOPPED = 75  # exit status of a run that SIGTERM stopped; see JAXCL_STOPPED in jaxcl/distributed.py
FINAL = [2, 3]  # exit statuses after which the same command would fail again
NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # JobSet appends to it, and pod names end at 63 characters
AXES = {  # of the topology, by value of cloud.google.com/gke-tpu-accelerator
    "tpu-v3-device": 2,
    "tpu-v3-slice": 2,
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-device": 2,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
    "tpu7x": 3,
}
SHAPES = {
    "name": (NAME, "small letters, digits and dashes, at most 40"),
    "namespace": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "small letters, digits and dashes"),
    "image": (r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}", "HOST/FOLDER/NAME:TAG or ...@sha256:DIGEST"),
    "accelerator": ("|".join(AXES), f"a value of cloud.google.com/gke-tpu-accelerator: {', '.join(AXES)}"),
    "topology": (r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", "such as 4x4 or 2x2x4"),
    "claim": (r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a ReadWriteMany PersistentVolumeClaim"),
    "mount": (r"(/(?!\.\.?/|\.\.?$)[A-Za-z0-9_.-]+)+/?", "an absolute folder, without .."),
    "service_account": (r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a service account of the namespace"),
}


def fail(message: str) -> NoReturn:
    """Ends with one line and status 2."""
    print(f"jobset.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def literal(text: str) -> str:
    """Returns `text` such that Kubernetes passes it on as it is: `$$` becomes `$`, and $(NAME) is never replaced."""
    return text.replace("$", "$$")


def hosts(topology: str, chips: int) -> int:
    """Returns the machines of a slice.

    Raises:
      ValueError: the chips do not make whole machines.
    """
    total = math.prod(int(side) for side in topology.split("x"))
    if total % chips:
        raise ValueError(f"--topology={topology}: {total} chips are no whole number of machines of --chips={chips}")
    return total // chips


def misplaced(job: list[str], mount: str) -> str | None:
    """Returns what is wrong with the folder of the run, which is to be on the claim; None = nothing."""
    if any(arg in ("--workdir", "-workdir") for arg in job):
        return f"the job: --workdir and its value are two words; write --workdir={mount}/NAME"
    folders = [arg.split("=", 1)[1] for arg in job if arg.startswith(("--workdir=", "-workdir="))]
    if not folders:
        return f"the job: has no --workdir; write -- --config=FILE --workdir={mount}/NAME"
    if ".." in folders[-1].split("/"):
        return f"--workdir={folders[-1]}: may lie anywhere; write {mount}/NAME, without .."
    if not folders[-1].startswith(f"{mount}/"):
        return f"--workdir={folders[-1]}: not on the claim, it would go with its pod; write {mount}/NAME"
    return None


def container(options: argparse.Namespace, args: list[str]) -> dict[str, Any]:
    """Returns the container of every pod."""
    return {
        "name": "jaxcl",
        "image": options.image,
        "command": [literal(options.python), "-m", "jaxcl.main"],
        "args": [literal(arg) for arg in args],
        "env": [
            {"name": "JAXCL_CLUSTER", "value": "tpu"},
            {"name": "JAXCL_STOPPED", "value": str(STOPPED)},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ],
        # 8471: between the machines of a slice; 8080: between slices; 8482: JAX's coordinator
        "ports": [{"containerPort": port} for port in (8471, 8080, 8482)],
        "resources": {"limits": {"google.com/tpu": options.chips}},
        "volumeMounts": [{"name": "runs", "mountPath": options.mount}],
    }


def pod(options: argparse.Namespace, args: list[str]) -> dict[str, Any]:
    """Returns the specification of every pod."""
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    found: dict[str, Any] = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it
        "terminationGracePeriodSeconds": options.grace,
        "automountServiceAccountToken": False,  # the run does not talk to Kubernetes
        "nodeSelector": nodes,
        "containers": [container(options, args)],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
    }
    if options.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
        found["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    if options.service_account:
        found["serviceAccountName"] = options.service_account
    return found


def manifest(options: argparse.Namespace, args: list[str]) -> dict[str, Any]:
    """Returns the JobSet."""
    count = hosts(options.topology, options.chips)
    job = {
        "parallelism": count,
        "completions": count,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod that dies takes the others of its slice along: they could only wait for it
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "jaxcl", "operator": "In", "values": FINAL},
                }
            ]
        },
        "template": {"spec": pod(options, args)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "restartStrategy": "BlockingRecreate",  # no pod of before is left when the new ones look for each other
                "rules": [
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options and what follows `--`; exits with status 2 and one line if something is wrong."""
    own, job = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="jobset.py", allow_abbrev=False, description=str(__doc__).splitlines()[0])
    parser.error = fail
    parser.add_argument("--name", required=True)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--image", required=True, help="a container image with jaxcl[tpu]")
    parser.add_argument("--accelerator", required=True)
    parser.add_argument("--topology", required=True, help="of a slice")
    parser.add_argument("--chips", type=int, default=4, help="of a machine (default 4)")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--claim", required=True, help="ReadWriteMany PersistentVolumeClaim, where runs outlive pods")
    parser.add_argument("--mount", default="/mnt/runs", help="where the claim is mounted (default /mnt/runs)")
    parser.add_argument("--service-account")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        help="seconds from SIGTERM to SIGKILL; Spot nodes give 15, unless set otherwise",
    )
    parser.add_argument("--python", default="python", help="the interpreter in the image")
    return parser.parse_args(own), job


def main(argv: list[str]) -> str:
    """Returns the manifest; exits with one line if something is wrong with the command line."""
    options, job = parse(argv)
    fault = None
    for field, (shape, what) in SHAPES.items():
        value = getattr(options, field)
        if value is not None and not re.fullmatch(shape, value):
            fault = fault or f"--{field.replace('_', '-')}={value!r}: write {what}"
    for field, least in (("chips", 1), ("slices", 1), ("restarts", 0), ("grace", 1)):
        if not least <= getattr(options, field) < 2**31:
            fault = fault or f"--{field}={getattr(options, field)}: must be at least {least} and below 2^31"
    axes = options.topology.count("x") + 1
    if axes != AXES.get(options.accelerator, axes):
        fault = (
            fault or f"--topology={options.topology}: {options.accelerator} has {AXES[options.accelerator]} dimensions"
        )
    fault = fault or misplaced(job, options.mount.rstrip("/"))
    if any("\udc80" <= letter <= "\udcff" for arg in job for letter in arg):
        fault = fault or "the job: an argument is not UTF-8, and JSON holds nothing else"
    if fault:
        fail(fault)
    try:
        return json.dumps(manifest(options, job), indent=1)
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    print(main(sys.argv[1:]))
