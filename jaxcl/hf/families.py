"""What Hugging Face calls things: one table of tensors and one of config fields for every family of decoders.

Both are used both ways. An entry reads: their tensor, our parameter, and how the axes of one become those of the
other, as in `(heads head) embed -> embed heads head`: their first axis holds heads x head, ours come in the order on
the right.
`{}` is the number of the layer; our parameters stack the layers along a first axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxcl.models.config import Config
from jaxcl.schema import UserError, nearest


class Entry(NamedTuple):
    """One tensor, or one of each layer if its name has `{}`."""

    tensor: str
    path: str
    axes: str


class Family(NamedTuple):
    """A `model_type`."""

    architecture: str
    entries: tuple[Entry, ...]
    defaults: Mapping[str, Any]  # of config.json, where the file leaves a field out


_BODY = (
    Entry("model.embed_tokens.weight", "embedding", "vocab embed -> vocab embed"),
    Entry("model.layers.{}.input_layernorm.weight", "layers/attention_norm", "embed -> embed"),
    Entry(
        "model.layers.{}.self_attn.q_proj.weight",
        "layers/attention/query",
        "(heads head) embed -> embed heads head",
    ),
    Entry(
        "model.layers.{}.self_attn.k_proj.weight",
        "layers/attention/key",
        "(kv_heads head) embed -> embed kv_heads head",
    ),
    Entry(
        "model.layers.{}.self_attn.v_proj.weight",
        "layers/attention/value",
        "(kv_heads head) embed -> embed kv_heads head",
    ),
    Entry(
        "model.layers.{}.self_attn.o_proj.weight",
        "layers/attention/out",
        "embed (heads head) -> heads head embed",
    ),
    Entry("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm", "embed -> embed"),
    Entry("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/gate", "mlp embed -> embed mlp"),
    Entry("model.layers.{}.mlp.up_proj.weight", "layers/mlp/up", "mlp embed -> embed mlp"),
    Entry("model.layers.{}.mlp.down_proj.weight", "layers/mlp/down", "embed mlp -> mlp embed"),
    Entry("model.norm.weight", "final_norm", "embed -> embed"),
    Entry("lm_head.weight", "head", "vocab embed -> embed vocab"),
)
_QKV_BIAS = (
    Entry("model.layers.{}.self_attn.q_proj.bias", "layers/attention/query_bias", "(heads head) -> heads head"),
    Entry("model.layers.{}.self_attn.k_proj.bias", "layers/attention/key_bias", "(kv_heads head) -> kv_heads head"),
    Entry("model.layers.{}.self_attn.v_proj.bias", "layers/attention/value_bias", "(kv_heads head) -> kv_heads head"),
)
_OUT_BIAS = (Entry("model.layers.{}.self_attn.o_proj.bias", "layers/attention/out_bias", "embed -> embed"),)
_MLP_BIAS = (
    Entry("model.layers.{}.mlp.gate_proj.bias", "layers/mlp/gate_bias", "mlp -> mlp"),
    Entry("model.layers.{}.mlp.up_proj.bias", "layers/mlp/up_bias", "mlp -> mlp"),
    Entry("model.layers.{}.mlp.down_proj.bias", "layers/mlp/down_bias", "embed -> embed"),
)
_QK_NORM = (
    Entry("model.layers.{}.self_attn.q_norm.weight", "layers/attention/query_norm", "head -> head"),
    Entry("model.layers.{}.self_attn.k_norm.weight", "layers/attention/key_norm", "head -> head"),
)

# The defaults are those of the configuration classes of transformers 5.
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10_000.0}
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            "LlamaForCausalLM",
            (*_BODY, *_QKV_BIAS, *_OUT_BIAS, *_MLP_BIAS),
            _COMMON | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
        ),
        "mistral": Family(
            "MistralForCausalLM",
            _BODY,
            _COMMON | {"sliding_window": 4096, "max_position_embeddings": 131_072},
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM",
            (*_BODY, *_QKV_BIAS),
            _COMMON | {"use_sliding_window": False, "max_window_layers": 28, "max_position_embeddings": 32_768},
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            (*_BODY, *_QKV_BIAS, *_OUT_BIAS, *_QK_NORM),
            _COMMON
            | {
                "attention_bias": False,
                "use_sliding_window": False,
                "max_window_layers": 28,
                "max_position_embeddings": 32_768,
                "head_dim": 128,
            },
        ),
    }
)

# Our field of `models.config.Config` -> theirs in config.json, where the two mean the same.
_FIELDS = MappingProxyType(
    {
        "vocab": "vocab_size",
        "layers": "num_hidden_layers",
        "embed": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp": "intermediate_size",
        "tied": "tie_word_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "max_length": "max_position_embeddings",
        "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    }
)


def family(config: Mapping[str, Any], place: str) -> Family:
    """Returns the family of a config.json.

    Raises:
      UserError: none of ours.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{place}: model_type={kind!r} is no family that jaxcl reads{nearest(str(kind), list(FAMILIES))}"
        )
    return FAMILIES[kind]


def entries(kind: Family, config: Config) -> list[Entry]:
    """Returns the entries whose parameter a model of this shape has."""
    without = {
        "head": config.tied,
        "layers/attention/query_bias": not config.qkv_bias,
        "layers/attention/key_bias": not config.qkv_bias,
        "layers/attention/value_bias": not config.qkv_bias,
        "layers/attention/out_bias": not config.out_bias,
        "layers/mlp/gate_bias": not config.mlp_bias,
        "layers/mlp/up_bias": not config.mlp_bias,
        "layers/mlp/down_bias": not config.mlp_bias,
    }
    return [entry for entry in kind.entries if not without.get(entry.path, False)]


def fields(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns the options of `jaxcl.models.transformer.make` that a config.json stands for.

    Args:
      config: of config.json, in the notation of transformers 4 or 5.
      place: the file, for messages.

    Raises:
      UserError: another family, a missing field, or a feature that our transformer does not have.
    """
    kind = family(config, place)
    known = dict(kind.defaults) | {key: value for key, value in config.items() if value is not None}
    _refuse(known, place)
    out = {ours: known[theirs] for ours, theirs in _FIELDS.items() if theirs in known}
    for name in ("vocab", "layers", "embed", "heads", "mlp"):
        if name not in out:
            raise UserError(f"{place}: has no {_FIELDS[name]!r}; take the config.json that came with the weights")
    out["qkv_bias"] = config["model_type"] == "qwen2" or bool(known.get("attention_bias", False))
    out["qk_norm"] = config["model_type"] == "qwen3"
    rope = dict(known.get("rope_parameters") or {}) | dict(known.get("rope_scaling") or {})
    out["rope_theta"] = float(rope.pop("rope_theta", out["rope_theta"]))
    out["rope_scaling"] = _scaling(rope, known, place)
    return {key: value for key, value in (out | _window(known, place)).items() if value is not None}


def _refuse(known: Mapping[str, Any], place: str) -> None:
    """Raises UserError for features that our transformer does not have."""
    if known["hidden_act"] != "silu":
        raise UserError(f"{place}: hidden_act={known['hidden_act']!r}: jaxcl has silu only; choose another checkpoint")
    if (share := known.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{place}: partial_rotary_factor={share!r}: jaxcl rotates whole heads only")


def _scaling(rope: Mapping[str, Any], known: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    return None


def _window(known: Mapping[str, Any], place: str) -> dict[str, Any]:
    return {}
