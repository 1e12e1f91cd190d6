"""Decoder-only transformer: Llama 2 and 3, Qwen 2, 2.5 and 3 as one stack of scanned layers."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxcl.kernels import decode, sharded
from jaxcl.kernels.attention import attention
from jaxcl.models import experts as mixtures
from jaxcl.models import presets
from jaxcl.models.bridge import from_linen
from jaxcl.models.config import Config, resolve
from jaxcl.models.layers import apply_rope, linear, lookup, mix, rms_norm, rope_frequencies, rope_tables
from jaxcl.models.units import Mlp, weight
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the past. All rows write to the same slots; a slot with segment 0 is never attended to.

    There is one array for each layer, so that a step writes to it in place; a stacked one would be copied.
    """

    keys: tuple[jax.Array, ...]  # of every layer: compute dtype [B, G, S, K], rotated
    values: tuple[jax.Array, ...]  # of every layer: compute dtype [B, G, S, K]
    segments: jax.Array  # int32 [B, S]
    positions: jax.Array  # int32 [B, S]
    index: jax.Array  # int32 []: the next free slot


class Rows(NamedTuple):
    """What every layer needs to know of a batch."""

    segments: jax.Array  # int32 [B, L]
    positions: jax.Array  # int32 [B, L]
    cos: jax.Array  # float32 [B, L, 1, K / 2]
    sin: jax.Array  # float32 [B, L, 1, K / 2]
    frozen: jax.Array | None = None  # bool [B, L]: tokens that no gradient of the attention reaches
    past: Cache | None = None  # slots to attend to; its keys and values are passed by layer


class Columns(NamedTuple):
    """What a transformer reads of `batch.extra`, if it is there, with a cache and without.

    Where `soft` holds, an input is the embedding `thought`, which is data; or it is sum_s shares_s E[support_s],
    through which the table E has a gradient, and the shares have none.
    """

    soft: jax.Array | None = None  # bool [B, L]: where something else is fed in place of the token
    thought: jax.Array | None = None  # [B, L, D] embeddings of no token
    support: jax.Array | None = None  # int32 [B, L, S] tokens to mix; without it all of them in order, S = V
    shares: jax.Array | None = None  # float32 [B, L, S] of those tokens; 0 for what is not used
    frozen: jax.Array | None = None  # bool [B, L]: tokens that no gradient of an attention reaches; skips their tiles


def make(
    *,
    preset: str | None = None,
    vocab: int | None = None,
    layers: int | None = None,
    embed: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp: int | None = None,
    tied: bool | None = None,
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    mlp_bias: bool | None = None,
    qk_norm: bool | None = None,
    window: int | None = None,
    window_layers: Sequence[bool] | None = None,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float | None = None,
    max_length: int | None = None,
    vocab_multiple: int | None = None,
    init_std: float | None = None,
    experts: int | None = None,
    experts_per_token: int | None = None,
    expert_mlp: int | None = None,
    norm_topk: bool | None = None,
    capacity: float | None = None,
    balance: float | None = None,
    router_z: float | None = None,
    remat: str | None = None,
    attention: str | None = None,
    compute_dtype: str | None = None,
    unroll: int | None = None,
) -> Model:
    """Returns a decoder as a Model; whatever is not None overrides the preset.

    `apply(params, batch, cache=None)` takes tokens or embeddings as `batch.inputs`, and the columns of `Columns`.
    `cache` is None, a Cache, or an int: the number of slots of a new cache that the batch is written to (prefill).

    Args:
      preset: name of a shape in `jaxcl.models.presets`.
      vocab: this and all others are the fields of `jaxcl.models.config.Config`, and described there.

    Raises:
      UserError: unknown preset or option, missing field or impossible shape.
    """
    return from_config(shape(**locals()))


def shape(*, preset: str | None = None, **fields: Any) -> Config:
    """Returns the Config of the options of `make`."""
    given = {name: value for name, value in fields.items() if value is not None}
    return resolve(({} if preset is None else presets.fields(preset)) | given)


def from_config(config: Config) -> Model:
    """Returns the Model of a resolved Config."""
    return from_linen(Transformer(config), _shapes(1, 1))


