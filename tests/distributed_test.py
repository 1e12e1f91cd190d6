"""The same run on one, two and four processes; checkpoints that move between them; stopping together."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import jax
import namespaces
import processes
import pytest
from etils import epath

from jaxcl import checkpoint, distributed, manifests
from jaxcl.schema import UserError

LAYOUTS = [(1, 4), (2, 2), (4, 1)]
REASON = namespaces.why_not()
apart = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six steps with a checkpoint after four, on every layout."""
    results = {}
    for count, devices in LAYOUTS:
        directory = tmp_path_factory.mktemp("run") / "checkpoints"
        found = processes.run("fsdp_tp", directory, 0, 4, 6, processes=count, devices=devices)
        results[count] = directory, found
    return results


def test_losses_and_states_are_bit_equal_on_every_layout(runs):
    _, reference = runs[1]
    for _, found in runs.values():
        for result in found:
            assert result["losses"] == reference[0]["losses"]
            assert result["leaves"] == reference[0]["leaves"]
    assert len(set(reference[0]["losses"])) == 6


def test_no_process_reads_the_rows_of_another(runs):
    assert [result["asked"] for result in runs[2][1]] == [[[0, 4]], [[4, 8]]]
    assert [result["asked"] for result in runs[1][1]] == [[[0, 4], [4, 8]]]


def test_saved_by_two_processes_restored_by_one(runs):
    directory, straight = runs[2]
    (resumed,) = processes.run("fsdp_tp", directory, 4, 0, 6, processes=1, devices=4)
    assert resumed["host"] == {"written by": 2}
    assert resumed["losses"] == straight[0]["losses"][4:]
    assert resumed["leaves"] == straight[0]["leaves"]


@apart
def test_processes_that_share_no_network_but_a_cable_train_together(runs, tmp_path):
    _, reference = runs[1]
    with namespaces.joined(tmp_path) as hosts:
        place = {"hosts": hosts, "address": namespaces.ADDRESSES[0]}
        started = processes.start("fsdp_tp", tmp_path / "run", 0, 4, 6, processes=2, devices=2, **place)
        found = processes.finish(started, timeout=300)
    for result in found:
        assert result["losses"] == reference[0]["losses"]
        assert result["leaves"] == reference[0]["leaves"]
    assert [result["asked"] for result in found] == [[[0, 4]], [[4, 8]]]


@apart
def test_hosts_reach_each_other_by_the_cable_alone(tmp_path):
    ask = "import socket, sys; print([socket.socket().connect_ex((name, 9)) for name in sys.argv[1:]])"
    with namespaces.joined(tmp_path) as hosts:
        for host in hosts:
            command = [*host, sys.executable, "-I", "-S", "-W", "ignore", "-c", ask, *namespaces.ADDRESSES, "192.0.2.1"]
            codes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert codes == "[111, 111, 101]\n"  # two refuse, and to the third there is no way


@pytest.fixture(scope="module")
def disagreeing(tmp_path_factory):
    """Two processes whose clocks, listings and disks differ; see the worker."""
    directory = tmp_path_factory.mktemp("agree") / "checkpoints"
    return directory, processes.run("agree", directory, processes=2, timeout=120)


def test_what_fails_on_one_process_ends_all(disagreeing):
    _, found = disagreeing
    assert [one["told"] for one in found] == ["process 1 cannot go on; its own message says why", "no room"]


def test_the_first_process_says_when_a_checkpoint_is_due(disagreeing):
    _, found = disagreeing
    assert [one["due by the first"] for one in found] == [[20, 40]] * 2
    assert [one["due by the second"] for one in found] == [[]] * 2


def test_a_save_begins_and_ends_together(disagreeing):
    """Whatever the first process writes late: the folder before the arrays, the manifest after them."""
    directory, found = disagreeing
    for one in found:
        assert one["host.json is there"] == [True, True]
        assert (one["waited for 10"], one["waited for 20"]) == ([10], [10, 20])
        assert ["MANIFEST", *one["hashed"]] == manifests.files(epath.Path(directory / "20"))
        assert any("process_1" in name for name in one["hashed"])


def test_all_restore_what_the_first_process_lists(disagreeing):
    _, found = disagreeing
    assert [one["an old listing"] for one in found] == [[20, 20.0, None]] * 2


def test_what_is_damaged_for_one_process_is_so_for_all(disagreeing):
    _, found = disagreeing
    assert list(found[0]["damaged"]) == list(found[1]["damaged"]) == found[0]["hashed"]
    finders = set()
    for name in found[0]["hashed"]:
        both = [one["damaged"][name] for one in found]
        assert [one[:2] for one in both] == [[10, 10.0]] * 2, name
        own = [f"checkpoint 20 is unusable ({name} was altered)" in one[2] for one in both]
        assert sorted(own) == [False, True], name  # each file is hashed once
        assert "another process found a damaged file" in both[own.index(False)][2]
        finders.add(own.index(True))
    assert finders == {0, 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number):
    started = processes.start("stop", processes=2, devices=1)
    processes.wait_for(started, "running")
    started[1].popen.send_signal(number)
    found = processes.finish(started, timeout=120)
    assert found[0]["step"] == found[1]["step"] < 10**6
    assert [one["reason"] for one in found] == ["SIGTERM", number.name]


