"""Runs with an adapter: the base keeps its bytes, the adapter goes on, and both become Hugging Face folders."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from orbax.checkpoint import v1 as ocp

from jaxcl import branch, frozen, program, saved, train, tree, weights
from jaxcl.hf import files, peft
from jaxcl.hf.__main__ import export, export_adapter
from jaxcl.models import lora
from jaxcl.schema import UserError

METHOD = "er(capacity=24, fraction=0.25) + reptile(every=5, keep=0.5)"
STAGES = [{"name": "a", "mixture": {"d0": 1.0}}, {"name": "b", "mixture": {"d1": 1.0}}]


def settings(folder, **overrides):
    shape = {"adapter": {"name": "lora", "rank": 2, "dropout": 0.1}, "stream__stages": STAGES, "stream__steps": 6}
    return small.config(folder, **({"method": METHOD} | shape | overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module", autouse=True)
def quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run with an adapter, a guard, a replay and Reptile."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    assert train.run(settings(folder), str(workdir), final=False) == 0
    return workdir


def first_losses(workdir):
    return small.records(workdir, "eval")[0]["loss"]


def test_a_run_leaves_the_base_alone(folder, trained):
    _, leaves = saved.params(trained / "checkpoints")
    _, pieces = train.split(settings(folder))
    made = program.build(**pieces)
    start = frozen.whole(made.create())
    jax.tree.map(np.testing.assert_array_equal, leaves["base"], start["base"])
    assert all(np.any(x) for x in jax.tree.leaves(leaves["lora"]))
    plain = program.build(**{k: v for k, v in pieces.items() if k != "adapter"})
    jax.tree.map(np.testing.assert_array_equal, plain.create().params, start["base"])
    sizes = tree.size(leaves["base"]), tree.size(leaves["lora"])
    assert (made.facts["parameters"], made.facts["trained_parameters"]) == (sum(sizes), sizes[1])
    assert plain.facts["parameters"] == sizes[0]
    assert "trained_parameters" not in plain.facts


def test_meshes_agree(folder):
    """Bytes of the base and losses on one device and on all axes."""
    ends = []
    for devices in ({"devices": jax.devices()[:1]}, {"data": 2, "fsdp": 2, "tensor": 2}):
        _, pieces = train.split(settings(folder, optim={"name": "sgd"}, mesh=devices))
        made = program.build(**pieces)
        state, losses = made.create(), []
        for i in range(3):
            state, metrics = made.step(state, made.place(i))
            losses.append(float(metrics["loss"]))
        ends.append((losses, jax.device_get(frozen.whole(state))))
    specs = {name: leaf.sharding.spec for name, leaf in tree.named_leaves(state)}
    assert tuple(specs["memory/frozen/base/layers/mlp/up"]) == (None, "fsdp", "tensor")
    assert tuple(specs["params/lora/layers/mlp/up/a"])[:2] == (None, "fsdp")
    assert tuple(specs["params/lora/layers/mlp/up/b"]) == (None, None, "tensor")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *ends)


def test_the_adapter_goes_on_with_and_without_its_optimiser_state(folder, trained, tmp_path):
    """The next phase as a branch of the run, and as a new run that starts from the exported adapter."""
    more = {"stream__stages": [*STAGES, {"name": "c", "mixture": {"d2": 1.0}}]}
    branch.make(trained, tmp_path / "with")
    assert train.run(settings(folder, **more), str(tmp_path / "with"), final=False) == 0
    before, after = small.checkpoint(trained)[1], small.checkpoint(tmp_path / "with")[1]
    same = {name for name in before if before[name] == after[name]}
    assert {name for name in before if name.startswith("memory/frozen/")} <= same
    assert not {name for name in before if name.startswith("params/")} & same
    assert small.records(tmp_path / "with", "train")[-1]["step"] == 18

    export_adapter(trained, tmp_path / "adapter")
    told = files.config(tmp_path / "adapter", "jaxcl.json")
    assert (told["step"], set(told["sources"])) == (12, {"d0", "d1", "d2"})
    again = {
        "adapter": {"name": "lora", "checkpoint": str(tmp_path / "adapter")},
        "stream__stages": more["stream__stages"][2:],
    }
    assert train.run(settings(folder, **again), str(tmp_path / "without"), final=False) == 0
    assert first_losses(tmp_path / "without") == pytest.approx(small.records(trained, "eval")[-1]["loss"], abs=1e-5)


def test_a_run_is_exported_with_what_its_adapter_learned(folder, trained, tmp_path):
    _, leaves = saved.params(trained / "checkpoints")
    export(trained, tmp_path / "out")
    merged = jax.tree.map(np.asarray, lora.merge(leaves, 16.0))
    found = files.open_folder(tmp_path / "out").read("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(found.T, merged["layers"]["mlp"]["up"][0])
    assert np.any(np.asarray(leaves["base"]["layers"]["mlp"]["up"][0]) != found.T)
    plain = tmp_path / "plain"
    train.run(settings(folder, adapter=None, stream__steps=1), str(plain), final=False)
    with pytest.raises(UserError, match="has no adapter; export it without --adapter"):
        export_adapter(plain, tmp_path / "none")


@pytest.fixture(scope="module")
def imported(folder, trained, tmp_path_factory):
    """A folder of a `base` in bfloat16, and a `run` that is told of it by a relative path."""
    place = tmp_path_factory.mktemp("imported")
    export(trained, place / "base", dtype="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        own = {"model": {"checkpoint": "base"}, "stream__steps": 2}
        assert train.run(settings(folder, **own), "run", final=False) == 0
    return place


def test_a_base_of_bfloat16_keeps_its_bytes_and_is_exported_in_float32(folder, imported, tmp_path, monkeypatch):
    """Untouched by training; and the sum with the adapter is rounded once, to the type that is asked for."""
    monkeypatch.chdir(imported)
    leaves = weights.load(imported / "run").params
    source = files.open_folder(imported / "base")
    up = np.asarray(leaves["base"]["layers"]["mlp"]["up"][0])
    assert up.dtype == source.read("model.layers.0.mlp.up_proj.weight").dtype == jnp.bfloat16
    assert up.T.tobytes() == source.read("model.layers.0.mlp.up_proj.weight").tobytes()
    export(imported / "run", tmp_path / "wide", dtype="float32")
    pair = leaves["lora"]["layers"]["mlp"]["up"]
    exact = up.astype(np.float64) + 16.0 / 2 * np.asarray(pair["a"][0], np.float64) @ np.asarray(
        pair["b"][0], np.float64
    )
    wide = files.open_folder(tmp_path / "wide").read("model.layers.0.mlp.up_proj.weight").T
    np.testing.assert_allclose(wide, exact, atol=1e-6)
    export(imported / "run", tmp_path / "same")
    assert files.open_folder(tmp_path / "same").dtype("model.norm.weight") == "BF16"
    model = {"checkpoint": "base", "vocab": 270, "new_rows": "normal"}
    grown = {"model": model, "stream__steps": 1}
    assert train.run(settings(folder, **grown), str(tmp_path / "grown"), final=False) == 0
    longer = settings(folder, **grown | {"stream__stages": [*STAGES, {**STAGES[0], "name": "c"}]})
    assert train.run(longer, str(tmp_path / "grown"), final=False) == 0
    drawn = weights.load(tmp_path / "grown").params["base"]["embedding"]  # read and drawn again
    assert np.asarray(drawn[269], np.float32).any()
    with pytest.raises(UserError, match="its vocabulary has grown, which no adapter holds"):
        export_adapter(tmp_path / "grown", tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_checkpoints_hold_the_adapter_alone_and_resume_bit_for_bit(folder, trained, tmp_path):
    """Where the base came from a folder; that folder is read again, and must be what it was."""
    base = tmp_path / "base"
    export(trained, base, dtype="bfloat16")
    own = {"model": {"checkpoint": str(base)}, "stream__stages": STAGES[:1], "stream__steps": 8}
    settings_ = settings(folder, **own)
    assert train.run(settings_, str(tmp_path / "whole"), final=False) == 0

    loop, pieces = train.split(settings_)
    made = program.build(**pieces)
    cut = train.Session(made, loop, tmp_path / "cut", settings_)
    with pytest.raises(train.Stopped), contextlib.closing(cut):
        cut.train(lambda step: "a signal" if step == 5 else None)
    path = tmp_path / "cut" / "checkpoints" / "5"
    kept = small.manifest(path)
    assert kept["base"] is False
    assert "memory/frozen/base/layers/mlp/up" in kept["leaves"]  # its checksum
    names = {name for name, _ in tree.named_leaves(ocp.metadata(path / "state").metadata)}
    assert names == {name for name in kept["leaves"] if not name.startswith("memory/frozen/")}
    with pytest.raises(UserError, match="holds an adapter alone, and the config names no checkpoint as its base"):
        saved.params(tmp_path / "cut" / "checkpoints", step=5)
    assert train.run(settings_, str(tmp_path / "cut"), final=False) == 0
    assert small.checkpoint(tmp_path / "cut") == small.checkpoint(tmp_path / "whole")

    found = weights.load(tmp_path / "cut")
    up = files.open_folder(base).read("model.layers.0.mlp.up_proj.weight")
    assert np.asarray(found.params["base"]["layers"]["mlp"]["up"][0]).T.tobytes() == up.tobytes()
    branch.make(tmp_path / "cut", tmp_path / "branch")
    more = settings(folder, **own | {"stream__steps": 10})
    assert train.run(more, str(tmp_path / "branch"), final=False) == 0

    (shard,) = base.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1  # the last number is still finite
    shard.write_bytes(data)
    with pytest.raises(
        UserError, match=r"of config\.model\.checkpoint is not what this adapter was trained on; restore"
    ):
        export(tmp_path / "cut", tmp_path / "lost")
    with pytest.raises(UserError, match="is not what this adapter was trained on"):
        train.run(more, str(tmp_path / "cut"), final=False)
    assert not (tmp_path / "lost").exists()


def test_an_adapter_travels_with_its_tokenizer_and_finds_its_base(folder, imported, tmp_path, monkeypatch):
    """From a run whose base was named from where it was started to one that is told the adapter alone."""
    monkeypatch.chdir(imported)
    export_adapter(Path("run"), tmp_path / "adapter")
    learned = weights.load(Path("run")).params
    monkeypatch.chdir("/")
    assert peft.base(tmp_path / "adapter") == str(imported / "base")
    with pytest.raises(UserError, match=r"adapter: was trained on another base: its embedding differs"):
        peft.check_base(tmp_path / "adapter", {"embedding": learned["base"]["embedding"] + 1})
    peft.check_base(tmp_path / "adapter", learned["base"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (imported / "base" / name).read_bytes()
    source = {"name": "lora", "checkpoint": str(tmp_path / "adapter")}
    _, pieces = train.split(settings(folder, model={"checkpoint": ""}, adapter=source))
    start = frozen.whole(program.build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}}).create())
    jax.tree.map(np.testing.assert_array_equal, start, learned)
    shutil.copytree(imported / "run", tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["config"] |= {"model": {"checkpoint": ""}, "adapter": source}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    assert weights.load(tmp_path / "run").network.checkpoint == str(imported / "base")


def test_the_dropout_of_a_config_reaches_the_step(folder):
    losses = []
    for dropout in (0.0, 0.5):
        adapter = {"name": "lora", "rank": 2, "dropout": dropout}
        _, pieces = train.split(settings(folder, adapter=adapter, method="cpt", mesh={"devices": jax.devices()[:1]}))
        made = program.build(**pieces)
        state = made.create()
        for i in range(4):  # the first has rate 0, and B is zero before the second
            state, metrics = made.step(state, made.place(i))
        losses.append(float(metrics["loss"]))
    assert losses[0] != losses[1]


def test_frozen_parameters_of_a_config(folder):
    _, pieces = train.split(settings(folder, adapter=None, optim={"name": "adamw", "frozen": ["embedding", "norm"]}))
    made = program.build(**pieces)
    state = made.create()
    before = jax.device_get(frozen.whole(state))
    names = {name for name, _ in tree.named_leaves(state)}
    assert "memory/frozen/embedding" in names
    assert not {name for name in names if "embedding" in name} - {"memory/frozen/embedding"}
    for i in (0, 1):  # the first has rate 0
        state, _ = made.step(state, made.place(i))
    after = jax.device_get(frozen.whole(state))
    np.testing.assert_array_equal(before["embedding"], after["embedding"])
    assert np.any(before["layers"]["mlp"]["up"] != after["layers"]["mlp"]["up"])
    with pytest.raises(UserError, match=r"config\.optim\.frozen: 'nowhere' matches no parameter"):
        program.build(**{**pieces, "optim": {"name": "adamw", "frozen": ["nowhere"]}})
    with pytest.raises(UserError, match=r"config\.optim\.frozen='norm': expected"):
        program.build(**{**pieces, "optim": {"name": "adamw", "frozen": "norm"}})
