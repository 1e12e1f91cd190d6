"""Softmax over a vocabulary without its logits: cross-entropy, distillation and the mixture of embeddings."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType

from jaxcl.kernels import sharded
from jaxcl.kernels.vocabulary import chunked, reference, tpu
from jaxcl.kernels.vocabulary.reference import log_density, select

__all__ = ["WIDEST", "cross_entropy", "kl", "log_density", "mixture", "select", "width_of"]

# Widest logits that are formed whole: below it one matrix product is faster, above it memory decides.
WIDEST = 8192
Cut = sharded.Tokens | None
_SMALL = ("TPU v2", "TPU v3", "TPU v4")  # their 16 MiB of VMEM are too few for the tiles; v5e is "TPU v5 lite"


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int | None = None, kernel: bool | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target and the logsumexp of its logits, float32 [...].

    Blocks of logits are formed in the forward pass and again in the backward pass; see `chunked` and `tpu`.

    Args:
      hidden: float [..., D].
      head: float [D, V].
      targets: int [...]; numbers outside [0, V) give the log-probability of no class, 0 - logsumexp.
      chunk: columns of the vocabulary held at a time; None = all of them up to 8192, else 8192. Where all are held,
        logits are kept for the backward pass.
      kernel: whether a program lowered for a TPU uses the Pallas kernel, in its own tiles, instead of a chunk. None =
        where it is known how to cut it: one device (`jax.set_mesh`), all axes of the mesh in context manual
        (`jax.shard_map` with check_vma=False), or a mesh of `jaxcl.mesh` whose batch axes divide the rows. There every
        device takes its own tokens and the whole head, and gradients of the head are summed in float32.

    Raises:
      ValueError: shapes that do not fit together, targets that are not integers, a chunk without columns.
    """
    _check(hidden, head, "cross_entropy")
    if targets.shape != hidden.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        found = f"{targets.dtype}{list(targets.shape)}"
        raise ValueError(f"targets {found}: expected integers of the shape {list(hidden.shape[:-1])} of the tokens")
    width = width_of(head, chunk)
    if width is None:
        return reference.cross_entropy(hidden, head, targets)
    return _cross_entropy(width, _fits(kernel, hidden, head), hidden, head, targets)


