r"""Networks whose weights come from a box: the box of a task, and the ledger of what earlier tasks were promised.

    raw_t    = the box that a generator (a hypernetwork, a centre and radii) gives for task t, in R^N
    box_t    = clip(raw_t, lower, upper)                     never leaves the ledger
    ledger   <- box_t  when task t is over                   (Boxed.close)

Task networks (`universal=False`): the ledger has a row for every task, the network of task t is clip(point_t, row t).
One universal network: the ledger is one row, the intersection of the boxes of all tasks that are over; since every
later box and the network itself are clipped into it, it cannot become empty. If every network of box_t solves a share
a_t of some rows, then so does the deployed network ever after, whatever happened to the generator.

Parameters are {"generator": ..., "fixed": ..., "ledger": {"lower", "upper" [R, N], "done" [T], "current" []}}. `fixed`
are parameters of the network that are no intervals and never move. The ledger is no parameter in the optimiser's sense,
but it is part of the model: without it the network is another one.

Source: the promise is that of Wolczyk et al. 2022 (InterContiNet); that it must be enforced, and by a projection while
training, is this library's: a penalty alone does not keep later boxes inside earlier ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcl import frozen
from jaxcl.kernels import boxes as products
from jaxcl.models.interval import Form, Interval, affine_bounds, bounds, check_rows
from jaxcl.schema import UserError
from jaxcl.types import Batch, Key, Model, Output, Params

LEDGER = "ledger"

# (generator, tasks int32 [S], scales float32 [S]) -> centres and radii, float32 [S, N] each; at scale 0 radii are 0.
# Nested embeddings take factors on their centres as well, float32 [S].
Boxes = Callable[..., tuple[jax.Array, jax.Array]]


class Layer(NamedTuple):
    """The last layer of a generator, and what enters it for one task: weights of the target = weight h + bias."""

    weight: jax.Array  # [N, K]
    bias: jax.Array  # [N]
    centre: jax.Array  # [K], of h
    generators: jax.Array  # [S, K]: h = centre + sum_s eps_s generators_s, |eps_s| <= 1


class Zonotope(NamedTuple):
    """All networks of a task at once, centre + weight d, whose weights share the symbols of d."""

    generators: jax.Array  # [S, K]
    centre: jax.Array  # [N]
    reach: jax.Array  # [N], sum_s |weight generators_s|
    mass: jax.Array  # [N], |weight| sum_s |generators_s|
    ends: Interval  # [N], a box that holds them, and not what the ledger has left of it


class Boxed(NamedTuple):
    """A model of boxes, and what a method and a certificate need of it."""

    model: Model
    target: Model  # the network whose weights are generated
    tasks: int  # T
    universal: bool  # one network for all tasks
    size: int  # N
    boxes: Boxes
    tight: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]  # of one task: the tightest known, [N] each
    begin: Callable[[Params, jax.Array, jax.Array], Params]  # (generator, task, task before): before its first step
    keep: Callable[[Params, Params, jax.Array], Params]  # (generator, that before a step, task): the others' own parts
    network: Callable[[Params, jax.Array], Params]  # (params, weights [N, ...]) -> parameters of the target
    layer: Callable[[Params, jax.Array], Layer] | None = None  # (generator, task), where weights depend on each other
    enclosed: Callable[[Params, jax.Array], Interval] | None = None  # (generator, task), rounded outward


def make(
    target: Model,
    generator: Callable[[Key], Params],
    axes: Any,
    tasks: int,
    universal: bool,
    fixed: Sequence[str] = (),
    **functions: Callable[..., Any],
) -> Boxed:
    """Returns the model of a generator.

    Args:
      target: the network.
      generator: key -> parameters of the generator.
      axes: of these.
      tasks: T.
      universal: whether one network serves all tasks.
      fixed: patterns of the target's parameters that have no boxes.
      **functions: `boxes`, `tight`, `begin`, `keep` and perhaps `layer` and `enclosed` of `Boxed`.

    Raises:
      UserError: T below 1, or parameters of the target that are not float32.
    """
    if tasks < 1:
        raise UserError(f"config.adapter.tasks={tasks}: must be at least 1")
    shapes = jax.eval_shape(free(target, fixed), jax.eval_shape(lambda: jax.random.key(0)))
    for leaf in jax.tree.leaves(shapes):
        if leaf.dtype != jnp.float32:
            raise UserError(f"config.model: has parameters of {leaf.dtype}; boxes are of float32 weights")
    size, unravel = raveling(shapes)
    rows = 1 if universal else tasks

    def init(key: Key) -> Params:
        infinite = jnp.full((rows, size), jnp.inf, jnp.float32)
        known = {"lower": -infinite, "upper": infinite, "done": jnp.zeros(tasks), "current": jnp.zeros(())}
        return {"generator": generator(key), "fixed": _parted(target.init(key), fixed)[1], LEDGER: known}

    def network(params: Params, weights: jax.Array) -> Params:
        return frozen.join(unravel(weights), params.get("fixed", {}))

    def apply(params: Params, batch: Batch, cache: Any = None) -> Output:
        output = target.apply(deployed(made, params, batch.task[0]), batch, cache)
        # Rows of several tasks have no common network: nothing is better than a wrong number.
        one = jnp.all(batch.task == batch.task[0]) | jnp.asarray(universal)
        return output._replace(hidden=jnp.where(one, output.hidden, jnp.nan))

    known = {"lower": (None, "mlp"), "upper": (None, "mlp"), "done": (None,), "current": ()}
    model = Model(init, apply, {"generator": axes, "fixed": _parted(target.axes, fixed)[1], LEDGER: known})
    made = Boxed(model, target, tasks, universal, size, network=network, **functions)
    return made


def free(target: Model, fixed: Sequence[str]) -> Callable[[Key], Params]:
    """Returns the function from a key to the parameters of the target that boxes are made of.

    Raises:
      UserError: a pattern that matches nothing or is none, or nothing is left.
    """
    try:
        frozen.check(target, fixed)
    except UserError as error:
        raise UserError(str(error).replace("config.optim.frozen", "config.adapter.fixed")) from None
    return lambda key: _parted(target.init(key), fixed)[0]


def check_target(target: Model, example: Batch) -> None:
    """Refuses a network whose logits of a row depend on other rows, as `jaxcl.models.interval.check_rows` does.

    The makers of boxes see no rows; methods of boxes and certificates call this as soon as they know what rows are.

    Args:
      target: the network.
      example: rows, or their shapes; two of such shapes are drawn.

    Raises:
      UserError: rows are mixed, such as by a normalisation with the statistics of the batch.
    """
    rows = jax.tree.map(lambda x: jnp.ones((2, *x.shape[1:]), x.dtype), example)
    if jnp.issubdtype(rows.inputs.dtype, jnp.floating):
        drawn = jax.random.normal(jax.random.key(1), rows.inputs.shape, rows.inputs.dtype)
        rows = dataclasses.replace(rows, inputs=drawn)
    check_rows(target, target.init(jax.random.key(0)), rows)


def _parted(tree: Any, fixed: Sequence[str]) -> tuple[Any, Any]:
    return frozen.split(tree, fixed)


def raveling(shapes: Any) -> tuple[int, Callable[[jax.Array], Params]]:
    """Returns N, and the function from [N, ...] to a tree of these shapes, in flattening order."""
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [math.prod(leaf.shape) for leaf in leaves]

    def unravel(vector: jax.Array) -> Params:
        parts, begin = [], 0
        for leaf, count in zip(leaves, sizes, strict=True):
            parts.append(jax.lax.slice_in_dim(vector, begin, begin + count).reshape(leaf.shape + vector.shape[1:]))
            begin += count
        return jax.tree.unflatten(structure, parts)

    return sum(sizes), unravel


def ravel(params: Params) -> jax.Array:
    """Returns the leaves as one vector [N], in flattening order."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])


