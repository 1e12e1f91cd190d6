"""The shape of a decoder-only transformer, checked before any compute is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from jaxcl.kernels.attention import IMPLEMENTATIONS
from jaxcl.schema import UserError, nearest

REMAT = ("none", "full", "dots", "dots_no_batch", "attention")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 stretching of slow RoPE frequencies (Llama 3.1 release; Grattafiori et al. 2024, section 3.2).

    Frequencies with a wavelength above original_max_position / low_freq_factor are divided by `factor`, those below
    original_max_position / high_freq_factor are kept, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every RoPE frequency is divided by `factor` (Chen et al. 2023, 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, 2309.00071, section 3): frequencies by the number of turns over the original context.

    Those with more than `beta_fast` turns are kept, those with less than `beta_slow` are divided by `factor`, between
    them a linear ramp over the pairs; queries and keys are multiplied by `attention_factor`.
    """

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the ends of the ramp are whole pairs


Scaling = RopeScaling | LinearScaling | YarnScaling
SCALINGS = {"llama3": RopeScaling, "linear": LinearScaling, "yarn": YarnScaling}


@dataclass(frozen=True)
class Config:
    """Everything that `transformer.make` accepts, resolved.

    Attributes:
      vocab: V, number of tokens.
      layers, embed: number of blocks; D, width of the residual stream.
      heads: H, query heads, a multiple of `kv_heads`.
      kv_heads, head_dim: G, key and value heads, `heads` if not given; K, even, `embed / heads` if not given.
      mlp: F, hidden width of the gated unit.
      tied, qkv_bias: whether the head is the transposed embedding; whether queries, keys, values have a bias (Qwen 2).
      out_bias, mlp_bias: whether the projection after attention and those of the gated unit have one.
      qk_norm: whether every query and key head is RMS-normalised before the rotation (Qwen 3).
      window, window_layers: tokens that a query sees, its own included (Mistral), in these layers; not given: all.
      rope_theta, rope_scaling: base of the rotary wavelengths; `kind` ("llama3" unless given, "linear", "yarn") and
        fields, see `models.config`; {} for none.
      norm_eps, max_length: added to the mean square in every RMSNorm; longest row (and cache) that is accepted.
      vocab_multiple: of which the stored rows of embedding and head are one; no logits for those beyond `vocab`.
      init_std: standard deviation of the initial weights; that of the two projections back into the residual stream
        is smaller by sqrt(2 * layers) (Radford et al. 2019, section 2.3).
      experts, experts_per_token, expert_mlp: E gated units in place of one, dense if not given; k, 2 unless given, of
        which a token meets; F of each, `mlp` if not given.
      norm_topk, capacity, balance, router_z: how tokens are routed, see `jaxcl.models.experts`.
      remat: what the backward pass finds stored: 'none' recomputes nothing, 'full' keeps only the input of every
        block, 'dots' also results of matrix products, 'dots_no_batch' those without batch dimension (projections,
        not attention scores), 'attention' the attention outputs.
      attention, unroll: see `jaxcl.kernels.attention.attention`; blocks per iteration of the loop over layers.
      compute_dtype: "float32" or "bfloat16"; parameters are float32 either way and are cast where they are used.
    """

    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-5
    max_length: int = 8192
    vocab_multiple: int = 1
    init_std: float = 0.02
    experts: int | None = None
    experts_per_token: int = 2
    expert_mlp: int | None = None
    norm_topk: bool = True
    capacity: float | None = None
    balance: float = 0.01
    router_z: float = 0.0
    remat: str = "none"
    attention: str = "auto"
    compute_dtype: str = "float32"
    unroll: int = 1

    @property
    def rows(self) -> int:
        """Returns the number of rows that the embedding and the head are stored with."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def active(self) -> float:
        """Returns the share of the experts that a token meets."""
        return 1.0 if self.experts is None else self.experts_per_token / self.experts


def resolve(fields: Mapping[str, Any]) -> Config:
    """Returns the Config of `fields` (those that are None are left at their default).

    Raises:
      UserError: a missing field, or a shape that cannot be built.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("vocab", "layers", "embed", "heads", "mlp"):
        if name not in given:
            raise UserError(f"config.model.{name}: missing; set it or choose a preset")
    sizes = ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp")
    sizes += ("max_length", "unroll", "window", "vocab_multiple", "experts", "experts_per_token", "expert_mlp")
    for name in sizes:
        if not 1 <= given.get(name, 1) < 2**31:
            raise UserError(f"config.model.{name}={given[name]!r}: must be at least 1 and below 2^31")
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not given.get(name, 1.0) > 0:
            raise UserError(f"config.model.{name}={given[name]!r}: must be positive")
    given.setdefault("kv_heads", given["heads"])
    given["rope_scaling"] = _scaling(given.get("rope_scaling"))
    for name, choices in (("remat", REMAT), ("attention", IMPLEMENTATIONS), ("compute_dtype", DTYPES)):
        if given.get(name, choices[0]) not in choices:
            raise UserError(f"config.model.{name}={given[name]!r}: unknown{nearest(str(given[name]), choices)}")
    if "head_dim" not in given:
        if given["embed"] % given["heads"]:
            raise UserError(
                f"config.model.embed={given['embed']}: not a multiple of heads={given['heads']}; set head_dim as well"
            )
        given["head_dim"] = given["embed"] // given["heads"]
    if given["heads"] % given["kv_heads"]:
        raise UserError(
            f"config.model.kv_heads={given['kv_heads']}: must divide heads={given['heads']}, as heads share keys"
        )
    if given["head_dim"] % 2:
        raise UserError(f"config.model.head_dim={given['head_dim']}: must be even, as RoPE rotates pairs")
    given["window_layers"] = _window_layers(given)
    _check_experts(given)
    return Config(**given)


