"""A run whose parameters are those of another run, trained on as they are or below an adapter."""

import jax
import numpy as np
import pytest
import rl_small

from jaxcl import network, saved
from jaxcl.hf.__main__ import export
from jaxcl.schema import UserError
from jaxcl.tree import named_leaves

STAGE = {"name": "worked", "steps": 2, "mixture": {"three": 1.0}, "learn": "sft"}


def settings(**overrides):
    plain = {"stream": {"batch": 4, "stages": [STAGE]}, "method": "cpt", "rollout": {"modes": [], "samples": 2}}
    return rl_small.config(**plain | {"objective": None, "policy": "hard"} | overrides)


def begun(place, **change):
    given = settings()
    return settings(model={**given["model"], "start": str(place), **change})


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    place = tmp_path_factory.mktemp("start") / "run"
    rl_small.run(settings(), place)
    return place


def test_the_parameters_are_those_of_the_run(trunk):
    state = rl_small.build(begun(trunk)).create()
    _, there = saved.params(trunk / "checkpoints")
    for (name, ours), (other, theirs) in zip(named_leaves(state.params), named_leaves(there), strict=True):
        assert name == other
        np.testing.assert_array_equal(ours, theirs)
    assert int(state.step) == 0
    fresh = rl_small.build(settings()).create()
    assert not np.array_equal(state.params["embedding"], fresh.params["embedding"])


def test_they_are_cut_over_the_mesh(trunk):
    made = rl_small.build(begun(trunk), 4, data=2, fsdp=2)
    state, (_, there) = made.create(), saved.params(trunk / "checkpoints")
    placed = jax.tree.map(lambda x: x.sharding, made.abstract.params)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, state.params, placed))
    np.testing.assert_array_equal(state.params["embedding"], there["embedding"])


def test_an_adapter_begins_as_what_it_adapts(trunk):
    given = begun(trunk)
    made, plain = rl_small.build(given | {"adapter": "lora"}), rl_small.build(given)
    state, whole = made.create(), plain.create()
    np.testing.assert_array_equal(state.memory["frozen"]["base"]["embedding"], whole.params["embedding"])
    batch = plain.place(0)
    ours, theirs = (float(one.step(s, batch)[1]["loss"]) for one, s in ((made, state), (plain, whole)))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_another_shape_or_no_run_is_refused(trunk, tmp_path):
    with pytest.raises(UserError, match=r"config\.model\.start=.*layers/mlp/\w+ has the shape .* there and .* here"):
        rl_small.build(begun(trunk, mlp=16)).create()
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match=r"config\.model\.start=.*give the folder of a run that has checkpoints"):
            rl_small.build(begun(folder))


def test_no_parameter_of_the_run_is_left_behind(trunk, monkeypatch):
    step, there = saved.params(trunk / "checkpoints")
    monkeypatch.setattr(network.saved, "params", lambda directory: (step, {**there, "more": np.zeros(3)}))
    with pytest.raises(UserError, match=r"config\.model\.start=.*more has the shape \(3,\) there and None here"):
        rl_small.build(begun(trunk)).create()


def test_generated_problems_cannot_be_exported(trunk, tmp_path):
    with pytest.raises(UserError, match="its problems make their own vocabulary"):
        export(trunk, tmp_path / "out")
