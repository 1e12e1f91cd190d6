"""FLOPs of a token by hand and by counting a program's matrix products; peaks of devices."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxcl import flops
from jaxcl.kernels.attention import reference
from jaxcl.models import mlp, transformer
from jaxcl.types import Batch


def test_flops_of_a_token_and_utilisation():
    assert flops.per_token(10) == 60
    assert flops.per_token(10, layers=2, length=8, width=4) == 60 + 12 * 2 * 8 * 4
    assert flops.per_token(10, layers=2, length=8, width=4, causal=True) == 60 + 6 * 2 * 8 * 4
    assert flops.utilisation(100.0, 1e10, 2, 1e12) == pytest.approx(0.5)
    assert flops.utilisation(100.0, 1e10, 2, None) is None


def products(jaxpr):
    """Returns the FLOPs of all matrix products of a program, loops unrolled; of a branch by platform, the first."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        times = eqn.params.get("length", 1)
        inner = jax.tree.leaves(list(eqn.params.values()))
        bodies = [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        total += times * sum(map(products, bodies[:1] if eqn.primitive.name == "cond" else bodies))
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "tiny"},
        {"preset": "tiny", "tied": True},
        {
            "preset": "tiny",
            "tied": False,
            "kv_heads": 2,
            "head_dim": 10,
            "qkv_bias": True,
            "qk_norm": True,
            "layers": 3,
        },
    ],
)
def test_flops_of_a_transformer_are_those_of_its_matrix_products(options, monkeypatch):
    """Three times those of the forward pass, counted in its program with plain attention."""

    def plain(q, k, v, *, implementation, **rest):
        return reference.attention(q, k, v, **rest)

    monkeypatch.setattr(transformer, "attention", plain)
    model, length = transformer.make(**options), 24
    params = jax.eval_shape(model.init, jax.random.key(0))
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = Batch(row, row, row, row, row, jax.ShapeDtypeStruct((1,), jnp.int32))
    forward = jax.make_jaxpr(lambda p, b: model.apply(p, b).logits)(params, batch)
    assert flops.of_model(model.axes, params, length) * length == 3 * products(forward.jaxpr)


def test_experts_count_as_far_as_a_token_meets_them():
    """As a dense model with the k units in one, and a router."""
    sizes = {"preset": "tiny", "layers": 3}
    mixed = transformer.shape(**sizes, experts=8, experts_per_token=2, expert_mlp=24)
    found = []
    for model in (transformer.from_config(mixed), transformer.make(**sizes, mlp=2 * 24)):
        found.append((model.axes, jax.eval_shape(model.init, jax.random.key(0)), 16))
    assert mixed.active == 2 / 8
    assert flops.of_model(*found[0], active=mixed.active) == flops.of_model(*found[1]) + 6 * 3 * 32 * 8


def test_flops_of_models_without_attention_and_without_names():
    model = mlp.make(inputs=5, hidden=[7, 3], classes=2)
    assert flops.of_model(model.axes, jax.eval_shape(model.init, jax.random.key(0)), 1) == 6 * (5 * 7 + 7 * 3 + 3 * 2)
    params = {"w": jnp.ones((4, 5)), "scale": jnp.ones(5), "gain": jnp.ones(())}
    assert flops.of_model({"w": (None, None), "scale": (None,), "gain": ()}, params, 8) == 6 * 20
    both, names = {"v": jnp.ones((3, 5)), "w": jnp.ones((4, 5))}, {"v": (None, None), "w": (None, None)}
    assert flops.of_model(names, both, 8, {"v": True, "w": False}) == 6 * 15 + 4 * 20  # no gradient of the frozen one
    tables = {"positions": jnp.ones((9, 4)), "tokens": jnp.ones((11, 4)), "head": jnp.ones((4, 11))}
    axes = {"positions": ("length", "embed"), "tokens": ("vocab", "embed"), "head": ("embed", "vocab")}
    assert flops.of_model(axes, tables, 8) == 6 * 44


# What JAX calls a device -> TFLOP/s in bfloat16 as the vendors give them: of TPU v2, v3 and v7x for a chip, which is
# two devices (https://cloud.google.com/tpu/docs/system-architecture); of most GPUs with sparsity, which counts double.
SHEETS = {
    "TPU v2": 45 / 2,
    "TPU v3": 123 / 2,
    "TPU v4 lite": 138,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU7x": 2307 / 2,
    "NVIDIA A100-SXM4-80GB": 624 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA B200": 4500 / 2,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 362 / 2,
    "NVIDIA L4": 242 / 2,
    "NVIDIA A10G": 140 / 2,
}


def test_peaks_are_those_of_the_data_sheets():
    for kind, teraflops in SHEETS.items():
        found = flops.peak(SimpleNamespace(device_kind=kind))
        assert found == pytest.approx(1e12 * teraflops, rel=2e-3), kind
    for prefix, value in flops.PEAKS:  # none without a data sheet, and none that another hides
        assert any(flops.peak(SimpleNamespace(device_kind=kind)) == value for kind in SHEETS if kind.startswith(prefix))
    assert flops.peak(SimpleNamespace(device_kind="cpu")) is None
