"""Boxes and generators through a wide last layer: every form against float64, nothing of the layer's size formed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_aot_test import compiled, missing
from jax.test_util import check_grads
from vocabulary_kernels_test import close, draw, wide

from jaxcl.kernels import boxes
from jaxcl.kernels.boxes import blocks, reference, tpu

SIZES = [(1, 300, 75), (5, 300, 130), (3, 256, 127), (2, 37, 5), (20, 200, 24)]  # T, N, K: ragged for all tiles but one
ROOM = 4 * 130 * 64  # two blocks or more of 64 rows and up, and what is left over
DECAYS = (0.9, 0.99)


def forms(name):
    """Returns form -> (the function, its backward pass), each taking arrays alone."""
    tiles = {"rows": 128, "interpret": True}
    found = {}
    for form, module, options in (("reference", reference, {}), ("tpu", tpu, tiles)):
        found[form] = [functools.partial(getattr(module, f"{name}{end}"), **options) for end in ("", "_backward")]
    found["blocks"] = [functools.partial(getattr(blocks, f"{name}{end}"), ROOM) for end in ("", "_backward")]
    return found


def layer(rows, width):
    """Returns V [N, K] with zeros: single ones, a row, a column."""
    weight = np.array(draw(rows, width, seed=1))
    weight[::7, ::3] = 0
    weight[rows - 1], weight[:, width - 1] = 0, 0
    return jnp.asarray(weight)


def problem(count, rows, width):
    """Returns the operands of `affine` and cotangents of its results."""
    operands = layer(rows, width), draw(rows, seed=2), draw(count, width, seed=3), abs(draw(count, width, seed=4))
    return operands, (draw(count, rows, seed=5), draw(count, rows, seed=6))


def affine64(weight, bias, centre, radius, d_centre, d_radius):
    """Returns the results and the cotangents of all operands; bounds are sums of the least and largest terms."""
    weight, bias, centre, radius, d_centre, d_radius = wide(weight, bias, centre, radius, d_centre, d_radius)
    ends = [weight[None] * (centre + sign * radius)[:, None] for sign in (-1, 1)]  # [T, N, K]
    low, high = np.minimum(*ends).sum(-1) + bias, np.maximum(*ends).sum(-1) + bias
    sign = (weight > 0) * 1.0 - (weight < 0)
    d_weight = np.einsum("tn,tk->nk", d_centre, centre) + sign * np.einsum("tn,tk->nk", d_radius, radius)
    of_centre, of_radius = np.einsum("tn,nk->tk", d_centre, weight), np.einsum("tn,nk->tk", d_radius, weight * sign)
    return ((high + low) / 2, (high - low) / 2), (d_weight, d_centre.sum(0), of_centre, of_radius)


def row_sums64(weight, generators, d_sums):
    """Returns the sums and the cotangents of both operands."""
    weight, generators, d_sums = wide(weight, generators, d_sums)
    moved = np.einsum("nk,sk->ns", weight, generators)
    d = np.where(moved > 0, 1.0, np.where(moved < 0, -1.0, 0.0)) * d_sums[:, None]
    return np.abs(moved).sum(1), (d @ generators, d.T @ weight)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["reference", "blocks", "tpu"])
def test_boxes_agree_with_sums_of_extremes_in_float64(form, size):
    forward, backward = forms("affine")[form]
    operands, cotangents = problem(*size)

    @jax.jit
    def run(operands, cotangents):
        return forward(*operands), backward(operands[0], *operands[2:], *cotangents)

    got, want = run(operands, cotangents), affine64(*operands, *cotangents)
    close(got[0], want[0], 1e-5)
    close(got[1], want[1], 1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(operands, cotangents)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["reference", "blocks", "tpu"])
def test_sums_of_generators_agree_with_float64(form, size):
    forward, backward = forms("row_sums")[form]
    (weight, _, generators, _), (d_sums, _) = problem(*size)
    got = jax.jit(lambda *x: (forward(*x[:2]), backward(*x)))(weight, generators, d_sums[0])
    want = row_sums64(weight, generators, d_sums[0])
    close([got[0]], [want[0]], 1e-5)
    close(got[1], want[1], 1e-5)


def numbers(lr, count, eps):
    return jnp.asarray([lr, *DECAYS, eps, *(1 - b ** (count + 1) for b in DECAYS)], jnp.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["reference", "blocks", "tpu"])
def test_an_update_is_a_step_of_adam_with_the_gradient_formed(form, size):
    rooms = {"reference": (reference, ()), "blocks": (blocks, (ROOM,)), "tpu": (tpu, ())}
    module, room = rooms[form]
    options = {"rows": 128, "interpret": True} if form == "tpu" else {}
    step = jax.jit(functools.partial(module.update, *room, **options))
    operands, _ = problem(*size)
    lr, eps, tx = 0.1, 1e-3, optax.adam(0.1, *DECAYS, eps=1e-3)
    adam = jax.jit(tx.update)
    state, weight = tx.init(operands[0]), operands[0]
    own = weight, jnp.zeros_like(weight), jnp.zeros_like(weight)
    for count in range(3):
        cotangents = draw(*size[:2], seed=20 + count), draw(*size[:2], seed=30 + count)
        d_weight = affine64(weight, *operands[1:], *cotangents)[1][0]
        change, state = adam(jnp.asarray(d_weight, jnp.float32), state)
        own = step(*own, *operands[2:], *cotangents, numbers(lr, count, eps))
        weight = optax.apply_updates(weight, change)
        close(own, (weight, state[0].mu, state[0].nu), 1e-5)
        own = (weight, *own[1:])  # the sign of a weight that a rounding carries over zero is another one


def test_an_update_counts_its_steps_like_optax():
    operands, cotangents = problem(2, 70, 9)
    weight = operands[0]
    tx, schedule = optax.adam(0.01, 0.8, 0.95, eps=1e-4), jnp.float32(0.01)
    first, second = draw(70, 9, seed=8), draw(70, 9, seed=9) ** 2
    state = (optax.ScaleByAdamState(jnp.int32(6), first, second), optax.EmptyState())
    d_weight = reference.affine_backward(weight, *operands[2:], *cotangents)[0]
    change, state = jax.jit(tx.update)(d_weight, state, weight)
    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-4}

    def step(lr, count):
        return boxes.update(weight, first, second, *operands[2:], *cotangents, lr=lr, count=count, **options)

    want = optax.apply_updates(weight, change), state[0].mu, state[0].nu
    close(jax.jit(step)(schedule, jnp.int32(6)), want, 1e-6)
    close(step(0.01, 6), want, 1e-6)


def test_derivatives_are_those_of_differences():
    rows, width, count = 21, 6, 3
    sign = np.where(np.arange(rows) % 2, 1, -1)[:, None]
    weight = jnp.asarray(sign * np.random.default_rng(0).uniform(0.5, 1.5, (rows, width)), jnp.float32)
    x = weight, draw(rows), draw(count, width, seed=1), abs(draw(count, width, seed=2)) + 0.5
    affine, sums = (jax.jit(f) for f in (boxes.affine, boxes.row_sums))
    check_grads(affine, x, 1, ["rev"], atol=2e-2, rtol=2e-2, eps=0.05)
    check_grads(sums, (weight, x[3]), 1, ["rev"], 2e-2, 2e-2, 0.05)
    # A symmetric difference of |x| at 0 is 0, as sign(0) is.
    zero = weight.at[4].set(0)
    check_grads(lambda w: affine(w, *x[1:]), (zero,), 1, ["rev"], atol=2e-2, rtol=2e-2, eps=0.05)
    check_grads(lambda w: sums(w, x[3]), (zero,), 1, ["rev"], 2e-2, 2e-2, 0.05)


def arrays(jaxpr):
    """Yields the shape of every array that is formed, in loops and kernels too."""
    for eqn in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # noqa: PLW2901
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


def specs(count, rows, width):
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return of((rows, width)), of((rows,)), of((count, width)), of((count, width))


def test_nothing_of_the_size_of_the_layer_is_formed_for_its_results():
    count, rows, width = 5, 40_000, 96
    x = specs(count, rows, width)
    cpu, pallas = functools.partial(blocks.affine, blocks.CACHE), tpu.affine
    for function, operands in (
        (cpu, x),
        (pallas, x),
        (functools.partial(blocks.row_sums, blocks.CACHE), (x[0], x[2])),
        (tpu.row_sums, (x[0], x[2])),
    ):
        large = {s for s in arrays(jax.make_jaxpr(function)(*operands).jaxpr) if math.prod(s) >= rows * width / 10}
        view = {(width, rows)} if function in (tpu.affine, tpu.row_sums) else set()  # V^T, as the layer lies there
        assert large == view
    assert max(map(math.prod, arrays(jax.make_jaxpr(reference.affine)(*x).jaxpr))) == rows * width
    generators = specs(100, rows, width)[2]
    made = set(arrays(jax.make_jaxpr(functools.partial(blocks.row_sums, blocks.CACHE))(x[0], generators).jaxpr))
    assert not {(rows, 100), (100, rows)} & made


def temporary(function, *x, donate=()):
    done = jax.jit(function, donate_argnums=donate).lower(*x).compile().memory_analysis()
    return done.temp_size_in_bytes, done.alias_size_in_bytes, done.output_size_in_bytes


def test_programs_for_a_cpu_hold_no_copy_of_the_layer():
    count, rows, width = 5, 40_000, 96
    size, x = 4 * rows * width, specs(count, rows, width)
    of_box = jax.ShapeDtypeStruct((count, rows), jnp.float32)

    def pull(function, operands, cotangents):
        return jax.vjp(function, *operands)[1](cotangents)

    assert temporary(boxes.affine, *x)[0] < size / 5
    used, _, out = temporary(functools.partial(pull, boxes.affine), x, (of_box, of_box))
    assert used < size / 5
    assert out < 1.1 * size  # the gradient
    generators = specs(100, rows, width)[2]
    assert temporary(functools.partial(pull, boxes.row_sums), (x[0], generators), x[1])[0] < size / 5
    whole = functools.partial(reference.affine_backward)
    assert temporary(whole, x[0], x[2], x[3], of_box, of_box)[0] > size / 5
    assert updated(x, of_box)[1] >= 3 * size


def test_the_update_of_the_layer_needs_no_memory_of_its_own():
    count, rows, width = 5, 40_000, 96
    used, _ = updated(specs(count, rows, width), jax.ShapeDtypeStruct((count, rows), jnp.float32))
    assert used < 4 * rows * width / 100


def updated(x, of_box):
    """Returns the bytes of temporaries and of aliases of an update that is given weights and moments."""
    step = functools.partial(boxes.update, lr=0.1, count=0)
    return temporary(step, x[0], x[0], x[0], x[2], x[3], of_box, of_box, donate=(0, 1, 2))[:2]


def loss(kernel, weight, bias, centre, radius):
    middle, half = boxes.affine(weight, bias, centre, radius, kernel=kernel)
    return jnp.sum(middle**2) + jnp.sum(half * boxes.row_sums(weight, centre, kernel=kernel)[None])


def calls(function, *x, platform="tpu"):
    return jax.jit(function).trace(*x).lower(lowering_platforms=(platform,)).as_text().count("@tpu_custom_call")


def step_of(kernel, *x):
    """A step that calls all kernels: a gradient and an update."""
    value, grads = jax.value_and_grad(functools.partial(loss, kernel), (0, 1, 2, 3))(*x)
    d = boxes.affine(*x, kernel=False)
    return value, grads, boxes.update(x[0], x[0], x[0], x[2], x[3], *d, lr=0.1, count=3, kernel=kernel)


def test_the_platform_of_the_lowered_program_decides():
    x = problem(3, 300, 75)[0]
    for kernel, count in ((True, 5), (False, 0), (None, 0)):
        step = functools.partial(step_of, kernel)
        assert calls(step, *x) == count
        assert calls(step, *x, platform="cpu") == calls(step, *x, platform="cuda") == 0
    assert calls(functools.partial(step_of, True), *problem(3, 8, 128)[0]) == 0
    assert calls(functools.partial(step_of, True), *problem(3, 8, tpu.WIDEST + 1)[0]) == 0
    assert calls(functools.partial(step_of, True), *problem(tpu.MOST + 1, 8, 5)[0]) == 0


def test_kernels_at_their_limits_are_lowered():
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    assert tpu.default_rows(tpu.WIDEST) == 128
    assert tpu.default_rows(100) == 1024
    for count, rows, width in ((10, 475_202, 75), (1, 2_036_010, 200), (tpu.MOST, 1000, tpu.WIDEST)):
        x = of((rows, width)), of((rows,)), of((count, width)), of((count, width))
        assert calls(functools.partial(step_of, True), *x) == 5


def test_a_mesh_decides_which_form_is_used():
    x = problem(3, 320, 75)[0]
    auto = (jax.sharding.AxisType.Auto,)
    one, four = (jax.make_mesh((n,), ("data",), axis_types=auto, devices=jax.devices()[:n]) for n in (1, 4))
    step = functools.partial(step_of, None)
    with jax.set_mesh(one):
        assert calls(step, *x) == 5
    with jax.set_mesh(four):
        assert calls(step, *x) == 0
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    across = jax.sharding.PartitionSpec(None, "data")
    cut = functools.partial(jax.shard_map, mesh=four, in_specs=(rows, rows, whole, whole), out_specs=(across, across))
    assert calls(cut(boxes.affine, check_vma=False), *x) == 1
    want = affine64(*x, *boxes.affine(*x))[0]
    close(jax.jit(cut(boxes.affine, check_vma=False))(*x), want, 1e-5)
    with pytest.raises(ValueError, match=r"check_vma=False"):
        jax.jit(cut(boxes.affine))(*x)
    # A program that the compiler cuts has no loop over rows, which would gather them.
    x = problem(3, 8192, 75)[0]  # several blocks
    want = affine64(*x, *boxes.affine(*x))[0]
    place = functools.partial(jax.sharding.NamedSharding, four)
    held = [jax.device_put(a, place(s)) for a, s in zip(x, (rows, rows, whole, whole), strict=True)]
    with jax.set_mesh(four):
        done = jax.jit(boxes.affine).lower(*held).compile()
        close(done(*held), want, 1e-5)
    assert not [word for word in ("all-gather", "all-reduce", "while(") if word in done.as_text()]


def test_vmap_is_a_loop():
    operands, _ = problem(3, 140, 9)
    centres = draw(4, 3, 9, seed=7)

    def both(c):
        return boxes.affine(*operands[:2], c, operands[3]), boxes.row_sums(operands[0], c)

    looped = [jnp.stack(x) for x in zip(*(jax.tree.leaves(both(c)) for c in centres), strict=True)]
    close(jax.tree.leaves(jax.jit(jax.vmap(both))(centres)), looped, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": draw(30)}, r"weight \[30\] and centre \[2, 5\]: expected \[N, K\]"),
        ({"weight": draw(30, 4)}, r"weight \[30, 4\] and centre \[2, 5\]"),
        ({"weight": draw(0, 5)}, r"neither of them empty"),
        ({"centre": draw(0, 5), "radius": draw(0, 5)}, r"neither of them empty"),
        ({"radius": draw(1, 5)}, r"radius \[1, 5\] for centre \[2, 5\]"),
        ({"bias": draw(31)}, r"bias \[31\] for weight \[30, 5\]"),
        ({"centre": draw(2, 5).astype(jnp.bfloat16)}, r"centre bfloat16\[2, 5\]: expected float32"),
        ({"generators": draw(2, 4)}, r"weight \[30, 5\] and generators \[2, 4\]"),
        ({"d_radius": draw(2, 29)}, r"d_radius \[2, 29\]: expected \[2, 30\]"),
        ({"first": draw(30, 4)}, r"first \[30, 4\]: expected \[30, 5\]"),
        ({"b2": 1.0}, r"b2=1.0: expected numbers from 0 to less than 1"),
    ],
)
def test_bad_input_is_refused(change, message):
    (weight, bias, centre, radius), (d_centre, d_radius) = problem(2, 30, 5)
    x = {"weight": weight, "centre": centre, "radius": radius, "bias": bias} | change
    function = boxes.affine
    if "generators" in change:
        x, function = {"weight": weight, **change}, boxes.row_sums
    if {"d_radius", "first", "b2"} & change.keys():
        x = {"weight": weight, "first": weight, "second": weight, "centre": centre, "radius": radius}
        x |= {"d_centre": d_centre, "d_radius": d_radius, "lr": 0.1, "count": 0} | change
        function = boxes.update
    with pytest.raises(ValueError, match=message):
        function(**x)


SCRIPT = """
import json, jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxcl.kernels.boxes import tpu

chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])

def run(weight, first, second, bias, centre, radius, d_centre, d_radius, numbers, generators):
    out = tpu.affine(weight, bias, centre, radius), tpu.affine_backward(weight, centre, radius, d_centre, d_radius)
    sums = tpu.row_sums(weight, generators)
    return out, sums, tpu.row_sums_backward(weight, generators, sums)

found = []
for T, N, K, S in ((5, 475202, 100, 24), (1, 5000, 1170, 256)):
    f = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=chip)
    boxes = [f(T, K), f(T, K), f(T, N), f(T, N), f(6)]
    done = jax.jit(run).trace(*[f(N, K)] * 3, f(N), *boxes, f(S, K)).lower().compile()
    step = jax.jit(tpu.update, donate_argnums=(0, 1, 2)).trace(*[f(N, K)] * 3, *boxes).lower().compile()
    calls = [x.as_text().count('custom_call_target="tpu_custom_call"') for x in (done, step)]
    memory = step.memory_analysis()
    size = 4 * N * K
    found.append([*calls, memory.alias_size_in_bytes >= 3 * size, memory.temp_size_in_bytes < size / 4])
print(json.dumps(found))
"""


@pytest.mark.skipif(missing("libtpu"), reason="needs libtpu: pip install -e '.[aot]'")
def test_compiles_for_a_tpu_in_place():
    assert compiled(SCRIPT) == [[4, 1, True, True]] * 2
