"""Which programs hold a kernel of attention: by platform, width, dtype, scale, kind of call and mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxcl import mesh as meshes
from jaxcl.kernels.attention import attention, reference

H100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")


def calls(platform, *, width=64, dtypes=("bfloat16",) * 3, **options):
    """Returns the names of the custom calls of forward and backward pass, lowered for a platform."""

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, **options).astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((2, 256, heads, width), t) for heads, t in zip((4, 2, 2), dtypes, strict=True)]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    return [x for x in re.findall(r"custom_call @(\w+)", text) if x.startswith(("tpu_custom", "mosaic_gpu"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_width_has_its_kernels(width, dtype):
    own = {"width": width, "dtypes": (dtype,) * 3}
    assert calls("tpu", **own) == ["tpu_custom_call"] * 3
    assert calls("cuda", **own) == []  # not before it has run on the hardware
    hopper = calls("cuda", **own, implementation="kernel")
    assert len(hopper) == (3 if dtype == "bfloat16" else 0)
    assert all(name.startswith("mosaic_gpu") for name in hopper)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0},
        {"scale": -0.1},
        {"dtypes": ("float16",) * 3},
        {"width": 32},
        {"width": 192},
        {"bias": np.zeros((1, 1, 1, 256), np.float32)},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_left_to_xla(options):
    assert calls("tpu", **options) == []


@pytest.mark.parametrize(("dtypes", "scale"), [(("float16",) * 3, 0.3), (("float32",) * 3, -0.3)])
def test_what_no_kernel_takes_follows_the_definition(dtypes, scale):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 20, n, 64)), t) for n, t in zip((4, 2, 2), dtypes, strict=True))

    def both(f):
        return jax.value_and_grad(lambda *x: jnp.sum(f(*x, scale=scale).astype(jnp.float32) ** 2), (0, 1, 2))(q, k, v)

    for got, want in zip(*(jax.tree.leaves(both(f)) for f in (attention, reference.attention)), strict=True):
        assert got.dtype == want.dtype
        a, b = (np.asarray(x, np.float32) for x in (got, want))
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()


def test_places_of_keys_count_where_there_are_as_many_keys_as_queries():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3))
    turned = np.tile(np.arange(6)[::-1], (2, 1)).astype(np.int32)
    places = np.tile(np.arange(6), (2, 1)).astype(np.int32)
    got = attention(q, k, v, positions=places, kv_positions=turned)
    np.testing.assert_allclose(got, attention(q, k[:, ::-1], v[:, ::-1]), atol=2e-6)
    ones = np.ones((2, 6), np.int32)
    got = attention(q, k, v, segments=ones, kv_segments=ones * np.array([1, 1, 2, 2, 2, 2], np.int32), causal=False)
    np.testing.assert_allclose(got, reference.attention(q, k[:, :2], v[:, :2], causal=False), atol=2e-6)


@pytest.mark.parametrize("heads", [4, 3])
def test_on_a_mesh_the_kernel_runs_on_the_rows_and_heads_of_a_device(heads):
    """Inside shard_map; the operands of the kernel have the size of a part and nothing is gathered for it."""
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    q, k = (jax.ShapeDtypeStruct((8, 128, n, 64), jnp.bfloat16) for n in (heads, heads // 2 if heads == 4 else 3))
    segments = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def loss(q, k, v, segments):
        return jnp.sum(attention(q, k, v, segments=segments).astype(jnp.float32))

    step = jax.jit(meshes.on(mesh, jax.grad(loss, (0, 1, 2))))
    text = step.trace(q, k, k, segments).lower(lowering_platforms=("tpu",)).as_text()
    kernels = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(kernels) == 3
    own = 2 if heads == 4 else 3  # three heads are not cut over two devices
    assert all(f"tensor<2x{own}x128x64xbf16>" in line for line in kernels)
    assert not any("tensor<8x" in line for line in kernels)
