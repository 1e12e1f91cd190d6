"""Kernels and activations on a mesh: what the compiler cannot cut by itself is cut here, over whatever mesh is set.

The idea. A program runs under `jax.sharding.use_abstract_mesh` (see `jaxcl.mesh.on`); models and methods stay as they
are written, for global arrays. A custom kernel is opaque to the partitioner, which would gather its operands; but
attention is independent between rows and between heads. So the call is put inside `jax.shard_map`: rows over the
batch axes, heads over the tensor axis, and every device runs the kernel on its own part, without communication; only
where the length of the rows is cut are keys and values gathered first (`lengths.py`). A softmax over the vocabulary is
independent between tokens: rows over the batch axes, positions over all others, the head whole on every device and its
gradient summed. A symmetric matrix is cut by rows, and every device updates its own from operands that all have whole.
Experts are independent of each other: every device has some of them, gathers the tokens of the devices that have the
others, and of what all of them add each device keeps its own tokens.
Without a mesh, or on one device, nothing is wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from jaxcl.kernels import lengths

# As in jaxcl.mesh, which kernels do not import; a test compares them.
BATCH = ("replica", "data", "fsdp", "expert")
HEADS = "tensor"
EXPERT = "expert"
LENGTH = lengths.AXIS


def current() -> AbstractMesh | None:
    """Returns the mesh that is set, if it has the axes of `jaxcl.mesh`, more than one device and is not cut already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or not {*BATCH, HEADS} <= set(mesh.axis_names):
        return None
    return mesh


def check(x: jax.Array, name: str) -> None:
    """Raises ValueError inside `jax.shard_map` with the check that no kernel of `name` passes."""
    over = getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", ())
    if over:
        raise ValueError(
            f"{name} inside jax.shard_map over {', '.join(sorted(map(str, over)))}: give it check_vma=False, as "
            "kernels do not say over which axes their results vary"
        )


def rows(x: jax.Array) -> jax.Array:
    """Returns `x` [B, ...], cut over the batch axes as far as they divide B, and not at all otherwise.

    Of [B, L, D] the length is cut too, over the context axis.

    Parameters are cut along dimensions that activations share with them. Left alone, the partitioner may cut the
    activations like the parameters and copy the rows to every device, which costs more memory than the parameters do.
    """
    mesh = current()
    if mesh is None:
        return x
    length = [_length(mesh, x.shape[1])] if x.ndim > 2 else []
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_divisors(mesh, BATCH, x.shape[0]), *length))


def whole(x: jax.Array) -> jax.Array:
    """Returns `x`, copied to every device of the mesh that is set: what a few rows are worth, and a matrix is not."""
    return x if current() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


class Strips(NamedTuple):
    """How devices share a symmetric matrix: by rows.

    Attributes:
      mesh: the one that is set.
      axes: mesh axes that the rows are cut over; none = every device has the matrix.
    """

    mesh: AbstractMesh
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Into how many parts the rows are cut."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    def run(
        self, f: Callable[..., Sequence[jax.Array]], matrices: Sequence[jax.Array], operands: Sequence[jax.Array]
    ) -> Sequence[jax.Array]:
        """Returns new matrices [d, d], cut by rows.

        Args:
          f: f(matrices, left, right) -> new rows, from rows [d / devices, d] and from the operands that columns of
            them which belong to these rows, and all columns.
          matrices: [d, d] each.
          operands: [b, d] each.
        """
        rows, columns = PartitionSpec(self.axes), PartitionSpec(None, self.axes)
        places = (rows, columns, PartitionSpec())
        cut = jax.shard_map(f, mesh=self.mesh, in_specs=places, out_specs=rows, check_vma=False)
        return cut(list(matrices), list(operands), list(operands))

    def product(self, f: Callable[..., Any], matrix: Any, operand: Any) -> Any:
        """Returns f(matrix, operand), by rows like the matrix [d, d]; every device gets the operand [d, K] whole."""
        rows, copy = PartitionSpec(self.axes), PartitionSpec()
        cut = jax.shard_map(f, mesh=self.mesh, in_specs=(rows, copy), out_specs=rows, check_vma=False)
        return cut(matrix, operand)

    def alone(self, f: Callable[..., Any], *operands: Any) -> Any:
        """Returns f(*operands), which every device computes."""
        copy = PartitionSpec()
        return jax.shard_map(f, mesh=self.mesh, in_specs=copy, out_specs=copy, check_vma=False)(*operands)


