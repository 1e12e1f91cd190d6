"""Accuracies of a stream: every figure by hand on a small table, then through records to the report."""

import json
import math

import fake_run
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import metrics, online, program, report, schema, scores
from jaxcl.data import rows, scenarios, stream, tabular
from jaxcl.models import mlp
from jaxcl.report import classified, compare, figures, many, run, terminal

QUICK = True
NAN = float("nan")

STEPS = np.array([0, 10, 20, 30, 40])
# Classes a, b come in the first task (steps 1 to 20), c and d in the second; c has one row in the first already.
SINCE = np.array([1, 12, 20, 31])
ROWS = np.array([10, 10, 20, 40])
RIGHT = np.array(
    [
        [0.9, 0.0, 0.0, 0.5],  # before training: chance counts nowhere
        [0.6, 0.0, 0.0, 0.5],
        [0.8, 1.0, 0.1, 0.5],
        [0.4, 0.9, 0.6, 0.5],
        [0.5, 0.4, 0.7, 0.9],
    ]
)
ENDS = [20, 40]


def test_figures_by_hand():
    seen = [NAN, 0.6, (8 + 10 + 2) / 40, (4 + 9 + 12) / 40, (5 + 4 + 14 + 36) / 80]
    np.testing.assert_allclose(online.seen_accuracy(STEPS, RIGHT, ROWS, SINCE), seen)
    balanced = [NAN, 0.6, 1.9 / 3, 1.9 / 3, 2.5 / 4]
    np.testing.assert_allclose(online.class_accuracy(STEPS, RIGHT, ROWS, SINCE), balanced)
    found = online.summary(STEPS, RIGHT, ROWS, SINCE, ENDS)
    wanted = {
        "a_auc": np.mean(seen[1:]),
        "a_avg": (seen[2] + seen[4]) / 2,
        "a_last": seen[4],
        # d has not come by the first end: its maximum is 0 and it does not count; that of c is 0.1, and it got better
        "forgetting": ((0.8 - 0.5) + (1.0 - 0.4) + (0.1 - 0.7)) / 3,
        "mean_class": 2.5 / 4,
        "mean_class_avg": (1.9 / 3 + 2.5 / 4) / 2,
    }
    assert found == pytest.approx(wanted)


def test_forgetting_takes_the_best_of_all_earlier_ends():
    right = np.array([[0.5, 0.0], [0.9, 0.0], [0.6, 0.4], [0.7, 0.3]])
    found = online.class_forgetting(np.arange(4), right, np.array([0, 2]), [0, 1, 2, 3])
    assert found == pytest.approx(((0.9 - 0.7) + (0.4 - 0.3)) / 2)
    assert math.isnan(online.class_forgetting(np.arange(4), right, np.array([0, 2]), [3]))
    never = online.class_forgetting(np.arange(4), np.zeros((4, 2)), np.array([0, 2]), [0, 3])
    assert math.isnan(never)


def test_what_was_not_measured_is_nan_and_nothing_is_skipped():
    holes = RIGHT.copy()
    holes[3, 0] = NAN
    found = online.summary(STEPS, holes, ROWS, SINCE, ENDS)
    assert math.isnan(found["a_auc"])
    assert found["a_last"] == pytest.approx(59 / 80)
    holes = RIGHT.copy()
    holes[1, 3] = NAN  # has not come yet
    assert online.summary(STEPS, holes, ROWS, SINCE, ENDS) == online.summary(STEPS, RIGHT, ROWS, SINCE, ENDS)
    holes[2, 0] = NAN
    assert math.isnan(online.summary(STEPS, holes, ROWS, SINCE, ENDS)["forgetting"])
    assert all(math.isnan(v) for v in online.summary(STEPS[:1], RIGHT[:1], ROWS, SINCE, []).values())
    unreached = np.array([1, 12, 20, math.inf])
    assert online.summary(STEPS, RIGHT, ROWS, unreached, ENDS)["a_last"] == pytest.approx(23 / 40)
    with pytest.raises(ValueError, match=r"expected \[N\], \[N, C\]"):
        online.seen_accuracy(STEPS[1:], RIGHT, ROWS, SINCE)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_equal_classes_that_are_all_there_make_both_means_equal(n, c, seed):
    right = np.random.default_rng(seed).random((n, c))
    whole, balanced = (
        f(np.arange(n), right, np.full(c, 7), np.zeros(c)) for f in (online.seen_accuracy, online.class_accuracy)
    )
    np.testing.assert_allclose(whole, right.mean(axis=1))
    np.testing.assert_allclose(balanced, whole)


