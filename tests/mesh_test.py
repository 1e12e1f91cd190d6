"""Meshes, shardings of whole states, and rows that reach the device that asked for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl import mesh as meshes
from jaxcl import optim, tree
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

AXES = {"embed": ("vocab", "embed"), "layers": {"norm": ("layers", None), "up": ("layers", "embed", "mlp")}}
SHAPES = {"embed": (32, 8), "layers": {"norm": (3, 8), "up": (3, 8, 16)}}
TASKS = 5


def make_params():
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def make_state(frozen=()):
    params = make_params()
    memory = {
        "ewc": {"anchor": params, "fisher": jax.tree.map(lambda p: jnp.stack([p] * TASKS), params)},
        "er": {"rows": {"inputs": jnp.zeros((48, 6), jnp.int32), "odd": jnp.zeros((7,))}, "count": jnp.zeros(())},
        "other": {"up": jnp.zeros((3, 3))},
    }
    return TrainState(jnp.zeros((), jnp.int32), params, optim.make(lr=1e-3, frozen=frozen).init(params), memory)


def test_a_mesh_always_has_all_axes_and_fills_the_open_one():
    mesh = meshes.make(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "context": 1, "expert": 1}
    assert meshes.make(data=1, fsdp=-1).shape["fsdp"] == 8
    assert meshes.make(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 3}, r"fsdp=3.*devices, which is 8"),
        ({"data": 2, "fsdp": 2}, r"data=2 x fsdp=2.*multiply to.*8"),
        ({"fsdp": -1}, "only one axis"),
        ({"fsdp": 0}, "positive"),
        ({"fsdp": 16}, "8"),
    ],
)
def test_an_impossible_mesh_names_the_sizes_and_the_devices(sizes, words):
    with pytest.raises(UserError, match=words):
        meshes.make(**sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1},
        {"data": 1, "tensor": 3},
        {"tensor": 3},
        {"data": 2, "fsdp": 2},
        {"fsdp": 16},
        {"tensor": 16},
        {"expert": 6},
    ],
)
def test_the_remedy_of_an_impossible_mesh_is_one(sizes):
    with pytest.raises(UserError) as error:
        meshes.make(**sizes)
    axis, size = re.search(r"e\.g\. --config\.mesh\.(\w+)=(-?\d+)$", str(error.value)).groups()
    assert meshes.make(**sizes | {axis: int(size)}).size == 8


def test_a_mesh_that_takes_two_changes_says_what_its_sizes_must_be():
    with pytest.raises(UserError, match="use divisors of 8, and -1 for one of them"):
        meshes.make(fsdp=3, tensor=5)


def test_state_follows_its_parameters():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    state = jax.eval_shape(make_state)
    specs = {name: s.spec for name, s in tree.named_leaves(meshes.state_shardings(mesh, AXES, state))}
    assert specs["params/embed"] == P("tensor", "fsdp")
    assert specs["params/layers/up"] == P(None, "fsdp", "tensor")
    assert specs["params/layers/norm"] == P(None, None)
    assert specs["memory/ewc/anchor/layers/up"] == P(None, "fsdp", "tensor")
    assert specs["memory/ewc/fisher/layers/up"] == P(None, None, "fsdp", "tensor")
    assert specs["memory/er/rows/inputs"] == P(("data", "fsdp"))
    assert specs["memory/er/rows/odd"] == P()
    assert specs["memory/other/up"] == specs["step"] == specs["memory/er/count"] == P()
    moments = [name for name in specs if name.endswith(("mu/embed", "nu/embed"))]
    assert len(moments) == 2
    assert all(specs[name] == P("tensor", "fsdp") for name in moments)


def test_moments_follow_with_frozen_parameters_too():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    state = jax.eval_shape(lambda: make_state(frozen=("norm",)))
    specs = {name: s.spec for name, s in tree.named_leaves(meshes.state_shardings(mesh, AXES, state))}
    assert [specs[n] for n in specs if n.endswith("mu/layers/up")] == [P(None, "fsdp", "tensor")]


def test_rules_can_be_changed_and_are_checked():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    assert meshes.spec(mesh, ("vocab", "embed"), (32, 8), {**meshes.RULES, "embed": ("data", "fsdp")}) == P(
        "tensor", ("data", "fsdp")
    )
    with pytest.raises(UserError, match="'embed' and 'embed' are both cut over the mesh axis 'fsdp'"):
        meshes.spec(mesh, ("embed", "embed"), (8, 8))
    with pytest.raises(UserError, match="did you mean 'embed'"):
        meshes.spec(mesh, ("embedd",), (8,))
    with pytest.raises(UserError, match="no such mesh axis"):
        meshes.spec(mesh, ("embed",), (8,), {"embed": "fdsp"})
    with pytest.raises(UserError, match="do not fit the shape"):
        meshes.spec(mesh, ("embed",), (8, 8))


def test_what_does_not_divide_is_copied_and_explained():
    mesh = meshes.make(data=1, fsdp=2, tensor=4)
    assert meshes.spec(mesh, ("embed", "kv_heads", "head"), (6, 1, 8)) == P("fsdp", None, None)
    lines = meshes.explain(mesh, {"a": {"k": ("embed", "kv_heads", None)}}, {"a": {"k": jnp.zeros((6, 1, 8))}})
    assert lines == ["a/k: dimension 1 (kv_heads) of size 1 is not divisible by tensor=4; cut over nothing"]
    both = {"x": ("data", "fsdp")}
    assert meshes.spec(meshes.make(data=2, fsdp=4), ("x",), (6,), both) == P("data")


def test_bytes_on_each_device():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    state = jax.eval_shape(make_state)
    shardings = meshes.state_shardings(mesh, AXES, state)
    assert meshes.device_bytes(state.params, shardings.params) == 4 * (32 * 8 // 4 + 3 * 8 + 3 * 8 * 16 // 4)


def numpy_batch(start, stop):
    rows = np.arange(start, stop)
    column = np.repeat(rows[:, None], 3, 1).astype(np.int32)
    return Batch(column, column, column.astype(np.float32), column, column, rows.astype(np.int32), {"x": column})


def test_placed_rows_equal_the_host_rows_and_each_piece_is_read_once():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    asked = []

    def read(part):
        asked.append((part.start, part.stop))
        return numpy_batch(part.start, part.stop)

    batch = meshes.place(mesh, read, rows=16)
    assert sorted(asked) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    whole = numpy_batch(0, 16)
    jax.tree.map(np.testing.assert_array_equal, batch, whole)
    jax.tree.map(np.testing.assert_array_equal, meshes.place(mesh, whole), whole)
    assert batch.inputs.sharding.is_equivalent_to(meshes.batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in batch.inputs.addressable_shards} == {(4, 3)}


def test_stacked_batches_are_cut_along_their_rows():
    mesh = meshes.make(fsdp=2)
    stacked = {"x": np.arange(5 * 16 * 3).reshape(5, 16, 3), "y": np.arange(80).reshape(5, 16)}
    placed = meshes.place(mesh, stacked, axis=1)
    jax.tree.map(np.testing.assert_array_equal, placed, stacked)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(5, 2, 3)}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="batch_size=12: not divisible by the 8 shards"):
        meshes.place(meshes.make(), numpy_batch(0, 12))


def test_fetch_returns_numbers():
    mesh = meshes.make()
    value = jax.jit(lambda: {"loss": jnp.float32(3)}, out_shardings=meshes.replicated(mesh))()
    assert meshes.fetch(value) == {"loss": np.float32(3)}


def train_step(tx):
    def loss(params, x):
        hidden = params["embed"][x].sum(1)
        for i in range(3):
            hidden = hidden + jnp.tanh(hidden * params["layers"]["norm"][i][None]) @ params["layers"]["up"][i][:, :8]
        return (hidden @ params["embed"].T).var()

    def step(state, x):
        value, grads = jax.value_and_grad(loss)(state.params, x)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.memory), value

    return step


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_step_is_the_same_on_every_mesh(sizes):
    tokens = np.random.default_rng(0).integers(0, 32, (16, 4))
    step = train_step(optim.make(lr=1e-2))
    want_state, want = jax.jit(step)(make_state(), jnp.asarray(tokens))
    mesh = meshes.make(**sizes)
    shardings = meshes.state_shardings(mesh, AXES, jax.eval_shape(make_state))
    state = jax.jit(make_state, out_shardings=shardings)()
    batch = meshes.place(mesh, tokens)
    jitted = jax.jit(step, out_shardings=(shardings, meshes.replicated(mesh)), donate_argnums=0)
    state, value = jitted(state, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state.params, want_state.params)


def test_lowers_for_256_chips_that_are_not_here():
    mesh = meshes.abstract(256, fsdp=16, tensor=4)
    assert mesh.shape["data"] == 4
    state = jax.eval_shape(make_state)
    shardings = meshes.state_shardings(mesh, AXES, state)
    rows = jax.ShapeDtypeStruct((256, 4), jnp.int32, sharding=meshes.batch_sharding(mesh))
    step = jax.jit(train_step(optim.make(lr=1e-2)), out_shardings=(shardings, meshes.replicated(mesh)))
    text = step.trace(meshes.with_shardings(state, shardings), rows).lower(lowering_platforms=("tpu",)).as_text()
    assert "num_partitions = 256" in text