def _check_experts(given: Mapping[str, Any]) -> None:
    """Raises UserError for options of experts that do not fit together, or that have no experts."""
    names = ("experts_per_token", "expert_mlp", "norm_topk", "capacity", "balance", "router_z")
    if (count := given.get("experts")) is None:
        for name in names:
            if name in given:
                raise UserError(f"config.model.{name}={given[name]!r}: of experts; set config.model.experts as well")
        return
    if (taken := given.get("experts_per_token", Config.experts_per_token)) > count:
        raise UserError(f"config.model.experts_per_token={taken}: there are {count} experts; use at most that many")
    if not 0 < given.get("capacity", 1.0) < math.inf:
        raise UserError(
            f"config.model.capacity={given['capacity']!r}: must be positive and finite, e.g. 1.25; without it no token "
            "is dropped"
        )
    for name in ("balance", "router_z"):
        if not 0 <= given.get(name, 0.0) < math.inf:
            raise UserError(f"config.model.{name}={given[name]!r}: must not be negative, and finite; 0 leaves it out")
    if given.get("mlp_bias"):
        raise UserError("config.model.mlp_bias=True: experts have no biases; leave it out")


def _window_layers(given: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Returns which layers have the window, checked; None for all."""
    if (chosen := given.get("window_layers")) is None:
        return None
    if len(chosen) != given["layers"] or "window" not in given:
        raise UserError(
            f"config.model.window_layers={list(chosen)!r}: "
            f"needs one entry for each of the {given['layers']} layers, and config.model.window"
        )
    return tuple(bool(layer) for layer in chosen)


def _scaling(value: Any) -> Scaling | None:
    """Returns the scaling of a mapping, whose `kind` is 'llama3' unless given; None for None and for an empty one."""
    if value is None or isinstance(value, Scaling) or not value:
        return value or None
    options = dict(value)
    kind = options.pop("kind", "llama3")
    if kind not in SCALINGS:
        raise UserError(f"config.model.rope_scaling.kind={kind!r}: unknown{nearest(str(kind), list(SCALINGS))}")
    known = SCALINGS[kind].__dataclass_fields__
    for name in options:
        if name not in known:
            raise UserError(f"config.model.rope_scaling.{name}: unknown key{nearest(name, list(known))}")
    for name, field in known.items():
        if name not in options and field.default is MISSING:
            raise UserError(f"config.model.rope_scaling.{name}: missing; {kind} scaling needs {', '.join(known)}")
        value = options.get(name, 1)
        if name != "truncate" and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"config.model.rope_scaling.{name}={value!r}: must be a positive number")
    scaling = SCALINGS[kind](**options)
    if isinstance(scaling, RopeScaling) and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"config.model.rope_scaling.high_freq_factor={scaling.high_freq_factor!r}: "
            f"must exceed low_freq_factor={scaling.low_freq_factor!r}"
        )
    return scaling
