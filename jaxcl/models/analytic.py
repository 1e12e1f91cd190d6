r"""A frozen network, a fixed expansion of its features and a head that is solved for rather than trained.

    f = base(batch)                 [B, D]   last hidden layer, never trained
    x = expansion(f)                [B, d]   fixed
    z = scale (x W + bias)          [B, C]   all four, seen among them, are written by a method, in closed form

    expansion    x
    relu, tanh   relu(f P), tanh(f P); P random (ACIL, Zhuang et al. 2022; RanPAC, McDonnell et al. 2023)
    gaussian     exp(-|f - c_i|^2 / (2 sigma^2)) with fixed centres c_i (GKEAL, Zhuang et al. 2023)
    dual         relu(f P) and tanh(f P) side by side, 2 d features (DS-AL, Zhuang et al. 2024)
    none         f

Parameters are {"base": those of the network, "expansion": {"projection" [D, d]} or {"centres" [d, D]}, "head" [d, C],
"bias" [C], "scale" [], "seen" [C]}; a head of distances has means in "head" and "precision" [C or 1, d, d] as well. The
head is preallocated: a class without rows has a column of zeros, and its logit lies MARGIN below the least of those
seen, where no row is ever put; it is finite, so that the held-out loss of a task to come is a number. Before any class
was seen all logits are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.kernels.ridge import pair
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params

MARGIN = 20.0  # logits; the share of a class that was not seen is below 1e-8
_TINY = 1e-12  # least length that a feature is divided by


class Options(NamedTuple):
    """The options of `make`, and the sizes that follow from them."""

    expansion: str
    inputs: int  # D
    wide: int  # features before the column of ones
    classes: int  # C
    scale: str
    sigma: float
    bias: bool
    normalise: bool
    head: str
    power: float
    shared: bool


class Analytic(NamedTuple):
    """A model with a head in closed form, and what a method needs of it."""

    model: Model
    raw: Callable[[Params, Batch], jax.Array]  # (params, batch) -> features of the base, float32 [B, D]
    expand: Callable[[Params, jax.Array], jax.Array]  # (params, raw) -> float32 [B, d]
    read: Callable[[Params, jax.Array], jax.Array]  # (params, expanded) -> logits, float32 [B, C]
    inputs: int  # D
    width: int  # d
    classes: int  # C
    expansion: str
    head: str = "linear"  # or "mahalanobis"
    power: float = 1.0  # of a head of distances
    shared: bool = False  # whether it has one precision for all classes
    sigma: float = 10.0  # of a Gaussian kernel
    bias: bool = False  # whether the last feature is 1
    normalise: bool = False  # whether features have length 1 in the end

    def features(self, params: Params, batch: Batch) -> jax.Array:
        """Returns what the head reads, float32 [B, d]."""
        return self.expand(params, self.raw(params, batch))


def make(
    base: Model,
    example: Batch,
    classes: int,
    *,
    expansion: Literal["relu", "tanh", "gaussian", "dual", "none"] = "relu",
    width: int | None = None,
    scale: Literal["uniform", "normal"] = "uniform",
    sigma: float = 10.0,
    bias: bool = False,
    normalise: bool = False,
    head: Literal["linear", "mahalanobis"] = "linear",
    power: float = 1.0,
    shared: bool = False,
) -> Analytic:
    """Returns the model.

    Args:
      base: a network whose `Output.hidden` are features [B, D]; hidden states [B, L, D] of a language model are
        averaged over the tokens that are no padding.
      example: shapes of a batch.
      classes: C, columns of the head.
      expansion: see above.
      width: features after the expansion, of "dual" after each of both; None = 512. Of "none" there is no choice.
      scale: of P: "normal" is N(0, 1), as in the papers; "uniform" is U(-1/sqrt(D), 1/sqrt(D)), as in the code of ACIL.
        The regularisation is not free of scale: gamma for features that are s times as large is s^2 times as large.
      sigma: of the Gaussian kernel.
      bias: whether a column of ones is appended; it is regularised like the others.
      normalise: whether features have length 1 in the end.
      head: "mahalanobis" is -(t(x) - mean_c)^T precision_c (t(x) - mean_c) / 2, t(x) = sign(x) |x|^power / length, for
        `fecam`.
      power: of that transformation (Tukey's); 1 = none.
      shared: whether a head of distances has one precision for all classes.

    Raises:
      UserError: an option out of range or without effect.
    """
    inputs = features_of(base, example)
    wide = inputs if expansion == "none" else (512 if width is None else width)
    options = Options(expansion, inputs, wide, classes, scale, sigma, bias, normalise, head, power, shared)
    _check(options, width)
    return _built(base, options)


def _built(base: Model, options: Options) -> Analytic:
    """Returns the model of options that were checked."""
    o, size = options, options.wide * (2 if options.expansion == "dual" else 1) + int(options.bias)

    def init(key: Key) -> Params:
        params: Params = {"base": base.init(key)}
        if o.expansion != "none":
            name = "centres" if o.expansion == "gaussian" else "projection"
            params["expansion"] = {name: _drawn(named(key, "expansion"), o)}
        params |= {"head": jnp.zeros((size, o.classes)), "bias": jnp.zeros(o.classes), "seen": jnp.zeros(o.classes)}
        params["scale"] = jnp.ones(())
        if o.head == "mahalanobis":
            params["precision"] = jnp.zeros((1 if o.shared else o.classes, size, size))
        return params

    def raw(params: Params, batch: Batch) -> jax.Array:
        return pooled(base.apply(params["base"], batch).hidden, batch)

    def expand(params: Params, features: jax.Array) -> jax.Array:
        found = _expanded(o, params.get("expansion", {}), features)
        if o.bias:
            found = jnp.concatenate([found, jnp.ones((found.shape[0], 1))], axis=1)
        return unit(found) if o.normalise else found

    def read(params: Params, x: jax.Array) -> jax.Array:
        if o.head == "linear":
            z = params["scale"] * (pair.contract(x, params["head"], 1, 0) + params["bias"][None])
        else:
            z = -0.5 * distances(unit(powered(x, o.power)), params["head"], params["precision"])
        return masked(z, params["seen"])

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        del cache
        return Output(read(params, expand(params, raw(params, batch))))

    model = Model(init, apply, _axes(base, o))
    told = (o.expansion, o.head, o.power, o.shared, o.sigma, o.bias, o.normalise)
    return Analytic(model, raw, expand, read, o.inputs, size, o.classes, *told)


def _axes(base: Model, o: Options) -> Any:
    axes = {"base": base.axes, "head": ("mlp", None), "bias": (None,), "scale": (), "seen": (None,)}
    if o.expansion != "none":
        names = {"centres": ("mlp", "embed")} if o.expansion == "gaussian" else {"projection": ("embed", "mlp")}
        axes["expansion"] = names
    return axes | ({"precision": (None, None, None)} if o.head == "mahalanobis" else {})


def features_of(base: Model, example: Batch) -> int:
    """Returns D, the number of features of a network.

    Raises:
      UserError: its output is neither [B, D] nor [B, L, D].
    """
    shapes = jax.eval_shape(base.init, jax.eval_shape(lambda: jax.random.key(0)))
    found = jax.eval_shape(lambda params, rows: base.apply(params, rows).hidden, shapes, example).shape
    if len(found) not in (2, 3):
        raise UserError(f"config.adapter='analytic': the model gives features {found}; it takes [B, D] or [B, L, D]")
    return found[-1]


def pooled(hidden: jax.Array, batch: Batch) -> jax.Array:
    """Returns features [B, D] in float32: hidden states [B, L, D] are averaged over the tokens that are no padding."""
    hidden = hidden.astype(jnp.float32)
    if hidden.ndim == 2:
        return hidden
    real = (batch.segments > 0).astype(jnp.float32)[..., None]  # [B, L, 1]
    return jnp.sum(jnp.where(real > 0, hidden, 0.0), axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)


def masked(logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns logits [B, C] in which classes that were not seen lie MARGIN below the least of the others."""
    known = (seen > 0)[None]
    least = jnp.min(jnp.where(known, logits, jnp.inf), axis=1, keepdims=True)
    return jnp.where(known, logits, jnp.where(jnp.isinf(least), 0.0, least) - MARGIN)


def unit(x: jax.Array) -> jax.Array:
    """Returns rows of length 1, [B, d]; a row of zeros stays one."""
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), _TINY)


