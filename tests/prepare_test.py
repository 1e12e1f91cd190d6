"""Packing: the rows hold the documents exactly, splits do not leak, damage is noticed, a cache is reused."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcl.data import prepare, provenance, rows, shards, tokenizer
from jaxcl.data.sources import Source, embedded
from jaxcl.data.stream import Stage, make
from jaxcl.schema import UserError

LENGTH = 16
TOKENS = tokenizer.make()


def source(documents, name="list"):
    return Source({"name": name}, [[name, sum(map(len, documents)), 0]], lambda: iter(documents))


def documents(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abc dµ"), rng.integers(1, 60))) for _ in range(count)]


def build(tmp_path, docs=None, **options):
    options = {"directory": str(tmp_path), "name": "x", "length": LENGTH, "held_out": 0.2} | options
    return prepare.make(source(documents() if docs is None else docs), TOKENS, **options)


def whole(table, length=LENGTH):
    """All packed rows of a table as (tokens, segments) with padding removed, oracle-style in plain Python."""
    out = []
    for words in table.words(np.arange(len(table))):
        count, tokens = int(words[0]), words[1 : length + 2].tolist()
        bits = [(int(words[length + 2 + i // 32]) >> (i % 32)) & 1 for i in range(length + 1)]
        out.append((tokens[:count], bits[:count]))
    return out


def test_rows_hold_every_document_once_and_in_order(tmp_path):
    docs = documents()
    corpus = build(tmp_path, docs)
    found = []
    for table in (corpus.train, corpus.held_out):
        for tokens, bits in whole(table):
            for token, bit in zip(tokens, bits, strict=True):
                assert bit == (token == TOKENS.bos)
                if bit:
                    found.append([])
                found[-1].append(token)
    assert all(d[-1] == TOKENS.eos for d in found)
    texts = [TOKENS.decode(d) for d in found]
    assert sorted(texts) == sorted(docs)
    train = texts[: corpus.manifest["splits"]["train"]["documents"]]
    assert train == [d for d in docs if d in set(train)]


def test_columns_against_a_slow_transcription(tmp_path):
    corpus = build(tmp_path)
    got = corpus.train.fetch(np.arange(len(corpus.train)))
    for i, (used, bits) in enumerate(whole(corpus.train)):
        segment, position, segments, positions = 0, 0, [], []
        for j in range(len(used)):
            segment, position = (segment + 1, 0) if bits[j] or j == 0 else (segment, position + 1)
            segments.append(segment)
            positions.append(position)
        pad = LENGTH + 1 - len(used)
        tokens, segments, positions = used + [0] * pad, segments + [0] * pad, positions + [0] * pad
        weights = [float(segments[j] == segments[j + 1] > 0) for j in range(LENGTH)]
        assert got["inputs"][i].tolist() == tokens[:-1]
        assert got["targets"][i].tolist() == tokens[1:]
        assert got["segments"][i].tolist() == segments[:-1]
        assert got["positions"][i].tolist() == positions[:-1]
        assert got["weights"][i].tolist() == weights
        assert corpus.train.tokens[i] == sum(weights)
        assert not any(t == TOKENS.bos and w for t, w in zip(tokens[1:], weights, strict=True))
    assert {k: v.dtype.name for k, v in got.items()} == {
        "inputs": "int32", "targets": "int32", "weights": "float32", "segments": "int32", "positions": "int32",
    }  # fmt: skip


def test_split_is_by_text_and_leaks_nothing(tmp_path):
    docs = documents(400)
    a, b = build(tmp_path / "a", docs), build(tmp_path / "b", [*reversed(docs), *docs[:50]])

    def texts(table):
        joined = [t for tokens, _ in whole(table) for t in tokens]
        cuts = [i for i, t in enumerate(joined) if t == TOKENS.bos] + [len(joined)]
        return {TOKENS.decode(joined[i:j]) for i, j in itertools.pairwise(cuts)}

    assert texts(a.train) == texts(b.train)
    assert not texts(a.train) & texts(a.held_out)
    share = a.manifest["splits"]["held_out"]["documents"] / 400
    assert 0.13 < share < 0.27


def test_a_prepared_corpus_is_reused_and_a_changed_one_is_not(tmp_path):
    first = build(tmp_path)
    stamp = os.stat(first.path).st_mtime_ns
    again = build(tmp_path)
    assert (again.path, os.stat(again.path).st_mtime_ns) == (first.path, stamp)
    assert again.train.fingerprint == first.train.fingerprint
    others = [build(tmp_path, documents(seed=1)), build(tmp_path, length=8), build(tmp_path, held_out=0.3)]
    assert len({c.path for c in others} | {first.path}) == 4
    assert len({c.train.fingerprint for c in others} | {first.train.fingerprint}) == 4
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_another_tokenizer_of_the_same_kind_has_rows_of_its_own(tmp_path):
    other = TOKENS._replace(fingerprint="other")
    given = {"directory": str(tmp_path), "name": "x", "length": LENGTH, "held_out": 0.2}
    paths = [prepare.make(source(documents()), words, **given).path for words in (TOKENS, other)]
    assert paths[0] != paths[1]


def test_fingerprint_depends_on_content_alone(tmp_path):
    a, b = build(tmp_path / "a"), build(tmp_path / "b", name="y")
    assert a.train.fingerprint == b.train.fingerprint
    memory = rows.from_words(a.train.words(np.arange(len(a.train))), LENGTH)
    assert memory.fingerprint == a.train.fingerprint
    np.testing.assert_array_equal(memory.tokens, a.train.tokens)
    streams = [make({"x": t}, [Stage("s", 5, {"x": 1})], batch=4) for t in (a.train, memory)]
    for name in ("inputs", "segments"):
        np.testing.assert_array_equal(*(getattr(s.at(3), name) for s in streams))


def test_many_files_and_row_order(tmp_path, monkeypatch):
    one = build(tmp_path / "one")
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 7)
    many = build(tmp_path / "many")
    assert len(many.manifest["splits"]["train"]["files"]) > 3
    index = np.random.default_rng(0).permutation(len(one.train))
    np.testing.assert_array_equal(one.train.words(index), many.train.words(index))
    with pytest.raises(IndexError, match="outside"):
        one.train.fetch(np.array([len(one.train)]))


def test_bytes_per_token(tmp_path):
    corpus = build(tmp_path)
    entry = corpus.manifest["splits"]["train"]
    joined = [t for tokens, _ in whole(corpus.train) for t in tokens]
    assert corpus.train.bytes_per_token == sum(t < 256 for t in joined) / sum(t != TOKENS.bos for t in joined)
    assert entry["tokens"] == corpus.train.tokens.sum()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "counts"])
def test_damage_is_a_user_error_with_the_remedy(tmp_path, damage):
    corpus = build(tmp_path)
    name = {"manifest": "manifest.json", "counts": "train.tokens.npy"}.get(damage, "train-00000.array_record")
    path = os.path.join(corpus.path, name)
    with open(path, "rb") as stream:
        content = bytearray(stream.read())
    place = len(content) - 4 if damage == "counts" else 200
    content[place] = ord("7") if content[place] != ord("7") else ord("8")
    os.remove(path)
    if damage != "remove":
        with open(path, "wb") as stream:
            stream.write(content[: len(content) // 2] if damage == "truncate" else content)

    def read():
        table = build(tmp_path).train
        assert damage == "flip"  # all else is noticed on opening
        table.fetch(np.arange(len(table)))

    with pytest.raises(UserError, match=rf"{name}.*; delete .* to have it rebuilt"):
        read()


def test_every_record_has_its_own_checksum():
    class Reader:
        def __init__(self, record):
            self.read = lambda places: [record] * len(places)

    good = bytes([0x1C, 0xDF, 0x44, 0x21]) + bytes(4)  # the CRC-32 of four zero bytes, and they
    assert shards._records(Reader(good), "f", [0], 1).tolist() == [[0]]
    for bad in (good[:-1] + b"\1", good + bytes(4), b""):
        with pytest.raises(UserError, match="record 5 is damaged"):
            shards._records(Reader(bad), "f", [5], 1)


def test_a_small_corpus_still_holds_one_document_out(tmp_path):
    docs = ["alpha", "beta", "gamma"]
    corpus = build(tmp_path, docs, held_out=1e-9)
    assert corpus.manifest["splits"]["held_out"]["documents"] == 1
    lowest = min(docs, key=lambda d: hashlib.sha256(d.encode()).digest())
    ((tokens, _),) = whole(corpus.held_out)
    assert TOKENS.decode(tokens) == lowest
    assert len(build(tmp_path, docs, held_out=0.0).held_out) == 0


def test_a_killed_build_leaves_nothing_in_the_way(tmp_path):
    script = (
        "import os, sys\n"
        "from tests.prepare_test import *\n"
        "def stop(*_): os.kill(os.getpid(), 9)\n"
        "prepare._publish = stop\n"
        "build(sys.argv[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=Path(__file__).parent.parent)
    assert run.returncode == -9
    assert all(name.startswith(".") for name in os.listdir(tmp_path))
    assert len(build(tmp_path).train) > 0


def test_the_slower_of_two_builders_takes_the_other_ones_rows(tmp_path):
    corpus = build(tmp_path / "a")
    partial = tmp_path / "partial"
    shutil.copytree(build(tmp_path / "b").path, partial)
    prepare._publish(str(partial), corpus.path)
    assert build(tmp_path / "a").train.fingerprint == corpus.train.fingerprint


@pytest.mark.parametrize(
    ("docs", "options", "words"),
    [
        ([], {}, "holds no text"),
        (["only one"], {}, r"too few different documents \(of 1\) for held_out=0.2"),
        (["x"], {"held_out": 1.0}, "held_out=1.0"),
        (["x"], {"length": 0}, "length=0"),
    ],
)
def test_bad_input_is_a_user_error(tmp_path, docs, options, words):
    with pytest.raises(UserError, match=words):
        build(tmp_path, docs, **options)
    assert not tmp_path.exists() or not os.listdir(tmp_path)


def test_provenance_of_a_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"directory": "~/rows", "length": 32, "held_out": 0.2}
    found = {"h": prepare.make(embedded.make(domain="headers", max_bytes=200_000), TOKENS, name="h", **options)}
    assert found["h"].path.startswith(str(tmp_path))
    table = provenance.table(found)
    assert json.loads(json.dumps(table)) == table
    assert table["h"]["licence"] == "PSF-2.0 AND BSD-3-Clause AND Apache-2.0"
    assert table["h"]["train"]["rows"] == len(found["h"].train)
    assert table["h"]["train"]["fingerprint"] == found["h"].train.fingerprint
