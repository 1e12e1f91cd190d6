"""Questions of a file, a checkpoint folder, thoughts in text: phases, a judge in processes, and what it may do."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest
import rl_small
import small

from jaxcl import main, program, train
from jaxcl.hf.__main__ import export
from jaxcl.rl.sample import ANSWER, FORCED, NOTHING, THOUGHT
from jaxcl.schema import UserError

QUICK = True  # compiling is most of the time

JUDGE = """
import time

def score(gold, answer):
    if len(answer) % 3 == 0:
        raise RuntimeError("no idea")
    if ord(answer[-1]) % 2:
        time.sleep(60)
    return float("nan") if ord(answer[-1]) % 4 else 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in the format of Hugging Face, with a tokenizer of bytes, and questions."""
    place = tmp_path_factory.mktemp("rl_text")
    settings = small.config(place, stream__steps=1, stream__replay=None, method="cpt", guard=None)
    settings["evaluation"], settings["checkpoint"] = {"every": 8, "rows": 8}, {}
    assert train.run(settings | {"mesh": {"data": -1}}, str(place / "trunk"), final=False) == 0
    export(place / "trunk", place / "model")
    lines = [{"question": f"{a} + {b}?", "answer": f"{a} and {b}.\n#### {a + b}"} for a in range(6) for b in range(6)]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (place / "judge_of_test.py").write_text(JUDGE)
    return place


def settings(folder, **overrides):
    source = {"name": "questions", "path": str(folder / "questions.jsonl"), "template": "Q: {question} A:"}
    stage = {"name": "rl", "steps": 2, "mixture": {"sums": 1.0}}
    plain = {
        "model": {"checkpoint": str(folder / "model")},
        "sources": {"sums": source},
        "stream": {"batch": 4, "stages": [stage]},
        "rollout": {"group": 4, "thoughts": 3, "answer": 2, "stop": ["a"], "forced": "=", "late": ";=", "samples": 4}
        | {"modes": ["hard"]},
        "method": "cpt",
    }
    return rl_small.config(**plain | overrides)


def test_phases_of_text(folder):
    made = rl_small.build(settings(folder, policy="hard"))
    prompts, numbers = made.rollouts.prompts(0, {})
    rolled = made.rollouts.explorer.roll(made.create().params, prompts, 0)
    kind, token = (np.asarray(x) for x in (rolled.kind, rolled.token))
    words = made.rollouts.practice.words
    assert words.encode("a")[0] in [phrase[-1] for phrase in made.rollouts.practice.limits.stop]
    stopped = np.asarray(rolled.rollouts.stopped)
    for row in range(16):
        thoughts = token[row, kind[row] == THOUGHT]
        forced = words.decode(token[row, kind[row] == FORCED])
        assert forced == ("=" if stopped[row] else ";=")
        assert len(thoughts) == 3 or words.decode(thoughts).endswith("a")
        answer = made.rollouts.explorer.judge_rows.answer(
            made.rollouts.practice.problems["sums"], kind[row], token[row]
        )
        assert answer.startswith(forced)
        assert np.sum(kind[row] == ANSWER) <= 2
        order = kind[row][kind[row] != NOTHING]
        assert np.all(np.diff(order) >= 0)
    rows, _ = made.rollouts.explorer.judge(rolled, prompts, numbers)
    kinds, weights = np.asarray(rows.extra["kind"]), np.asarray(rows.weights)
    assert np.array_equal(weights > 0, (kinds == THOUGHT) | (kinds == ANSWER))


def test_a_judge_that_throws_hangs_or_says_nan_costs_the_sample_and_is_counted(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    given = settings(folder, policy="hard", rollout__timeout=0.3)
    given["sources"]["sums"]["verifier"] = {"name": "judge_of_test:score"}
    rl_small.run(given, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")  # what was trained by rollouts goes back to Hugging Face
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    steps = small.records(tmp_path / "run", "train")
    assert len(steps) == 2
    for record in steps:
        assert 0 < record["failed"] <= 16
        assert record["failed"] + 16 * record["reward"] <= 16
        assert np.isfinite(record["loss"])


@pytest.mark.slow
def test_the_shipped_config_runs_to_its_report(folder, tmp_path, monkeypatch):
    """configs/gsm8k_rl.py as a command line changes it: fewer and shorter rollouts, and a verifier without extras."""
    given = main.plain(importlib.import_module("configs.gsm8k_rl").get_config())
    short = ("stream.steps=2", "schedule.warmup=1", "tensorboard=False", "sources.gsm8k.verifier.name=boxed")
    short += (
        "rollout.thoughts=6",
        "rollout.answer=3",
        "rollout.group=4",
        "rollout.samples=2",
        "rollout.modes=['hard']",
    )
    for change in (*short, f"model.checkpoint={folder}/model", f"sources.gsm8k.path={folder}/questions.jsonl"):
        main.override(given, f"--config.{change}")
    build = program.build
    alone = functools.wraps(build)(lambda **pieces: build(**pieces, mesh={"devices": jax.devices()[:1]}))
    monkeypatch.setattr(program, "build", alone)
    monkeypatch.setattr(train.allocator, "keep_pages", lambda: True)
    assert train.run(given, str(tmp_path / "run"), final=False) == 0
    steps = small.records(tmp_path / "run", "train")
    assert [record["step"] for record in steps] == [1, 2]
    late = len(given["rollout"]["late"])  # fewer thoughts than the phrase that would end them has bytes
    for record in steps:
        assert np.isfinite(record["loss"])
        assert record["thoughts"] == 6
        assert 6 + late < record["length"] <= 6 + late + 3
        assert record["failed"] == 0
    ends = [record for record in small.records(tmp_path / "run", "eval") if record["boundary"] is not None]
    assert [record["boundary"] for record in ends] == [-1, 0]
    for record in ends:
        assert set(record["inference"]["gsm8k"]) == {"soft", "hard"}
        assert np.isfinite(list(record["drift"]["gsm8k"].values())).all()
    assert small.results(tmp_path / "run")
    assert "gsm8k" in (tmp_path / "run" / "report.html").read_text()


def test_only_the_full_reward_is_a_right_answer(folder):
    """The paper's rewards: 100 for a right answer, 10 for a wrong one in a box."""
    given = settings(folder)
    given["sources"]["sums"]["verifier"] = {"name": "boxed", "scale": 100.0, "partial": 0.1}
    made = rl_small.build(given)
    explorer, words = made.rollouts.explorer, made.rollouts.practice.words
    gold = made.rollouts.practice.problems["sums"].gold(0)
    texts = ["\\boxed{" + gold + "}", "\\boxed{99}", gold, ""]
    token, kind = np.zeros((4, 20), np.int32), np.zeros((4, 20), np.int8)
    for row, text in enumerate(texts):
        numbers = words.encode(text)
        token[row, : len(numbers)], kind[row, : len(numbers)] = numbers, ANSWER
    found = explorer.rewards(kind, token, np.array([0]))
    assert found.values.tolist() == [[100, 10, 0, 0]]
    assert found.right.tolist() == [[True, False, False, False]]