@pytest.fixture
def alone(monkeypatch):
    """No launcher has left anything in the environment."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JOBSET", "JAXCL_CLUSTER", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)


def test_without_a_cluster_nothing_is_joined(alone):
    assert not distributed.initialize()
    distributed.shutdown()
    assert jax.process_count() == 1


TWO = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': must be a whole number from 1 on"),
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID='': must be a whole number from 0 on"),
        ({"JAX_PROCESS_ID": "5"}, "JAX_PROCESS_ID=5: must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_COORDINATOR_ADDRESS": "nonsense"}, "JAX_COORDINATOR_ADDRESS='nonsense': must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS='': must be HOST:PORT"),
        ({"JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None}, "cluster: the environment names one that JAX does not"),
        (dict.fromkeys(TWO) | {"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS='abc': must be a whole"),
        (dict.fromkeys(TWO) | {"JAXCL_CLUSTER": "tpu"}, "cluster: the environment names one that JAX does not find"),
    ],
)
def test_a_cluster_that_is_none_is_named(monkeypatch, changes, message):
    for name, value in (TWO | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", incomplete)
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.initialize()


def incomplete(*of):
    raise ValueError("coordinator_address should be defined.")


def test_a_first_process_that_does_not_answer_is_named_with_a_status_to_start_again(monkeypatch, capsys):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "APPEAR_S", 0.5)
    with pytest.raises(SystemExit) as stop:
        distributed.initialize()
    assert stop.value.code == 4
    assert "error: process 0 at JAX_COORDINATOR_ADDRESS=127.0.0.1:9 did not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "several", "one"),
    [
        ("JAX_COORDINATOR_ADDRESS", "host:1234", None),
        ("MEGASCALE_COORDINATOR_ADDRESS", "host", None),
        ("JAXCL_CLUSTER", "1", None),
        ("JOBSET_NAME", "run", None),
        ("TPU_WORKER_HOSTNAMES", "a,b", "a"),
        ("SLURM_STEP_NUM_TASKS", "2", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2", "1"),
    ],
)
def test_the_processes_of_a_launcher_are_joined(alone, monkeypatch, name, several, one):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *rest: calls.append(rest))
    if one:
        monkeypatch.setenv(name, one)
        assert not distributed.initialize()
    assert calls == []
    monkeypatch.setenv(name, several)
    assert distributed.initialize()
    assert calls == [()]  # JAX asks the launcher for the rest


def test_processes_that_are_numbered_by_hand_are_joined(alone, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *rest, **_: calls.append(rest))
    monkeypatch.setattr(distributed, "_answers", lambda host, port: (host, port) == ("host", 1234))
    for name, value in (("COORDINATOR_ADDRESS", "host:1234"), ("NUM_PROCESSES", "4"), ("PROCESS_ID", "3")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert distributed.initialize()
    assert calls == [("host:1234", 4, 3)]


def test_one_process_stops_on_a_signal_and_on_the_second_interrupt_at_once():
    old = signal.getsignal(signal.SIGTERM)
    with distributed.stop_on_signal() as stopped:
        assert stopped(0) is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped(1) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with distributed.stop_on_signal() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped(0) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is old


def test_compiled_programs_are_kept_unless_they_are_told_to_be_elsewhere(tmp_path, monkeypatch):
    set_ = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_.append((name, value)))
    monkeypatch.setenv("HOME", str(tmp_path))
    place = str(tmp_path / ".cache" / "jaxcl" / "compiled")
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", True, raising=False)
    assert distributed.cache_compilations() == place
    assert set_ == [("jax_compilation_cache_dir", place)]
    assert os.stat(place).st_mode & 0o077 == 0
    with monkeypatch.context() as other:
        other.setattr(os, "getuid", lambda: os.stat(place).st_uid + 1)  # somebody else could write programs there
        assert distributed.cache_compilations() is None
    monkeypatch.setenv("HOME", "/proc/none")
    assert distributed.cache_compilations() is None
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "elsewhere", raising=False)
    assert distributed.cache_compilations() == "elsewhere"
    assert len(set_) == 1


def test_a_fork_is_like_an_interpreter_of_its_own(tmp_path):
    """And its neighbour hashes in another way, so that a program that depends on the order of a set is noticed."""
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAXCL_GIVEN": "yes"}
    started = processes.start("order", "fail", 7, processes=2, env=env)
    found = processes.finish(started, codes=(3,))
    assert [one.pop("process") for one in found] == [0, 1]
    assert found[0].pop("hash") != found[1].pop("hash")
    told = {"arguments": ["fail", "7"], "quick": True, "cache": str(tmp_path), "least": 1.0, "given": "yes"}
    assert found == [told, told]
    assert all("to stderr" in one.log.read_text() for one in started)
    (plain,) = processes.run("order")
    assert (plain["quick"], plain["given"], plain["arguments"]) == (False, None, [])


GONE, OTHER = "INTERNAL: [Gloo] Connection closed by peer", "another process or its machine is gone"


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (jax.errors.JaxRuntimeError(GONE), 4, OTHER),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            1,
            "error: RESOURCE_EXHAUSTED",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: CpuCallback error: bad row"), 1, "error: INTERNAL: CpuCallback"),
        (
            checkpoint.NotSaved("checkpoint 3 was not written: Barrier timed out"),
            4,
            "another process or its machine is gone",
        ),
        (checkpoint.NotSaved("checkpoint 3 was not written: No space left on device"), None, ""),
        (ValueError("heartbeat: no such key"), None, ""),
    ],
)
def test_a_process_leaves_at_once_only_if_another_is_gone_or_its_own_device_fails(
    error, status, told, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with contextlib.nullcontext() if status else pytest.raises(type(error)), distributed.leaving(4):
        raise error
    assert left == [status] * bool(status)
    assert told in capsys.readouterr().err
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(type(error)), distributed.leaving(4):
        raise error
