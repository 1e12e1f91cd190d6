"""Runs on problems: one loop for supervision and rollouts, exact resume, filters, demonstrations, and bad input."""

import json

import numpy as np
import processes
import pytest
import rl_small

from jaxcl.schema import UserError

QUICK = True  # compiling is most of the time

CHAINS = {
    "on-policy": [("SIGKILL:step:7", -9), ("none", 0)],  # what is kept of the second stage is in the checkpoint
    "ahead": [
        ("SIGTERM:step:5", 0),  # in the middle of rollouts, one step of which is drawn ahead
        ("SIGKILL:save:10", -9),
        ("SIGINT:step:11", 130),
        ("none", 0),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "rl"


def command(config, workdir, folder, point="none"):
    (started,) = processes.start(
        "run", point, f"--config={config}", f"--workdir={workdir}", env=rl_small.environment(folder)
    )
    return started


KINDS = {
    "on-policy": {"rollout": {"group": 4, "samples": 4, "modes": ["hard"], "refill": 2, "filter": 4}},
    "ahead": {"objective": "grpo", "rollout": {"group": 4, "samples": 4, "modes": ["hard"], "ahead": True}},
}


@pytest.mark.parametrize("kind", [pytest.param("on-policy", marks=pytest.mark.slow), "ahead"])
def test_a_chain_of_kills_and_stops_changes_no_bit(kind, folder, tmp_path):
    config = rl_small.write(rl_small.config(**KINDS[kind]), tmp_path / "config.py")
    processes.finish([command(config, tmp_path / "straight", folder)])
    for point, code in CHAINS[kind]:
        started = command(config, tmp_path / "run", folder, point)
        processes.finish([started], codes=(code,))
        assert "Traceback" not in started.log.read_text()
    assert rl_small.outcome(tmp_path / "run") == rl_small.outcome(tmp_path / "straight")
    restored = [step for step, event in rl_small.events(tmp_path / "run") if event == "restore"]
    assert len(restored) == len(CHAINS[kind]) - 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run in this process."""
    place = tmp_path_factory.mktemp("finished") / "run"
    rl_small.run(rl_small.config(), place)
    return place


def test_what_a_run_records(finished):
    steps = rl_small.records(finished, "train")
    assert [("reward" in record) for record in steps] == [False] * 3 + [True] * 9
    for record in steps[3:]:
        assert 0 <= record["reward"] <= record["solved"] <= 1
        assert record["thoughts"] == 1
        assert record["length"] == 2
        assert record["drawn"] == 4 * 4 * 2
        assert record["failed"] == 0
    boundaries = [record for record in rl_small.records(finished, "eval") if record["boundary"] is not None]
    assert [record["boundary"] for record in boundaries] == [-1, 0, 1, 2]
    for record in boundaries:
        for domain in ("three", "four"):
            assert set(record["inference"][domain]) == {"soft", "hard"}
            one = record["inference"][domain]["soft"]
            assert record["accuracy"][domain] == one["greedy"]
            assert one["sample"]["1"] <= one["sample"]["4"] <= 1
            assert len(record["entropy"][domain]["hard"]) == 1
            assert record["drift"][domain]["soft"] == pytest.approx(record["loss"][domain])
    facts = json.loads((finished / "run.json").read_text())["facts"]
    assert set(facts["baselines"]) == {"three", "four"}
    assert 0 < facts["baselines"]["three"]["majority"] < 1


def test_nothing_compiles_after_the_first_step_of_a_kind(tmp_path):
    """Two stages of rollouts over different domains are one program each: drawing, rows, step."""
    made = rl_small.build(rl_small.config())
    rollouts, state = made.rollouts, made.create()

    def go(step):
        prompts, _ = rollouts.prompts(step, {})
        rows, _ = rollouts.now(state, prompts, step, {})
        return rows

    rows = [go(step) for step in (3, 4, 8, 11)]
    assert rollouts.explorer.draw._cache_size() == 1
    assert rollouts.explorer.teach._cache_size() == 1
    for one in rows:
        state, _ = made.step(state, one)
    assert made.step._cache_size() == 1


def test_meshes_agree():
    """The same rows and the same losses on 1 device and on 2 x 2."""
    settings = rl_small.config(guard=None)
    found = []
    for mesh in ({}, {"devices": 4, "data": 2, "fsdp": 2}):
        made = rl_small.build(settings, **mesh)
        state, told = made.create(), []
        for step in (3, 4, 5):
            prompts, _ = made.rollouts.prompts(step, {})
            rows, values = made.rollouts.now(state, prompts, step, {})
            state, metrics = made.step(state, rows)
            told.append([values["reward"], float(metrics["loss"]), float(metrics["grad_norm"])])
        found.append(told)
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4, atol=1e-5)


def test_groups_without_a_signal_are_drawn_anew():
    made = rl_small.build(rl_small.config(rollout__refill=40))
    prompts, _ = made.rollouts.prompts(3, {})
    rows, told = made.rollouts.now(made.create(), prompts, 3, {})
    assert told["refills"] > 0
    assert told["signal"] == 1
    share = np.asarray(rows.extra["share"]).reshape(4, 4)
    values = np.asarray(rows.extra["advantage"]).reshape(4, 4)
    assert np.all(share == 1)
    assert np.all(np.ptp(values, axis=1) > 0)
    # What was drawn belongs to the prompts it stands with: the answers are rewarded as their problems say.
    kind, token, inputs = (np.asarray(x) for x in (rows.extra["kind"], rows.targets, rows.inputs))
    domain = made.rollouts.practice.problems["three"]
    names = np.array(domain.names)
    for row in range(16):
        digits = names[inputs[row, :3]][1:].astype(int)
        right = token[row, kind[row] == 3][0] == domain.names.index(str(digits.sum() % 3))
        best = values[row // 4].max()
        assert right == (values[row // 4, row % 4] == best)


def test_the_filter_keeps_exactly_what_some_rollout_solves():
    made = rl_small.build(rl_small.config(rollout__filter=16))
    state, rollouts = made.create(), made.rollouts
    kept = rollouts.solved(state, 2)
    for source, rows in enumerate(kept):
        counts = rollouts.successes(state.params, source, 2, 7)
        assert rows == np.flatnonzero(counts > 0).tolist()
        assert counts.max() <= 16
        assert len(counts) == rollouts.flow.sizes[source]
    assert sum(map(len, kept)) < rollouts.flow.sizes.sum()
    assert rollouts.solved(state, 1)[0] == list(range(rollouts.flow.sizes[0]))  # four is in no mixture of that stage
    for step in range(7, 12):
        index = rollouts.index(step, {"2": kept})
        assert all(row in kept[source] for source, row in zip(index.source, index.row, strict=True))
        plain = rollouts.flow.index(step)
        same = [row in kept[source] for source, row in zip(plain.source, plain.row, strict=True)]
        assert np.array_equal(index.row[same], plain.row[same])


def test_demonstrations_a_reference_and_an_adapter_in_one_run():
    """Rollouts and worked rows in one step, a divergence from the start, and only the adapter moves."""
    settings = rl_small.config(
        adapter="lora",
        method="reference(at='start') + chord(mu=0.5, end=0.25, steps=2)",
        objective="grpo(kl=0.1)",
        rollout__demonstrations=True,
    )
    settings["stream"] = {"batch": 4, "stages": [{"name": "a", "steps": 4, "mixture": {"three": 1.0}}]}
    made = rl_small.build(settings)
    state = made.create()
    base = np.asarray(state.memory["frozen"]["base"]["embedding"])
    shares = []
    for step in range(3):
        rows, _ = made.rollouts.now(state, made.place(step), step, {})
        assert rows.task.shape == (4 * 4 + 4,)
        state, metrics = made.step(state, rows)
        assert np.isfinite(float(metrics["loss"]))
        assert float(metrics["chord"]) > 0
        shares.append(float(metrics["chord/mu"]))
    np.testing.assert_allclose(shares, [0.5, 0.375, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(state.memory["frozen"]["base"]["embedding"], base)
    assert set(state.params) == {"lora"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout__group": 1}, r"config\.rollout\.group=1"),
        ({"rollout__modes": "hard"}, r"config\.rollout\.modes='hard': expected a list, as in \['hard'\]"),
        ({"rollout__ahead": True}, r"config\.rollout\.ahead=True: rloo knows no ratio"),
        ({"evaluation": {"alignment": True}}, r"config\.evaluation\.alignment=True: compares losses of text"),
        ({"rollout__overlong": 5}, r"config\.rollout\.overlong=5: must be at most the limit of 2 tokens"),
        ({"rollout__stop": ["zzz"]}, r"config\.rollout\.stop='zzz': 'zzz' is no word"),
        ({"rollout__stop": [""]}, r"config\.rollout\.stop=.*an empty phrase"),
        ({"rollout__forced": "zzz"}, r"config\.rollout\.forced='zzz'"),
        ({"rollout__demonstrations": True}, r"config\.rollout\.demonstrations=True: nothing learns from them"),
        ({"rollout__workers": 0}, r"config\.rollout\.workers=0"),
        ({"objective": "grpo(kl=0.1)"}, r"config\.objective kl=0\.1: .*add reference to config\.method"),
        ({"policy": "soft(temperature=nan)"}, r"config\.policy\.temperature=nan: must be a finite number"),
        ({"rollout__tags": ["think"]}, r"config\.rollout\.tags=.*of text"),
        ({"rollout__group": 0}, r"config\.rollout\.group=0: must be at least 1"),
        ({"rollout__thoughts": 14}, r"config\.model\.max_length=16: rows of 18 tokens"),
        ({"rollout__answer": 0}, r"config\.rollout\.answer=0: must be at least 1 token"),
        ({"rollout__filter": 6}, r"config\.rollout\.filter=6: must be a multiple of group=4"),
        ({"rollout": {"grup": 2}}, r"config\.rollout\.grup: unknown key; did you mean 'group'"),
        ({"policy": "sofd"}, r"config\.policy\.name='sofd'.*did you mean 'soft'"),
        ({"policy": "soft + hard"}, r"config\.policy=.*write one name"),
        ({"objective": "rlo"}, r"config\.objective\.name='rlo'.*did you mean 'rloo'"),
        ({"objective": None}, None),
        ({"method": "chord"}, r"config\.method chord: no demonstration rows.*config\.rollout\.demonstrations"),
        ({"objective": {"kl": 0.1}}, r"config\.objective=.*has no name"),
        ({"model__vocab": 4}, r"config\.model\.vocab=4: smaller than that of the tokenizer 'task'"),
        ({"packing": {"length": 8}}, r"config\.packing: of text"),
        (
            {"loss": {"z_loss": 1e-4}, "stream__stages": [{"name": "a", "mixture": {"three": 1.0}, "steps": 1}]},
            r"config\.loss\.z_loss=0\.0001: .*learn='sft' alone.*since the stages have 'rl'",
        ),
        ({"tokenizer": {"name": "byte"}}, r"config\.tokenizer: generated problems make their own vocabulary"),
        ({"method": "er(capacity=8)"}, r"config\.method: keeps rows.* stages learn in different ways"),
        ({"model": {"name": "mlp"}}, r"config\.model"),
        ({"sources": {"a": {"name": "mnns", "count": 0}}}, r"config\.sources\.a\.count=0"),
        (
            {"sources": {"a": {"name": "modular", "held_out": 1.5}}},
            r"config\.sources\.a\.held_out=1\.5: must lie between",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(change, message):
    settings = rl_small.config(**change)
    if message is None:
        settings["stream"] = {
            "batch": 4,
            "stages": [{"name": "a", "steps": 1, "mixture": {"three": 1.0}, "learn": "rl"}],
        }
        message = r"config\.objective: missing, but a stage has learn='rl'"
    with pytest.raises(UserError, match=message) as caught:
        rl_small.build(settings)
    assert "\n" not in str(caught.value)


def test_text_has_no_use_for_rollouts(tmp_path):
    settings = rl_small.config(sources={"a": {"name": "embedded", "domain": "prose"}}, packing={"length": 32})
    settings["stream"] = {"batch": 4, "stages": [{"name": "a", "steps": 1, "mixture": {"a": 1.0}}]}
    with pytest.raises(UserError, match=r"config\.policy: of problems"):
        rl_small.build(settings)
    mixed = rl_small.config(
        sources={"a": {"name": "embedded", "domain": "prose"}, "b": {"name": "modular", "modulus": 3}}
    )
    with pytest.raises(UserError, match="b has problems and a has none"):
        rl_small.build(mixed)
