"""Branches: a new run that goes on from a checkpoint of another, which anneals while the other stays as it is."""

import json

import jax
import numpy as np
import pytest
import small
import tokenizers

from jaxcl import branch, saved, train
from jaxcl.data import tokenizer
from jaxcl.schema import UserError

AT = 12  # two stages of eight steps are past the cooldown of eleven


def settings(folder, **schedule):
    return small.config(folder, schedule={**small.config(folder)["schedule"], **schedule})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "small"


@pytest.fixture(scope="module")
def trunk(folder, tmp_path_factory):
    """A finished run that kept its checkpoints."""
    workdir = tmp_path_factory.mktemp("trunk") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small.reuse(folder, monkeypatch)
        kept = {"every_steps": 3, "every_minutes": None, "keep": 99}
        assert train.run(small.config(folder, checkpoint=kept), str(workdir)) == 0
    return workdir


def test_a_branch_anneals_and_the_trunk_stays(folder, trunk, tmp_path, capsys):
    before, new = small.tree_of(trunk), tmp_path / "new"
    branch.main([str(trunk), str(new), f"--step={AT}"])
    assert f"--workdir={new}" in capsys.readouterr().out
    annealed = settings(folder, anneal=6, anneal_from=AT, end=1e-4)
    annealed["stream"]["stages"] = annealed["stream"]["stages"][:2]
    annealed["stream"]["stages"][1]["steps"] = AT + 6 - small.STEPS
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in a third of the time
    try:
        assert train.run(annealed, str(new)) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    own, old = small.records(new, "train"), small.records(trunk, "train")
    assert own[:AT] == old[:AT]
    rates = {r["step"]: r["lr"] for r in own}
    assert [rates[s] for s in (AT, AT + 1)] == pytest.approx([5e-3, 5e-3])
    falls = [5e-3 * (1e-4 / 5e-3) ** (k / 6) for k in range(6)]
    assert [rates[AT + 1 + k] for k in range(6)] == pytest.approx(falls, rel=1e-5)
    assert own[AT]["loss"] == pytest.approx(old[AT]["loss"], rel=1e-5)  # the same state and rows; another program
    assert json.loads((new / "run.json").read_text())["branch"] == {"source": str(trunk), "step": AT, "whole": True}
    assert (new / "report.html").exists()
    assert small.tree_of(trunk) == before


def test_a_branch_that_changes_nothing_ends_like_the_trunk(folder, trunk, tmp_path, monkeypatch):
    branch.make(trunk, tmp_path / "new", step=9)
    small.reuse(folder, monkeypatch)
    assert train.run(small.config(folder), str(tmp_path / "new")) == 0
    assert small.outcome(tmp_path / "new") == small.outcome(trunk)


def test_a_branch_takes_the_reservoir_along(folder, tmp_path):
    replay = {"fraction": 0.25, "over": "reservoir", "capacity": 24}
    kept = {"every_steps": 6, "every_minutes": None, "keep": 99}
    settings = small.config(folder, stream__replay=replay, checkpoint=kept, method="cpt")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert train.run(settings, str(tmp_path / "run")) == 0
        branch.make(tmp_path / "run", tmp_path / "new", step=12)
        before = small.tree_of(tmp_path / "run")
        assert train.run(settings, str(tmp_path / "new")) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert small.outcome(tmp_path / "new") == small.outcome(tmp_path / "run")
    assert small.tree_of(tmp_path / "run") == before


def test_a_branch_with_more_tokens(folder, trunk, tmp_path, capsys):
    """The tokenizer of bytes gives way to a file with the same numbers and more; old rows stay bit for bit."""
    tok = tokenizers.Tokenizer.from_str(tokenizer.byte_json())
    tok.add_special_tokens([f"<|new {i}|>" for i in range(9)])
    tok.save(str(tmp_path / "tokenizer.json"))
    before, new = small.tree_of(trunk), tmp_path / "new"
    branch.main([str(trunk), str(new), "--step=12", "--vocab=272"])
    assert "--config.model.vocab=272" in capsys.readouterr().out
    (_, old, host), (step, grown, changed) = (saved.read(run / "checkpoints", step=12) for run in (trunk, new))
    assert step == 12
    assert changed == host | {"stream": None, "held_out": None}
    assert old.keys() == grown.keys()
    sizes = set()
    for name, x in grown.items():
        if x.shape == old[name].shape:
            np.testing.assert_array_equal(x, old[name])
            continue
        axis = next(i for i, (a, b) in enumerate(zip(x.shape, old[name].shape, strict=True)) if a != b)
        sizes.add((old[name].shape[axis], x.shape[axis]))
        ours, theirs = (np.moveaxis(np.asarray(y), axis, 0) for y in (x, old[name]))
        assert ours[: len(theirs)].tobytes() == theirs.tobytes()
        if name.startswith("opt_state"):
            assert not np.any(ours[264:])
        elif name.startswith("params"):
            np.testing.assert_allclose(ours[264:], np.tile(theirs.mean(axis=0), (8, 1)), atol=1e-6)
    assert sizes == {(264, 272)}
    (anchor,) = (name for name in grown if name.endswith("anchor/embedding"))
    np.testing.assert_array_equal(grown[anchor][264:], grown["params/embedding"][264:])
    config = small.config(folder)
    config["model"]["vocab"] = 272
    config["tokenizer"] = {"name": "hf", "path": str(tmp_path / "tokenizer.json")}
    config["stream"]["stages"] = config["stream"]["stages"][:2]
    config["evaluation"]["alignment"] = False
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert train.run(config, str(new), final=False) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert small.records(new, "train")[:12] == small.records(trunk, "train")[:12]
    assert saved.read(new / "checkpoints")[0] == 16
    assert saved.read(new / "checkpoints")[2]["stream"]  # from here on the rows are checked again
    assert small.tree_of(trunk) == before


def test_a_vocabulary_never_shrinks(trunk, tmp_path):
    with pytest.raises(UserError, match=r"--vocab=100: the run in .* has 264 tokens"):
        branch.make(trunk, tmp_path / "new", vocab=100)
    assert not (tmp_path / "new").exists()


def test_a_branch_that_was_cut_short_is_not_trained_and_is_made_anew(folder, trunk, tmp_path, monkeypatch):
    new = tmp_path / "new"

    def cut(*rest, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(branch.saved, "copy", cut)
        with pytest.raises(KeyboardInterrupt):
            branch.make(trunk, new)
    with pytest.raises(UserError, match=r"a branch that was cut short; make it again with python -m jaxcl\.branch"):
        train.run(small.config(folder), str(new))
    assert branch.make(trunk, new) == small.TOTAL


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nowhere"}, "nowhere: not the folder of a run"),
        ({"step": 13}, r"no checkpoint at step 13; it has \[3, 6, 9"),
        ({"target": "occupied"}, "occupied: is not empty; branch into a new folder"),
    ],
)
def test_bad_input_writes_nothing(trunk, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("mine")
    before = small.tree_of(tmp_path)
    source, target = options.get("source", str(trunk)), options.get("target", "new")
    with pytest.raises(UserError, match=words):
        branch.main([source, target, f"--step={options.get('step', 12)}"])
    assert small.tree_of(tmp_path) == before
    assert not (tmp_path / "new").exists()