def limits(boxed: Boxed, params: Params, task: jax.Array) -> Interval:
    """Returns what the ledger leaves to a task, float32 [N]: infinite where nothing was promised.

    Raises:
      UserError: the parameters are of another model. Shapes tell, so that it is noticed under jit as well.
    """
    check_ledger(boxed, params)
    ledger = params[LEDGER]
    row = 0 if boxed.universal else task
    return Interval(ledger["lower"][row], ledger["upper"][row])


def shown(boxed: Boxed, params: Params, task: jax.Array) -> jax.Array:
    """Returns the task whose embedding makes the network: the current one if one network serves all tasks."""
    return params[LEDGER]["current"].astype(jnp.int32) if boxed.universal else task


def check_ledger(boxed: Boxed, params: Params) -> None:
    """Raises UserError for a ledger of another number of weights or of tasks."""
    ends = (1 if boxed.universal else boxed.tasks, boxed.size)
    for name, wanted in {"lower": ends, "upper": ends, "done": (boxed.tasks,)}.items():
        if (found := jnp.shape(params[LEDGER][name])) != wanted:
            raise UserError(
                f"params: the ledger is of another network or other tasks: {LEDGER}/{name} has the shape {found}, and "
                f"this model of {boxed.size:,} weights and {boxed.tasks} tasks has {wanted}; make the model with the "
                "options of the run that they are from, or take the parameters of its own init"
            )


