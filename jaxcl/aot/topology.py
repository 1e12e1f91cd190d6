"""The machine that a program is compiled for: its name, its chips, and the devices that stand for them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import math
import os
import re
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxcl.schema import UserError

EXAMPLES = "examples: v4:2x2x4, v5e:16x16, v5p:8x8x4, v6e:8x8, v7x:4x4x4, h200:32"
INSTALL = "pip install -e '.[aot]'"
HOST = 8  # GPUs that share a host
# Read by libtpu and JAX when they start: compile for chips that are elsewhere, and leave alone those that are here.
ENVIRONMENT = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked which machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: without one libtpu warns that it does not know its machine
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
)


class Chip(NamedTuple):
    """What one JAX device of a kind has."""

    hbm: float  # GiB that a program may use
    bandwidth: float  # bytes per second between HBM and the chip
    dimensions: int  # of the torus; 0 = a number of GPUs
    links: float | None  # bytes per second that leave a device over all of its links to others; None = not known
    config: str | None = None  # "megacore": the two cores of a chip are one device


# HBM is what the compiler of the chip allows (libtpu 0.0.42: its RESOURCE_EXHAUSTED names it), for the GPU 95 % of what
# nvidia-smi shows. Bandwidth: https://cloud.google.com/tpu/docs/system-architecture and the H200 data sheet. The two
# devices of a TPU v7x chip have half of it each. Links: half of the "bidirectional inter-chip interconnect bandwidth"
# of https://cloud.google.com/tpu/docs/v5e, v5p and v6e (400, 1200 and 800 GB/s), which counts both directions.
CHIPS = MappingProxyType(
    {
        "v4": Chip(30.75, 1.2e12, 3, None, "megacore"),
        "v5e": Chip(15.75, 0.819e12, 2, 200e9),
        "v5p": Chip(95.74, 2.765e12, 3, 600e9),
        "v6e": Chip(31.25, 1.64e12, 2, 400e9),
        "tpu7x": Chip(94.75, 3.69e12, 3, None),
        "h200": Chip(133.3, 4.8e12, 0, None),
    }
)


ALIASES = MappingProxyType({"v7x": "tpu7x"})  # as people say -> as libtpu does


class Topology(NamedTuple):
    """Chips of one kind."""

    name: str  # as it was given
    kind: str
    sizes: tuple[int, ...]  # of the torus, or the number of GPUs
    slices: int = 1  # such tori, joined by the network of the data centre

    @property
    def chip(self) -> Chip:
        """Returns what each device has."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """Returns the JAX platform to lower for."""
        return "tpu" if self.chip.dimensions else "cuda"


def parse(text: str, slices: int = 1) -> Topology:
    """Returns the topology of `slices` times `KIND:AxB` or `KIND:AxBxC`, or of `h200:N`.

    Raises:
      UserError: there is no such kind, the sizes do not fit it, or it has no slices.
    """
    kind, _, rest = text.strip().lower().partition(":")
    kind = ALIASES.get(kind, kind)
    if kind not in CHIPS:
        known = ", ".join((*CHIPS, *ALIASES))
        raise UserError(f"--topology={text}: unknown kind of chip; choose from {known}; {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        raise UserError(f"--topology={text}: sizes are missing or malformed; {EXAMPLES}")
    sizes = tuple(int(size) for size in rest.split("x"))
    wanted = CHIPS[kind].dimensions
    if len(sizes) != (wanted or 1):
        shape = {0: "a number", 2: "two sizes", 3: "three sizes"}[wanted]
        raise UserError(f"--topology={text}: {kind} takes {shape}; {EXAMPLES}")
    if not wanted and sizes[0] > HOST and sizes[0] % HOST:
        raise UserError(f"--topology={text}: more than {HOST} GPUs must be a multiple of {HOST}; {EXAMPLES}")
    if wanted and any(size % 2 for size in sizes[:2]) and math.prod(sizes) > 1:
        low = [max(size - size % 2, 2) for size in sizes[:2]]
        high = [size + size % 2 for size in sizes[:2]]
        near = dict.fromkeys(f"{kind}:{'x'.join(map(str, (*pair, *sizes[2:])))}" for pair in (low, high))
        fault = "the first two sizes must be even, as a host has 2x2 chips, or all sizes 1"
        raise UserError(f"--topology={text}: {fault}; nearby: {', '.join(near)}")
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    if slices > 1 and not wanted:
        fault = "GPUs lie in hosts, not in slices; leave it out, and name all of them"
        raise UserError(f"--slices={slices}: {fault}: --topology={kind}:{sizes[0] * slices}")
    return Topology(text, kind, sizes, slices)


def devices(topology: Topology) -> list[Any]:
    """Returns a JAX device for every chip of all slices; they can be compiled for, and no more.

    Raises:
      UserError: the compiler is not installed, or does not know such a topology, or no slices.
    """
    _require(topology)
    from jax.experimental import topologies  # noqa: PLC0415  (the environment must be set before)

    from jaxcl import slices  # noqa: PLC0415

    options: dict[str, Any] = {"platform": topology.platform}
    if topology.platform == "tpu":
        options["topology_name"] = f"{topology.kind}:{'x'.join(map(str, topology.sizes))}"
        if topology.chip.config:
            options["chip_config_name"] = topology.chip.config
        if math.prod(topology.sizes) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if topology.slices > 1:
            options["num_slices"] = topology.slices
    else:
        gpus = topology.sizes[0]
        hosts = max(gpus // HOST, 1)
        options["topology"] = f"1x{hosts}x{gpus // hosts}"  # slices x hosts x GPUs
        options["target_config"] = importlib.resources.files("jaxcl.aot").joinpath("h200.txtpb").read_text()
    try:
        found = list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # the plugins raise what they like
        text = " ".join(str(error).split())[:200]
        several = f" --slices={topology.slices}" if topology.slices > 1 else ""
        fault = f"--topology={topology.name}{several}: the compiler refuses it"
        raise UserError(f"{fault} ({text}); {EXAMPLES}") from error
    if topology.slices > 1 and slices.count(found) != topology.slices:
        fault = f"this libtpu knows {slices.count(found)} of them; install a newer one, or leave it out"
        raise UserError(f"--slices={topology.slices}: {fault}: {INSTALL}")
    return found


def _require(topology: Topology) -> None:
    """Raises UserError unless the compiler of the platform is installed."""
    if topology.platform == "tpu":
        found = bool(os.environ.get("TPU_LIBRARY_PATH")) or _installed("libtpu")
        what = "libtpu"
    else:
        found, what = _installed("jax_plugins.xla_cuda13"), "the CUDA compiler (jax-cuda13-plugin and three more)"
    if not found:
        raise UserError(f"--topology={topology.name}: needs {what}, which is not installed: {INSTALL}")


def versions(topology: Topology) -> dict[str, str]:
    """Returns the versions of JAX and of the compiler, as far as they are packages."""
    out = {}
    for package in ("jax", "jaxlib", "libtpu" if topology.platform == "tpu" else "jax-cuda13-pjrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[package] = importlib.metadata.version(package)
    return out


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
