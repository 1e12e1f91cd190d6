"""The shape of a decoder-only transformer, checked before any compute is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
class Config:
    """Everything that `transformer.make` accepts, resolved. See there for the meaning of the fields."""

    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    max_length: int = 8192
    init_std: float = 0.02
    remat: str = "none"
    compute_dtype: str = "float32"
    unroll: int = 1


def resolve(fields: Mapping[str, Any]) -> Config:
    """Returns the Config of `fields` (those that are None are left at their default).

    Raises:
      UserError: a missing field, or a shape that cannot be built.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("vocab", "layers", "embed", "heads", "mlp"):
        if name not in given:
            raise UserError(f"config.model.{name}: missing; set it or choose a preset")
    for name in ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "max_length", "unroll"):
        if given.get(name, 1) < 1:
            raise UserError(f"config.model.{name}={given[name]!r}: must be at least 1")
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not given.get(name, 1.0) > 0:
            raise UserError(f"config.model.{name}={given[name]!r}: must be positive")
    given.setdefault("kv_heads", given["heads"])
    given["rope_scaling"] = _scaling(given.get("rope_scaling"))
    for name, choices in (("remat", REMAT), ("compute_dtype", DTYPES)):
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
    return Config(**given)


def _scaling(value: Any) -> RopeScaling | None:
    """Returns the RopeScaling of a mapping; None for None and for an empty one."""
    if value is None or isinstance(value, RopeScaling) or not value:
        return value or None
    known = list(RopeScaling.__dataclass_fields__)
    for name in value:
        if name not in known:
            raise UserError(f"config.model.rope_scaling.{name}: unknown key{nearest(name, known)}")
    for name in known:
        if name not in value:
            raise UserError(f"config.model.rope_scaling.{name}: missing; Llama-3 scaling needs {', '.join(known)}")
        if not value[name] > 0:
            raise UserError(f"config.model.rope_scaling.{name}={value[name]!r}: must be positive")
    scaling = RopeScaling(**value)
    if not scaling.low_freq_factor < scaling.high_freq_factor:
        raise UserError(
            f"config.model.rope_scaling.high_freq_factor={scaling.high_freq_factor!r}: "
            f"must exceed low_freq_factor={scaling.low_freq_factor!r}"
        )
    return scaling
