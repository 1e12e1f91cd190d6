"""Reports of runs that learn by rollouts speak of accuracy, and their numbers are those of the records."""

import io
import json
import math
import re

import fake_run
import numpy as np
import pytest
from report_sections_test import cells
from report_test import page_of
from rich.console import Console

from jaxcl import forgetting, report, seeds
from jaxcl.report import chart, figures, inference, terminal
from jaxcl.report import run as runs


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rewrite(folder, change):
    """Changes every record in place."""
    lines = records(folder)
    for line in lines:
        change(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def set_facts(folder, **facts):
    about = json.loads((folder / "run.json").read_text())
    about["facts"] |= facts
    (folder / "run.json").write_text(json.dumps(about))


def texts(folder, caption):
    return [[" ".join(cell) for cell in row] for row in cells(folder, caption)]


def verdict(folder):
    text = (folder / "report.html").read_text()
    return re.sub("<[^>]*>", "", text[text.index('aria-label="Verdict">') :].partition("</section>")[0])


def shown(results):
    buffer = io.StringIO()
    Console(file=buffer, width=200).print(terminal.summary(results))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return fake_run.make_thinking(tmp_path_factory.mktemp("rollouts") / "one")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return fake_run.make_thinking(tmp_path_factory.mktemp("rollouts") / "two", domains=fake_run.PROBLEMS)


def test_figures_are_those_of_the_records_before_and_after(one):
    block = report.write([one])["inference"]
    at = {r["boundary"]: r for r in records(one) if r["kind"] == "eval" and r["boundary"] is not None}
    assert (block["mode"], block["since"], block["begin"], block["step"]) == ("soft", "learn add", 60, 120)
    assert list(block["domains"]["add"]) == ["soft", "hard", "gumbel"]  # its own mode first
    for mode, entry in block["domains"]["add"].items():
        before, after = (at[k]["inference"]["add"][mode] for k in (0, 1))
        assert entry["greedy"] == {"before": before["greedy"], "after": after["greedy"]}
        for k in ("1", "4", "16"):
            assert entry["sample"][k] == {"before": before["sample"][k], "after": after["sample"][k]}
        assert block["drift"]["add"][mode] == {
            "before": at[0]["drift"]["add"][mode],
            "after": at[1]["drift"]["add"][mode],
        }
        assert block["entropy"]["add"][mode] == at[1]["entropy"]["add"][mode]
    assert block["guessing"] == {"add": fake_run.BASELINES["add"]}
    assert json.loads((one / "report.json").read_text())["inference"] == block


def test_table_of_modes_says_what_was_measured_and_what_guessing_is_worth(one):
    report.write([one])
    head, soft, hard, _ = texts(one, "Inference")
    assert head == ["mode", "greedy", "pass@1", "pass@4", "pass@16"]
    first, last = (fake_run.accuracies("add", "soft", step, 120) for step in (60, 120))
    assert soft[0] == "soft thoughts"
    assert soft[1] == f"{100 * last['greedy']:.1f} % +{100 * (last['greedy'] - first['greedy']):.1f}"
    assert soft[4] == f"{100 * last['sample']['16']:.1f} % +{100 * (last['sample']['16'] - first['sample']['16']):.1f}"
    assert hard[1].startswith(f"{100 * fake_run.accuracies('add', 'hard', 120, 120)['greedy']:.1f} %")
    text = page_of(one / "report.html")
    assert "256 problems: a share near 50 % is known to ± 6.1 points" in text
    assert "Guessing: majority 13.6 % and parity 25.7 %." in text
    assert "1 answer could not be verified" in text
    for title in ("Rewards", "Accuracy", "Entropy of the next token", "Time for rollouts", "Length of the rollouts"):
        assert f"<h3>{title}</h3>" in (one / "report.html").read_text()
    assert "What the method reports" not in text  # rollouts have their own section
    assert texts(one, "Drift of right answers")[1] == ["soft thoughts", "1.010 −0.500"]


def test_verdict_speaks_of_accuracy_not_of_nats(one):
    report.write([one])
    said = verdict(one)
    assert "Soft thoughts: 55 % → 70 % of held-out problems right (256 problems; guessing by parity: 26 %)." in said
    assert "52 % → 64 % at the first try, 81 % → 90 % within 16 tries." in said
    assert "nats" not in said
    assert "forgot" not in said  # the one domain is what the last stage learns


def test_an_accuracy_below_the_guessers_is_said_to_be_no_better(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run")
    set_facts(folder, baselines={"add": {"majority": 0.1, "oracle<b>": 0.9}})
    report.write([folder])
    assert "guessing by oracle&lt;b&gt;: 90 %), which is no better than guessing." in verdict(folder)


def test_several_domains_and_forgetting_in_points(two):
    def forget(record):
        if record["kind"] == "eval" and record["boundary"] == 2:
            record["accuracy"]["add"] = 0.52

    rewrite(two, forget)
    results = report.write([two])
    at = {r["boundary"]: r["accuracy"] for r in records(two) if r["kind"] == "eval" and r["boundary"] is not None}
    R = np.array([[at[k][domain] for domain in ("add", "add", "mnns")] for k in range(-1, 3)])
    np.testing.assert_array_equal(results["accuracy_matrix"]["matrix"], R)
    lost = R[:, 0].max() - R[-1, 0]
    assert lost > 0.05
    assert results["accuracy_matrix"]["per_task_forgetting"] == pytest.approx([lost, lost, 0.0])
    assert results["accuracy_matrix"]["figures"] == forgetting.summary(R, higher_is_better=True)
    assert inference.forgotten(results) == {"add": (0.52, pytest.approx(lost))}
    assert f"add went from {100 * R[:, 0].max():.0f} % to 52 % of problems right: {100 * lost:.1f} points" in verdict(
        two
    )
    table = texts(two, "Accuracy at the boundaries")
    assert table[-1] == ["forgetting, points", f"{100 * lost:.1f}", f"{100 * lost:.1f}", "–"]
    assert table[-2][1:] == ["52.0 %", "52.0 %", f"{100 * at[2]['mnns']:.1f} %"]
    assert len(texts(two, "Inference: add")) == len(texts(two, "Inference: mnns")) == 4
    assert "mnns, soft thoughts: 57 % → 77 %" in verdict(two)


def test_classifiers_get_forgetting_in_accuracy_and_keep_their_verdict(tmp_path):
    folder = fake_run.make(tmp_path / "run", stop=520)
    report.write([folder])
    before = verdict(folder)

    def classify(record):
        if record["kind"] == "eval":
            record["accuracy"] = {d: 1 / (1 + loss) for d, loss in record["loss"].items()}

    rewrite(folder, classify)
    results = report.write([folder])
    assert results["inference"] is None
    R = np.array(results["accuracy_matrix"]["matrix"])[:3, :2]
    assert results["accuracy_matrix"]["figures"]["forgetting"] == pytest.approx(R[:, 0].max() - R[2, 0])
    for old, new in (("per token", "per row"), ("M tokens", "M rows"), ("new text", "new rows")):  # of a classifier
        before = before.replace(old, new)
    assert verdict(folder) == before
    assert "Accuracy at the boundaries" in page_of(folder / "report.html")
    assert "Rollouts" not in page_of(folder / "report.html")


def test_a_run_without_accuracy_says_nothing_of_it(tmp_path):
    folder = fake_run.make(tmp_path / "run", stop=260)
    results = report.write([folder])
    assert results["inference"] is None
    assert results["accuracy_matrix"] is None
    assert "ccuracy" not in page_of(folder / "report.html")
    assert "method" in shown(results)


@pytest.mark.parametrize("stop", [0, 1, 10, 59, 60, 61, 75, 85, 119])
def test_every_moment_of_a_run_can_be_reported(tmp_path, stop):
    folder = fake_run.make_thinking(tmp_path / "run", stop=stop)
    results = report.write([folder])
    block, said = results["inference"], verdict(folder)
    page_of(folder / "report.html")
    shown(results)
    assert "still in progress" in said
    assert ("No step has learned by rollouts yet." in said) == (stop <= 60)
    pair = block["domains"]["add"]["soft"]["greedy"]
    assert math.isnan(pair["after"]) == (stop < 80)
    assert pair["before"] == fake_run.accuracies("add", "soft", min(60, stop // 20 * 20), 120)["greedy"]
    others = block["domains"]["add"]["hard"]  # measured at boundaries alone
    assert (others["step"], math.isnan(others["greedy"]["after"])) == (60 if stop >= 60 else 0, True)
    stale = [row[0] for row in texts(folder, "Inference") if "at step" in row[0]]
    assert bool(stale) == (block["step"] not in (0, 60))


def test_without_a_supervised_stage_changes_are_since_before_training(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run", warm=False)
    block = report.write([folder])["inference"]
    assert (block["since"], block["begin"]) == ("training", 0)
    assert "Small: change since before training, in percentage points." in page_of(folder / "report.html")
    assert block["domains"]["add"]["soft"]["greedy"]["before"] == fake_run.accuracies("add", "soft", 0, 60)["greedy"]


def test_a_run_that_never_learns_by_rollouts_is_told_since_before_training(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run", stop=60)
    config = json.loads((folder / "config.json").read_text())
    config["stream"]["stages"] = config["stream"]["stages"][:1]
    (folder / "config.json").write_text(json.dumps(config))
    results = report.write([folder])
    assert results["complete"]
    assert results["inference"]["since"] == "training"
    assert "Soft thoughts: 40 % → 55 %" in verdict(folder)
    assert "No step has learned" not in verdict(folder)
    assert "<h3>Rewards</h3>" not in (folder / "report.html").read_text()


def test_one_thought_has_no_profile(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run", thoughts=1)
    report.write([folder])
    assert "Entropy of the next token" not in page_of(folder / "report.html")
    assert "Drift of right answers" in page_of(folder / "report.html")


def test_what_was_not_measured_or_is_not_finite_leaves_gaps(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run")

    def damage(record):
        if record["kind"] == "train" and record["step"] == 70:
            record["reward"] = record["signal"] = None
        if record["kind"] == "eval" and record["boundary"] == 1:
            table = record["inference"]["add"]
            table["soft"]["greedy"] = None
            del table["soft"]["sample"]["4"], table["gumbel"]["sample"]
            record["entropy"]["add"]["hard"][1] = None
            record["drift"]["add"]["hard"] = None
            record["accuracy"]["add"] = None
            del record["drift"]["add"]["gumbel"]

    rewrite(folder, damage)
    set_facts(folder, baselines={"add": {"majority": None}}, problems={})
    results = report.write([folder])
    soft = results["inference"]["domains"]["add"]["soft"]
    assert soft["greedy"]["before"] == fake_run.accuracies("add", "soft", 60, 120)["greedy"]
    assert math.isnan(soft["greedy"]["after"])
    assert soft["sample"]["4"]["after"] == fake_run.accuracies("add", "soft", 100, 120)["sample"]["4"]  # the last one
    assert np.isnan(results["inference"]["entropy"]["add"]["hard"][1])
    text = page_of(folder / "report.html")
    assert "nan" not in text.lower().replace("finance", "")
    assert "How many problems there are was not recorded." in text
    assert "What guessing is worth was not recorded." in text
    json.loads((folder / "report.json").read_text())
    shown(results)


def test_the_records_are_enough_without_a_config(one, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes((one / "metrics.jsonl").read_bytes())
    block = report.write([tmp_path / "run"])["inference"]
    assert (block["mode"], block["begin"]) == ("soft", 60)  # the mode that is measured between boundaries
    assert block["domains"] == figures.of(runs.load(one))["inference"]["domains"]


def test_a_run_whose_mode_is_unknown_is_told_by_its_table(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run", every=60)  # boundaries alone
    (folder / "config.json").unlink()
    results = report.write([folder])
    assert results["inference"]["mode"] == ""
    assert len(texts(folder, "Inference")) == 4
    assert "right" not in verdict(folder)
    assert shown(results).split()[:3] == ["mode", "not", "recorded"]


def test_text_from_outside_is_escaped(tmp_path):
    folder = fake_run.make_thinking(tmp_path / "run", label="<b>x", domains=fake_run.PROBLEMS)
    for file in (folder / "metrics.jsonl", folder / "config.json"):
        text = file.read_text().replace("learn add", "<s>learn")
        file.write_text(text.replace('"add"', '"<u>add"').replace('"soft"', '"<i>soft"'))
    set_facts(folder, baselines={"<u>add": {"<em>": 0.2}}, problems={"<u>add": 10, "mnns": 10})
    report.write([folder])
    text = (folder / "report.html").read_text()
    page_of(folder / "report.html")
    assert not re.search("<(b>x|i>|u>|s>|em>)", text)
    assert "&lt;i&gt;soft thoughts" in text


def test_terminal_shows_accuracy_before_and_after(one, two):
    line = shown(report.write([one])).splitlines()
    assert line[0].split() == ["soft", "thoughts", "greedy", "pass@1", "pass@16", "guessing"]
    assert "55.0 % → 70.0 %" in line[1]
    assert line[1].rstrip().endswith("25.7 %")
    assert len(shown(report.write([two])).splitlines()) == 3


def test_seeds_have_intervals_and_paired_differences_in_accuracy(tmp_path):
    made = {
        (policy, seed): fake_run.make_thinking(tmp_path / f"{policy}{seed}", label=policy, policy=policy, seed=seed)
        for policy in ("hard", "soft")
        for seed in (0, 1, 3)
    }
    results = report.write([tmp_path])
    assert results["differing"] == []  # a policy is what is compared
    planted = {key: fake_run.accuracies("add", key[0], 120, 120, key[1]) for key in made}
    hard, soft = results["groups"]
    for group, policy in ((hard, "hard"), (soft, "soft")):
        expected = seeds.interval([planted[policy, seed]["greedy"] for seed in (0, 1, 3)])
        for found in (group["accuracy"]["add"]["own"]["greedy"], group["accuracy"]["all"]["own"]["greedy"]):
            assert (found["mean"], found["half_width"], found["n"]) == pytest.approx(expected)
    pairs = [planted["soft", seed]["sample"]["16"] - planted["hard", seed]["sample"]["16"] for seed in (0, 1, 3)]
    found = results["accuracy_differences"]["soft"]["add"]["pass@16"]
    assert (found["mean"], found["half_width"], found["n"]) == pytest.approx(seeds.interval(pairs))
    text = page_of(tmp_path / "report.html")
    mean = 100 * np.mean([planted["soft", seed]["greedy"] for seed in (0, 1, 3)])
    assert f"Most right is soft: {mean:.1f} %" in text
    assert "Best at the end" not in text
    rows = texts(tmp_path, "Accuracy by mode of inference")
    assert [row[:2] for row in rows[1:3]] == [["hard", "hard thoughts"], ["hard", "soft thoughts"]]
    assert len(rows) == 7
    assert "Paired differences in accuracy, method minus hard" in text
    assert shown(results).splitlines()[0].split() == ["method", "greedy", "pass@1", "pass@4", "pass@16"]


def test_options_of_a_policy_are_not_part_of_its_mode(tmp_path):
    """`config.policy` may be text with options; the records name the mode without them."""
    folder = fake_run.make_thinking(tmp_path / "run", policy="soft")
    found = report.write([folder])["inference"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"policy": "soft(temperature=1.0)"}))
    assert report.write([folder])["inference"] == found
    assert found["mode"] == "soft"


def test_runs_side_by_side_in_progress_show_the_modes_that_were_measured_last(tmp_path):
    for policy in ("hard", "soft"):
        fake_run.make_thinking(tmp_path / policy, label=policy, policy=policy, stop=85)
    results = report.write([tmp_path])
    assert [list(group["accuracy"]["add"]) for group in results["groups"]] == [["hard", "own"], ["soft", "own"]]
    assert "Some runs have not finished" in verdict(tmp_path)
    assert "single seed there is no interval" in verdict(tmp_path)
    page_of(tmp_path / "report.html")


def test_a_curve_breaks_where_a_long_stretch_was_not_measured():
    y = np.concatenate([np.ones(2000), np.full(2000, np.nan), np.ones(2000)])
    drawn = chart.figure([chart.Line("", np.arange(6000.0), y)], title="t", x="x", y="y", half=True)
    (path,) = re.findall('class="line[^>]* d="([^"]*)"', drawn)
    assert path.count("M") == 2
