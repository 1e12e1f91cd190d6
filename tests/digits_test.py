"""Drawn digits: the same bits every time, apart where they must be, ink along the strokes; protocols; the config."""

import importlib
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from jaxcl import main, schema, train
from jaxcl.data import scenarios
from jaxcl.data.sources import digits
from jaxcl.schema import UserError

ROOT = Path(__file__).parent.parent


def drawn(**options):
    return schema.make("jaxcl.data.sources", {"name": "digits", "count": 40, "held_out": 20, **options}, field="s")


def rows(columns):
    return [row.tobytes() for row in columns["inputs"][:]]


def test_digits_are_the_same_every_time_and_do_not_depend_on_the_task():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    for part in ("train", "held_out"):
        for name, value in getattr(first, part).items():
            np.testing.assert_array_equal(value, getattr(again, part)[name])
    assert first.train["inputs"].shape == (40, 28, 28, 1)
    assert (first.train["inputs"][:].min(), first.train["inputs"][:].max()) == (0, 1)
    assert np.array_equal(first.train["inputs"][:] * 255, np.rint(first.train["inputs"][:] * 255))
    assert first.train["targets"].tolist() == [*range(10)] * 4
    assert not {*rows(first.train)} & {*rows(other.train)}
    assert rows(drawn(count=70).train)[:40] == rows(first.train)
    pair = drawn(classes=[7, 2], count=8, held_out=4)  # 4 copies of each, as there
    assert pair.train["targets"].tolist() == [0, 1] * 4
    assert rows(pair.train)[::2] == rows(first.train)[7::10]
    assert rows(pair.train)[1::2] == rows(first.train)[2::10]
    assert drawn(classes=[7, 2], relabel=False).train["targets"].tolist() == [7, 2] * 20
    turned = drawn(rotation=90.0, permutation=4)
    order = np.random.default_rng(4).permutation(784)
    flat = np.rot90(first.train["inputs"][:], axes=(1, 2)).reshape(40, 784)[:, order]
    np.testing.assert_allclose(turned.train["inputs"][:].reshape(40, 784), flat, atol=1e-6)


def test_no_held_out_digit_is_trained_on():
    table = drawn(count=1000, held_out=1000)
    every = rows(table.train) + rows(table.held_out)
    assert len({*every}) == 2000


def test_a_hand_can_be_kept_for_held_out_rows():
    """With hardly any jitter a copy is its hand."""
    table = drawn(count=400, held_out=40, unseen=3, jitter=1e-3)
    for digit in range(10):
        own = table.train["inputs"][table.train["targets"] == digit]
        rest = table.held_out["inputs"][table.held_out["targets"] == digit]
        kinds = [own[0]]
        for image in own:
            if min(np.abs(image - kind).max() for kind in kinds) > 0.2:
                kinds.append(image)
        assert len(kinds) == 3
        assert max(np.abs(image - rest[0]).max() for image in rest) < 0.2
        assert min(np.abs(kind - rest[0]).max() for kind in kinds) > 0.2
    assert table.description["unseen"] == 3


@pytest.mark.parametrize("hand", range(4))
def test_ink_is_one_minus_the_distance_to_the_edge_of_the_stroke(hand):
    """Against float64, pixel by pixel, to half a step of grey."""
    for digit in (1, 2, 8):
        strokes = digits.segments(hand, digit)
        middle = np.full((1, 18), 0.5)  # no deviation
        ends, radius = digits._bent(strokes, middle, 20, 1.0)
        np.testing.assert_allclose(ends[0], 14 * strokes + 9.5, atol=1e-5)
        assert radius[0] == np.float32(20 * 0.042)
        image = digits._inked(ends, radius, 20)[0]
        for y in range(20):
            for x in range(20):
                distance = min(away((x, y), 14 * a + 9.5, 14 * b + 9.5) for a, b in strokes)
                wanted = min(max(20 * 0.042 + 0.5 - distance, 0), 1) * 255
                assert abs(image[y, x] - wanted) <= 0.51
        assert 20 < (image > 0).sum() < 200
        assert image[0].max() == image[-1].max() == image[:, 0].max() == image[:, -1].max() == 0


def away(point, a, b):
    """Distance of a point to a piece of a line."""
    line, out = np.subtract(b, a), np.subtract(point, a)
    t = min(max(np.dot(line, out) / np.dot(line, line), 0), 1)
    return math.dist(out, t * line)