def powered(x: jax.Array, power: float) -> jax.Array:
    """Returns sign(x) |x|^power (Tukey's ladder of powers, for features of either sign)."""
    return x if power == 1.0 else jnp.sign(x) * jnp.abs(x) ** power


def distances(x: jax.Array, means: jax.Array, precision: jax.Array) -> jax.Array:
    """Returns (x - mean_c)^T precision_c (x - mean_c), float32 [B, C].

    Args:
      x: float32 [B, d].
      means: float32 [d, C].
      precision: float32 [C, d, d], or [1, d, d] for all classes.
    """
    away = x[:, None] - means.T[None]  # [B, C, d]
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    if precision.shape[0] == means.shape[1]:
        turned = jnp.einsum("bcd,cde->bce", away, precision, **precise)
    else:  # of one precision B + C products are enough, of rows and of means
        turned = pair.contract(x, precision[0], 1, 0)[:, None] - pair.contract(means, precision[0], 0, 0)[None]
    return jnp.sum(turned * away, axis=-1)


def _drawn(key: Key, o: Options) -> jax.Array:
    """Returns the projection [D, d], or centres [d, D] where there are no rows to take them from."""
    if o.expansion == "gaussian":
        return jax.random.normal(key, (o.wide, o.inputs))
    if o.scale == "normal":
        return jax.random.normal(key, (o.inputs, o.wide))
    limit = 1 / math.sqrt(o.inputs)
    return jax.random.uniform(key, (o.inputs, o.wide), jnp.float32, -limit, limit)