def check_task(tasks: int, task: jax.Array) -> None:
    """Raises UserError for a number that no task of T has. Under jit it is not known, and nothing is raised."""
    if not isinstance(task, Tracer) and not 0 <= int(task) < tasks:
        raise UserError(f"task={int(task)}: there is no such task; give one of 0 .. {tasks - 1}")


def point(boxed: Boxed, params: Params, task: jax.Array) -> jax.Array:
    """Returns the weights of the deployed network, float32 [N]."""
    own, where = shown(boxed, params, task)[None], limits(boxed, params, task)
    centre, _ = boxed.boxes(params["generator"], own, jnp.zeros(1))
    return inside(centre[0], where)


def deployed(boxed: Boxed, params: Params, task: jax.Array) -> Params:
    """Returns the parameters of the deployed network of a task; nan if there is no such task."""
    known = ((task >= 0) & (task < boxed.tasks)) | jnp.asarray(boxed.universal)  # else that of the nearest task
    return boxed.network(params, jnp.where(known, point(boxed, params, task), jnp.nan))


def box(boxed: Boxed, params: Params, task: jax.Array, *, tight: bool = False) -> Interval:
    """Returns the box of a task as it is now, clipped into the ledger, float32 [N]; it holds the deployed network.

    Args:
      boxed: the model.
      params: of it.
      task: int32 [].
      tight: whether by affine forms, which are inside the bounds of interval arithmetic.

    Raises:
      UserError: parameters of another model; there is no such task. Under jit that is not noticed: the box is then
        that of another one.
    """
    check_task(boxed.tasks, task)
    where, own, generator = limits(boxed, params, task), shown(boxed, params, task), params["generator"]
    centre, radius = boxed.boxes(generator, jnp.stack([own, own]), jnp.array([1.0, 0.0]))
    found = boxed.tight(generator, own) if tight else (centre[0], radius[0])
    return around(*found, inside(centre[1], where), where)


def around(centre: jax.Array, radius: jax.Array, held: jax.Array, where: Interval) -> Interval:
    """Returns centre -+ radius clipped into a box, [N], in which `held` stays whatever the rounding."""
    lower, upper = inside(centre - radius, where), inside(centre + radius, where)
    return Interval(jnp.minimum(lower, held), jnp.maximum(upper, held))


def close(boxed: Boxed, params: Params, task: jax.Array, *, tight: bool = True) -> Params:
    """Returns the parameters with the present box of a task in the ledger. A task that is over stays as it was.

    Raises:
      UserError: parameters of another model; there is no such task. Under jit that is not noticed.
    """
    ledger, found = params[LEDGER], box(boxed, params, task, tight=tight)
    row = 0 if boxed.universal else task
    # A second pass over a task may not widen what was promised, and need not narrow it: clipping keeps it inside.
    again = (ledger["done"][task] > 0) & ~jnp.asarray(boxed.universal)
    lower, upper = (jnp.where(again, ledger[end][row], getattr(found, end)) for end in ("lower", "upper"))
    new = {
        "lower": ledger["lower"].at[row].set(lower),
        "upper": ledger["upper"].at[row].set(upper),
        "done": ledger["done"].at[task].set(1.0),
        "current": ledger["current"],
    }
    return {**params, LEDGER: new}


def over(params: Params, task: jax.Array) -> Params:
    """Returns the parameters with a task noted as over, and nothing promised for it.

    Raises:
      UserError: there is no such task. Under jit it is not noticed.
    """
    check_task(params[LEDGER]["done"].size, task)
    return {**params, LEDGER: {**params[LEDGER], "done": params[LEDGER]["done"].at[task].set(1.0)}}


def logits(boxed: Boxed, params: Params, box: Interval, batch: Batch, *, outward: bool = False) -> Interval:
    """Returns bounds of the logits of every network in a box [N], float32 [B, V].

    Raises:
      UserError: the network mixes rows, see `check_target`. Under jit it is not looked at.
    """
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, box, batch))):
        check_target(boxed.target, batch)
    bare = {**params, "fixed": {}}
    ends = jax.tree.map(Interval, boxed.network(bare, box.lower), boxed.network(bare, box.upper))
    ends = frozen.join(ends, params.get("fixed", {}))
    return bounds(lambda params, rows: boxed.target.apply(params, rows).logits, outward=outward)(ends, batch)


