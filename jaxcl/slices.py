"""Devices in groups that only a slow network joins: which axis of a mesh crosses it.

TPU slices are joined by the data-centre network; JAX says of every device in which slice it lies. GPUs and CPUs of
different hosts are told apart in the same way. The axis `replica` is for that network: what crosses it is one sum of
gradients for each step, while the other axes move activations or parameters in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from jaxcl.schema import UserError

SPLIT = ("TPU v5 lite", "TPU v5e")  # kinds of which `jax.make_mesh`, too, lets two axes share a side of the torus


def count(devices: Sequence[Any]) -> int:
    """Returns how many slices the devices lie in; 1 if that is not known."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices of several slices as a grid in which the first axis crosses them.

    On TPUs it must. Where a slice is a host of GPUs or CPUs, an axis that is longer than the host is common: if the
    first axis is no multiple of the hosts, the devices lie host after host, and the outer axes cross.

    Args:
      sizes: of the axes, `replica` first; their product is the number of devices.
      devices: all of them, as many in each slice.

    Raises:
      UserError: another axis would cross the slices of TPUs, or these have different sizes.
    """
    slices, platform = count(devices), devices[0].platform
    members = [getattr(device, "slice_index", 0) for device in devices]
    if len({members.count(one) for one in members}) > 1:
        each = ", ".join(f"slice {one}: {members.count(one)}" for one in sorted(set(members)))
        raise UserError(f"config.mesh: the slices have different numbers of devices ({each}); use equal ones")
    if sizes[0] % slices == 0:
        inner = (sizes[0] // slices, *sizes[1:])
        outer = (slices, *(1 for _ in sizes[1:]))
        split = devices[0].device_kind in SPLIT
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=split)
    if platform == "tpu":
        raise UserError(
            f"config.mesh.replica={sizes[0]}: the devices lie in {slices} slices, and only this axis may cross the "
            f"network between them; use a multiple, e.g. --config.mesh.replica={slices}"
        )
    ordered = sorted(zip(members, (device.id for device in devices), range(len(devices)), strict=True))
    grid = np.empty(len(devices), object)
    grid[:] = [devices[i] for _, _, i in ordered]
    return grid.reshape(tuple(sizes))
