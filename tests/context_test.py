"""Runs whose rows are cut along their length: the same losses and gradients, less memory, and clear refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxcl import grad, losses, plan, program, train
from jaxcl import mesh as meshes
from jaxcl.models import transformer
from jaxcl.schema import UserError
from jaxcl.types import Batch, TrainState

SHAPE = {"vocab": 48, "layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "mlp": 64, "max_length": 1024, "window": 9}
SHAPE |= {"window_layers": [True, False], "unroll": 1}


def rows(count=8, length=32):
    """Returns packed rows: documents that cross the cuts, positions that start anew in each, and padding."""
    rng = np.random.default_rng(1)
    ends = np.sort(rng.integers(1, length, (count, 2)), axis=1)
    segments = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(2)
    segments[0, -3:] = 0
    starts = np.where(np.diff(segments, axis=1, prepend=0) != 0, np.arange(length)[None], 0)
    positions = np.arange(length)[None] - np.maximum.accumulate(starts, axis=1)
    tokens = rng.integers(0, 48, (count, length + 1))
    weights = rng.random((count, length)) * (segments > 0)
    narrow = [x.astype(np.int32) for x in (tokens[:, :-1], tokens[:, 1:], segments, positions)]
    inputs, targets, segments, positions = narrow
    return Batch(inputs, targets, weights.astype(np.float32), segments, positions, np.zeros(count, np.int32))


def gradients(microbatches=1, **fields):
    """Returns the model, and the function from parameters and rows to the loss and its gradients."""
    model = transformer.make(**SHAPE | fields)

    def run(params, batch):
        cost = lambda p, b: {"loss": losses.cross_entropy(model.apply(p, b), b, z_loss=1e-3)}  # noqa: E731
        values, grads = grad.value_and_grad(cost, params, batch, microbatches)
        return grad.mean(*values["loss"]), grads

    return model, run


def lowered(sizes, batch, microbatches=1, **fields):
    """Returns the compiled gradients on a mesh, and what they are called with."""
    model, run = gradients(microbatches, **fields)
    mesh = meshes.make(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    params = model.init(jax.random.key(0))
    shardings = meshes.state_shardings(mesh, model.axes, TrainState(jnp.int32(0), params, ())).params
    places = (meshes.replicated(mesh), shardings)
    placed = jax.device_put(params, shardings), meshes.place(mesh, batch)
    return jax.jit(meshes.on(mesh, run), out_shardings=places).lower(*placed).compile(), placed


@pytest.fixture(scope="module")
def alone():
    model, run = gradients()
    return jax.device_get(jax.jit(run)(model.init(jax.random.key(0)), jax.tree.map(jnp.asarray, rows())))


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, 1),
        ({"data": 2, "context": 4}, 2),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_device(alone, sizes, microbatches):
    step, placed = lowered(sizes, rows(), microbatches)
    loss, grads = step(*placed)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, alone[1])
    shards = np.prod([sizes.get(axis, 1) for axis in meshes.BATCH])
    assert {x.data.shape for x in placed[1].inputs.addressable_shards} == {(8 // shards, 32 // sizes["context"])}


def test_activations_shrink_with_the_devices_and_only_keys_and_values_are_gathered():
    batch, fields = rows(2, 512), {"remat": "full"}
    made = {parts: lowered({"data": 1, "context": parts}, batch, **fields)[0] for parts in (1, 2, 4)}
    temporary = {parts: step.memory_analysis().temp_size_in_bytes for parts, step in made.items()}
    assert temporary[2] < 0.7 * temporary[1], temporary
    assert temporary[4] < 0.7 * temporary[2], temporary
    text = made[4].as_text()
    gathered = set(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text))
    assert gathered == {"2,512,2,8", "2,512"}, gathered  # keys and values; documents
    for kind in ("reduce-scatter", "collective-permute"):
        assert f" {kind}(" in text
    assert " all-to-all(" not in text


def test_squares_of_the_gradients_of_rows():
    """What the Fisher information is made of: rows one by one, each cut along its length."""
    model, batch = transformer.make(**SHAPE | {"layers": 1, "window_layers": None}), rows(4, 16)
    mesh = meshes.make(data=1, context=2, devices=jax.devices()[:2])

    def squares(params, batch):
        return grad.squares(lambda p, b: losses.cross_entropy(model.apply(p, b), b), params, batch, 2)

    params = model.init(jax.random.key(0))
    want = jax.jit(squares)(params, jax.tree.map(jnp.asarray, batch))
    got = jax.jit(meshes.on(mesh, squares))(jax.device_put(params, meshes.replicated(mesh)), meshes.place(mesh, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def settings(folder, **changes):
    """Returns a run of six steps with replayed rows."""
    made = small.config(folder, **{"method": "er(capacity=8, fraction=0.25)", "stream__steps": 2} | changes)
    return made | {"evaluation": {"every": 50, "rows": 8}, "checkpoint": {"every_steps": 2, "every_minutes": None}}


def test_a_run_trains_and_resumes(tmp_path_factory):
    """Stopped by a signal in the middle; the losses are those of a mesh that cuts rows alone."""
    folder, place = tmp_path_factory.getbasetemp() / "small", tmp_path_factory.mktemp("context") / "run"
    cut, build = settings(folder, mesh={"data": 4, "context": 2}), program.build
    made = build(**train.split(cut)[1])
    compiled = {name: getattr(made, name) for name in ("create", "step", "end_task", "evaluate")}

    @functools.wraps(build)
    def again(**pieces):
        return build(**pieces)._replace(**compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "build", again)
        patch.setattr(train.allocator, "keep_pages", lambda: True)
        with pytest.MonkeyPatch.context() as struck:
            small.strike(struck, "SIGTERM", 3)
            assert train.run(cut, str(place), final=False) == 0
        assert small.checkpoint(place)[0] == 4
        assert train.run(cut, str(place), final=False) == 0
    plain = build(**train.split(settings(folder, mesh={"data": 8}))[1])
    state, records = plain.create(), small.records(place, "train")
    assert [r["step"] for r in records] == list(range(1, 7))
    for step, told in enumerate(records):
        state, expected = plain.step(state, plain.place(step))
        for key in ("loss", "grad_norm", "weight"):
            np.testing.assert_allclose(told[key], float(expected[key]), rtol=1e-4, err_msg=f"{key} of step {step + 1}")
        if step + 1 in plain.stream.boundaries:
            state = plain.end_task(state, plain.place_task(plain.stream.boundaries.index(step + 1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing__length": 33, "mesh": {"context": 2}}, r"config.mesh.context=2: .*packing.length=33.*length=32"),
        ({"mesh": {"expert": 2}}, r"config.mesh.expert=2: config.model has no experts; .*--config.mesh.fsdp=-1"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path_factory, changes, words):
    folder = tmp_path_factory.getbasetemp() / "small"
    pieces = train.split(settings(folder, **changes))[1]
    with pytest.raises(UserError, match=words):
        program.build(**pieces)


@pytest.mark.parametrize(
    ("shape", "practice", "words"), [(None, None, "no transformer"), ("any", "any", "drawn token")]
)
def test_what_has_no_length_is_refused(shape, practice, words):
    network = plan.Network(None, None, shape)
    with pytest.raises(UserError, match=rf"config.mesh.context=4: .*{words}.*--config.mesh.fsdp=-1"):
        plan.check_mesh(meshes.make(context=4), network, practice)
    plan.check_mesh(meshes.make(), network, practice)
