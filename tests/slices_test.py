"""Meshes over several slices: only the axis `replica` crosses the network between them."""

import itertools
import random
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jaxcl import mesh as meshes
from jaxcl import slices
from jaxcl.schema import UserError


@dataclass(frozen=True)
class Device:
    """As much of a JAX device as says where it is."""

    id: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.slice_index


def devices(platform, sizes=(4, 4), kind=None):
    """Returns the devices of slices of 2 x (size / 2) chips, in no order."""
    found = []
    for index, size in enumerate(sizes):
        for x, y in itertools.product(range(2), range(size // 2)):
            found.append(Device(len(found), index, platform, kind or platform, (x, y, 0)))
    random.Random(0).shuffle(found)
    return found


def crossing(grid):
    """Returns the axes along which the slice changes, and whether every device is there once."""
    where = np.vectorize(lambda device: device.slice_index, otypes=[int])(grid)
    whole = len({device.id for device in grid.flat}) == grid.size
    return {axis for axis in range(grid.ndim) if np.any(np.diff(where, axis=axis))}, whole


TPU = {"platform": "tpu", "kind": "TPU v5 lite"}


@pytest.mark.parametrize("where", [TPU, {"platform": "gpu", "kind": "NVIDIA H200"}, {"platform": "cpu"}], ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 4, 1, 1, 1), (4, 1, 1, 2, 1, 1), (2, 1, 2, 1, 2, 1), (8, 1, 1, 1, 1, 1)])
def test_only_the_replicas_cross(where, sizes):
    grid = slices.arrange(sizes, devices(**where))
    assert grid.shape == sizes
    assert crossing(grid) == ({0}, True)


def test_more_replicas_than_slices_lie_together():
    """The outer half of the replicas is one slice, the inner half the other: a sum first inside, then across."""
    grid = slices.arrange((4, 1, 2, 1, 1, 1), devices(**TPU))
    assert [device.slice_index for device in grid[:, 0, 0, 0, 0, 0]] == [0, 0, 1, 1]


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1, 1, 1), (3, 1, 4, 1, 1, 1)])
def test_another_axis_across_slices_of_tpus_is_refused(sizes):
    with pytest.raises(UserError, match=rf"replica={sizes[0]}: .* 2 slices, .*--config.mesh.replica=2"):
        slices.arrange(sizes, devices(**TPU, sizes=(4, 4) if sizes[0] == 1 else (6, 6)))


def test_hosts_of_gpus_may_be_crossed_by_an_outer_axis():
    grid = slices.arrange((1, 1, 8, 1, 1, 1), devices("gpu"))
    assert [device.id for device in grid.flat] == list(range(8))
    grid = slices.arrange((1, 2, 1, 4, 1, 1), devices("gpu"))
    assert crossing(grid) == ({1}, True)  # tensor stays inside a host


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="slice 0: 4, slice 1: 2"):
        slices.arrange((2, 1, 3, 1, 1, 1), devices("tpu", (4, 2)))


def test_a_mesh_is_made_of_it(monkeypatch):
    assert slices.count(jax.devices()) == 1
    monkeypatch.setattr(slices, "count", lambda found: 2)
    monkeypatch.setattr(slices, "arrange", lambda sizes, found: np.asarray(found[::-1]).reshape(sizes))
    mesh = meshes.make(replica=2, fsdp=4)
    assert dict(mesh.shape)["replica"] == 2
    assert list(mesh.devices.flat) == jax.devices()[::-1]
