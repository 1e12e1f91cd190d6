"""Two processes that share no network but a cable: nothing of ours supposes that all of them are on one host."""

import namespaces
import numpy as np
import processes
import pytest

REASON = namespaces.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")


def test_processes_in_two_network_namespaces_train_together(tmp_path):
    with namespaces.joined(tmp_path) as hosts:
        started = processes.start(
            "fsdp_tp", tmp_path / "apart", 0, 2, 3, processes=2, devices=2, hosts=hosts, address=namespaces.ADDRESSES[0]
        )
        apart = processes.finish(started, timeout=300)
    (alone,) = processes.run("fsdp_tp", tmp_path / "alone", 0, 2, 3, processes=1, devices=4)
    assert apart[0]["losses"] == apart[1]["losses"]
    np.testing.assert_array_equal(apart[0]["losses"], alone["losses"])  # sums over two devices are exact in any order
    assert apart[0]["leaves"] == alone["leaves"]
    assert apart[0]["asked"] != apart[1]["asked"]  # each read its own rows


def test_the_hosts_reach_each_other_by_the_cable_alone(tmp_path):
    ask = "import socket, sys; print(socket.socket().connect_ex((sys.argv[1], 9)))"
    with namespaces.joined(tmp_path) as hosts:
        for (own, other), host in zip((namespaces.ADDRESSES, namespaces.ADDRESSES[::-1]), hosts, strict=True):
            for address, refused in ((own, True), (other, True), ("192.0.2.1", False)):
                code = processes.subprocess.run(
                    [*host, processes.sys.executable, "-c", ask, address], capture_output=True, text=True, check=True
                ).stdout
                assert (int(code) == 111) == refused, (address, code)  # refused by a host, or no way to one