def test_strokes_pass_through_their_points_and_stay_joined_when_bent():
    random = np.random.default_rng(0).random((5, 18))
    for hand in range(4):
        for digit, text in enumerate(digits._HANDS[hand].split("|")):
            pieces = digits.segments(hand, digit)
            points = [[float(v) for v in p.split(",")] for stroke in text.split("/") for p in stroke.split()]
            ends = {tuple(np.round(p, 9)) for p in pieces.reshape(-1, 2)}
            assert all(tuple(np.round((np.array(p) - (3, 5)) / 10, 9)) in ends for p in points), (hand, digit)
            assert np.linalg.norm(pieces[:, 1] - pieces[:, 0], axis=1).max() < 0.15
            bent, _ = digits._bent(pieces, random, 28, 1.0)
            joined = [i for i in range(len(pieces) - 1) if np.array_equal(pieces[i, 1], pieces[i + 1, 0])]
            assert len(joined) >= len(pieces) - 1 - text.count("/")
            for i in joined:
                np.testing.assert_array_equal(bent[:, i, 1], bent[:, i + 1, 0])


def test_jitter_moves_digits_within_the_image():
    table = drawn(count=1000)
    border = np.concatenate([table.train["inputs"][:][:, side].ravel() for side in (0, -1)])
    assert (border > 0).mean() < 0.01
    spread = [np.std(drawn(count=100, jitter=j).train["inputs"][:], axis=0).mean() for j in (0.01, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]


def test_two_thousand_digits_take_less_than_three_seconds():
    began = time.process_time()
    drawn(count=2000)
    assert time.process_time() - began < 3


def test_digits_out_of_range_are_refused():
    for words, options in (
        ("classes=10: must be from 0 to 9", {"classes": [1, 10]}),
        ("classes=-1: must be from 0 to 9", {"classes": [-1]}),
        ("count=9: must be from 10", {"count": 9}),
        ("held_out=1: must be from 2", {"held_out": 1, "classes": [0, 1]}),
        ("size=4: must be from 8", {"size": 4}),
        ("jitter=0: must be from 0.001 to 4", {"jitter": 0}),
        ("unseen=4: must be from 0 to 3", {"unseen": 4}),
        ("seed=-1: must be", {"seed": -1}),
        (r"classes=\[1, 1\]: name", {"classes": [1, 1]}),
        (r"classes=\[\]: name", {"classes": []}),
        ("unknown key; did you mean 'rotation'", {"rotations": 1.0}),
    ):
        with pytest.raises(UserError, match=words):
            drawn(**options)


def test_scenarios_are_sources_and_stages():
    source = {"name": "digits", "count": 100}
    sources, stages = scenarios.split(source, (3, 1, 4, 5), 2, steps=7)
    assert sources == {
        "task_00": {**source, "classes": (3, 1), "relabel": True},
        "task_01": {**source, "classes": (4, 5), "relabel": True},
    }
    assert stages == tuple({"name": t, "steps": 7, "mixture": {t: 1.0}} for t in ("task_00", "task_01"))
    sources, stages = scenarios.split(source, 10, 5, relabel=False)
    assert [one["classes"] for one in sources.values()] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert {one["relabel"] for one in sources.values()} == {False}
    assert stages[4] == {"name": "task_04", "mixture": {"task_04": 1.0}}
    assert [s["permutation"] for s in scenarios.permuted(source, 3, 20)[0].values()] == [None, 21, 22]
    assert [s["rotation"] for s in scenarios.rotated(source, 3, 15)[0].values()] == [0.0, 15.0, 30.0]
    names = list(scenarios.permuted(source, 120)[0])
    assert (names[0], names[-1], sorted(names)) == ("task_000", "task_119", names)
    for words, call in (
        ("10 classes in groups=3: choose a divisor", lambda: scenarios.split(source, 10, 3)),
        ("groups=0", lambda: scenarios.split(source, 10, 0)),
        ("0 classes", lambda: scenarios.split(source, 0, 1)),
        ("tasks=0", lambda: scenarios.permuted(source, 0)),
        ("tasks=0", lambda: scenarios.rotated(source, 0, 5)),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_the_config_learns_every_task_and_its_report_tells_accuracy(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    config = importlib.import_module("configs.split_digits")
    assert {one["label"]: dict(one["set"])["method"] for one in config.get_config("compare").variants} == config.METHODS
    with pytest.raises(ValueError, match="no such part"):
        config.get_config("all")
    made = main.plain(config.get_config())
    sources, stages = scenarios.split({**config.SOURCE, "count": 200, "held_out": 60}, 4, 2, steps=60)
    made |= {"sources": sources, "stream": {"batch": 16, "stages": list(stages)}, "method": "er(capacity=64)"}
    made |= {"evaluation": {"every": 60, "rows": 60}, "tensorboard": False, "mesh": {"data": 8}}
    made["schedule"] = {"name": "constant", "peak": 3e-3}
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert train.run(made, str(tmp_path / "run")) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    shown = json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]
    assert shown == small.records(tmp_path / "run", "eval")[-1]["accuracy"]
    assert set(shown) == {"task_00", "task_01"}
    assert min(shown.values()) > 0.9  # guessing is worth 0.5
    told = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["sources"]["task_01"]
    assert (told["licence"], told["source"]["classes"]) == ("Apache-2.0", [2, 3])
