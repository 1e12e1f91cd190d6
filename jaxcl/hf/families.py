"""What Hugging Face calls things: one table of tensors and one of config fields for every family of decoders.

Both are used both ways. An entry reads: their tensor, our parameter, and how the axes of one become those of the
other, as in `(heads head) embed -> embed heads head`: their first axis holds heads x head, ours come in the order on
the right.
`{}` is the number of the layer; our parameters stack the layers along a first axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxcl.models.config import SCALINGS, Config, resolve
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
# Fields of ours that say how to compute, not what.
_OWN = MappingProxyType(
    {
        field.name: field.default
        for field in dataclasses.fields(Config)
        if field.name in ("init_std", "remat", "compute_dtype", "unroll", "vocab_multiple")
    }
)


def family(config: Mapping[str, Any], place: str) -> Family:
    """Returns the family of a config.json.

    Raises:
      UserError: none of ours.
    """
    kind = str(config.get("model_type"))
    for field in ("num_local_experts", "num_experts"):
        if kind not in FAMILIES and config.get(field):
            count = str(config[field])[:40]
            raise UserError(
                f"{place}: model_type={kind!r} has experts, {field}={count}; jaxcl reads dense families only, "
                "and trains experts from scratch (config.model.experts)"
            )
    if kind not in FAMILIES:
        raise UserError(f"{place}: model_type={kind!r} is no family that jaxcl reads{nearest(kind, list(FAMILIES))}")
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
    known["sliding_window"] = config.get("sliding_window", kind.defaults.get("sliding_window"))  # null: there is none
    _check_types(known, place)
    rope = _rope(known, place)
    _refuse(known | rope, place)
    out = {ours: known[theirs] for ours, theirs in _FIELDS.items() if theirs in known}
    out["norm_eps"] = float(out["norm_eps"])
    for name in ("vocab", "layers", "embed", "heads", "mlp"):
        if name not in out:
            raise UserError(f"{place}: has no {_FIELDS[name]!r}; take the config.json that came with the weights")
    out["qkv_bias"] = config["model_type"] == "qwen2" or bool(known.get("attention_bias", False))
    out["qk_norm"] = config["model_type"] == "qwen3"
    out |= _numbers(rope, known, place)
    return {key: value for key, value in (out | _window(known, place)).items() if value is not None}


_NEAR = ("sliding_window", "use_sliding_window", "layer_types")  # of families that are not ours


def unseen(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns the fields of a config.json that change what a model computes and no shape of its tensors.

    In one notation for transformers 4 and 5, of any `model_type`; defaults and scalings are known for ours alone.

    Args:
      config: of config.json.
      place: the file, for messages.

    Raises:
      UserError: RoPE fields that cannot be read.
    """
    kind = FAMILIES.get(str(config.get("model_type")))
    known = dict(kind.defaults if kind else {}) | {key: value for key, value in config.items() if value is not None}
    heads, rope = known.get("num_attention_heads"), _rope(known, place)
    form = rope.get("rope_type", rope.get("type", "default"))
    if kind and form in ("default", *SCALINGS):
        turned = _numbers(rope, known, place)
    else:
        rest = {key: rope[key] for key in sorted(rope) if key not in ("rope_theta", "rope_type", "type")}
        turned = {"rope_theta": rope.get("rope_theta", known.get("rope_theta")), "rope_scaling": {"kind": form} | rest}
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": known.get("num_key_value_heads", heads),
        "hidden_act": known.get("hidden_act", known.get("hidden_activation")),
        "rms_norm_eps": known.get("rms_norm_eps"),
        "tie_word_embeddings": bool(known.get("tie_word_embeddings")),
        "sliding_window": _window({"num_hidden_layers": 0, **known}, place)
        if kind
        else {key: known.get(key) for key in _NEAR},
        **{key: known.get(key) for key in ("partial_rotary_factor", "query_pre_attn_scalar")},
        **turned,
    }