def init_cache(model: Model, batch: int, length: int) -> Cache:
    """Returns an empty cache of `length` slots for `batch` rows: zeros, on the default device.

    The loop that fills it must stop after `length` tokens per row, padding included; hidden states are NaN beyond.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda p, rows: model.apply(p, rows, cache=length).cache, params, _shapes(batch, 1))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def count(model: Model) -> int:
    """Returns the number of parameters, without computing them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def _shapes(rows: int, length: int) -> Batch:
    """Returns the shapes of a batch of tokens."""
    row: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    task: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Batch(row, row, weights, row, row, task)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, rows: Rows, past: Any, window: Any) -> tuple[jax.Array, Any]:
        """Maps x [B, L, D] to [B, L, D]; also returns keys and values.

        They are those of x, [B, L, G, K], or with a past those of the whole cache, [B, G, S, K].
        """
        c, dtype = self.config, x.dtype

        def project(name: str, heads: int, axis: str) -> jax.Array:
            kernel = weight(self, name, (c.embed, heads, c.head_dim), ("embed", axis, "head"), c.init_std)
            y: Any = linear(x, kernel.astype(dtype))  # [B, L, heads, K]
            if c.qkv_bias:
                bias = weight(self, f"{name}_bias", (heads, c.head_dim), (axis, "head"), 0.0)
                y = y + bias.astype(dtype)[None, None]
            if c.qk_norm and name != "value":
                y = rms_norm(y, weight(self, f"{name}_norm", (c.head_dim,), ("head",), None), c.norm_eps)
            return y if name == "value" else apply_rope(y, rows.cos, rows.sin)

        q = project("query", c.heads, "heads")
        k = project("key", c.kv_heads, "kv_heads")
        v = project("value", c.kv_heads, "kv_heads")
        if rows.past is None:
            how = {"window": window, "frozen": rows.frozen, "implementation": c.attention}
            mixed = attention(q, k, v, segments=rows.segments, **how)
        else:
            at = (0, 0, rows.past.index, 0)
            k, v = (jax.lax.dynamic_update_slice(p, x.swapaxes(1, 2), at) for p, x in zip(past, (k, v), strict=True))
            mixed = decode.attention(
                q,
                k,
                v,
                segments=rows.segments,
                kv_segments=rows.past.segments,
                positions=rows.positions,
                kv_positions=rows.past.positions,
                window=window,
            )
        mixed = checkpoint_name(mixed, "attention")
        std = c.init_std / math.sqrt(2 * c.layers)
        out = weight(self, "out", (c.heads, c.head_dim, c.embed), ("heads", "head", "embed"), std)
        y: Any = linear(mixed, out.astype(dtype), 2)
        if c.out_bias:
            y = y + weight(self, "out_bias", (c.embed,), ("embed",), 0.0).astype(dtype)[None, None]
        return y, (k, v)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: Config
    keep: bool  # whether to return keys and values for a cache

    @nn.compact
    def __call__(self, x: jax.Array, past: Any, window: Any, rows: Rows) -> tuple[jax.Array, Any]:
        """Maps x [B, L, D] to [B, L, D]; also returns keys and values, if they are kept, and what a router tells."""
        c = self.config
        scale = weight(self, "attention_norm", (c.embed,), ("embed",), None)
        mixed, new = Attention(c, name="attention")(rms_norm(x, scale, c.norm_eps), rows, past, window)
        x = sharded.rows(x + mixed)
        scale = weight(self, "mlp_norm", (c.embed,), ("embed",), None)
        y, told = rms_norm(x, scale, c.norm_eps), None
        if c.experts is None:
            y = Mlp(c, name="mlp")(y)
        else:  # what is drawn token by token has no row that a capacity could be a share of
            y, told = mixtures.Experts(c, bounded=not self.keep, name="experts")(y, rows.segments)
        return sharded.rows(x + y), (new if self.keep else None, told)


