"""Sections of the report of one run: alignment of the domains, sources and ledger, speed."""

import json
import re

import fake_run
import numpy as np
import pytest
from report_test import page_of

from jaxcl import report


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return fake_run.make(tmp_path_factory.mktemp("runs") / "one", method="reptile(every=10, keep=0.5)", lr=6e-3)


def cells(folder, caption):
    """Returns the rows of a table of the page, each as a list of texts."""
    text = (folder / "report.html").read_text()
    (table,) = re.findall(rf"<caption>{caption}</caption>(.*?)</table>", text)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [re.sub("<[^>]*>", " ", cell).split() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r)] for r in rows
    ]


def test_cosines_of_the_domains_are_shown_for_each_boundary(one):
    results = report.write([one])
    assert [entry["boundary"] for entry in results["alignment"]] == [-1, 0, 1, 2]
    assert [entry["step"] for entry in results["alignment"]] == [0, 250, 500, 750]
    for entry in results["alignment"]:
        planted = fake_run.alignment(entry["boundary"])
        assert entry["cosines"] == [[planted[a][b] for b in results["domains"]] for a in results["domains"]]
        pairs = [planted[a][b] for i, a in enumerate(planted) for b in list(planted)[i + 1 :]]
        assert entry["mean"] == pytest.approx(np.mean(pairs))
    assert json.loads((one / "report.json").read_text())["alignment"] == results["alignment"]
    assert "Do the domains pull together?" in page_of(one / "report.html")
    head, *rows = cells(one, r"After headers \(mean of the pairs −0.22\)")
    assert [*map(" ".join, head)] == ["", "prose", "code", "headers", "general"]
    assert [*map(" ".join, rows[1])] == ["code", "−0.24", "1", "−0.22", "−0.21"]
    shares = re.findall(r'<td class="heat( ally)?" style="--share:(\d+)%">(.)0', (one / "report.html").read_text())
    assert {(bool(ally), sign) for ally, _, sign in shares} == {(True, "+"), (False, "−")}


def test_a_comparison_that_failed_or_is_missing_leaves_gaps(tmp_path):
    folder = fake_run.make(tmp_path / "run", stop=260)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("boundary") == -1:
            del line["alignment"]
        elif line.get("boundary") == 0:
            line["alignment"]["prose"]["code"] = line["alignment"]["code"]["prose"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (entry,) = report.write([folder])["alignment"]
    assert entry["boundary"] == 0
    assert json.loads((folder / "report.json").read_text())["alignment"][0]["mean"] is None
    rows = cells(folder, r"After prose \(mean of the pairs –\)")
    assert rows[1][1:3] == [["1"], ["–"]]


def test_the_data_are_described_and_the_ledger_says_how_much_of_them_was_used(one):
    report.write([one])
    _, prose, _, headers = cells(one, "Data")
    shown = [*map(" ".join, prose)]
    assert shown[:3] == ["prose", "embedded: domain prose, max_bytes 3,000,000", "licence of prose"]
    assert shown[3:7] == ["1.23 k 56", "4.00 k 78", "1.02 M 20.0 k", "1.00 MB 19.5 kB"]
    prints = [fake_run.sources()["prose"][split]["fingerprint"][:12] for split in ("train", "held_out")]
    assert prose[7] == prints
    assert headers[2] == ["not", "stated"]
    assert "Tokenizer: byte, 259 tokens" in page_of(one / "report.html")
    used = [[*map(" ".join, row)] for row in cells(one, "Token ledger")]
    assert used[0][1:4] == ["new", "of the corpus", "replayed"]
    assert used[1][:3] == ["prose", "1.02 M", "100 %"]  # 250 x 4096 of 4000 x 256
    assert used[4][:3] == ["all", "2.56 M", "42 %"]


def test_speed_is_arithmetic_and_a_share_of_the_peak_where_that_is_known(one, tmp_path):
    time = report.write([one])["time"]
    assert time["model_flops_per_s"] == time["tokens_per_s"] * 8_000_000
    assert np.isnan(time["mfu"])
    text = page_of(one / "report.html")
    assert re.search(r"Median 3\d\.\d k tokens per second, counting targets .*? of model arithmetic\.", text)
    assert "MFU" not in text
    known = fake_run.make(tmp_path / "run", mfu=True)
    time = report.write([known])["time"]
    assert time["mfu"] == pytest.approx(time["model_flops_per_s"] / 1e12)
    assert re.search(
        r"That is 29\d GFLOP/s of model arithmetic, (29|30) % of the bfloat16 peak \(MFU\)\.",
        page_of(known / "report.html"),
    )


def compared(folder, *changes):
    """Returns results and verdict of the comparison of runs whose configs are changed: {section: {key: value}}."""
    made = []
    for i, change in enumerate(changes):
        made.append(fake_run.make(folder / f"run{i}", label=f"run {i}", stop=520))
        config = json.loads((made[-1] / "config.json").read_text())
        for section, values in change.items():
            config[section] = {**config.get(section, {}), **values}
        (made[-1] / "config.json").write_text(json.dumps(config))
    results = report.write(made)
    return results, (folder / "report.html").read_text()


def test_what_is_compared_raises_no_warning(tmp_path):
    other = {
        "schedule": {"peak": 1.0},
        "optim": {"name": "sgd"},
        "checkpoint": {"keep": 9},
        "packing": {"directory": "x"},
    }
    results, text = compared(tmp_path, {}, other)
    assert results["differing"] == []
    assert "These runs differ" not in text
    assert "Best at the end" in text


def test_other_settings_are_named_first_in_the_verdict(tmp_path):
    results, text = compared(tmp_path, {}, {"model": {"preset": "small", "a": 1, "b": 2, "c": 3, "d": 4, "<e>": 5}})
    assert results["differing"] == [f"model.{key}" for key in ("<e>", "a", "b", "c", "d", "preset")]
    verdict = text[text.index('aria-label="Verdict"') :]
    assert verdict.startswith('aria-label="Verdict"><p><strong>These runs differ')
    assert "<code>model.&lt;e&gt;</code>" in verdict
    assert "<code>model.d</code> and 1 more. A difference" in verdict
    assert "Best at the end" in verdict


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation": {"rows": 8}},
        {"sources": {"prose": "x"}},
        {"tokenizer": {"name": "bpe"}},
        {"packing": {"length": 3}},
    ],
)
def test_losses_on_other_rows_are_not_ranked(tmp_path, change):
    results, text = compared(tmp_path, {}, change)
    assert not results["same_rows"]
    assert "not on the same held-out rows" in text
    assert not any(words in text for words in ("Best at the end", "Paired differences", "better than the control"))


def test_a_branch_is_called_one_and_told_from_its_trunk_by_the_folder(tmp_path):
    trunk, new = (fake_run.make(tmp_path / name, label="x", stop=520) for name in ("main", "release"))
    about = json.loads((new / "run.json").read_text())
    branch = {"source": "runs/<main>", "step": 300, "whole": True}
    (new / "run.json").write_text(json.dumps({**about, "branch": branch}))
    report.write([new])
    assert "seed 0 · branched off runs/<main> at step 300" in page_of(new / "report.html")
    labels = [group["label"] for group in report.write([trunk, new])["groups"]]
    assert [label.split()[-1] for label in labels] == ["[main]", "[release]"]