_WHOLE = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_WHOLE += ("intermediate_size", "max_position_embeddings", "sliding_window", "max_window_layers")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def _check_types(known: Mapping[str, Any], place: str) -> None:
    """Raises UserError for values of another type, or of a size that no model has."""
    for key, value in known.items():
        most = 10_000 if key == "num_hidden_layers" else 2**31
        if key in _WHOLE and value is not None and not (type(value) is int and 0 <= value < most):
            raise UserError(f"{place}: {key}={str(value)[:40]}: must be a whole number below {most:,}; fetch it again")
        if key in _FLAGS and not isinstance(value, bool):
            raise UserError(f"{place}: {key}={str(value)[:40]}: must be true or false; fetch it again")
    types = known.get("layer_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise UserError(f"{place}: layer_types={str(types)[:40]}: must be a list of names; fetch it again")
    for key in ("rope_theta", "rms_norm_eps"):
        if not isinstance(known[key], (int, float)) or not 0 < known[key] < 1e30:
            raise UserError(f"{place}: {key}={str(known[key])[:40]}: must be a positive number; fetch it again")


def _numbers(rope: Mapping[str, Any], known: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns our `rope_theta` and `rope_scaling`."""
    try:
        theta = float(rope.get("rope_theta", known["rope_theta"]))
        return {"rope_theta": theta, "rope_scaling": _scaling(rope, known, place)}
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(f"{place}: its RoPE has values that are no numbers: {rope}; take the original one") from None


def _rope(known: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns what a config.json says of RoPE, in the notation of transformers 4 or 5."""
    found: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = known.get(key) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{place}: {key}={value!r}: must be an object with a rope_type; take the original one")
        found |= value
    return found


def _refuse(known: Mapping[str, Any], place: str) -> None:
    """Raises UserError for features that our transformer does not have."""
    if known["hidden_act"] != "silu":
        raise UserError(f"{place}: hidden_act={known['hidden_act']!r}: jaxcl has silu only; choose another checkpoint")
    if (share := known.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{place}: partial_rotary_factor={share!r}: jaxcl rotates whole heads only")


def _scaling(rope: Mapping[str, Any], known: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    """Returns our `rope_scaling` for theirs."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    longest = known["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings", known.get("original_max_position_embeddings", longest))
    try:
        if kind == "linear":
            return {"kind": kind, "factor": float(rope["factor"])}
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return {"kind": kind, "original_max_position": original} | {name: float(rope[name]) for name in names}
        if kind == "yarn":
            factor = float(rope.get("factor") or longest / original)
            return {
                "kind": kind,
                "factor": factor,
                "original_max_position": original,
                "attention_factor": _attention_factor(factor, rope),
                "beta_fast": float(rope.get("beta_fast") or 32),
                "beta_slow": float(rope.get("beta_slow") or 1),
                "truncate": bool(rope.get("truncate", True)),
            }
    except KeyError as error:
        raise UserError(f"{place}: its {kind} RoPE scaling lacks {error}; take the original config.json") from None
    raise UserError(f"{place}: rope_type={kind!r} is not implemented; jaxcl has default, linear, llama3 and yarn")


def _attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    """Returns by what YaRN multiplies queries and keys (Peng et al. 2023, eq. 22)."""

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1.0)


def _window(known: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns our `window` and `window_layers`."""
    width, layers = known.get("sliding_window"), known["num_hidden_layers"]
    kinds = known.get("layer_types")
    if kinds and (odd := set(kinds) - {"full_attention", "sliding_attention"}):
        raise UserError(f"{place}: layer_types has {sorted(odd)[0]!r}; jaxcl has full and sliding attention")
    if known["model_type"] == "mistral":
        return {"window": width}
    if not width or not known.get("use_sliding_window"):
        return {}
    near = [kind == "sliding_attention" for kind in kinds or []]
    near = near or [layer >= known["max_window_layers"] for layer in range(layers)]
    return {"window": width, "window_layers": near} if any(near) else {}


def config(shape: Config, original: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json for a model: that of the checkpoint it came from, brought up to date, or a new one.

    Args:
      shape: of the model.
      original: config.json of its checkpoint; {} for a model that was trained from the beginning.

    Raises:
      UserError: no family describes such a model.
    """
    if shape.experts is not None:
        raise UserError(
            f"config.model.experts={shape.experts}: folders of Hugging Face are written of dense models only; evaluate "
            "and continue the run where it is"
        )
    if original:
        return {**original, "vocab_size": shape.vocab, "max_position_embeddings": shape.max_length}
    kind = "qwen3" if shape.qk_norm else "mistral" if shape.window else "llama"
    out = {theirs: getattr(shape, ours) for ours, theirs in _FIELDS.items()}
    if shape.qkv_bias != shape.out_bias:
        kind = "qwen2"
        out.pop("attention_bias")
    if kind in ("qwen2", "qwen3") and shape.window:
        near = list(shape.window_layers or (True,) * shape.layers)
        types = ["sliding_attention" if layer else "full_attention" for layer in near]
        out |= {"use_sliding_window": True, "sliding_window": shape.window, "layer_types": types}
    elif kind == "mistral":
        out |= {"sliding_window": shape.window}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": out.pop("rope_theta")}
    if shape.rope_scaling is not None:
        name = next(name for name, form in SCALINGS.items() if isinstance(shape.rope_scaling, form))
        rope |= {"rope_type": name, **dataclasses.asdict(shape.rope_scaling)}
        if "original_max_position" in rope:
            rope["original_max_position_embeddings"] = rope.pop("original_max_position")
    made = {"model_type": kind, "architectures": [FAMILIES[kind].architecture], "hidden_act": "silu", **out}
    made |= {"rope_parameters": rope}
    if resolve(fields(made, "config.json")) != dataclasses.replace(shape, **_OWN):
        raise UserError("config.model: no Hugging Face family has this combination of biases, norms and windows")
    return made
