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
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no iproute2 or no unshare"
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


# Gloo tells the others where it is by resolving its own name.
NAMED = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


@contextlib.contextmanager
def joined(folder):
    """Yields the commands that run something on each of two hosts; `folder` is for what these know of names."""
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
        known = folder / "hosts"
        known.write_text(
            "".join(f"{a} {name}\n" for a, name in zip(ADDRESSES, names, strict=True)) + "127.0.0.1 localhost\n"
        )
        own = ["unshare", "--mount", "--uts", "sh", "-c", NAMED, str(known)]
        yield [["ip", "netns", "exec", name, *own, name] for name in names]
    finally:
        for name in made:
            _ip("netns", "delete", name)
