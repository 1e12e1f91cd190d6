"""One mesh with all six axes, logical axes to mesh axes by one table, shardings of a whole training state.

The idea. A mesh arranges the devices in a grid with named sides. A sharding says, for each dimension of an array, over
which sides it is cut; along the sides it does not name, the array is copied. Nothing else in the program changes: the
step is written for global arrays, `jax.jit` is told how its inputs are cut, and the compiler inserts the collectives.

  replica, data   copies of the parameters, each with its own rows (replica: over the slow network, see `slices`)
  fsdp            rows are cut, and so are the parameters: they are gathered layer by layer when needed
  tensor          the wide dimensions of the layers (heads, mlp, vocab) are cut; every device sees the same rows
  context         the length of the rows, tokens and activations alike; attention gathers the keys and values
  expert          rows are cut, and so are the experts of a mixture: each device has some of them whole, and the
                  devices trade the activations of their tokens instead of parameters

A model names the dimensions of its parameters ("embed", "mlp", ...); RULES gives a mesh axis to each name. State that
belongs to a parameter (moments, Fisher information, anchors, teachers) is found by its path and is cut in the same way.
State of another kind names its own dimensions (`AXES` of its class).

  m = make(fsdp=4, tensor=2)
  shardings = state_shardings(m, model.axes, jax.eval_shape(method.init, abstract_params))
  state = jax.jit(init, out_shardings=shardings)(key)
  batch = place(m, read, rows=64)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcl import slices
from jaxcl.schema import UserError, nearest
from jaxcl.tree import map_named, named_leaves, path_name
from jaxcl.types import PyTree

AXES = ("replica", "data", "fsdp", "tensor", "context", "expert")
BATCH = ("replica", "data", "fsdp", "expert")  # the mesh axes that rows are cut over

Result = TypeVar("Result")
Rules = Mapping[str, str | tuple[str, ...] | None]

# logical axis -> mesh axis, several, or None = not cut
RULES: Rules = MappingProxyType(
    {
        "batch": BATCH,
        "length": "context",
        "vocab": "tensor",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head": None,
        "mlp": "tensor",
        "expert": "expert",
        "layers": None,
        "rank": None,
        "tasks": None,
        "features": BATCH,  # rows of a symmetric matrix, as jaxcl.kernels.sharded cuts them
    }
)


def make(
    *,
    replica: int = 1,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns the mesh of these sizes; one size may be None or -1: the devices that are left.

    Args:
      replica, data, fsdp, tensor, context, expert: sizes of the axes.
      devices: all devices of all processes unless given.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or cannot be laid out on their torus or slices.
    """
    found = jax.devices() if devices is None else list(devices)
    sizes = _sizes((replica, data, fsdp, tensor, context, expert), len(found))
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        if slices.count(found) > 1:
            return Mesh(slices.arrange(sizes, found), AXES, axis_types=kinds)
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=found)
    except NotImplementedError as error:  # JAX says so at length
        raise UserError(
            f"config.mesh: {_shown(sizes)}: cannot be laid out on the torus of these {found[0].device_kind} devices; "
            "use sizes that are products of its sides"
        ) from error


def abstract(chips: int, **sizes: int | None) -> AbstractMesh:
    """Returns the mesh of `chips` devices that are not here: enough to lower a step and to count bytes."""
    full = {"replica": 1, "data": None, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1} | sizes
    shape = _sizes(tuple(full[axis] for axis in AXES), chips)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(wanted: Sequence[int | None], count: int) -> tuple[int, ...]:
    """Returns the sizes with the open one filled in."""
    shown = _shown(wanted)
    open_axes = [i for i, size in enumerate(wanted) if size is None or size == -1]
    fixed = [size for size in wanted if size is not None and size != -1]
    if any(size < 1 for size in fixed):
        raise UserError(f"config.mesh: {shown}: sizes must be positive; -1 or None takes the devices that are left")
    if len(open_axes) > 1:
        raise UserError(f"config.mesh: {shown}: only one axis may be left open; give a size to the others")
    rest, remainder = divmod(count, math.prod(fixed))
    if remainder or rest < 1 or (not open_axes and rest != 1):
        fault = "must divide" if open_axes else "must multiply to"
        remedy = _remedy(wanted, count)
        raise UserError(f"config.mesh: {shown}: the sizes {fault} the number of devices, which is {count}; {remedy}")
    return tuple(rest if i in open_axes else int(size or 1) for i, size in enumerate(wanted))