def test_accuracies_of_classes_are_counted_over_batches_and_padding():
    model = mlp.make(inputs=3, hidden=(), classes=5)
    params = model.init(jax.random.key(0))
    x, y = np.random.default_rng(0).standard_normal((21, 3)).astype(np.float32), np.arange(21) % 4
    columns = {"inputs": x, "targets": y.astype(np.int32), "weights": np.ones(21, np.float32)}
    columns |= dict.fromkeys(("segments", "positions"), np.ones(21, np.int32))
    table = rows.from_columns(columns)
    held = scores.put({"a": list(rows.batches(table, size=8)), "b": list(rows.batches(table, size=8, limit=3))})
    found = scores.by_class(model)(params, held)
    kernel, offset = (np.asarray(params["layer_0"][name], np.float64) for name in ("kernel", "bias"))
    guess = (x @ kernel + offset).argmax(1)
    for name, count in (("a", 21), ("b", 3)):
        right = [np.sum((guess == y)[:count] & (y[:count] == c)) for c in range(5)]
        np.testing.assert_array_equal(found[name], [right, np.bincount(y[:count], minlength=5)])
    told = scores.classified(model)(params, held)
    assert told["accuracy"] == {"a": np.mean(guess == y), "b": np.mean((guess == y)[:3])}
    assert told["accuracy"] == scores.make(model, scores.accuracy)(params, held)
    assert list(told["classes"]["b"]) == ["0", "1", "2"]
    assert told["classes"]["a"]["1"] == np.mean(guess[y == 1] == 1)


@pytest.mark.parametrize("relabel", [False, True])
def test_a_label_that_tasks_share_is_another_class_in_each(relabel):
    """Also with rows of a later task's label in an earlier one: then the class has come."""
    sources, stages = scenarios.split(
        {"name": "digits", "count": 12, "held_out": 8, "size": 8}, 4, 2, steps=3, relabel=relabel
    )
    stages = ({**stages[0], "mixture": {"task_00": 0.5, "task_01": 0.5}}, stages[1])
    corpora = {n: tabular.corpus(schema.make("jaxcl.data.sources", one, field=n)) for n, one in sources.items()}
    flow = stream.make({n: corpus.train for n, corpus in corpora.items()}, stages[:1], batch=4)
    found = program.classes_of(flow, {n: corpus.held_out.labels[:6] for n, corpus in corpora.items()})
    came = flow.arrivals()
    names = {"task_00": ("0", "1"), "task_01": ("0", "1") if relabel else ("2", "3")}
    assert found == {d: {name: {"rows": 3, "come": came[d][int(name)]} for name in own} for d, own in names.items()}
    alone = stream.make({n: corpus.train for n, corpus in corpora.items()}, stages[1:], batch=4)
    found = program.classes_of(alone, {n: corpus.held_out.labels for n, corpus in corpora.items()})
    assert [list(one) for one in found["task_00"].values()] == [["rows"]] * 2  # never comes


DOMAINS = ("first", "second")
LABELS = (("0", "1"), ("2", "3"))


def make(folder, *, seed=0, label="plain", shift=0.0, by_class=True, stop=40, **options):
    """Writes the run of a classifier whose accuracies are RIGHT, less `shift`."""
    folder.mkdir(parents=True)
    stages = [{"name": name, "mixture": {name: 1.0}} for name in DOMAINS]
    config = {
        "label": label,
        "seed": seed,
        "method": options.pop("method", "cpt"),
        "stream": {"steps": 20, "stages": stages},
    }
    cells = [(d, label) for d, own in zip(DOMAINS, LABELS, strict=True) for label in own]
    facts = {d: {} for d in DOMAINS}
    for (domain, name), count, come in zip(cells, ROWS.tolist(), SINCE.tolist(), strict=True):
        facts[domain][name] = {"rows": count, "come": come}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "facts": {"classes": facts} if by_class else {}}))
    writer = metrics.Jsonl(folder / "metrics.jsonl")
    for step, line in zip(STEPS.tolist(), RIGHT - shift, strict=True):
        if step > stop:
            break
        classes = {d: {name: v for (e, name), v in zip(cells, line, strict=True) if e == d} for d in DOMAINS}
        accuracy = {
            d: float(np.average([*classes[d].values()], weights=ROWS[2 * i : 2 * i + 2])) for i, d in enumerate(DOMAINS)
        }
        record = {"kind": "eval", "step": step, "boundary": {0: -1, 20: 0, 40: 1}.get(step), "accuracy": accuracy}
        record |= {"loss": {d: 2 - a for d, a in accuracy.items()}, "bits_per_byte": {}}
        writer.write(record | ({"classes": classes} if by_class else {}))
    writer.close()
    return folder


def page_of(folder):
    return (folder / "report.html").read_text()


