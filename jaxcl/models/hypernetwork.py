r"""HyperInterval: boxes of weights from intervals around embeddings of tasks (Krukowski et al., 2405.15444).

    embedding of task t      centre c_t, radius eps_t in R^M
      task networks          c_t = e_t,                        eps_t = gamma softmax(v_t)
      one universal network  c_t = (gamma / 2M) cos(e_t),      eps_t = gamma / M
    hidden layers            c <- W c + b, r <- |W| r;  l, u = relu(c -+ r);  c, r <- (u + l) / 2, (u - l) / 2
    weights                  centre V c + b, radius |V| r      V [N, K], N weights of the target network

gamma is the sum of the radii of an embedding: that of one coordinate is gamma / M. All tasks that are asked for pass
through V together, and V is read once (`jaxcl.kernels.boxes`). With `scale` the radii are multiplied, not the centres:
at 0 this is the hypernetwork of points, bit for bit.

`tight` are affine forms (zonotopes; Singh et al. 2018, DeepZ, section 4): every coordinate of the embedding keeps its
own noise symbol through all layers, a ReLU that may be on or off adds one, and the radius of weight n is
sum_s |V_n g_s|. Where few ReLUs are undecided they are far inside the boxes of interval arithmetic; where many are,
neither holds the other, and what is used is the intersection, in every layer and at the end. `layer` is what a
certificate of all networks together goes on from (`boxed.together`): V itself holds the slopes of the weights, so that
no number of weights x symbols is stored.

Choices. `start="fan"` draws the bias of the last layer as the target network draws its weights and gives V rows that
move a weight by `reach` of its own scale, so that all target layers start well; "published" draws V and both biases
uniformly within 1 / sqrt(K), whatever the layer. With one universal network the embedding of a new task starts as that
of the task before: its box is then inside the ledger from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcl.kernels import boxes as products
from jaxcl.models import boxed
from jaxcl.models.boxed import Boxed, Layer
from jaxcl.models.interval import Interval, bounds
from jaxcl.random import named
from jaxcl.schema import UserError
from jaxcl.types import Key, Model, Params

STARTS = ("fan", "published")


def make(
    target: Model,
    *,
    tasks: int,
    universal: bool = False,
    embedding: int = 24,
    hidden: Sequence[int] = (100,),
    gamma: float = 1.0,
    start: Literal["fan", "published"] = "fan",
    reach: float = 0.5,
    fixed: Sequence[str] = (),
) -> Boxed:
    """Returns the hypernetwork of a target network.

    Parameters: `generator/hidden/layer_0/{kernel [M, K], bias [K]}`, ..., `generator/head/{weight [N, K], bias [N]}`,
    `generator/embedding/{centre, radius} [T, M]` (e and v), and the ledger, see `jaxcl.models.boxed`.

    Args:
      target: a network of float32 parameters that interval arithmetic knows, see `jaxcl.models.interval`. One that
        normalises with the statistics of the batch is refused where rows are known: `jaxcl.models.boxed.check_target`.
      tasks: T.
      universal: one network for all tasks, with nested embeddings; else one network per task.
      embedding: M.
      hidden: widths of the hidden layers, the last is K.
      gamma: sum of the radii of an embedding; 0 = points.
      start: how parameters are drawn.
      reach: of start="fan".
      fixed: patterns of parameters of the target that are drawn once and have no boxes, such as "^filters$".

    Raises:
      UserError: an option out of range.
    """
    for name, value in (("embedding", embedding), *(("hidden", width) for width in hidden)):
        if value < 1:
            raise UserError(f"config.adapter.{name}={value}: must be at least 1")
    if not hidden:
        raise UserError("config.adapter.hidden=[]: name the width of at least one hidden layer")
    for name, value in (("gamma", gamma), ("reach", reach)):
        if not 0 <= value < math.inf:
            raise UserError(f"config.adapter.{name}={value}: must not be negative, and finite; it is a radius")
    if start not in STARTS:
        raise UserError(f"config.adapter.start={start!r}: must be one of {', '.join(STARTS)}")

    part = boxed.free(target, fixed)

    def init(key: Key) -> Params:
        return _drawn(part, key, tasks, embedding, hidden, start, reach)

    layers = {f"layer_{i}": {"kernel": (None, None), "bias": (None,)} for i in range(len(hidden))}
    head = {"weight": ("mlp", None), "bias": ("mlp",)}
    axes = {"hidden": layers, "head": head, "embedding": {"centre": ("tasks", None), "radius": ("tasks", None)}}
    functions = _functions(tasks, universal, embedding, gamma)
    return boxed.make(target, init, axes, tasks, universal, fixed, **functions)


def enclosure(made: Boxed, params: Params, task: jax.Array) -> Interval:
    """Returns a box that holds all networks that a hypernetwork makes of the embedding of a task, rounded outward.

    In exact arithmetic: none is outside by an error of rounding. What `boxed.box` finds is computed to nearest, which
    costs no promise, since a promise is for the numbers that the ledger keeps. The ledger takes no part here.

    Args:
      made: the model, of a hypernetwork.
      params: of it.
      task: int32 [].

    Raises:
      UserError: boxes without a hypernetwork; parameters of another model; there is no such task, as for `boxed.box`.
    """
    if made.enclosed is None:
        raise UserError("enclosure: these boxes have no hypernetwork; config.adapter='hypernetwork' makes one")
    boxed.check_task(made.tasks, task)
    boxed.check_ledger(made, params)
    return made.enclosed(params["generator"], boxed.shown(made, params, task))


def _functions(tasks: int, universal: bool, embedding: int, gamma: float) -> dict[str, Callable[..., Any]]:
    """Returns `boxes`, `tight`, `begin`, `keep`, `layer` and `enclosed` of `jaxcl.models.boxed.Boxed`."""

    def embed(generator: Params, which: jax.Array) -> tuple[jax.Array, jax.Array]:
        free, spread = (generator["embedding"][part][which] for part in ("centre", "radius"))  # [S, M]
        if universal:
            return gamma / (2 * embedding) * jnp.cos(free), jnp.full_like(free, gamma / embedding)
        return free, gamma * jax.nn.softmax(spread)

    def wide(
        generator: Params, which: jax.Array, scales: jax.Array, nearer: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        centre, radius = embed(generator, which)
        centre = centre if nearer is None else centre * nearer[:, None]
        centre, radius = _through(generator["hidden"], centre, radius * scales[:, None])
        return products.affine(generator["head"]["weight"], generator["head"]["bias"], centre, radius)

    def layer(generator: Params, task: jax.Array) -> Layer:
        centre, radius = embed(generator, task[None])
        centre, noise, fresh = _affine_forms(generator["hidden"], centre[0], radius[0])
        generators = jnp.concatenate([noise, jnp.diag(fresh)])
        return Layer(generator["head"]["weight"], generator["head"]["bias"], centre, generators)

    def tight(generator: Params, task: jax.Array) -> tuple[jax.Array, jax.Array]:
        centre, radius = embed(generator, task[None])
        plain = _through(generator["hidden"], centre, radius)
        centre, noise, fresh = _affine_forms(generator["hidden"], centre[0], radius[0])
        weight, bias = generator["head"]["weight"], generator["head"]["bias"]
        both = (jnp.concatenate([one, other[None]]) for one, other in zip(plain, (centre, fresh), strict=True))
        middles, radii = products.affine(weight, bias, *both)
        return intersection(middles, radii.at[1].add(products.row_sums(weight, noise)))

    def begin(generator: Params, task: jax.Array, before: jax.Array) -> Params:
        if not universal:
            return generator
        own = generator["embedding"]["centre"]
        return _with(generator, centre=own.at[task].set(own[before]))

    def keep(generator: Params, old: Params, task: jax.Array) -> Params:
        """The embeddings of other tasks stay as they are, whatever moments and decay say."""
        own = (jnp.arange(tasks) == task)[:, None]
        new, kept = generator["embedding"], old["embedding"]
        return _with(generator, **{part: jnp.where(own, new[part], kept[part]) for part in new})

    def enclosed(generator: Params, task: jax.Array) -> Interval:
        centre, radius = embed(generator, task[None])
        return _enclosed(generator, centre[0], radius[0])

    functions = {"boxes": wide, "tight": tight, "begin": begin, "keep": keep, "layer": layer}
    return {**functions, "enclosed": enclosed}


def _enclosed(generator: Params, centre: jax.Array, radius: jax.Array) -> Interval:
    """Returns all weights over a box of the embedding, [N], rounded outward.

    Centre and radius are computed to nearest, and widened by what that may hide.
    """
    limits = jnp.finfo(jnp.float32)
    near = (8 + centre.size) * (float(limits.eps) * (jnp.abs(centre) + radius) + float(limits.tiny))

    def weights(place: jax.Array) -> jax.Array:
        for i in range(len(generator["hidden"])):
            layer = generator["hidden"][f"layer_{i}"]
            place = jax.nn.relu(place @ layer["kernel"] + layer["bias"])
        return generator["head"]["weight"] @ place + generator["head"]["bias"]

    return bounds(weights, outward=True)(Interval(centre - radius - near, centre + radius + near))


def intersection(centre: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns centre and radius of what all intervals have in common; the radius is negative where nothing is.

    Args:
      centre: float32 [T, M].
      radius: float32 [T, M].
    """
    lower, upper = jnp.max(centre - radius, axis=0), jnp.min(centre + radius, axis=0)
    return (lower + upper) / 2, (upper - lower) / 2