def worst(logits: Interval, batch: Batch) -> jax.Array:
    """Returns the least logits of the targets and the greatest of all others, [B, V]."""
    own = batch.targets[..., None] == jnp.arange(logits.lower.shape[-1])[None]
    return jnp.where(own, logits.lower, logits.upper)


def certain(logits: Interval, batch: Batch) -> jax.Array:
    """Returns the rows that all networks of a box get right, bool [B]: the target's least logit beats all others."""
    own = batch.targets[:, None] == jnp.arange(logits.lower.shape[-1])[None]
    others = jnp.max(jnp.where(own, -jnp.inf, logits.upper), axis=-1)
    return jnp.max(jnp.where(own, logits.lower, -jnp.inf), axis=-1) > others  # never of a class that is not there


def zonotope(boxed: Boxed, params: Params, task: jax.Array) -> Zonotope:
    """Returns all networks that the generator makes of the embedding of a task, without the ledger.

    Where `Boxed.layer` is. The layers before the last are computed to nearest. The box beside them is `Boxed.tight`:
    that of `box` is clipped into the ledger, and need not hold a single one of these networks.

    Raises:
      UserError: parameters of another model; there is no such task. Under jit that is not noticed.
    """
    check_task(boxed.tasks, task)
    check_ledger(boxed, params)
    own, generator = shown(boxed, params, task), params["generator"]
    assert boxed.layer
    weight, bias, centre, generators = boxed.layer(generator, own)
    middle, mass = products.affine(weight, bias, centre[None], jnp.sum(jnp.abs(generators), axis=0)[None])
    near, radius = boxed.tight(generator, own)
    ends = Interval(near - radius, near + radius)
    return Zonotope(generators, middle[0], products.row_sums(weight, generators), mass[0], ends)


def together(boxed: Boxed, params: Params, task: jax.Array, found: Zonotope, batch: Batch) -> jax.Array:
    """Returns the rows that all networks of a zonotope get right, bool [B], by affine forms through the target.

    These are networks of the generator, which the ledger does not hold: they need not be those of `box`, nor the one
    that is deployed. Bounded is the difference of two logits, in which what they share cancels. Rounded outward.
    Memory: K numbers for every activation of the batch; compute: about 2 K forward passes.

    Args:
      boxed: the model.
      params: of it.
      task: int32 [].
      found: `zonotope` of these.
      batch: rows of the task.
    """
    assert boxed.layer
    slope = boxed.layer(params["generator"], shown(boxed, params, task)).weight
    bare = {**params, "fixed": {}}
    parts = (found.centre, slope, found.reach, found.mass, *found.ends)
    trees = [boxed.network(bare, part) for part in parts]
    symbols = len(found.generators)

    def form(centre: Any, slope: Any, reach: Any, mass: Any, lower: Any, upper: Any) -> Form:
        return Form.of(centre, slope, reach, mass, Interval(lower, upper), symbols)

    forms = jax.tree.map(form, *trees)

    def margins(params: Params, rows: Batch) -> jax.Array:
        logits = boxed.target.apply(params, rows).logits
        return jnp.take_along_axis(logits, rows.targets[:, None], axis=-1) - logits  # [B, V]

    joined = frozen.join(forms, params.get("fixed", {}))
    least = affine_bounds(margins, found.generators)(joined, batch).lower
    return jnp.all((least > 0) | (batch.targets[:, None] == jnp.arange(least.shape[-1])[None]), axis=-1)


@jax.custom_vjp
def _inside(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.maximum(x, lower), upper)


def _inside_forward(x: jax.Array, lower: jax.Array, upper: jax.Array) -> tuple[jax.Array, Any]:
    return _inside(x, lower, upper), (x, lower, upper)


def _inside_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    x, lower, upper = kept
    return jnp.where(((x > upper) & (g < 0)) | ((x < lower) & (g > 0)), 0, g), None, None


_inside.defvjp(_inside_forward, _inside_backward)


def inside(x: jax.Array, where: Interval) -> jax.Array:
    """Returns the nearest point of a box.

    What lies outside has a gradient only if a step against it leads back: a clipped weight can return, and is not
    driven further away.
    """
    return _inside(x, where.lower, where.upper)