def _remedy(wanted: Sequence[int | None], count: int) -> str:
    """Returns a change of one size that fits `count` devices, as it is written on the command line."""
    is_open = any(size is None or size == -1 for size in wanted)
    sizes = {axis: size if size and size > 0 else 1 for axis, size in zip(AXES, wanted, strict=True)}
    for axis in ("fsdp", "data", "tensor", "replica", "context", "expert"):
        others = math.prod(sizes.values()) // sizes[axis]
        if count % others == 0 and not is_open:
            return f"give one of them what is left, e.g. --config.mesh.{axis}=-1"
        if count % others == 0 and sizes[axis] > 1:
            return f"e.g. --config.mesh.{axis}={math.gcd(sizes[axis], count // others)}"
    return f"use divisors of {count}, and -1 for one of them"


def _shown(sizes: Sequence[int | None]) -> str:
    """Returns the sizes of the axes, without those that are 1."""
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1) or "all axes 1"


def spec(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None] | None, shape: Sequence[int], rules: Rules = RULES
) -> PartitionSpec:
    """Returns how an array of `shape` with the logical `axes` is cut.

    A dimension that its mesh axes do not divide is cut over as many of them as do, in order, and is otherwise
    copied: one key-value head on tensor=4 must work. `explain` lists where that happens.

    Raises:
      UserError: unknown logical axis, wrong number of axes, or two dimensions cut over one mesh axis.
    """
    return PartitionSpec(*(taken for taken, _ in _cut(mesh, axes, shape, rules)))


def explain(mesh: Mesh | AbstractMesh, model_axes: PyTree, params: PyTree, rules: Rules = RULES) -> list[str]:
    """Returns one line for each dimension of a parameter that `rules` would cut but whose size does not allow it."""
    lines = []
    axes = dict(_named_axes(model_axes))
    for name, leaf in named_leaves(params):
        for i, (taken, wanted) in enumerate(_cut(mesh, axes.get(name), leaf.shape, rules)):
            if taken != wanted:
                text = f"{name}: dimension {i} ({axes[name][i]}) of size {leaf.shape[i]} is not divisible by"
                lines.append(f"{text} {_show(mesh, wanted)}; cut over {_show(mesh, taken) if taken else 'nothing'}")
    return lines