def strips(size: int) -> Strips | None:
    """Returns how [size, size] matrices are shared over the batch axes of the mesh that is set, if there is one."""
    mesh = current()
    if mesh is None:
        return None
    return Strips(mesh, tuple(name for name in _divisors(mesh, BATCH, size) if mesh.shape[name] > 1))


def attention(f: Callable[..., Any], *, lse: bool = False, causal: bool | None = None) -> Callable[..., Any]:
    """Returns `f` on the mesh that is set when it is called.

    `f(q, k, v, *rest)` is attention that knows no mesh, differentiable if it is to be differentiated: q [B, L, H, K];
    k, v [B, S, G, K]; `rest` are arrays with rows first (segments [B, L], frozen [B, L]), scalars (a window) or None.
    The last of them, if `causal` is given, is the place of the first query, None for a whole row: then the length is
    cut over the context axis if that divides it, and each device has its own queries and all keys. If the heads are cut
    over more devices than there are key heads, these are repeated; heads that cannot be cut evenly are copied to all
    devices of the axis, and rows likewise.

    Args:
      f: returns mixed [B, L, H, K].
      lse: whether it returns (mixed, lse [B, H, L]).
      causal: whether a query is kept from later keys, if `f` takes a part of the queries.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        mesh = current()
        if mesh is None:
            return f(q, k, v, *rest)
        batch = _divisors(mesh, BATCH, q.shape[0])
        heads, times = _heads(mesh.shape[HEADS], q.shape[2], k.shape[2])
        if times > 1:
            k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
        length = None if causal is None or q.shape[1] != k.shape[1] else _length(mesh, q.shape[1])
        own = f if length is None else lengths.attention(f, mesh.shape[LENGTH], balanced=bool(causal))
        wide = PartitionSpec(batch, length, heads, None)
        narrow = [PartitionSpec(batch) if getattr(x, "ndim", 0) else PartitionSpec() for x in rest]
        out = (wide, PartitionSpec(batch, heads, length)) if lse else wide
        # The kernels do not say over which axes their results vary, so that cannot be checked.
        cut = jax.shard_map(own, mesh=mesh, in_specs=(wide, wide, wide, *narrow), out_specs=out, check_vma=False)
        return cut(q, k, v, *rest)

    return run


def experts(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `f` on the mesh that is set when it is called.

    `f(x, choice, shares, gate, up, down, total)` is `jaxcl.kernels.experts.mixture` of some of `total` experts, where
    choices outside [0, those here) are none of them. Rows are cut over the batch axes, the length over the context
    axis, the hidden units over the tensor axis and experts over theirs, each as far as it divides evenly.

    The tokens of the devices that share the experts are gathered, and what their experts add is summed and scattered
    (the all-to-all of Lepikhin et al. 2020, 2006.16668, section 3.3, would need room for the worst choices). Weights of
    experts stay where they are, but for their parts along the fsdp axis.
    """

    def run(x: jax.Array, choice: jax.Array, shares: jax.Array, *weights: jax.Array) -> jax.Array:
        mesh, (total, _, hidden) = current(), weights[0].shape
        if mesh is None:
            return f(x, choice, shares, *weights, total)
        batch, length = _divisors(mesh, BATCH, x.shape[0]), _length(mesh, x.shape[1])
        own = EXPERT if mesh.shape[EXPERT] > 1 and total % mesh.shape[EXPERT] == 0 else None
        wide = HEADS if mesh.shape[HEADS] > 1 and hidden % mesh.shape[HEADS] == 0 else None
        apart = own in batch  # whether the devices that share the experts have different rows

        def part(x: jax.Array, choice: jax.Array, shares: jax.Array, *weights: jax.Array) -> jax.Array:
            if apart:
                x, choice, shares = (jax.lax.all_gather(a, own, axis=0, tiled=True) for a in (x, choice, shares))
            first = jax.lax.axis_index(own) * weights[0].shape[0] if own else 0
            y = f(x, choice - first, shares, *weights, total)
            y = jax.lax.psum(y, wide) if wide else y
            if apart:
                return jax.lax.psum_scatter(y, own, scatter_dimension=0, tiled=True)
            return jax.lax.psum(y, own) if own else y

        tokens, rows = PartitionSpec(batch, length), PartitionSpec(own, None, wide)
        places = (tokens, tokens, tokens, rows, rows, PartitionSpec(own, wide))
        cut = jax.shard_map(part, mesh=mesh, in_specs=places, out_specs=tokens, check_vma=False)
        return cut(x, choice, shares, *weights)

    return run


