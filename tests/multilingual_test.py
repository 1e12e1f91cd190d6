"""The multilingual recipe: disjoint corpora, a tokenizer that has not seen what is held out, its arms, its verdicts."""

import gzip
import importlib
import json
import os
from pathlib import Path

import jax
import pytest

from jaxcl import main, program, seeds, sweep, train
from jaxcl.data import prepare as packing
from jaxcl.data import tokenizer
from jaxcl.data.sources import jsonl
from jaxcl.report.run import parts
from jaxcl.schema import UserError


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """Two files of parallel paragraphs, some in one of them only."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, code, numbers in (("en-fr", "fr", range(900)), ("en-ja", "ja", range(300, 1200))):
        word = {"fr": "le numéro", "ja": "番号は"}[code]
        lines = [json.dumps({"en": f"number {n} of many " * 9, code: f"{word} {n} " * 9}) + "\n" for n in numbers]
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder


@pytest.fixture
def data(recipe, parallel, tmp_path, monkeypatch):
    prepare = recipe("multilingual", "prepare")
    monkeypatch.setattr(prepare, "VOCAB", 300)
    return prepare.prepare(str(parallel), str(tmp_path / "data"))


def test_no_paragraph_is_in_two_languages_and_held_out_ones_do_not_make_the_tokenizer(recipe, parallel, data, tmp_path):
    prepare, bpe = recipe("multilingual", "prepare"), importlib.import_module("jaxcl.bpe")
    texts = {n: list(jsonl.make(path=str(data / f"{n}.jsonl")).documents()) for n in prepare.LANGUAGES}
    numbers = {n: {int(next(w for w in t.split() if w.isdigit())) for t in found} for n, found in texts.items()}
    english, french, japanese = numbers.values()
    assert not english & french
    assert not english & japanese
    assert not french & japanese
    assert all(len(found) > 200 for found in numbers.values())
    assert all("numéro" in t for t in texts["french"])
    held_out = 0
    for name in prepare.LANGUAGES:
        made = packing.make(jsonl.make(path=str(data / f"{name}.jsonl")), tokenizer.make(),
                            directory=str(tmp_path / "rows"), name=name, length=64)  # fmt: skip
        held = [t for t in texts[name] if prepare.held_out(t)]
        assert made.manifest["splits"]["held_out"]["documents"] == len(held)
        assert made.manifest["splits"]["held_out"]["bytes"] == sum(len(t.encode()) for t in held)
        held_out += len(held)
    assert held_out
    seen = (t for found in texts.values() for t in found if not prepare.held_out(t))
    assert (data / "tokenizer" / "tokenizer.json").read_text() == bpe.train(seen, 300)


def test_data_that_is_absent_is_one_line(recipe, tmp_path):
    prepare, config = recipe("multilingual", "prepare"), importlib.import_module("configs.multilingual")
    with pytest.raises(UserError, match=r"has no en-fr.jsonl.gz; give the folder"):
        prepare.prepare(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--data: missing; give the folder"):
        prepare.prepare(None, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"no corpora there; make them with experiments/multilingual/prepare.py"):
        config.get_config(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_arm_can_be_built_and_every_meta_update_has_its_control(recipe, data):
    runs = sweep.expand({**main.plain(importlib.import_module("configs.multilingual").get_config(str(data)))})
    labels = {run["label"]: run for run in runs}
    assert len(runs) == 3 * len(labels)
    for run in labels.values():
        sweep.check(run, Path(data) / "none")
    for label in ("naive, infinite", "MER"):
        run = labels[label]
        _, pieces = train.split({**run, "model": {"name": "transformer", "preset": "tiny", "vocab": 300}})
        stages = [{**stage, "steps": 6} for stage in pieces["stream"]["stages"]]
        rate = {"name": "constant", "peak": 0.1}
        pieces |= {"stream": {**pieces["stream"], "stages": stages}, "schedule": rate}
        made = program.build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}})
        assert set(made.held_out) == {"english", "french", "japanese"}
    cosine = [run for run in labels.values() if run["schedule"]["name"] == "rewarm_cosine" and run["method"] == "cpt"]
    plain = {(run["stream"]["replay"]["fraction"], run["schedule"]["peak"]) for run in cosine}
    meta = [run for run in labels.values() if "reptile" in run["method"]]
    assert len(meta) == 1
    for run in meta:
        keep = dict(parts(run))["reptile"]["keep"]
        assert (run["stream"]["replay"]["fraction"], keep * run["schedule"]["peak"]) in plain


def test_the_pilot_scales_the_rate_and_uses_another_seed(recipe, data):
    config = main.plain(importlib.import_module("configs.multilingual").get_config(str(data)))
    runs = sweep.expand(recipe("multilingual", "launch").pilot(config, [0.5, 2.0]))
    (base,) = (r for r in sweep.expand(config) if r["label"] == "replay 25 %" and r["seed"] == 20)
    assert [r["schedule"]["peak"] / base["schedule"]["peak"] for r in runs] == [0.5, 2.0]
    assert [r["schedule"]["end"] / base["schedule"]["end"] for r in runs] == [0.5, 2.0]
    assert not {r["seed"] for r in runs} & set(config["seeds"])
    assert all(r["stream"] == base["stream"] for r in runs)


def test_verdicts_follow_the_intervals(recipe, tmp_path):
    claims = recipe("multilingual", "claims")
    assert claims.verdict(seeds.interval([-1.0, -1.1, -0.9]), -1) == "holds"
    assert claims.verdict(seeds.interval([1.0, 1.1, 0.9]), -1) == "contradicted"
    assert claims.verdict(seeds.interval([1.0, -1.1, 0.9]), -1) == "not shown"
    assert claims.verdict(seeds.interval([-1.0]), -1) == "not shown", "one seed shows nothing"
    forgotten = {claims.NAIVE: 1.0, claims.LITTLE: 0.7, claims.REPLAY: 0.3}
    labels = {label for *_, weights in claims.CLAIMS for label in weights}
    runs = [
        {"label": label, "seed": seed, "complete": seed != 3, "tasks": ["a", "b"], "matrix": [[5, 5], [1, 4], [2, 3]],
         "figures": dict.fromkeys(claims.SHOWN, seed + (1 + seed / 100) * forgotten.get(label, 0.5))}
        for label in sorted(labels) for seed in (1, 2, 3)
    ]  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps({"runs": runs}))
    arms = claims.load(tmp_path / "report.json")
    assert all(sorted(found) == [1, 2] for found in arms.values()), "a run that goes on is left out"
    lines = {line.split(" | ")[0].strip("| "): line for line in claims.judged(arms).splitlines()}
    assert "-0.3045 ±" in lines["replay 5 % forgets less than none"]
    assert "| holds |" in lines["replay 25 % forgets less than 5 %"]
    per_point = next(line for claim, line in lines.items() if claim.startswith("a point of replay"))
    assert "-0.0406 ±" in per_point, "(0.3 / 5 - 0.4 / 20) * 1.015"
    assert "+1.000" in claims.forgetting(arms)
    (tmp_path / "report.json").write_text(json.dumps({"runs": runs[:3]}))
    with pytest.raises(UserError, match="no finished run of"):
        claims.load(tmp_path / "report.json")
    with pytest.raises(UserError, match="run the comparison first"):
        claims.load(tmp_path / "none.json")


def test_the_real_files_suffice(recipe, tmp_path):
    folder = os.environ.get("JAXCL_DATA", "")
    if not Path(folder, "en-fr.jsonl.gz").exists():
        pytest.skip("JAXCL_DATA names no folder with the parallel files")
    prepare = recipe("multilingual", "prepare")
    made = prepare.corpora(prepare.paragraphs(folder))
    assert min(sum(len(t.encode()) for t in texts) for texts in made.values()) > 1_000_000
