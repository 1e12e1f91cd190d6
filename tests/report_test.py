"""Reports say what happened, in figures that can be checked, from one run or many."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import numpy as np
import pytest
from rich.console import Console

from jaxcl import console, forgetting, report, seeds
from jaxcl.report import __main__ as command_line
from jaxcl.report import compare, figures, terminal
from jaxcl.report import run as runs
from jaxcl.schema import UserError

VOID = {"meta", "br", "path", "rect", "link", "img"}


class Strict(HTMLParser):
    """Fails on tags that do not close, and collects the text that is shown."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td", "div", "p"):
            self.text.append(" ")

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def page_of(path):
    parser = Strict()
    parser.feed(Path(path).read_text())
    assert parser.open == []
    assert parser.links == []  # nothing is loaded from anywhere
    return " ".join("".join(parser.text).split())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return fake_run.make(folder, method="reptile(every=10, keep=0.5)", lr=6e-3)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    fake_run.sweep(folder)
    return folder


def test_figures_follow_from_the_recorded_evaluations(one):
    results = report.write([one])
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    at = {r["boundary"]: r["loss"] for r in lines if r["kind"] == "eval" and r["boundary"] is not None}
    R = np.array([[at[k][domain] for domain in fake_run.DOMAINS] for k in range(-1, 3)])
    np.testing.assert_array_equal(results["matrix"], R)
    assert results["figures"]["forgetting"] == forgetting.forgetting(R)
    assert results["figures"]["learned"] == np.mean([R[1, 0], R[2, 1], R[3, 2]])
    ends = [r for r in lines if r["kind"] == "ledger"][-1]["sources"]
    assert results["tokens"]["replayed"] == sum(row["replayed_tokens"] for row in ends.values())
    assert json.loads((one / "report.json").read_text())["matrix"] == R.tolist()


def test_gaps_follow_from_the_dense_curve(one):
    gaps = {(g["stage"], g["domain"]): g for g in figures.of(runs.load(one))["gaps"]}
    assert set(gaps) == {(1, "prose"), (2, "prose"), (2, "code")}
    run = runs.load(one)
    stage = (run.eval_steps >= 250) & (run.eval_steps <= 500)
    rise = run.losses["prose"][stage] - run.losses["prose"][run.eval_steps == 250]
    assert gaps[1, "prose"]["depth"] == rise.max()
    assert gaps[1, "prose"]["peak"] == run.eval_steps[stage][rise.argmax()] - 250
    assert gaps[1, "prose"]["lasting"] == rise[-1]
    assert gaps[1, "prose"]["evaluations"] == 25


def test_page_of_a_run_says_it_in_words(one):
    results = report.write([one])
    text = page_of(one / "report.html")
    assert f"forgot {results['figures']['forgetting']:.3f} nats per token" in text
    assert "The deepest stability gap opened when" in text
    assert "Replay took 17 % of training" in text
    for part in ("complete", "Evaluation matrix", "Token ledger", "Learning rate", "Throughput", "skip", "restore"):
        assert part in text
    for part in ("now, bits per byte", "parameters 1,123,456", "flops_per_token 8,000,000", "reptile/distance"):
        assert part in text
    assert "Domains that no task trains on" in text
    assert "versions jax 0.10.2" in text
    assert str(one.parent) not in (one / "report.html").read_text()