class Tokens(NamedTuple):
    """How devices share tokens [B] or [B, L].

    Attributes:
      mesh: None if there is nothing to share.
      axes: for each dimension of the tokens the mesh axes that it is cut over.
    """

    mesh: AbstractMesh | None = None
    axes: tuple[tuple[str, ...], ...] = ()

    def cut(
        self, f: Callable[..., Sequence[jax.Array]], inputs: Sequence[bool], outputs: Sequence[bool]
    ) -> Callable[..., tuple[jax.Array, ...]]:
        """Returns `f` with every device at its own tokens; it is not differentiated.

        Args:
          f: a function of arrays that knows no mesh.
          inputs: for each argument whether its first dimensions are those of the tokens; others are copied.
          outputs: likewise; others are summed over the devices that have different tokens.
        """
        if self.mesh is None:
            return lambda *x: tuple(f(*x))
        taken = tuple(name for names in self.axes for name in names)

        def own(*x: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(y if token else jax.lax.psum(y, taken) for y, token in zip(f(*x), outputs, strict=True))

        def places(kinds: Sequence[bool]) -> tuple[PartitionSpec, ...]:
            return tuple(PartitionSpec(*self.axes) if token else PartitionSpec() for token in kinds)

        return jax.shard_map(own, mesh=self.mesh, in_specs=places(inputs), out_specs=places(outputs), check_vma=False)


def tokens(shape: Sequence[int]) -> Tokens | None:
    """Returns how tokens of this shape are shared on the mesh that is set, or None if the rows cannot be cut evenly."""
    mesh = current()
    if mesh is None or not shape or shape[0] % math.prod(mesh.shape[name] for name in BATCH):
        return None
    # The length first, as it is in the activations: then every device cuts what it has.
    others = sorted((name for name in mesh.axis_names if name not in BATCH), key=lambda name: name != LENGTH)
    return Tokens(mesh, (BATCH, *(_divisors(mesh, others, size) for size in shape[1:2])))


def _length(mesh: AbstractMesh, size: int) -> str | None:
    """Returns the mesh axis that rows of this length are cut over, if there is one and divides it."""
    parts = mesh.shape.get(LENGTH, 1)
    return LENGTH if parts > 1 and size % parts == 0 else None


def _heads(parts: int, heads: int, groups: int) -> tuple[str | None, int]:
    """Returns the mesh axis of the heads, if `parts` devices can share them, and how often to repeat the key heads."""
    if parts == 1 or heads % parts:
        return None, 1
    if groups % parts == 0:
        return HEADS, 1
    return (HEADS, parts // groups) if parts % groups == 0 else (None, 1)


def _divisors(mesh: AbstractMesh, names: Sequence[str], size: int) -> tuple[str, ...]:
    """Returns as many of the mesh axes, in order, as together divide `size`."""
    taken: tuple[str, ...] = ()
    for name in names:
        if size % (math.prod(mesh.shape[n] for n in taken) * mesh.shape[name]) == 0:
            taken = (*taken, name)
    return taken
