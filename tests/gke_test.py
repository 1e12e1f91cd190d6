"""The JobSet that tpu/jobset.py writes and tpu/gke.sh applies; nothing here is a cluster."""

import importlib.util
import json
import re

import pytest
from fake_cloud import HOSTILE, ROOT, Cloud, line

SET = ("--name=mine", "--image=us-docker.pkg.dev/p/runs/jaxcl@sha256:0f", "--claim=runs")
KIND = ("--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
JOB = ("--", *HOSTILE, "--workdir=/mnt/runs/it's mine")


@pytest.fixture(scope="module")
def jobset():
    spec = importlib.util.spec_from_file_location("jobset", ROOT / "tpu" / "jobset.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cloud(tmp_path):
    with Cloud(tmp_path) as made:
        yield made


def expand(text, variables):
    """What the kubelet makes of an argument (k8s.io/kubernetes third_party/forked/golang/expansion)."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "$" and i + 1 < len(text):
            i += 1
            if text[i] == "$":
                out += "$"
            elif text[i] == "(":
                end = text.find(")", i)
                if end < 0:
                    out += "$("
                else:
                    name = text[i + 1 : end]
                    out += variables.get(name, f"$({name})")
                    i = end
            else:
                out += "$" + text[i]
        else:
            out += text[i]
        i += 1
    return out


def made(jobset, *flags, job=JOB):
    return json.loads(jobset.main([*SET, *KIND, *flags, *job]))


def pod_of(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_arguments_reach_the_container_as_they_are(jobset):
    (box,) = pod_of(made(jobset))["containers"]
    known = {"NAME": "replaced", "PATH": "replaced"}
    assert [expand(arg, known) for arg in box["args"]] == list(JOB[1:])
    assert expand("$(NAME)", known) == "replaced"  # the oracle does replace
    assert expand("$$(NAME) $x $", known) == "$(NAME) $x $"
    assert box["command"] == ["python", "-m", "jaxcl.main"]
    assert {entry["name"]: entry["value"] for entry in box["env"]} == {
        "JAXCL_CLUSTER": "tpu",
        "JAXCL_STOPPED": "75",
        "PYTHONUNBUFFERED": "1",
    }


def test_exit_statuses_decide_what_is_started_again(jobset):
    found = made(jobset, "--restarts=7")
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["restartStrategy"] == "BlockingRecreate"
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "jaxcl", "operator": "In", "values": [2, 3]}
    assert job["backoffLimit"] == 0
    pod = pod_of(found)
    assert pod["restartPolicy"] == "Never"  # without it Kubernetes refuses podFailurePolicy
    assert pod["containers"][0]["name"] == rule["onExitCodes"]["containerName"]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("flags", "hosts", "slices"),
    [
        (("--topology=4x4",), 4, 1),
        (("--topology=2x4", "--chips=8"), 1, 1),
        (("--topology=2x2x4", "--accelerator=tpu-v5p-slice", "--slices=3"), 4, 3),
    ],
)
def test_a_pod_for_every_machine_and_a_job_for_every_slice(jobset, flags, hosts, slices):
    found = made(jobset, *flags)
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], replicated["replicas"]) == (hosts, hosts, slices)
    assert job["completionMode"] == "Indexed"
    where = pod_of(found)["nodeSelector"]
    assert f"--topology={where['cloud.google.com/gke-tpu-topology']}" in flags
    assert "cloud.google.com/gke-spot" not in where
    exclusive = found["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"


def test_spot_nodes_and_a_service_account_are_asked_for(jobset):
    plain, pod = pod_of(made(jobset)), pod_of(made(jobset, "--spot", "--service-account=runs"))
    assert pod["nodeSelector"] == plain["nodeSelector"] | {"cloud.google.com/gke-spot": "true"}
    assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    assert pod["serviceAccountName"] == "runs"
    assert not {"tolerations", "serviceAccountName"} & plain.keys()


def test_the_run_is_on_the_claim(jobset):
    pod = pod_of(made(jobset, "--mount=/runs", job=("--", "--workdir=/runs/a")))
    (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}
    assert mount == {"name": volume["name"], "mountPath": "/runs"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--name=a: b",), "--name='a: b': write small letters"),
        (("--name=a\n",), "--name="),
        (("--image=x y",), "--image='x y'"),
        (
            ("--accelerator=tpu-v9",),
            "--accelerator='tpu-v9': write a value of cloud.google.com/gke-tpu-accelerator: tpu-",
        ),
        (("--topology=2x2x4",), "--topology=2x2x4: tpu-v5-lite-podslice has 2 dimensions"),
        (("--accelerator=tpu-v5p-slice",), "--topology=4x4: tpu-v5p-slice has 3 dimensions"),
        (("--mount=/mnt/../x",), "--mount='/mnt/../x': write an absolute folder, without .."),
        (("--topology=4x0",), "--topology='4x0': write such as 4x4"),
        (("--topology=2x3",), "6 chips are no whole number of machines of --chips=4"),
        (("--slices=0",), "--slices=0: must be at least 1"),
        (("--restarts=-1",), "--restarts=-1: must be at least 0"),
        (("--grace=soon",), "--grace"),
        (("--color=red",), "--color"),
        (("--", "--config=x"), "has no --workdir"),
        (("--", "--workdir=/tmp/x"), "--workdir=/tmp/x: not on the claim"),
        (("--", "--workdir=/mnt/runsx"), "not on the claim"),
        (("--", "--workdir=/mnt/runs/x", "--workdir=/tmp/x"), "not on the claim"),
        (("--", "--workdir=/mnt/runs/../x"), "--workdir=/mnt/runs/../x: may lie anywhere; write /mnt/runs/NAME"),
        (("--", "--workdir", "/mnt/runs/x"), "two words; write --workdir=/mnt/runs/NAME"),
        (("--", "--workdir=/mnt/runs/x", "\udcff"), "not UTF-8"),
    ],
)
def test_mistakes_are_one_line(jobset, capsys, given, words):
    job = () if given[0] == "--" else ("--", "--workdir=/mnt/runs/x")
    with pytest.raises(SystemExit) as ended:
        jobset.main([*SET, *KIND, *given, *job])
    assert ended.value.code == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert text.startswith("jobset.py: error: ")
    assert words in text


def test_the_wrapper_applies_what_the_renderer_writes(cloud, jobset):
    flags = (*SET, *KIND, "--spot", "--slices=2", "--namespace=team")
    done = cloud.run("gke.sh", "apply", *flags, "--context=gke_p_us-east5_c", *JOB)
    assert done.returncode == 0, done
    (call,) = cloud.calls("kubectl")
    assert call["argv"] == ["--context=gke_p_us-east5_c", "--namespace=team", "apply", "--filename=-"]
    assert json.loads(call["stdin"]) == json.loads(jobset.main([*flags, *JOB]))
    cloud.forget()
    shown = cloud.run("gke.sh", "apply", *flags, "--dry-run", *JOB)
    assert cloud.calls("kubectl") == []
    first, rest = shown.stdout.split("\n", 1)
    assert first == "# kubectl --namespace=team apply --filename=-"
    assert json.loads(rest) == json.loads(call["stdin"])


def test_the_wrapper_says_what_is_wrong_and_asks(cloud):
    assert "not on the claim" in line(cloud.run("gke.sh", "apply", *SET, *KIND, "--", "--workdir=/x"))
    assert "say what to do" in line(cloud.run("gke.sh", "destroy", "--name=mine"))
    assert "--name=" in line(cloud.run("gke.sh", "delete", "--name=--all", "--yes"))
    asked = "gke.sh: error: deleting the JobSet mine of default needs --yes when there is nobody to ask"
    assert line(cloud.run("gke.sh", "delete", "--name=mine")) == asked
    for context in ("my cluster", "a;b", "--all"):
        assert "not valid; write --context=" in line(
            cloud.run("gke.sh", "status", "--name=mine", f"--context={context}")
        )
    assert "--namespace=: empty" in line(cloud.run("gke.sh", "status", "--name=mine", "--namespace="))
    assert "--: this command is given no job" in line(cloud.run("gke.sh", "logs", "--name=mine", *JOB))
    assert cloud.calls("kubectl") == []
    assert cloud.run("gke.sh", "delete", "--name=mine", "--yes").returncode == 0
    assert [call["argv"] for call in cloud.calls("kubectl")] == [["--namespace=default", "delete", "jobset", "mine"]]
    cloud.forget()
    for verb in ("status", "logs"):
        assert cloud.run("gke.sh", verb, "--name=mine").returncode == 0
    assert [call["argv"][1] for call in cloud.calls("kubectl")] == ["get", "get", "logs"]
    cloud.says(kubectl=["hang"])
    done = cloud.run("gke.sh", "status", "--name=mine", "--limit=1")
    assert done.returncode == 124
    assert "gke.sh: kubectl --namespace=default get jobset mine: no answer within 1 s, ended" in done.stderr
    (cloud.bin / "kubectl").unlink()
    assert "kubectl: not found on PATH; install it" in line(cloud.run("gke.sh", "status", "--name=mine"))
