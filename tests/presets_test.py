"""Parameter counts of the presets against published numbers and a closed form; bad shapes are refused."""

import jax
import pytest

from jaxcl import schema
from jaxcl.models import presets, transformer
from jaxcl.schema import UserError

PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
}
SHAPE = {"vocab": 11, "layers": 1, "embed": 8, "heads": 2, "mlp": 4}


def closed_form(f):
    q, kv = f["heads"] * f["head_dim"], f["kv_heads"] * f["head_dim"]
    units, router = f.get("experts", 1), f["embed"] * f.get("experts", 0)
    layer = f["embed"] * (2 * q + 2 * kv + 3 * units * f.get("expert_mlp", f["mlp"]) + 2) + router
    layer += (q + 2 * kv) * f.get("qkv_bias", 0) + 2 * f["head_dim"] * f.get("qk_norm", 0)
    tables = 1 if f.get("tied") else 2
    return f["layers"] * layer + f["embed"] * (1 + f["vocab"] * tables)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_count(name):
    number = transformer.count(transformer.make(preset=name))
    assert number == closed_form(presets.fields(name))
    assert number == PUBLISHED.get(name, number)


def test_presets_that_are_trained_here_have_the_size_of_their_name():
    sizes = {name: closed_form(presets.fields(name)) for name in presets.PRESETS if name not in PUBLISHED}
    bounds = {
        "tiny": (1e4, 1e5),
        "tiny_moe": (1e4, 1e5),
        "small": (1e6, 3e6),
        "100m": (0.9e8, 1.1e8),
        "1b": (0.9e9, 1.1e9),
    }
    assert sizes.keys() == bounds.keys()
    assert all(low <= sizes[name] <= high for name, (low, high) in bounds.items())


def test_fields_override_the_preset():
    model = transformer.make(preset="tiny", layers=3, tied=False, vocab=100)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert shapes["layers"]["mlp_norm"].shape == (3, 32)
    assert shapes["head"].shape == (32, 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "tinny"}, "preset='tinny'.*'tiny'"),
        ({"preset": "tiny", "window": 0}, "window=0: must be at least 1"),
        ({"preset": "tiny", "vocab_multiple": 0}, "vocab_multiple=0: must be at least 1"),
        ({**SHAPE, "window": 4, "window_layers": (True, True)}, "window_layers=.*each of the 1 layers"),
        ({**SHAPE, "window_layers": (True,)}, "window_layers=.*and config.model.window"),
        ({"preset": "tiny", "rope_scaling": {"kind": "yarm"}}, "rope_scaling.kind='yarm'.*'yarn'"),
        ({"preset": "tiny", "rope_scaling": {"kind": "linear"}}, "rope_scaling.factor: missing; linear scaling"),
        ({"preset": "tiny", "rope_scaling": {"kind": "linear", "factor": "4"}}, "factor='4': must be a positive"),
        ({"preset": "tiny", "rope_scaling": {"kind": "yarn", "factor": -1.0}}, "factor=-1.0: must be a positive"),
        ({"preset": "tiny", "kv_heads": 3}, "kv_heads=3: must divide heads=4"),
        ({"preset": "tiny", "head_dim": 7}, "head_dim=7: must be even"),
        ({"preset": "tiny", "remat": "dot"}, "remat='dot'.*'dots'"),
        ({"preset": "tiny", "compute_dtype": "float16"}, "compute_dtype='float16'.*'bfloat16'|'float32'"),
        ({"preset": "tiny", "layers": 0}, "layers=0: must be at least 1"),
        ({"preset": "tiny", "rope_theta": 0.0}, "rope_theta=0.0: must be positive"),
        ({"preset": "tiny", "rope_scaling": {"factr": 2.0}}, "rope_scaling.factr: unknown.*'factor'"),
        ({"preset": "tiny", "rope_scaling": {"factor": 2.0}}, "rope_scaling.low_freq_factor: missing"),
        (SHAPE | {"heads": 3}, "embed=8: not a multiple of heads=3"),
        ({"layers": 2}, "vocab: missing; .*preset"),
        ({"preset": "tiny", "experts": 0}, "experts=0: must be at least 1"),
        ({"preset": "tiny", "experts": 1}, "experts_per_token=2: there are 1 experts; use at most"),
        ({"preset": "tiny", "experts": 4, "experts_per_token": 5}, "experts_per_token=5: there are 4 experts"),
        ({"preset": "tiny", "experts": 4, "expert_mlp": 0}, "expert_mlp=0: must be at least 1"),
        ({"preset": "tiny_moe", "capacity": 0.0}, "capacity=0.0: must be positive and finite"),
        ({"preset": "tiny_moe", "balance": -0.1}, "balance=-0.1: must not be negative"),
        ({"preset": "tiny_moe", "router_z": float("nan")}, "router_z=nan: must not be negative"),
        ({"preset": "tiny_moe", "mlp_bias": True}, "mlp_bias=True: experts have no biases"),
        ({"preset": "tiny", "balance": 0.1}, "balance=0.1: of experts; set config.model.experts"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        transformer.make(**fields)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("config.model.")


def test_scaling_bounds_must_be_ordered():
    scaling = {"factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, "original_max_position": 8}
    with pytest.raises(UserError, match=r"high_freq_factor=4.0: must exceed"):
        transformer.make(**SHAPE, rope_scaling=scaling)
    assert transformer.count(transformer.make(**SHAPE, rope_scaling={})) == 11 * 8 * 2 + 8 + 8 * (4 * 8 + 3 * 4 + 2)


def test_the_signature_is_the_schema():
    options = {"name": "transformer", "preset": "tiny", "layers": 1}
    assert transformer.count(schema.make("jaxcl.models", options, field="model")) > 0
    with pytest.raises(UserError, match=r"config.model.layer: unknown key.*'layers'"):
        schema.make("jaxcl.models", {"name": "transformer", "layer": 1}, field="model")
    with pytest.raises(UserError, match=r"config.model.vocab='9': expected"):
        schema.make("jaxcl.models", {"name": "transformer", "vocab": "9"}, field="model")