def test_the_slowest_of_several_processes_is_named(tmp_path):
    run = fake_run.make(tmp_path / "run", steps=4, every=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(line for line in lines if line["kind"] == "eval"):
        line["time"] = {"seconds": 1.0, "skew": 1.5 + (i == 0), "slowest": 2 if i else 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, results = report.build([run])
    assert "The slowest process was busy 1.50 times as long as the median one, most often process 2." in text
    assert (results["time"]["skew"], results["time"]["slowest"]) == (1.5, 2.0)


def test_equal_inputs_give_equal_reports(one, tmp_path):
    report.write([one], out=tmp_path / "a.html")
    report.write([one], out=tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_an_interruption_changes_nothing_outside_time(one, tmp_path):
    """Speed, events and the folder's name may differ; the figures may not."""
    other = tmp_path / "another"
    other.mkdir()
    for name in ("config.json", "run.json"):
        (other / name).write_bytes((one / name).read_bytes())
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "time" in line:
            line["time"] = {"tokens_per_s": 1.0}
    kept = [line for line in lines if line["kind"] != "event"]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    a, b = report.write([one]), report.write([other])
    assert a.pop("time") != b.pop("time")
    assert json.dumps(a) == json.dumps(b)


def test_a_run_in_progress_gives_a_partial_report_that_says_so(tmp_path):
    going = fake_run.make(tmp_path / "going", stop=633)
    results = report.write([going])
    assert not results["complete"]
    assert results["finished_tasks"] == 2
    assert np.isfinite(results["figures"]["forgetting"])  # of the finished tasks
    text = page_of(going / "report.html")
    assert "This run is still in progress: step 633 of 750, 2 of 3 tasks finished" in text
    assert "not yet" in text
    assert "so far" in text
    assert json.loads((going / "report.json").read_text())["matrix"][3] == [None] * 3


def test_a_run_that_a_signal_stopped_says_so_until_it_goes_on(tmp_path, capsys):
    place = fake_run.make(tmp_path / "run", stop=633)
    with (place / "metrics.jsonl").open("a") as file:
        event = {"kind": "event", "step": 633, "event": "stopped", "message": "by SIGTERM; the same command continues"}
        file.write(json.dumps(event) + "\n")
    results = report.write([place])
    assert results["stopped"] == 633
    text = page_of(place / "report.html")
    assert "stopped at step 633" in text
    assert "This run was stopped by a signal: step 633 of 750" in text
    assert "in progress" not in text
    terminal.show(results, place / "report.html")
    assert "The run was stopped at step 633: the report is partial." in capsys.readouterr().out
    with (place / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 633, "event": "restore", "message": "continues"}) + "\n")
    results = report.write([place])
    assert results["stopped"] is None
    text = page_of(place / "report.html")
    assert "in progress" in text
    assert "stopped at step" not in text


@pytest.mark.parametrize("stop", [0, 5, 250, 251, 260])
def test_every_early_moment_of_a_run_can_be_reported(tmp_path, stop):
    report.write([fake_run.make(tmp_path / "run", stop=stop)])
    assert "still in progress" in page_of(tmp_path / "run" / "report.html")


def test_one_task_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"stream": {"steps": 5, "stages": [{"name": "a"}]}}))
    records = [
        {"kind": "eval", "step": s, "task": 0, "boundary": b, "loss": {"a": v}} for s, b, v in ((0, -1, 3), (5, 0, 1))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    results = report.write([folder])
    assert results["complete"]
    assert results["figures"]["learned"] == 1.0
    assert "nothing to forget" in page_of(folder / "report.html")
    assert json.loads((folder / "report.json").read_text())["figures"]["forgetting"] is None


def test_tasks_are_judged_by_their_main_source_wherever_stages_are_named(tmp_path):
    folder = fake_run.make(tmp_path / "run")
    options = json.loads((folder / "config.json").read_text())
    for i, stage in enumerate(options["stream"]["stages"]):
        stage["name"] = f"stage {i}"
        stage["mixture"]["general"] = 0.2
    (folder / "config.json").write_text(json.dumps(options))
    run = runs.load(folder)
    assert run.tasks == ["stage 0", "stage 1", "stage 2"]
    assert run.own == list(fake_run.DOMAINS)
    assert run.domains[-1] == "general"


def test_without_a_config_the_records_are_enough(one, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((one / "metrics.jsonl").read_bytes())
    results = report.write([tmp_path])
    assert results["tasks"] == list(fake_run.DOMAINS)
    assert results["complete"]


def test_many_runs_are_grouped_with_intervals_and_paired_differences(many):
    results = report.write([many])
    loaded = [runs.load(path) for path in report.expand([many])]
    retained = {run.seed: forgetting.retained(run.matrix) for run in loaded if run.label == "replay 25 %"}
    plain = {run.seed: forgetting.retained(run.matrix) for run in loaded if run.label == "plain"}
    group = next(g for g in results["groups"] if g["label"] == "replay 25 %")
    expected = seeds.interval(list(retained.values()))
    assert group["figures"]["retained"] == {"mean": expected.mean, "half_width": expected.half_width, "n": 3}
    assert results["control"] == "plain"
    difference = results["differences"]["replay 25 %"]["retained"]
    assert difference["mean"] == seeds.paired(retained, plain).mean
    # seeds share what they share: the paired interval is the narrower one
    assert difference["half_width"] < group["figures"]["retained"]["half_width"]
    text = page_of(many / "report.html")
    for part in (
        "4 methods side by side",
        "3 seeds each",
        "Results",
        "Paired differences, method minus plain",
        "Loss on prose",
    ):
        assert part in text


def test_reptile_stands_beside_its_learning_rate_matched_control(many):
    results = report.write([many])
    (matched,) = results["learning_rate_matched"]
    means = {group["label"]: group["figures"]["forgetting"]["mean"] for group in results["groups"]}
    paired = matched.pop("differences")["forgetting"]
    assert paired["mean"] == pytest.approx(means[matched["label"]] - means[matched["control"]])
    assert paired["n"] == 3
    assert matched == {
        "label": "replay 25 % + reptile",
        "keep": 0.5,
        "lr": pytest.approx(1.5e-3),
        "control": "replay 25 %, half lr",
    }
    text = page_of(many / "report.html")
    assert "Learning-rate-matched controls" in text
    assert (
        "at the matched learning rate 0.0015 cannot be told apart." in text
    )  # planted: Reptile is nothing but the smaller rate


def test_reptile_without_its_control_is_called_out(many, tmp_path):
    alone = [p for p in report.expand([many]) if runs.load(p).label in ("plain", "replay 25 % + reptile")]
    results = report.write(alone, out=tmp_path / "report.html")
    assert results["learning_rate_matched"][0]["control"] is None
    text = page_of(tmp_path / "report.html")
    assert "has no learning-rate-matched control" in text
    assert "not among these runs" in text


def test_a_run_at_the_right_rate_with_other_replay_is_no_control(tmp_path):
    a = fake_run.make(tmp_path / "a", label="reptile", method="reptile(keep=0.5)")
    b = fake_run.make(tmp_path / "b", label="less replay", lr=1.5e-3, fraction=0.1)
    results = report.write([a, b])
    assert results["learning_rate_matched"][0]["control"] is None


def test_a_control_has_the_matched_rate_at_every_step(tmp_path):
    a = fake_run.make(tmp_path / "a", label="reptile", method="reptile(keep=0.5)")
    b = fake_run.make(tmp_path / "b", label="half lr", lr=1.5e-3)
    assert report.write([a, b])["learning_rate_matched"][0]["control"] == "half lr"
    path = b / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = [r for r in records if r["kind"] == "train"][-1]
    last["lr"] *= 0.9
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert report.write([a, b])["learning_rate_matched"][0]["control"] is None


@pytest.mark.parametrize(
    "change", [{"schedule": {"name": "cosine"}}, {"optim": {"name": "adamw", "weight_decay": 0.0}}]
)
def test_a_run_with_another_schedule_or_optimiser_is_no_control(tmp_path, change):
    a = fake_run.make(tmp_path / "a", label="reptile", method="reptile(keep=0.5)")
    b = fake_run.make(tmp_path / "b", label="half lr", lr=1.5e-3)
    assert report.write([a, b])["learning_rate_matched"][0]["control"] == "half lr"
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({**config, **{k: {**config.get(k, {}), **v} for k, v in change.items()}}))
    assert report.write([a, b])["learning_rate_matched"][0]["control"] is None


def test_control_can_be_chosen(many, tmp_path):
    results = report.write([many], out=tmp_path / "r.html", control="replay 25 %")
    assert results["control"] == "replay 25 %"
    assert "plain" in results["differences"]
    with pytest.raises(UserError, match="did you mean 'plain'"):
        report.write([many], out=tmp_path / "r.html", control="plian")


def test_single_seeds_have_no_interval_and_say_so(many, tmp_path):
    firsts = [path for path in report.expand([many]) if path.name.endswith("seed0")]
    report.write(firsts, out=tmp_path / "r.html")
    text = page_of(tmp_path / "r.html")
    assert "differences may be chance" in text
    assert "nan" not in text.lower().replace("finance", "")
    groups = json.loads((tmp_path / "r.json").read_text())["groups"]
    assert all(g["figures"]["retained"]["half_width"] is None for g in groups)


def joined(path):
    """Makes a run one of a single task with all domains."""
    config = json.loads((path / "config.json").read_text())
    config["stream"]["stages"] = [{"name": "all", "mixture": dict.fromkeys(fake_run.DOMAINS, 1.0)}]
    (path / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        r.update({"task": 0, "stage": "all"} if r["kind"] == "train" else {})
        if r["kind"] == "eval" and r["boundary"] is not None:
            r["boundary"] = {-1: -1, 2: 0}.get(r["boundary"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_joint_training_is_compared_by_all_its_domains_alone(tmp_path):
    doses = {"naive": 0.0, "joint": 0.5, "replay": 0.25}
    runs_ = [fake_run.make(tmp_path / f"{n}{s}", label=n, seed=s, fraction=f) for n, f in doses.items() for s in (0, 1)]
    finals = [json.loads(line) for line in (runs_[2] / "metrics.jsonl").read_text().splitlines()]
    last = [r["loss"] for r in finals if r["kind"] == "eval"][-1]
    results = report.write([*runs_[:2], *map(joined, runs_[2:4]), *runs_[4:]], out=tmp_path / "r.html")
    text = page_of(tmp_path / "r.html")
    assert "Best at the end is replay" in text
    assert "joint, which has everything as one task, ends at" in text
    assert "nan" not in text.lower()
    one = next(r for r in results["runs"] if (r["label"], r["seed"]) == ("joint", 0))
    assert one["figures"]["final"] == pytest.approx(np.mean(list(last.values())))


def test_same_label_with_other_settings_is_told_apart_and_a_seed_twice_is_refused(tmp_path):
    a = fake_run.make(tmp_path / "a", label="x", stop=260)
    b = fake_run.make(tmp_path / "b", label="x", lr=1e-3, stop=260)
    c = fake_run.make(tmp_path / "c", label="x", stop=260, steps=200)
    labels = [g["label"] for g in report.write([a, b])["groups"]]
    assert labels == ["x (plain, 25 % replay, lr 0.003)", "x (plain, 25 % replay, lr 0.001)"]
    assert len(report.write([a, c])["groups"]) == 2
    d = fake_run.make(tmp_path / "d", label="x", stop=260)
    with pytest.raises(UserError, match=r"seed 0 was given twice, \S+/a and \S+/d; leave one"):
        report.write([a, d])
    assert report.expand([a, a]) == [a]


def test_runs_whose_labels_and_methods_are_the_same_are_told_apart_by_their_folders(tmp_path):
    """By their names, by those of the folders above where these are the same, and by the first of several seeds."""

    def made(place, steps, seed=0):
        return fake_run.make(tmp_path / place, label="x", stop=260, steps=steps, seed=seed)

    def told(*runs):
        return [
            group["label"].removeprefix("x (plain, 25 % replay, lr 0.003) ") for group in report.write(runs)["groups"]
        ]

    one, other = made("one/run", 250), made("other/run", 200)
    assert told(one, made("third", 200)) == ["[run]", "[third]"]
    assert told(one, other) == ["[one/run]", "[other/run]"]
    more, others = made("one/again", 250, 1), made("other/again", 200, 1)
    assert told(one, more, other, others) == ["[one]", "[other]"]
    beside = [made("one/beside", 200), made("one/beside1", 200, 1)]
    assert told(one, more, *beside) == ["[run]", "[beside]"]


def test_runs_of_different_progress_compare_on_what_they_share(tmp_path):
    a = fake_run.make(tmp_path / "a", label="a", seed=0, stop=520)
    b = fake_run.make(tmp_path / "b", label="a", seed=1)
    c = fake_run.make(tmp_path / "c", label="b", seed=7)
    results = report.write([a, b, c])
    assert results["groups"][0]["complete"] is False
    text = page_of(tmp_path / "report.html")
    assert "Some runs have not finished" in text
    assert "shares no seed with" in text or "No other method did better" in text


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("reptile(every=10, keep=0.5)", [("reptile", {"every": 10, "keep": 0.5})]),
        ("er(rows=8) + reptile", [("er", {"rows": 8}), ("reptile", {})]),
        (
            [{"name": "ewc", "strength": 2.0}, "reptile(keep=0.1)"],
            [("ewc", {"strength": 2.0}), ("reptile", {"keep": 0.1})],
        ),
        ({"name": "cpt"}, [("cpt", {})]),
        ("", []),
        (None, []),
    ],
)
def test_methods_are_understood_however_they_are_written(method, expected):
    assert runs.parts({"method": method}) == expected


def test_errors_are_one_line_with_the_remedy(tmp_path):
    cases = {}
    cases["missing"] = "not a run directory"
    (tmp_path / "other").mkdir()
    cases["other"] = "not a run directory"
    for name, text, message in (
        ("empty", "", "metrics.jsonl is empty"),
        ("early", '{"kind":"train","step":1,"task":0,"loss":1.0}\n', "no evaluation recorded yet"),
        ("config", '{"kind":"eval","step":0,"boundary":-1,"loss":{"a":1.0}}\n', "config.json: not valid JSON"),
        ("broken", '{"kind"\n{"kind":"train","step":1}\n', "line 1: not a JSON object"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        (tmp_path / name / "config.json").write_text("{")
        cases[name] = message
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            report.write([tmp_path / name])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("report.*"))


def test_only_reports_are_overwritten(one, tmp_path):
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="is not a report"):
        report.write([one], out=tmp_path / "notes.html")
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(UserError, match="is not a report"):
        report.write([one], out=tmp_path / "r.html")
    with pytest.raises(UserError, match=r"must end in \.html"):
        report.write([one], out=tmp_path / "r.pdf")
    with pytest.raises(UserError, match="only one run"):
        report.write([one], out=tmp_path / "s.html", control="x")


def test_command_line(one, tmp_path):
    def run(*arguments):
        root = Path(__file__).parent.parent
        return subprocess.run(
            [sys.executable, "-m", "jaxcl.report", *arguments], capture_output=True, text=True, cwd=root, check=False
        )

    good = run(str(one), f"--out={tmp_path / 'x.html'}")
    assert good.returncode == 0, good.stderr
    assert "forgetting" in good.stdout
    assert (tmp_path / "x.html").exists()
    bad = run(str(tmp_path / "none"))
    assert bad.returncode == 2
    assert re.fullmatch(r"error: .*not a run directory.*\n", bad.stderr)
    usage = run("--nonsense", str(one))
    assert usage.returncode == 2
    assert usage.stderr.count("\n") == 1


def test_terminal_table_shows_every_group(many, tmp_path):
    stream = io.StringIO()
    results = report.write([many], out=tmp_path / "r.html")
    Console(file=stream, width=140).print(terminal.summary(results))
    text = stream.getvalue()
    assert all(label in text for label in ("plain", "replay 25 % + reptile", "±"))


def test_text_from_outside_is_escaped(tmp_path):
    folder = fake_run.make(tmp_path / "run", label="<script>alert(1)</script>", stop=260)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 260, "event": "<b>", "message": "a & <i>b</i>"}) + "\n")
    report.write([folder])
    assert "<script>" not in (folder / "report.html").read_text()
    text = page_of(folder / "report.html")
    assert "a & <i>b</i>" in text


def test_matched_control_uses_the_rate_that_was_really_used(many):
    """The peak comes from the recorded rates, not from a key of the config that a schedule may interpret otherwise."""
    loaded = [runs.load(path) for path in report.expand([many])]
    for run in loaded:
        run.config["schedule"] = {"name": "other"}
    groups = compare.group(loaded, [figures.of(run) for run in loaded])
    (matched,) = compare.matched(groups)
    assert matched.control is not None
    assert matched.control.label == "replay 25 %, half lr"


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    run = fake_run.make(tmp_path / "run", stop=100)
    monkeypatch.setattr("sys.argv", ["report", str(run), "--out=/proc/nowhere.html"])
    with pytest.raises(SystemExit) as caught:
        console.cli(command_line.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith("error: /proc/nowhere.html")
    assert line.endswith("choose another folder")