def state_shardings(
    mesh: Mesh | AbstractMesh,
    model_axes: PyTree,
    abstract_state: PyTree,
    rules: Rules = RULES,
    *,
    params: PyTree = None,
) -> PyTree:
    """Returns a sharding for every leaf of a state, from four rules.

    1. Below a path element `rows`, the first axis is cut over the batch axes if they divide it.
    2. A leaf whose path ends with the path of a parameter is cut like that parameter if it has its shape;
       [T, *shape], one copy for each task, is cut likewise behind its first axis.
    3. A leaf of an object whose class names logical axes by field (`AXES`, as of `jaxcl.ridge`) is cut by `rules`.
    4. Every other leaf is copied to all devices.

    Args:
      mesh: of `make` or `abstract`.
      model_axes: `Model.axes`.
      abstract_state: TrainState of arrays or jax.ShapeDtypeStruct.
      rules: logical axis -> mesh axes.
      params: shapes of all parameters of the model; None = those of the state, which are all unless some are frozen.
    """
    specs: dict[str, tuple[tuple[int, ...], PartitionSpec]] = {}
    axes = dict(_named_axes(model_axes))
    for name, leaf in named_leaves(abstract_state.params if params is None else params):
        specs[name] = (tuple(leaf.shape), spec(mesh, axes.get(name), leaf.shape, rules))
    own = dict(_own_axes(abstract_state))

    def leaf_spec(name: str, leaf: Any) -> NamedSharding:
        shape = tuple(leaf.shape)
        parts = name.split("/")
        if "rows" in parts[:-1]:
            axes_used = [axis for axis in BATCH if mesh.shape[axis] > 1]
            rows = _divisors(mesh, axes_used, shape[0]) if shape else ()
            return NamedSharding(mesh, PartitionSpec(rows) if rows else PartitionSpec())
        if name in own:
            stacked = (None,) * (len(shape) - len(own[name]))  # one for each class or task
            return NamedSharding(mesh, spec(mesh, (*stacked, *own[name]), shape, rules))
        for start in range(len(parts)):  # the longest tail first
            found = specs.get("/".join(parts[start:]))
            if found and found[0] == shape:
                return NamedSharding(mesh, found[1])
            if found and found[0] == shape[1:]:
                return NamedSharding(mesh, PartitionSpec(None, *found[1]))
        return NamedSharding(mesh, PartitionSpec())

    return map_named(leaf_spec, abstract_state)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Returns `abstract` as jax.ShapeDtypeStruct leaves that carry their sharding."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def device_bytes(abstract: PyTree, shardings: PyTree) -> int:
    """Returns the bytes that a tree takes on each device."""

    def leaf(x: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(tuple(x.shape))) * np.dtype(x.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(leaf, abstract, shardings)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh, axis: int = 0, shape: Sequence[int] = ()) -> NamedSharding:
    """Returns the sharding of rows: dimension `axis` is cut over replica, data, fsdp and expert.

    With a `shape` the dimension behind it is cut over context if that divides it.
    """
    length = [_plain(_divisors(mesh, ["context"], size)) for size in shape[axis + 1 : axis + 2]]
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH, *(length if mesh.shape["context"] > 1 else [])))


def on(mesh: Mesh, function: Callable[..., Result]) -> Callable[..., Result]:
    """Returns `function`, inside which kernels find the mesh while it is traced (see `jaxcl.kernels.sharded`).

    What is compiled must get arguments that lie on the mesh, as the devices are those of the arguments.
    """

    def run(*args: Any, **options: Any) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return run


def place(mesh: Mesh, source: PyTree | Callable[[slice], PyTree], *, rows: int | None = None, axis: int = 0) -> PyTree:
    """Returns host rows as global arrays, cut over the batch axes and, along their length, over context.

    Args:
      mesh: of `make`.
      source: a tree of NumPy arrays with all rows; or a function from a slice of rows to a tree with those rows,
        which is called once for each piece that this process holds, so that no process reads the rows of another.
      rows: global number of rows B; only needed if `source` is a function.
      axis: the dimension of the rows: 0 for [B, ...], 1 for stacked batches [K, B, ...].

    Raises:
      UserError: the batch axes do not divide the number of rows.
    """
    index = (slice(None),) * axis
    if callable(source):
        read, total = source, rows
    else:
        read = lambda part: jax.tree.map(lambda x: np.asarray(x)[(*index, part)], source)  # noqa: E731
        total = jax.tree.leaves(source)[0].shape[axis] if rows is None else rows
    if total is None:
        raise ValueError("place: give `rows`, the global number of rows, along with a function")
    shards = math.prod(mesh.shape[name] for name in BATCH)
    if total % shards:
        raise UserError(
            f"config.batch_size={total}: not divisible by the {shards} shards of {' x '.join(BATCH)}; "
            f"use a multiple of {shards} or a smaller mesh axis"
        )
    sharding = batch_sharding(mesh, axis)
    held = sharding.addressable_devices_indices_map((1,) * axis + (total,))
    pieces: dict[int, PyTree] = {}
    for where in held.values():
        start, stop, _ = where[axis].indices(total)  # pyright: ignore[reportOptionalSubscript]
        if start not in pieces:
            pieces[start] = jax.tree.map(_narrow, read(slice(start, stop)))
    leaves = {start: jax.tree.leaves(piece) for start, piece in pieces.items()}
    first, treedef = jax.tree.flatten(next(iter(pieces.values())))

    def leaf(i: int) -> jax.Array:
        shape = (*first[i].shape[:axis], total, *first[i].shape[axis + 1 :])

        def part(where: Any) -> Any:
            return leaves[where[axis].indices(total)[0]][i][(*index, slice(None), *where[axis + 1 :])]

        with jax.transfer_guard_host_to_device("allow"):  # this transfer is meant, whatever the loop forbids
            return jax.make_array_from_callback(shape, batch_sharding(mesh, axis, shape), part, dtype=first[i].dtype)

    return jax.tree.unflatten(treedef, [leaf(i) for i in range(len(first))])