def test_a_run_tells_its_accuracies(tmp_path):
    folder = make(tmp_path / "run")
    results = report.write([folder])
    block = results["classified"]
    wanted = online.summary(STEPS, RIGHT, ROWS, SINCE, ENDS)
    wanted["class_forgetting"] = wanted.pop("forgetting")
    assert {name: block["figures"][name] for name in wanted} == pytest.approx(wanted)
    first = np.array([0.9, 0.45])  # of the first task, at the ends
    second = (20 * 0.7 + 40 * 0.9) / 60
    tasks = {"final": (0.45 + second) / 2, "learned": (0.9 + second) / 2, "forgetting": first[0] - first[1]}
    tasks["average_incremental"] = (0.9 + (0.45 + second) / 2) / 2
    assert {name: block["figures"][name] for name in tasks} == pytest.approx(tasks)
    assert block["steps"] == [10, 20, 30, 40]
    assert block["seen"] == pytest.approx(online.seen_accuracy(STEPS, RIGHT, ROWS, SINCE)[1:].tolist())
    assert {(c["domain"], c["label"]): (c["come"], c["accuracy"]) for c in block["classes"]} == {
        ("first", "0"): (1, 0.5), ("first", "1"): (12, 0.4), ("second", "2"): (20, 0.7), ("second", "3"): (31, 0.9)
    }  # fmt: skip
    text = page_of(folder)
    assert (
        "<strong>73.8 %</strong> of held-out rows of the classes that have come are right, mean over classes 62.5 %"
        in text
    )
    assert (
        "45.0 points were forgotten</strong>, mean over earlier tasks; first lost most, from 90.0 % to 45.0 %" in text
    )
    assert "all classes seen" in text
    console = str(fake_run_table(results))
    assert "62.5 %" in console
    assert "45.0" in console


def fake_run_table(results):
    """Returns the cells of the table on the terminal."""
    table = terminal.summary(results)
    return [[*column.cells] for column in table.columns]


def test_a_run_without_classes_has_the_figures_of_tasks_alone(tmp_path):
    folder = make(tmp_path / "run", by_class=False)
    block = report.write([folder])["classified"]
    assert block["figures"]["final"] == pytest.approx((0.45 + 50 / 60) / 2)
    assert math.isnan(block["figures"]["a_auc"])
    assert block["steps"] == []
    assert "forgot 0.450 nats" in page_of(folder)  # the verdict of losses
    assert "What is right" in page_of(folder)
    assert "nats per row" in page_of(folder)
    assert "nats per token" not in page_of(folder)  # a classifier has none


@pytest.mark.parametrize("stop", [0, 10, 20, 30])
def test_early_moments_can_be_reported(tmp_path, stop):
    folder = make(tmp_path / "run", stop=stop)
    block = report.write([folder])["classified"]
    assert math.isnan(block["figures"]["a_last"]) == (stop < 20)
    assert math.isnan(block["figures"]["a_auc"]) == (stop < 10)


def test_what_thinks_is_no_classifier(tmp_path):
    assert report.write([fake_run.make_thinking(tmp_path / "a")])["classified"] is None
    assert report.write([fake_run.make(tmp_path / "b")])["classified"] is None


def test_runs_side_by_side_show_accuracies(tmp_path):
    drop = {"cpt": (0.0, 0.02, 0.04), "er": (-0.01, 0.009, 0.031)}
    folders = [
        make(tmp_path / f"{name}{seed}", seed=seed, label=name, shift=shift, method=name)
        for name, shifts in drop.items()
        for seed, shift in enumerate(shifts)
    ]
    out = tmp_path / "both.html"
    results = report.write(folders, out=out)
    rows = {group["label"]: group["classified"] for group in results["groups"]}
    final = (0.45 + 50 / 60) / 2
    assert rows["cpt"]["final"]["mean"] == pytest.approx(final - 0.02)
    assert rows["er"]["a_last"]["mean"] == pytest.approx(59 / 80 - 0.01)
    assert rows["er"]["a_last"]["n"] == 3
    text = out.read_text()
    for words in (
        f"Most right at the end is <strong>er</strong>: {100 * (final - 0.01):.1f} %",
        "Against cpt that is +1.0",
        "<caption>Tasks</caption>",
        "<caption>Classes that have come</caption>",
        "Paired differences in accuracy (tasks), method minus cpt",
        "Accuracy on first",
    ):
        assert words in text
    assert "Loss on first" not in text
    assert "nats per token" not in text  # no verdict in nats, and no tokens
    cells = fake_run_table(results)
    assert cells[0] == ["cpt", "er"]
    assert cells[2][1].startswith(f"{100 * (final - 0.01):.1f} %")


def test_losses_are_compared_where_no_run_is_a_classifier(tmp_path):
    results = report.write(fake_run.sweep(tmp_path, seeds=(0,)), out=tmp_path / "all.html")
    assert all(group["classified"] == {} for group in results["groups"])
    text = (tmp_path / "all.html").read_text()
    assert "What is right" not in text
    assert "Loss on prose" in text


def test_columns_of_classes_keep_their_places(tmp_path):
    found = run.load(make(tmp_path / "run"))
    np.testing.assert_array_equal(found.classes["second", "2"], RIGHT[:, 2])
    text = classified.section(found, classified.of(found), [], {"first": 0, "second": 1})
    assert all(f"</span>{name}</li>" in text for name in ("first", "second", "all classes seen"))
    (group,) = compare.group([found], [figures.of(found)])
    line = many._mean_line(group, "first", 0, True)
    np.testing.assert_allclose(line.y, RIGHT[:, :2].mean(1))
    np.testing.assert_allclose(many._mean_line(group, "first", 0, False).y, 2 - RIGHT[:, :2].mean(1))
    assert classified.of(found)["figures"]["a_last"] == pytest.approx(59 / 80)