def test_tags_have_a_share_of_the_reward_that_falls(folder):
    made = rl_small.build(settings(folder, rollout__tags=["a"], rollout__tags_share=[1.0, 0.0], rollout__tags_steps=4))
    explorer, words = made.rollouts.explorer, made.rollouts.practice.words
    texts = ["<a></a>", "<a>", "</a><a>", "<a>x</a>"]
    token = np.zeros((4, 12), np.int32)
    kind = np.zeros((4, 12), np.int8)
    for row, text in enumerate(texts):
        numbers = words.encode(text)
        token[row, : len(numbers)], kind[row, : len(numbers)] = numbers, THOUGHT
    found = [explorer.rewards(kind, token, np.array([0]), step).values[0] for step in (0, 2, 4, None)]
    np.testing.assert_allclose(found, [[1, 0, 0, 1], [0.5, 0, 0, 0.5], [0] * 4, [0] * 4], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollout": {"group": 4, "thoughts": 3}}, r"config\.rollout\.answer: missing"),
        ({"rollout": {"group": 4, "answer": 3}}, None),
        ({"rollout": {"group": 4, "thoughts": 600, "answer": 3}}, r"config\.model\.max_length=\d+: rows of \d+ tokens"),
        ({"model": {"checkpoint": ""}}, r"config\.model\.checkpoint=''"),
    ],
)
def test_bad_input(folder, change, message):
    if message is None:
        made = rl_small.build(settings(folder, **change))
        assert made.rollouts.practice.limits.thoughts == 0
        return
    with pytest.raises(UserError, match=message):
        rl_small.build(settings(folder, **change))
