"""Two hosts on one machine: network namespaces of their own, joined by a virtual cable, and nothing else to reach."""

import contextlib
import os
import shutil
import subprocess

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def why_not():
    """Returns why there can be none, or None."""
    if not shutil.which("ip"):
        return "no iproute2"
    name = f"jaxcl-{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "jaxcl-a", "type", "veth", "peer", "name", "jaxcl-b")
        finally:
            _ip("netns", "delete", name)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"not permitted: {' '.join(str(getattr(error, 'stderr', error)).split())}"
    return None


@contextlib.contextmanager
def joined():
    """Yields the commands that run something on each of two hosts."""
    names = [f"jaxcl-{os.getpid()}-{i}" for i in range(2)]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            _ip("netns", "delete", name)