def _through(layers: Params, centre: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns centre and radius behind the hidden layers, [S, K]."""
    high = jax.lax.Precision.HIGHEST
    for i in range(len(layers)):
        layer = layers[f"layer_{i}"]
        centre = jnp.dot(centre, layer["kernel"], precision=high) + layer["bias"][None]
        radius = jnp.dot(radius, jnp.abs(layer["kernel"]), precision=high)
        lower, upper = jax.nn.relu(centre - radius), jax.nn.relu(centre + radius)
        centre, radius = (upper + lower) / 2, (upper - lower) / 2
    return centre, radius


def _affine_forms(layers: Params, centre: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns centre [K], generators [S, K] and the radii [K] that the last ReLUs add.

    A ReLU of x in [l, u] with l < 0 < u becomes slope x + offset +- offset, slope = u / (u - l), offset = -slope l / 2.
    """
    high = jax.lax.Precision.HIGHEST
    noise, fresh = jnp.diag(radius), jnp.zeros_like(radius)
    below, above = centre - radius, centre + radius  # the same by interval arithmetic
    for i in range(len(layers)):
        kernel, bias = layers[f"layer_{i}"]["kernel"], layers[f"layer_{i}"]["bias"]
        noise = noise if not i else jnp.concatenate([noise, jnp.diag(fresh)])
        centre, noise = jnp.dot(centre, kernel, precision=high) + bias, jnp.dot(noise, kernel, precision=high)
        spread = jnp.sum(jnp.abs(noise), axis=0)
        middle = jnp.dot((below + above) / 2, kernel, precision=high) + bias
        size = jnp.dot((above - below) / 2, jnp.abs(kernel), precision=high)
        lower = jnp.maximum(centre - spread, middle - size)
        upper = jnp.maximum(jnp.minimum(centre + spread, middle + size), lower)
        undecided = (lower < 0) & (upper > 0)
        slope = jnp.where(undecided, upper / jnp.where(undecided, upper - lower, 1), (lower >= 0).astype(jnp.float32))
        fresh = jnp.where(undecided, -slope * lower / 2, 0)
        centre, noise = slope * centre + fresh, slope[None] * noise
        below, above = jax.nn.relu(lower), jax.nn.relu(upper)
    return centre, noise, fresh


def _drawn(
    part: Callable[[Key], Params], key: Key, tasks: int, embedding: int, hidden: Sequence[int], start: str, reach: float
) -> Params:
    """Returns the parameters of the generator."""
    layers, width = {}, embedding
    for i, size in enumerate(hidden):
        a, b = jax.random.split(named(key, f"hidden {i}"))
        bound = 1 / math.sqrt(width)  # kaiming_uniform with a = sqrt(5), as published
        kernel = jax.random.uniform(a, (width, size), jnp.float32, -bound, bound)
        layers[f"layer_{i}"] = {"kernel": kernel, "bias": jax.random.uniform(b, (size,), jnp.float32, -bound, bound)}
        width = size
    begun = part(named(key, "target"))
    rows = boxed.ravel(begun)
    a, b = jax.random.split(named(key, "head"))
    if start == "published":
        bound = 1 / math.sqrt(width)
        weight = jax.random.uniform(a, (rows.size, width), jnp.float32, -bound, bound)
        bias = jax.random.uniform(b, (rows.size,), jnp.float32, -bound, bound)
    else:
        scales = jnp.concatenate([jnp.full(leaf.size, scale) for leaf, scale in zip(*_scales(begun), strict=True)])
        weight, bias = jax.random.normal(a, (rows.size, width)) * (reach * scales / math.sqrt(width))[:, None], rows
    places = {
        "centre": jax.random.normal(named(key, "embedding"), (tasks, embedding)),
        "radius": jnp.full((tasks, embedding), 1 / embedding, jnp.float32),
    }
    return {"hidden": layers, "head": {"weight": weight, "bias": bias}, "embedding": places}


def _scales(params: Params) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the leaves, and the standard deviation of each; of a leaf that starts as a constant, the least other."""
    leaves = jax.tree.leaves(params)
    spread = [jnp.std(leaf) for leaf in leaves]
    least = jnp.min(jnp.stack([jnp.where(one > 0, one, jnp.inf) for one in spread]))
    least = jnp.where(jnp.isfinite(least), least, 1.0)
    return leaves, [jnp.where(one > 0, one, least) for one in spread]


def _with(generator: Params, **parts: jax.Array) -> Params:
    return {**generator, "embedding": {**generator["embedding"], **parts}}
