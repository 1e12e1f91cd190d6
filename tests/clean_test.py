"""Cleaning: repetitions, near repetitions, contamination and filters against brute force, and bad options."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcl import domains
from jaxcl.data import clean, prepare, provenance, shingles, tokenizer
from jaxcl.data.sources import Source
from jaxcl.report import origin
from jaxcl.schema import UserError


def run(docs, **options):
    made = clean.make(Source({"name": "list"}, [], lambda: iter(docs)), **options)
    return list(made.documents()), made.removed()


def sentences(count, size, seed=0, vocabulary=3000):
    rng = np.random.default_rng(seed)
    return [[f"w{i}" for i in rng.integers(0, vocabulary, size)] for _ in range(count)]


def jaccard(a, b, n=5):
    a, b = ({tuple(x[i : i + n]) for i in range(len(x) - n + 1)} for x in (a, b))
    return len(a & b) / len(a | b)


def test_the_first_of_each_class_of_equal_texts_stays(monkeypatch):
    monkeypatch.setattr(clean, "_DOCUMENTS", 7)
    rng = np.random.default_rng(0)
    docs = [f"t{i}{' ' * j}x" for i, j in zip(rng.integers(0, 40, 300), rng.integers(1, 4, 300), strict=True)]
    expected = list({" ".join(d.split()): d for d in reversed(docs)}.values())
    found, removed = run(docs)
    assert found == sorted(expected, key=docs.index)
    assert removed == {"duplicate": 300 - len(found)}
    assert run(docs, exact=False) == (docs, {})
    assert run(["A b", "a b", "\uff21 b"])[0] == ["A b", "a b"]


@pytest.mark.parametrize("chunk", [5, 1000])
def test_near_repetitions_against_brute_force(chunk, monkeypatch):
    monkeypatch.setattr(clean, "_DOCUMENTS", chunk)
    rng, base = np.random.default_rng(1), sentences(60, 120)
    docs, similarity = list(base), []
    for words in base:
        other = list(words)
        for place in rng.choice(120, rng.integers(1, 9), replace=False):
            other[place] = "changed"
        docs.append(other)
        similarity.append(jaccard(words, other))
    found, _ = run([" ".join(d) for d in docs], near=0.7)
    kept = [" ".join(d) in set(found) for d in docs]
    assert all(kept[:60])
    similarity, gone = np.array(similarity), ~np.array(kept[60:])
    assert min((similarity > 0.82).sum(), (similarity < 0.58).sum()) > 5
    assert gone[similarity > 0.82].all()
    assert not gone[similarity < 0.58].any()


def test_signatures_estimate_the_jaccard_index_without_bias():
    errors = []
    for seed in range(40):
        a, c = sentences(2, 200, seed)
        b = a[:130] + c[:70]
        signature = shingles.signatures(shingles.units([" ".join(a), " ".join(b)]), 2, 5)
        errors.append((signature[0] == signature[1]).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.07


def test_scripts_without_spaces_are_compared_by_characters():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    other = "山路を登りながら、こう考えた。智に働けば角が立つ。情に棹させば流される。"
    assert len(shingles.units([text]).hashes) == sum(c.isalnum() for c in text)
    assert len(shingles.units(["Élan vital, d'hier 12!"]).hashes) == 5
    assert run([text, text.replace("。", "、") + "猫", other], near=0.7)[0] == [text, other]
    assert run(["...", "!!!", "?"], near=0.5)[0] == ["...", "!!!", "?"]


def test_contamination_is_found_and_a_near_miss_stays(tmp_path):
    (long,), (short,) = sentences(1, 30, 5), sentences(1, 9, 6)
    file = tmp_path / "e.jsonl"
    file.write_text(json.dumps({"q": " ".join(long), "choices": [" ".join(short), "yes"]}) + "\n")
    other = "yes " + " ".join(sentences(1, 50, 7, 10**9)[0])
    dirty = [
        f"{other}\n{', '.join(long[4:10])}.\n{'! '.join(long[10:17]).upper()} {other}",
        f"{other} {' '.join(short)}",
    ]
    tidy = [other, f"{other} {' '.join(long[4:16])} {other}", f"{other} {' '.join(short[1:])}"]
    tidy.append(f"{' '.join(long[:6])}")
    tidy.append(f"{' '.join(long[6:13])}")  # the 13 words lie in two documents
    found, removed = run([*dirty, *tidy], against=str(file))
    assert found == tidy
    assert removed == {"contaminated": 2}
    assert dirty[1] in run(dirty, against=str(file), columns=["q"])[0]
    assert tidy[1] not in run(tidy, against=str(file), ngram=12)[0]
    across = f"{other} {' '.join([*long[-8:], *short[:5]])} {other}"  # of the question and the first choice
    assert run([across], against=str(file))[0] == []


def test_columns_of_parquet_files_count_too(tmp_path):
    (asked,), (other,) = sentences(1, 30, 5), sentences(1, 30, 6)
    pq.write_table(pa.table({"q": [" ".join(asked)], "note": [" ".join(other)]}), tmp_path / "e.parquet")
    dirty = [" ".join(asked[3:20]), " ".join(other[3:20])]
    assert run(dirty, against=str(tmp_path / "e.parquet"))[0] == []
    assert run(dirty, against=str(tmp_path / "e.parquet"), columns=["q"])[0] == [dirty[1]]


def test_filters_and_the_order_of_reasons():
    docs = ["ab", "good long text", "good but bad", "no match here", "good " * 9, "good long text"]
    found, removed = run(docs, min_chars=3, max_chars=30, match="^good", drop=["bad", "worse"])
    assert found == ["good long text"]
    assert removed == {"too_short": 1, "too_long": 1, "unmatched": 1, "dropped": 1, "duplicate": 1}


def test_every_process_removes_the_same(tmp_path):
    script = (
        "from tests.clean_test import *\n"
        "pairs = zip(sentences(20, 60) * 2, sentences(40, 60, 3))\n"
        "docs = [' '.join(d[:40] + e[:k]) for k, (d, e) in enumerate(pairs)]\n"
        "print(run(docs, near=0.6), shingles.units(docs).hashes.sum())"
    )
    root, outputs = Path(__file__).parent.parent, set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.add(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=root, env=environment))
    assert len(outputs) == 1
    assert "near_duplicate" in outputs.pop()


def test_from_the_config_to_the_manifest_and_the_report(tmp_path):
    words, evaluation = tokenizer.make(), tmp_path / "e.txt"
    paragraphs = [" ".join(words) for words in sentences(30, 40)]
    (tmp_path / "d.txt").write_text("\n\n".join([*paragraphs, *paragraphs[:4]]))
    evaluation.write_text(paragraphs[7] + "\n")
    packing = domains.Packing(32, 0.0001, str(tmp_path / "rows"))  # so small that the documents are read twice

    def build(**options):
        text = {"name": "text", "path": str(tmp_path / "d.txt"), "split": "paragraph", "clean": options}
        text["licence"] = "CC0-1.0"
        return domains.of_text({"d": text}, words, packing)

    first = build(against=str(evaluation))
    assert first["d"].manifest["removed"] == {"duplicate": 4, "contaminated": 1}
    assert sum(s["documents"] for s in first["d"].manifest["splits"].values()) == 29
    assert build(against=str(evaluation))["d"].path == first["d"].path
    assert build(against=str(evaluation), ngram=12)["d"].path != first["d"].path
    evaluation.write_text(paragraphs[8] + "\n" + paragraphs[9])
    assert build(against=str(evaluation))["d"].manifest["removed"] == {"duplicate": 4, "contaminated": 2}
    table = provenance.table(first)["d"]
    assert table["licence"] == "CC0-1.0"
    assert "4 duplicate and 1 contaminated" in origin.removed(table)
    assert origin.describe(table["source"]).count("ngram 13") == 1
    del first["d"].manifest["removed"]  # as in a folder from before there was cleaning
    assert provenance.table(first)["d"]["removed"] == {}
    assert prepare.load(first["d"].path).train.fingerprint == first["d"].train.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"match": "("}, r"clean\.match='\('"),
        ({"drop": ["a", "["]}, r"clean\.drop='\['"),
        ({"near": 1.0}, r"clean\.near=1\.0"),
        ({"near": 0}, r"clean\.near=0"),
        ({"ngram": 0}, r"clean\.ngram=0"),
        ({"min_chars": 0}, r"clean\.min_chars=0"),
        ({"min_chars": 9, "max_chars": 8}, r"clean\.max_chars=8"),
        ({"against": "absent*.txt"}, r"clean\.against='absent\*\.txt': no such file"),
        ({"against": __file__}, r"clean_test\.py': expected \.txt"),
        ({"columns": ["a"]}, r"clean\.columns"),
        ({"neer": 0.5}, r"config\.sources\.d\.clean\.neer: unknown key; did you mean 'near'"),
        ({"near": "x"}, r"config\.sources\.d\.clean\.near='x'"),
        ("yes", r"config\.sources\.d\.clean='yes'"),
    ],
)
def test_bad_options_are_user_errors(options, words, tmp_path):
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(UserError, match=words) as error:
        domains.source_of("d", {"name": "text", "path": str(tmp_path / "d.txt"), "clean": options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "columns", "words"),
    [
        ("{", None, r"e\.jsonl:1: not JSON"),
        ('{"question": "a"}', ["questoin"], r"e\.jsonl:1: .*did you mean 'question'"),
        ('{"q": "too few words"}', None, r"e\.jsonl': no text of 8 words"),
    ],
)
def test_bad_evaluation_files_are_user_errors(line, columns, words, tmp_path):
    (tmp_path / "e.jsonl").write_text(line)
    with pytest.raises(UserError, match=words):
        run(["a"], against=str(tmp_path / "e.jsonl"), columns=columns)
