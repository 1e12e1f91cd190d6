"""LoRA: a frozen projection W learns a change of low rank (Hu et al. 2021, 2106.09685, section 4.1).

  y = x W + (alpha / rank) drop(x) A B        A [in, r] is drawn as in PEFT, B [r, out] starts at 0

So the model starts at the logits of its base. Cost of a step, per weight of W: 4 FLOPs instead of 6, since its gradient
is never formed; 6 per weight of A and B. Parameters are {"base": those of the model, "lora": path: {"a": A, "b": B}},
nested like the base; `jaxcl.frozen` keeps the base out of gradient and optimiser.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.models.layers import LowRank
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.tree import map_named, named_leaves
from jaxcl.types import Batch, Key, Model, Output, Params, PyTree

FROZEN = ("^base/",)
# The projections of a transformer and the number of dimensions that each contracts.
PROJECTIONS: Mapping[str, int] = MappingProxyType(
    {f"layers/attention/{name}": 1 for name in ("query", "key", "value")}
    | {"layers/attention/out": 2}
    | {f"layers/mlp/{name}": 1 for name in ("gate", "up", "down")}
)
ALL = ("layers/attention/(query|key|value|out)$", "layers/mlp/(gate|up|down)$")


def make(
    model: Model, *, rank: int = 8, alpha: float = 16.0, targets: Sequence[str] = ALL, dropout: float = 0.0
) -> Model:
    """Returns `model` with low-rank changes of its projections.

    `apply(params, batch, cache=None, key=None)` drops inputs of A if it is given a key, and is deterministic without.

    Args:
      model: a transformer.
      rank: r, columns of A.
      alpha: the change is multiplied by alpha / rank.
      targets: patterns of the projections that change, searched for in names such as 'layers/attention/query'.
      dropout: share of the inputs of A that is dropped.

    Raises:
      UserError: an option out of range; a pattern that finds no projection, or a parameter that is none.
    """
    if rank < 1:
        raise UserError(f"config.adapter.rank={rank}: must be at least 1")
    if not 0 < alpha < math.inf:
        raise UserError(f"config.adapter.alpha={alpha}: must be above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"config.adapter.dropout={dropout}: must be at least 0 and below 1")
    shapes = dict(named_leaves(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))))
    chosen = _find(list(shapes), targets)

    def adapter(key: Key) -> Params:
        found = {}
        for path in chosen:
            stack, inputs, outputs = _dimensions(path, shapes[path].shape)
            bound = 1 / math.sqrt(math.prod(inputs))  # kaiming_uniform with a = sqrt(5), as in PEFT
            a = jax.random.uniform(named(key, path), (*stack, *inputs, rank), jnp.float32, -bound, bound)
            found[path] = {"a": a, "b": jnp.zeros((*stack, rank, *outputs), jnp.float32)}
        return _nest(found)

    def init(key: Key) -> Params:
        return {"base": model.init(key), "lora": adapter(named(key, "lora"))}

    def apply(params: Params, batch: Batch, cache: Any = None, key: Key | None = None) -> Output:
        pairs = pairs_of(params["lora"])

        def leaf(path: str, w: jax.Array) -> jax.Array | LowRank:
            if path not in pairs:
                return w
            drop = None if key is None or not dropout else jax.random.split(named(key, path), w.shape[0])
            return LowRank(w, pairs[path]["a"], pairs[path]["b"], drop, alpha / rank, dropout)

        return model.apply(map_named(leaf, params["base"]), batch, cache)

    return Model(init, apply, {"base": model.axes, "lora": _axes(model.axes, chosen)})


def merge(params: Params, alpha: float, dtype: Any = None) -> Params:
    """Returns the parameters of the base with the changes added in float32.

    Args:
      params: {"base", "lora"}.
      alpha: as in `make`.
      dtype: of the projections that change; None = that of the base, which rounds a bfloat16 base plus its change.
    """
    return _add(params["base"], params["lora"], alpha, dtype)


def unmerge(merged: Params, adapter: Params, alpha: float) -> Params:
    """Returns {"base", "lora"}, given what `merge` returned and the adapter; equal up to rounding."""
    return {"base": _add(merged, adapter, -alpha), "lora": adapter}


def pairs_of(adapter: Params) -> dict[str, dict[str, Any]]:
    """Returns path -> {"a", "b"} of the nested adapter."""
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in named_leaves(adapter):
        path, _, part = name.rpartition("/")
        found.setdefault(path, {})[part] = leaf
    return found


def _add(base: Params, adapter: Params, alpha: float, dtype: Any = None) -> Params:
    """Returns base + (alpha / rank) A B."""
    pairs = pairs_of(adapter)

    def leaf(path: str, w: jax.Array) -> jax.Array:
        if path not in pairs:
            return w
        a, b = pairs[path]["a"], pairs[path]["b"]
        # Layer by layer; flattening the dimensions would gather what is cut over devices.
        product = jax.vmap(lambda x, y: jnp.tensordot(x, y, 1, precision=jax.lax.Precision.HIGHEST))(a, b)
        return (w.astype(jnp.float32) + alpha / a.shape[-1] * product).astype(dtype or w.dtype)

    return map_named(leaf, base)


def _dimensions(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns the dimensions of a stacked projection: layers, inputs, outputs."""
    first = 1 + PROJECTIONS[path]
    return tuple(shape[:1]), tuple(shape[1:first]), tuple(shape[first:])


def _find(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Returns the projections among `names` that the patterns find."""
    known = [name for name in names if name in PROJECTIONS]
    shown = ", ".join(known) or "none: this model is no transformer"
    found: set[str] = set()
    for pattern in targets:
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"config.adapter.targets: {pattern!r} is no regular expression: {error}") from None
        # The bias and the norm of a projection share its name; they stay as they are.
        others = {name for name in hits if re.sub("_(bias|norm)$", "", name) not in known}
        if others:
            raise UserError(
                f"config.adapter.targets: {pattern!r} finds {min(others)}, which is no projection; there are {shown}"
            )
        if not hits & set(known):
            raise UserError(f"config.adapter.targets: {pattern!r} finds no projection; there are {shown}")
        found |= hits & set(known)
    if not found:
        raise UserError(f"config.adapter.targets: empty; name at least one of {shown}")
    return [name for name in known if name in found]


def _axes(axes: PyTree, chosen: Sequence[str]) -> PyTree:
    """Returns the logical axes of the adapter."""
    found = {}
    for path in chosen:
        own = axes
        for part in path.split("/"):
            own = own[part]
        stack, inputs, outputs = _dimensions(path, own)
        found[path] = {"a": (*stack, *inputs, "rank"), "b": (*stack, "rank", *outputs)}
    return _nest(found)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts for names such as `a/b`."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *parts, last = name.split("/")
        here = out
        for part in parts:
            here = here.setdefault(part, {})
        here[last] = value
    return out