def fetch(metrics: PyTree) -> PyTree:
    """Returns replicated device values as NumPy arrays; every process may call it alone.

    Raises:
      ValueError: a value is cut over devices of several processes.
    """

    def leaf(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if not x.is_fully_replicated:
                raise ValueError(f"fetch: an array of shape {x.shape} is cut over processes; give it P() first")
            return x.addressable_data(0)
        return x

    return jax.device_get(jax.tree.map(leaf, metrics))


def _narrow(x: Any) -> np.ndarray:
    """Returns a host array in the type that JAX will hold it in: int32 for int64 unless 64 bits are enabled."""
    x = np.asarray(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def _named_axes(model_axes: PyTree) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Yields (path, logical axes) for every parameter; the leaves of `model_axes` are tuples."""
    marked = jax.tree.map(_Axes, model_axes, is_leaf=lambda node: isinstance(node, tuple))
    for name, leaf in named_leaves(marked):
        yield name, leaf.names


def _own_axes(state: PyTree) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """Yields (path, logical axes) for every leaf whose object names them."""
    named = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: hasattr(node, "AXES"))
    for path, node in named:
        for field, axes in getattr(node, "AXES", {}).items():
            for below, _ in named_leaves(getattr(node, field)):
                yield "/".join(part for part in (path_name(path), field, below) if part), axes


class _Axes:
    """A tuple of axis names that is a leaf."""

    def __init__(self, names: tuple[str | None, ...]):
        self.names = tuple(names)


def _cut(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None] | None, shape: Sequence[int], rules: Rules
) -> list[tuple[Any, Any]]:
    """Returns (mesh axes taken, mesh axes the rules ask for) for every dimension."""
    if axes is None:
        return [(None, None)] * len(shape)
    if len(axes) != len(shape):
        raise UserError(
            f"model axes {tuple(axes)} do not fit the shape {tuple(shape)}: name every dimension or use None"
        )
    result, owner = [], {}
    for logical, size in zip(axes, shape, strict=True):
        if logical is not None and logical not in rules:
            raise UserError(f"logical axis {logical!r}: no rule for it{nearest(logical, list(rules))}")
        wanted = rules[logical] if logical is not None else None
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        for name in names:
            if name not in AXES:
                raise UserError(f"rule {logical!r} -> {name!r}: no such mesh axis{nearest(name, AXES)}")
            if name in owner:
                raise UserError(
                    f"logical axes {tuple(axes)}: {owner[name]!r} and {logical!r} are both cut over the mesh axis "
                    f"{name!r}; change the rule of one of them"
                )
            owner[name] = logical
        names = tuple(name for name in names if mesh.shape[name] > 1)
        result.append((_plain(_divisors(mesh, names, size)), _plain(names)))
    return result


def _divisors(mesh: Mesh | AbstractMesh, names: Sequence[str], size: int) -> tuple[str, ...]:
    """Returns as many of the mesh axes, in order, as together divide `size`."""
    taken: tuple[str, ...] = ()
    for name in names:
        if size % (math.prod(mesh.shape[n] for n in taken) * mesh.shape[name]) == 0:
            taken = (*taken, name)
    return taken


def _plain(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Returns the form in which a PartitionSpec takes these mesh axes."""
    return names[0] if len(names) == 1 else (names or None)


def _show(mesh: Mesh | AbstractMesh, names: str | tuple[str, ...]) -> str:
    """Returns mesh axes with their sizes."""
    return " x ".join(f"{name}={mesh.shape[name]}" for name in ((names,) if isinstance(names, str) else names))