def _expanded(o: Options, own: Params, f: jax.Array) -> jax.Array:
    """Returns the expansion of features [B, D] without its column of ones."""
    if o.expansion == "none":
        return f
    if o.expansion == "gaussian":
        centres = own["centres"]
        products = pair.contract(f, centres, 1, 1)  # [B, d]
        squares = jnp.sum(f * f, axis=1)[:, None] + jnp.sum(centres * centres, axis=1)[None] - 2 * products
        return jnp.exp(-jnp.maximum(squares, 0.0) / (2 * o.sigma**2))
    found = pair.contract(f, own["projection"], 1, 0)
    if o.expansion == "dual":
        return jnp.concatenate([jax.nn.relu(found), jnp.tanh(found)], axis=1)
    return jax.nn.relu(found) if o.expansion == "relu" else jnp.tanh(found)


def _check(o: Options, width: int | None) -> None:
    """Raises UserError for an option out of range, or one that nothing asks for; `width` is the one that was given."""
    if o.classes < 1:
        raise UserError(f"config.adapter.classes={o.classes}: must be at least 1")
    if width is not None and width < 1:
        raise UserError(f"config.adapter.width={width}: must be at least 1")
    if width is not None and o.expansion == "none":
        raise UserError(f"config.adapter.width={width}: expansion='none' keeps the features of the model; leave it out")
    if o.scale != "uniform" and o.expansion in ("gaussian", "none"):
        raise UserError(f"config.adapter.scale={o.scale!r}: of a random projection; leave it out")
    for name, value in (("sigma", o.sigma), ("power", o.power)):
        if not 0 < value < math.inf:
            raise UserError(f"config.adapter.{name}={value}: must be above 0")
    if o.head == "linear" and (o.power != 1.0 or o.shared):
        name, value = ("power", o.power) if o.power != 1.0 else ("shared", o.shared)
        raise UserError(f"config.adapter.{name}={value}: of head='mahalanobis'; set that, or leave it out")
