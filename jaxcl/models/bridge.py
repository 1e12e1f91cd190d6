"""From Flax to `Model`: the only door through which modules enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params

Arguments = Callable[[Batch], tuple[Any, ...]]


def from_linen(module: nn.Module, example: Batch, *, arguments: Arguments | None = None) -> Model:
    """Wraps a Linen module.

    Axes come from `nn.with_logical_partitioning`; a parameter without it gets None for every dimension.
    The module must keep no state but parameters and draw no randomness in `apply`.

    Args:
      module: called as `module(batch, cache)`, returning an Output; see `arguments` for plain modules.
      example: a batch whose shapes and dtypes suffice for initialisation; arrays or jax.ShapeDtypeStruct.
      arguments: if given, the module is called as `module(*arguments(batch))` and may return an array of logits.

    Raises:
      UserError: the module has collections other than 'params'.
    """

    def run(variables: Any, batch: Batch, cache: Any = None) -> Output:
        if arguments is None:
            return _output(module.apply(variables, batch, cache))
        return _output(module.apply(variables, *arguments(_without_cache(batch, cache))))

    def boxed(key: Key) -> Any:
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
        return module.init(key, *((batch,) if arguments is None else arguments(batch)))

    # Under jit the forward pass of module.init is dead code: only the parameters are computed.
    init = jax.jit(lambda key: nn.meta.unbox(boxed(key))["params"])
    shapes = jax.eval_shape(boxed, jax.random.key(0))
    extra = sorted(set(shapes) - {"params"})
    if extra:
        raise UserError(
            f"config.model: {type(module).__name__} keeps state in {extra[0]!r}; "
            "use a module whose only variables are parameters"
        )
    axes = jax.tree.map(_names, shapes["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    return Model(init, lambda params, batch, cache=None: run({"params": params}, batch, cache), axes)


def from_nnx(factory: Callable[[nnx.Rngs], nnx.Module], *, arguments: Arguments | None = None) -> Model:
    """Wraps an NNX module, given as a function from `nnx.Rngs` to the module.

    Axes come from `nnx.with_partitioning`; a parameter without it gets None for every dimension.
    The module must hold no variables but `nnx.Param`: no running statistics, no streams of random numbers.

    Args:
      factory: builds the module; called under jit.
      arguments: as in `from_linen`.

    Raises:
      UserError: the module holds variables that are no parameters.
    """

    def build(key: Key) -> nnx.Module:
        # The names are logical, so NNX must not look for mesh axes of that name.
        with nnx.use_eager_sharding(False):
            return factory(nnx.Rngs(params=key))

    abstract = nnx.eval_shape(build, jax.random.key(0))
    graph, parameters, rest = nnx.split(abstract, nnx.Param, ...)
    for path, _ in nnx.to_flat_state(rest):
        name = "/".join(str(part) for part in path)
        raise UserError(f"config.model: {name!r} is not a parameter; use a module whose only variables are nnx.Param")

    def init(key: Key) -> Params:
        return _text_keys(nnx.to_pure_dict(nnx.state(build(key), nnx.Param)))

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        state = jax.tree.map(lambda shape: shape, parameters)  # a copy: the next line writes to it
        nnx.replace_by_pure_dict(state, _own_keys(params, nnx.to_pure_dict(state)))
        module: Any = nnx.merge(graph, state)
        if arguments is None:
            return _output(module(batch, cache))
        return _output(module(*arguments(_without_cache(batch, cache))))

    flat = [(path, _nnx_names(variable)) for path, variable in nnx.to_flat_state(parameters)]
    return Model(jax.jit(init), apply, _text_keys(nnx.traversals.unflatten_mapping(dict(flat))))


def _output(value: Any) -> Output:
    """Returns `value` as an Output; an array is logits."""
    return value if isinstance(value, Output) else Output(value)


def _without_cache(batch: Batch, cache: Any) -> Batch:
    """Returns `batch`, or refuses a cache that the module cannot use."""
    if cache is not None:
        raise ValueError("this model has no key-value cache; call apply(params, batch)")
    return batch


def _names(leaf: Any) -> tuple[str | None, ...]:
    """Returns one logical axis name (or None) for every dimension of a leaf, boxed or not."""
    if isinstance(leaf, nn.LogicallyPartitioned | nn.Partitioned):
        return tuple(leaf.names)
    return (None,) * leaf.ndim


def _nnx_names(variable: Any) -> tuple[str | None, ...]:
    """Returns one logical axis name (or None) for every dimension of an abstract nnx.Param."""
    names = variable.get_metadata().get("out_sharding")
    return tuple(names) if names else (None,) * len(variable.shape)


def _text_keys(tree: Any) -> Any:
    """Returns nested dicts with string keys; NNX lists have integer ones."""
    return {str(key): _text_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _own_keys(tree: Any, model: Any) -> Any:
    """Undoes `_text_keys`, given a tree with the original keys."""
    return {key: _own_keys(tree[str(key)], value) for key, value in model.items()} if isinstance(model, dict) else tree
