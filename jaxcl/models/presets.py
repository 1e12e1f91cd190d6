"""Shapes of known transformers by name."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from jaxcl.schema import UserError, nearest

_LLAMA3_ROPE = MappingProxyType(
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
)


def _shape(sizes: tuple[int, int, int, int, int, int, int], **rest: Any) -> MappingProxyType[str, Any]:
    names = ("vocab", "layers", "embed", "heads", "kv_heads", "head_dim", "mlp")
    return MappingProxyType(dict(zip(names, sizes, strict=True)) | rest)


# vocab, layers, embed, heads, kv_heads, head_dim, mlp. The published ones are those of the models' own config files.
PRESETS = MappingProxyType(
    {
        # For tests and for byte-level text: 256 bytes and up to 8 special tokens.
        "tiny": _shape((264, 2, 32, 4, 2, 8, 64), tied=True, max_length=512),
        "tiny_moe": _shape(
            (264, 2, 32, 4, 2, 8, 64), tied=True, max_length=512, experts=4, experts_per_token=2, expert_mlp=32
        ),
        "small": _shape((264, 4, 160, 5, 5, 32, 448), tied=True, max_length=1024),
        # For training from scratch.
        "100m": _shape((32_000, 12, 768, 12, 4, 64, 2048), tied=True, max_length=2048),
        "1b": _shape((32_000, 16, 2048, 32, 8, 64, 8192), tied=True, max_length=4096),
        # Published models.
        "tinyllama-1.1b": _shape((32_000, 22, 2048, 32, 4, 64, 5632), max_length=2048),
        "llama2-7b": _shape((32_000, 32, 4096, 32, 32, 128, 11_008), max_length=4096),
        "llama3-8b": _shape((128_256, 32, 4096, 32, 8, 128, 14_336), rope_theta=500_000.0, max_length=8192),
        "llama3-70b": _shape((128_256, 80, 8192, 64, 8, 128, 28_672), rope_theta=500_000.0, max_length=8192),
        "llama3.1-8b": _shape(
            (128_256, 32, 4096, 32, 8, 128, 14_336),
            rope_theta=500_000.0,
            rope_scaling=_LLAMA3_ROPE,
            max_length=131_072,
        ),
        "llama3.2-1b": _shape(
            (128_256, 16, 2048, 32, 8, 64, 8192),
            tied=True,
            rope_theta=500_000.0,
            rope_scaling=_LLAMA3_ROPE | {"factor": 32.0},
            max_length=131_072,
        ),
        "llama3.2-3b": _shape(
            (128_256, 28, 3072, 24, 8, 128, 8192),
            tied=True,
            rope_theta=500_000.0,
            rope_scaling=_LLAMA3_ROPE | {"factor": 32.0},
            max_length=131_072,
        ),
        "qwen2.5-0.5b": _shape(
            (151_936, 24, 896, 14, 2, 64, 4864),
            tied=True,
            qkv_bias=True,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            max_length=32_768,
        ),
        "qwen2.5-1.5b": _shape(
            (151_936, 28, 1536, 12, 2, 128, 8960),
            tied=True,
            qkv_bias=True,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            max_length=131_072,
        ),
        "qwen3-0.6b": _shape(
            (151_936, 28, 1024, 16, 8, 128, 3072),
            tied=True,
            qk_norm=True,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            max_length=40_960,
        ),
        "qwen3-1.7b": _shape(
            (151_936, 28, 2048, 16, 8, 128, 6144),
            tied=True,
            qk_norm=True,
            rope_theta=1_000_000.0,
            norm_eps=1e-6,
            max_length=40_960,
        ),
    }
)


def fields(name: str) -> dict[str, Any]:
    """Returns the fields of preset `name`.

    Raises:
      UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"config.model.preset={name!r}: unknown{nearest(name, list(PRESETS))}")
    return dict(PRESETS[name])