class Transformer(nn.Module):
    """Embedding, blocks, norm and head."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch, cache: Cache | int | None = None) -> Output:
        """Returns hidden [B, L, D] after the last norm, the head [D, V] and the cache, if one was given."""
        c, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        length = batch.segments.shape[1]
        slots = cache if isinstance(cache, int) else length if cache is None else cache.segments.shape[1]
        if length > slots or slots > c.max_length:
            raise UserError(
                f"config.model.max_length={c.max_length}: rows of {length} tokens in {slots} slots; "
                "use shorter rows, more slots or a larger max_length"
            )
        table = weight(self, "embedding", (c.rows, c.embed), ("vocab", "embed"), c.init_std)
        extra = Columns(**{name: batch.extra.get(name) for name in Columns._fields})
        # The padding is cut off before the lookup, where a token beyond the vocabulary must become NaN.
        x = sharded.rows(_inputs(table[: c.vocab], batch.inputs, extra, dtype))
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        cos, sin = rope_tables(batch.positions, frequencies, getattr(c.rope_scaling, "attention_factor", 1.0))
        if cache is None or isinstance(cache, int):
            # A new cache: the batch attends to itself, as without one, and is written to it afterwards.
            context = Rows(batch.segments, batch.positions, cos, sin, extra.frozen)
            x, (new, told) = self._stack(cache is not None)(x, None, _windows(c), context)
            store = None if cache is None else _filled(c, batch, slots, *new)
        else:
            told = None
            store = _note(cache, batch)
            x, new = self._steps(x, store, Rows(batch.segments, batch.positions, cos, sin, past=store))
            x = jnp.where(store.index + length <= slots, x, jnp.nan)  # a full cache must not pass unnoticed
            store = dataclasses.replace(store, keys=new[0], values=new[1], index=store.index + length)
        x = rms_norm(x, weight(self, "final_norm", (c.embed,), ("embed",), None), c.norm_eps)
        head = table.T if c.tied else weight(self, "head", (c.embed, c.rows), ("embed", "vocab"), c.init_std)
        terms = None if told is None or cache is not None else mixtures.terms(c, told, batch.segments)
        return Output(x, head[:, : c.vocab].astype(dtype), store, table[: c.vocab].astype(dtype), terms)

    def _stack(self, keep: bool) -> nn.Module:
        """Returns the blocks as one scanned module with parameters stacked along a first axis named 'layers'."""
        c, block = self.config, Block
        if c.remat != "none":
            # Inside a loop nothing can merge the recomputation with the forward pass; without a loop it could.
            block = nn.remat(Block, policy=_policy(c.remat), prevent_cse=c.unroll >= c.layers)
        axes: Any = (0, 0, nn.broadcast)
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=axes,
            length=c.layers,
            unroll=c.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, keep, name="layers")

    def _steps(self, x: jax.Array, store: Cache, context: Rows) -> tuple[jax.Array, Any]:
        """Returns x after all blocks, and the keys and the values of every layer. Layers are unrolled."""
        c, stacked, windows = self.config, self.variables["params"]["layers"], _windows(self.config)
        kept = []
        for i, past in enumerate(zip(store.keys, store.values, strict=True)):
            own = {"params": jax.tree.map(operator.itemgetter(i), stacked)}
            window = None if windows is None else windows[i]
            x, (new, _) = Block(c, keep=True, parent=None).apply(own, x, past, window, context)  # pyright: ignore
            kept.append(new)
        return x, tuple(zip(*kept, strict=True))


def _inputs(table: jax.Array, inputs: jax.Array, extra: Columns, dtype: Any) -> jax.Array:
    """Returns what the first block is given, [B, L, D], for tokens [B, L] or embeddings [B, L, D]."""
    x = (lookup(table, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs).astype(dtype)
    if extra.shares is None and extra.support is None:
        if extra.soft is None or extra.thought is None:
            return x
        return jnp.where(extra.soft[..., None], extra.thought.astype(dtype), x)
    if extra.thought is not None:
        raise UserError("batch.extra: has both thought and shares; feed embeddings or mixtures of tokens, not both")
    if extra.shares is None or extra.soft is None:
        missing = "soft" if extra.soft is None else "shares"
        raise UserError(f"batch.extra: has no {missing}, which mixtures of tokens need; add it")
    wanted = (*extra.soft.shape, table.shape[0]) if extra.support is None else extra.support.shape
    if extra.shares.shape != wanted or extra.soft.shape != wanted[:-1]:
        found = f"soft {list(extra.soft.shape)}, shares {list(extra.shares.shape)}"
        raise UserError(f"batch.extra: {found}; expected {list(wanted[:-1])}, {list(wanted)}")
    # Elsewhere the columns may hold anything, and 0 * NaN would reach the gradient of the table.
    shares = jnp.where(extra.soft[..., None], extra.shares, 0)
    return jnp.where(extra.soft[..., None], mix(table, extra.support, shares, dtype).astype(dtype), x)


def _windows(c: Config) -> np.ndarray | None:
    """Returns the window of every layer, int32 [layers], 0 = none; None if no layer has one."""
    if c.window is None:
        return None
    return np.array([c.window if near else 0 for near in c.window_layers or (True,) * c.layers], np.int32)


def _policy(name: str) -> Callable[..., bool] | None:
    """Returns the checkpoint policy of a remat name other than 'none'."""
    policies = jax.checkpoint_policies
    return {
        "full": policies.nothing_saveable,
        "dots": policies.dots_saveable,
        "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names("attention"),
    }[name]


def _filled(c: Config, batch: Batch, slots: int, keys: jax.Array, values: jax.Array) -> Cache:
    """Returns a cache with the batch in its first slots; its keys and values are [layers, B, L, G, K]."""
    length = batch.segments.shape[1]

    def by_layer(x: jax.Array) -> tuple[jax.Array, ...]:
        x = jnp.pad(x.swapaxes(2, 3), ((0, 0), (0, 0), (0, 0), (0, slots - length), (0, 0)))
        return tuple(x[i] for i in range(c.layers))

    row = jnp.zeros((batch.segments.shape[0], slots), jnp.int32)
    empty = Cache(by_layer(keys), by_layer(values), row, row, jnp.zeros((), jnp.int32))
    return dataclasses.replace(_note(empty, batch), index=jnp.int32(length))


def _note(cache: Cache, batch: Batch) -> Cache:
    """Returns `cache` with the segments and positions of `batch` written to its next slots."""
    at = (0, cache.index)
    return dataclasses.replace(
        cache,
        segments=jax.lax.dynamic_update_slice(cache.segments, batch.segments, at),
        positions=jax.lax.dynamic_update_slice(cache.positions, batch.positions, at),
    )