def mixture(
    hidden: jax.Array,
    head: jax.Array,
    embedding: jax.Array,
    *,
    temperature: jax.Array | float,
    chunk: int | None = None,
    kernel: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean embedding softmax(hidden head / temperature) embedding, and the logsumexp of the scores.

    The input that a soft token is fed with (Butt et al. 2025, "Soft Tokens, Hard Truths", equation 6, without noise):
    attention with the vocabulary as keys and values. Its density under Gaussian noise is `log_density`. Scores and
    sums are float32. All four operands have gradients. On a TPU the backward pass is the chunked form.

    Args:
      hidden: float [..., D].
      head: float [D, V].
      embedding: float [V, E]; tied: `head.T`.
      temperature: > 0, a number or float [].
      chunk: columns of the vocabulary held at a time; None = 8192.
      kernel: see `cross_entropy`.

    Returns:
      float32 [..., E], float32 [...].

    Raises:
      ValueError: shapes that do not fit together, a temperature that is not positive, a chunk without columns.
    """
    _check(hidden, head, "mixture")
    if embedding.ndim != 2 or embedding.shape[0] != head.shape[1]:
        raise ValueError(f"embedding {list(embedding.shape)}: expected one row for each of {head.shape[1]} columns")
    if jnp.shape(temperature) != ():
        raise ValueError(f"temperature of shape {jnp.shape(temperature)}: expected one number for all tokens")
    if not isinstance(temperature, Tracer) and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature={temperature}: expected a positive number; for the limit 0 use a small one")
    width = min(width_of(head, chunk) or head.shape[1], head.shape[1])
    inverse = 1 / jnp.asarray(temperature, jnp.float32)
    return _mixture(width, _fits(kernel, hidden, head, embedding), hidden, head, embedding, inverse)


def width_of(head: jax.Array, chunk: int | None) -> int | None:
    """Returns the columns per block for a chunk as in `cross_entropy`, or None to form the logits whole."""
    if chunk is None:
        return WIDEST if head.shape[1] > WIDEST else None
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least one column of the vocabulary")
    return chunk if chunk < head.shape[1] else None


def _check(hidden: jax.Array, head: jax.Array, name: str) -> None:
    sharded.check(hidden, name)
    if head.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"hidden {list(hidden.shape)} and head {list(head.shape)}: expected [..., D] and [D, V]")
    if not head.size:
        raise ValueError(f"head {list(head.shape)}: expected at least one column, and D of at least 1")


def _fits(kernel: bool | None, *operands: jax.Array) -> Cut:
    """Returns how the TPU kernel is cut, or None if it may not be used: see `cross_entropy`."""
    if kernel is False or not operands[0].size or any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in operands):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    cut = sharded.tokens(operands[0].shape[:-1])
    if kernel:
        return cut or sharded.Tokens()
    sides = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    if not mesh.empty and all(size == 1 or kind == AxisType.Manual for size, kind in sides):
        cut = sharded.Tokens()
    device = getattr(mesh, "abstract_device", None)  # the kind of a real mesh, e.g. 'TPU v4'
    return None if any(old in str(getattr(device, "device_kind", "")) for old in _SMALL) else cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(width: int, kernel: Cut, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> Any:
    return _cross_entropy_fwd(width, kernel, hidden, head, targets)[0]


def _cross_entropy_fwd(width: int, kernel: Cut, *operands: jax.Array) -> tuple[Any, Any]:
    fast = kernel and kernel.cut(tpu.cross_entropy, (True, False, True), (True, True))
    out = _platform(fast, functools.partial(chunked.cross_entropy, width), *operands)
    return out, (*operands, out[1])


def _cross_entropy_bwd(width: int, kernel: Cut, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    def fast(*x: jax.Array) -> tuple[jax.Array, ...]:
        assert kernel is not None
        # A sum over devices has to be rounded once.
        own = functools.partial(tpu.cross_entropy_backward, d_head=jnp.float32 if kernel.mesh else None)
        d_hidden, d_head = kernel.cut(own, (True, False, True, True, True, True), (True, False))(*x)
        return d_hidden, d_head.astype(x[1].dtype)

    plain = functools.partial(chunked.cross_entropy_backward, width)
    return *_platform(fast if kernel else None, plain, *saved, *cotangents), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture(
    width: int, kernel: Cut, hidden: jax.Array, head: jax.Array, embedding: jax.Array, inverse: jax.Array
) -> Any:
    return _mixture_fwd(width, kernel, hidden, head, embedding, inverse)[0]


def _mixture_fwd(width: int, kernel: Cut, *operands: jax.Array) -> tuple[Any, Any]:
    fast = kernel and kernel.cut(tpu.mixture, (True, False, False, False), (True, True))
    out = _platform(fast, functools.partial(chunked.mixture, width), *operands)
    return out, (*operands, *out)


def _mixture_bwd(width: int, kernel: Cut, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    return chunked.mixture_backward(width, *saved, *cotangents)


_mixture.defvjp(_mixture_fwd, _mixture_bwd)


def _platform(fast: Any, plain: Any, *operands: jax.Array) -> Any:
    if fast is None:
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, tpu=fast, default=plain)


def kl(width: int, scale: float, student: chunked.Pair, teacher: chunked.Pair) -> jax.Array:
    """Returns KL(teacher || student) of softmax(scale * logits) in nats, float32 [...]; no gradient for the teacher.

    Args:
      width: columns of the vocabulary held at a time.
      scale: 1 / temperature.
      student: (hidden [..., D], head [D, V]).
      teacher: the same with a D of its own.

    Raises:
      ValueError: shapes that do not fit together, a width or a scale out of range.
    """
    for hidden, head in (student, teacher):
        _check(hidden, head, "kl")
    (hidden, head), (other, shown) = student, teacher
    if head.shape[1] != shown.shape[1] or hidden.shape[:-1] != other.shape[:-1]:
        found = f"student {list(hidden.shape)} {list(head.shape)}, teacher {list(other.shape)} {list(shown.shape)}"
        raise ValueError(f"{found}: expected the same tokens and the same vocabulary")
    if not 1 <= width <= head.shape[1] or not 0 < scale < math.inf:
        raise ValueError(f"width={width}, scale={scale}: expected 1 to {head.shape[1]} columns and a positive number")
    return _kl(width, scale, student, teacher)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kl(width: int, scale: float, student: chunked.Pair, teacher: chunked.Pair) -> jax.Array:
    return _kl_fwd(width, scale, student, teacher)[0]


def _kl_fwd(width: int, scale: float, student: chunked.Pair, teacher: chunked.Pair) -> tuple[Any, Any]:
    cost, lse_q, lse_p = chunked.kl(width, scale, student, teacher)
    return cost, (student, teacher, lse_q, lse_p)


def _kl_bwd(width: int, scale: float, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    student, teacher, lse_q, lse_p = saved
    return chunked.kl_backward(width, scale, student, teacher, lse_q, lse_p, cotangent), None


_kl.defvjp(_kl_fwd, _kl_bwd)
