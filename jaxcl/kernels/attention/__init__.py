"""Grouped-query attention over packed rows: one function, and one implementation per platform behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.kernels import sharded
from jaxcl.kernels.attention import cpu, gpu, gpu_backward, reference, tpu


class Kernel(NamedTuple):
    """The kernels of a platform: functions with the arguments of those in `cpu`, without a bias."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    dtypes: tuple[str, ...]
    auto: bool  # whether "auto" takes them: not before they have run on the hardware or on a faithful simulation
    parts: bool = False  # whether they take queries that are a part of the row


# By the platform that a program is lowered for. They take WIDTHS; `cpu` takes everything, on every platform.
KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "tpu": Kernel(tpu.forward, tpu.backward, ("float32", "bfloat16"), auto=True, parts=True),
        "cuda": Kernel(gpu.forward, gpu_backward.backward, ("bfloat16", "float16"), auto=False),
    }
)
WIDTHS = (64, 128, 256)
IMPLEMENTATIONS = ("auto", "kernel", "tiles")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    causal: bool = True,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    frozen: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    """Returns what `reference.attention` returns, with the same arguments and errors.

    Rows that attend to themselves (no `kv_segments`, no `kv_positions`) use the implementation of the platform that
    the program is lowered for and keep no scores for the backward pass: a kernel of `KERNELS` for heads of 64, 128 or
    256 without a bias, else tiles in plain XLA. All else is the reference. Self-attention has no derivative in forward
    mode (`jax.jvp`). A query whose keys are all hidden by a bias below -1e29 gets zeros, as if they were masked.
    On a mesh that cuts the length of rows every device has its own queries and gathers the keys and values.
    Within `jax.shard_map` its option check_vma must be False; axes of a mesh must be `AxisType.Auto`.

    Args:
      implementation: "auto"; "kernel": the kernels of all platforms that have some; "tiles": none of them. The one for
        Hopper GPUs is not part of "auto", as it has been compiled and interpreted but never run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    numbers: dict[str, Any] = {"soft_cap": soft_cap, "scale": scale, "window": window}
    own = kv_segments is None and kv_positions is None and q.shape[1] == k.shape[1]
    if not own:
        places = {
            "segments": segments,
            "positions": positions,
            "kv_segments": kv_segments,
            "kv_positions": kv_positions,
        }
        options = {"causal": causal, "bias": bias, "frozen": frozen, "return_lse": return_lse}
        return reference.attention(q, k, v, **places, **options, **numbers)
    reference.check(q, k, v, bias=bias, frozen=frozen, segments=segments, positions=positions, **numbers)
    sharded.check(q, "attention")
    if not q.size:
        return (q, jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))) if return_lse else q
    window = None if window is None else jnp.asarray(window, jnp.int32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    how = _How(causal, scale, None if soft_cap is None else float(soft_cap), implementation)
    found: Any
    if bias is None:  # every device runs the kernel on its own rows and heads
        alone = sharded.attention(lambda *x: _packed(how, *x, None), lse=True, causal=causal)
        found = alone(q, k, v, segments, window, frozen, None)
    else:
        bias = bias.astype(jnp.promote_types(q.dtype, jnp.float32))
        found = _packed(how, q, k, v, segments, window, frozen, None, bias)
    return found if return_lse else found[0]


def refused(
    platform: str, width: int, dtype: str, *, bias: bool = False, part: bool = False, implementation: str = "auto"
) -> str | None:
    """Returns why the kernel of a platform does not take attention with these arguments; None if it does.

    Args:
      platform: a key of KERNELS, or another, which has no kernel.
      width: K of a head.
      dtype: name of that of queries, keys and values.
      bias, implementation: see `attention`.
      part: whether the length of the rows is cut over devices.
    """
    kernel = KERNELS.get(platform)
    if kernel is None:
        return f"there is none for {platform}"
    if implementation == "tiles":
        return "implementation 'tiles' takes none; 'auto' or 'kernel' do"
    if not kernel.auto and implementation != "kernel":
        return f"that for {platform} has never run, so that 'auto' does not take it; implementation 'kernel' does"
    if width not in WIDTHS:
        return f"heads of width {width}; they take {', '.join(map(str, WIDTHS))}"
    if dtype not in kernel.dtypes:
        return f"{dtype}; that for {platform} takes {' or '.join(kernel.dtypes)}"
    if part and not kernel.parts:
        return f"that for {platform} takes no rows whose length is cut; leave mesh.context at 1"
    return "there is a bias, which they do not take" if bias else None


Whole = jax.Array | None


class _How(NamedTuple):
    """What is known when the program is traced."""

    causal: bool
    scale: float
    soft_cap: float | None
    implementation: str

    @property
    def options(self) -> dict[str, Any]:
        """Returns the keywords of `forward` and `backward`."""
        return {"causal": self.causal, "scale": self.scale, "soft_cap": self.soft_cap}


def _kernels(how: _How, q: jax.Array, first: Whole, bias: Whole) -> Mapping[str, Kernel]:
    """Returns those of `KERNELS` that are asked for and take these arguments."""
    if not how.scale > 0:
        return {}
    asked = {"bias": bias is not None, "part": first is not None, "implementation": how.implementation}
    return {n: kernel for n, kernel in KERNELS.items() if not refused(n, q.shape[-1], q.dtype.name, **asked)}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Whole,
    window: Whole,
    frozen: Whole,
    first: Whole,
    bias: Whole,
) -> tuple[jax.Array, jax.Array]:
    return _packed_fwd(how, q, k, v, segments, window, frozen, first, bias)[0]


def _packed_fwd(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Whole,
    window: Whole,
    frozen: Whole,
    first: Whole,
    bias: Whole,
) -> tuple[Any, Any]:
    own = {name: partial(kernel.forward, **how.options) for name, kernel in _kernels(how, q, first, bias).items()}
    tiled = partial(cpu.forward, bias=bias, **how.options)
    at = () if first is None else (first,)
    mixed, lse = jax.lax.platform_dependent(q, k, v, segments, window, *at, **own, default=tiled)
    return (mixed, lse), (q, k, v, segments, window, frozen, mixed, lse, first, bias)


def _packed_bwd(how: _How, saved: Any, d: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    *saved, first, bias = saved
    q, at = saved[0], () if first is None else (first,)
    own = {name: partial(kernel.backward, **how.options) for name, kernel in _kernels(how, q, first, bias).items()}
    tiled = partial(cpu.backward, bias=bias, **how.options)
    grads = jax.lax.platform_dependent(*saved, *d, *at, **own, default=tiled)
    return *grads[:3], None, None, None, None, None if bias is None else grads[3]


_packed.defvjp(_packed_fwd, _packed_bwd)
