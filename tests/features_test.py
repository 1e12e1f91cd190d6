"""Banks of features: rows as they lie on disk, read a batch at a time; long tails; what is refused."""

import hashlib
import importlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl import main, schema
from jaxcl.data import chosen, rows, scenarios, tabular
from jaxcl.data.sources import features
from jaxcl.schema import UserError

QUICK = True


def made(**options):
    return schema.make("jaxcl.data.sources", {"name": "features", **options}, field="sources.x")


def bank(count, classes=4, seed=0, dtype=np.float32, width=6):
    """Rows that are all different, whose first feature is their number; labels go round."""
    x = np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)
    x[:, 0] = np.arange(count)
    return x, np.arange(count) % classes


def numbers(columns):
    return columns["inputs"][:][:, 0].astype(int).tolist()


def put(folder, form, train, held_out=None):
    """Writes a bank in one of its forms; returns its path."""
    arrays = {"features": train[0], "labels": train[1]}
    if held_out:
        arrays = {f"train_{n}": a for n, a in arrays.items()} | {
            "test_features": held_out[0],
            "test_labels": held_out[1],
        }
    if form == "npz":
        np.savez(folder / "bank.npz", **arrays)
        return str(folder / "bank.npz")
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder / "features.npy") if form == "npy" else str(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("form", ["npz", "folder"])
def test_rows_are_those_of_the_file(tmp_path, form, dtype, monkeypatch):
    monkeypatch.setattr(rows, "_CHUNK", 100)  # several chunks
    train, held_out = bank(40, dtype=dtype), bank(12, seed=1, dtype=dtype)
    table = made(path=put(tmp_path, form, train, held_out))
    for columns, (x, y) in ((table.train, train), (table.held_out, held_out)):
        assert {name: (c.shape, str(c.dtype)) for name, c in columns.items()} == {
            "inputs": (x.shape, "float32"),
            "targets": (y.shape, "int32"),
            "weights": (y.shape, "float32"),
            "segments": (y.shape, "int32"),
            "positions": (y.shape, "int32"),
        }
        np.testing.assert_array_equal(columns["inputs"][:], x.astype(np.float32))
        np.testing.assert_array_equal(columns["targets"], y)
    corpus = tabular.corpus(table)
    got = corpus.train.fetch(np.array([7, 0, 7]))
    np.testing.assert_array_equal(got["inputs"], train[0][[7, 0, 7]].astype(np.float32))
    assert type(got["inputs"]) is np.ndarray
    whole = {name: np.asarray(column[:]) for name, column in table.train.items()}
    digest = hashlib.sha256()  # where rows lie does not matter
    for name, column in sorted(whole.items()):
        digest.update(f"{name}/{column.dtype}/{column.shape}/".encode() + column.tobytes())
    assert corpus.train.fingerprint == digest.hexdigest()
    np.testing.assert_array_equal(corpus.train.labels, train[1])


def test_arrays_of_fortran_order_and_columns_of_labels(tmp_path):
    x, y = bank(20)
    path = put(tmp_path, "npz", (np.asfortranarray(x), y[:, None].astype(np.uint8)))
    table = made(path=path, held_out=0.3)
    found = [(n, t) for c in (table.train, table.held_out) for n, t in zip(numbers(c), c["targets"], strict=True)]
    assert sorted(found) == [(i, i % 4) for i in range(20)]
    np.testing.assert_array_equal(table.train["inputs"][:], x[numbers(table.train)])


def test_a_bank_is_not_loaded(tmp_path, monkeypatch):
    """8 MB of features on disk, below 2 MB of memory for a table, its fingerprint and a batch."""
    x = np.random.default_rng(0).standard_normal((4000, 512)).astype(np.float32)
    path = put(tmp_path, "npz", (x, np.arange(4000) % 10), (x[:50] + 1, np.arange(50) % 10))
    made(path=path)  # imports
    monkeypatch.setattr(features, "_ROWS", 2**16)
    monkeypatch.setattr(rows, "_CHUNK", 2**18)
    tracemalloc.start()
    try:
        corpus = tabular.corpus(made(path=path))
        corpus.train.fetch(np.arange(64))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_what_is_held_out_depends_on_content_and_seed_alone(tmp_path):
    x, y = bank(400)
    x[200:] = x[:200]  # all twice
    path = put(tmp_path, "npy", (x, y))
    table = made(path=path, held_out=0.25)
    train, rest = numbers(table.train), numbers(table.held_out)
    assert not {*train} & {*rest}
    assert len(train) + len(rest) == 400
    assert 60 < len(rest) < 140
    assert rest != numbers(made(path=path, held_out=0.25, seed=1).held_out)
    parts = [made(path=path, held_out=0.25, classes=c) for c in ([0, 1], [3, 2])]
    assert sorted(n for part in parts for n in numbers(part.held_out)) == sorted(rest)
    assert sorted(n for part in parts for n in numbers(part.train)) == sorted(train)
    assert parts[1].train["targets"].tolist() == [3 - n % 4 for n in numbers(parts[1].train)]
    kept = made(path=path, held_out=0.25, classes=[3, 2], relabel=False, limit=5)
    assert len(numbers(kept.train)) == 5
    assert {*numbers(kept.train)} < {*train}
    assert {*kept.train["targets"].tolist()} <= {2, 3}
    assert kept.description == {
        "name": "features", "path": path, "held_out": 0.25, "classes": [3, 2], "relabel": False, "limit": 5
    }  # fmt: skip


def test_held_out_rows_of_another_file(tmp_path):
    (tmp_path / "a").mkdir()
    first, second = put(tmp_path, "npz", bank(20)), put(tmp_path / "a", "folder", bank(8, seed=3))
    table = made(path=first, held_out_path=second)
    assert (len(table.train["targets"]), len(table.held_out["targets"])) == (20, 8)


@given(st.integers(1, 300), st.integers(2, 9), st.floats(1, 500), st.integers(0, 5))
def test_a_long_tail_falls_geometrically(count, classes, imbalance, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(classes) * 3, count))
    index = chosen.thinned(labels, imbalance, seed)
    kept = [int((labels[index] == 3 * c).sum()) for c in range(classes)]
    assert kept == [max(round(count * imbalance ** (-c / (classes - 1))), 1) for c in range(classes)]
    assert (np.diff(index) > 0).all()
    assert {*chosen.thinned(labels, imbalance * 2, seed).tolist()} <= {*index.tolist()}


def test_a_long_tail_is_the_same_in_every_task_and_spares_held_out_rows(tmp_path):
    path = put(tmp_path, "npz", bank(400), bank(80, seed=1))
    whole = made(path=path, imbalance=10.0)
    assert np.bincount(whole.train["targets"]).tolist() == [100, 46, 22, 10]
    assert np.bincount(whole.held_out["targets"]).tolist() == [20] * 4
    sources, _ = scenarios.class_incremental({"name": "features", "path": path, "imbalance": 10.0}, [3, 0, 1, 2], 2)
    tables = [schema.make("jaxcl.data.sources", one, field="x") for one in sources.values()]
    assert [np.unique(t.train["targets"]).tolist() for t in tables] == [[0, 3], [1, 2]]
    assert sorted(n for t in tables for n in numbers(t.train)) == sorted(numbers(whole.train))
    digits = {"name": "digits", "count": 200, "held_out": 40, "size": 8, "imbalance": 20.0}
    table = schema.make("jaxcl.data.sources", digits, field="x")
    wanted = [round(20 * 20 ** (-c / 9)) for c in range(10)]
    assert np.bincount(table.train["targets"]).tolist() == wanted
    part = schema.make("jaxcl.data.sources", digits | {"classes": [5, 0], "relabel": False}, field="x")
    assert np.bincount(part.train["targets"]).tolist() == [100, 0, 0, 0, 0, round(100 * 20 ** (-5 / 9))]


def test_class_incremental_tasks_keep_their_labels():
    sources, stages = scenarios.class_incremental({"name": "digits"}, [7, 1, 2, 9, 0, 4], 2, base=2, steps=3)
    assert [one["classes"] for one in sources.values()] == [(7, 1), (2, 9), (0, 4)]
    assert not any(one["relabel"] for one in sources.values())
    assert [stage["steps"] for stage in stages] == [3, 3, 3]
    for words, options in (("6 classes in groups=4", {"groups": 4}), ("base=6: of 6", {"groups": 1, "base": 6})):
        with pytest.raises(UserError, match=words):
            scenarios.class_incremental({"name": "digits"}, 6, **options)


@pytest.mark.parametrize("part", ["air", "blurry"])
def test_the_config_is_one_pass_over_whole_batches(part):
    config = main.plain(importlib.import_module("configs.long_tail").get_config(part))
    assert set(config["sources"]) == {stage["name"] for stage in config["stream"]["stages"]}
    for stage in config["stream"]["stages"]:
        source = config["sources"][stage["name"]] | {"size": 8}
        table = schema.make("jaxcl.data.sources", source, field="x")
        assert stage["steps"] == len(table.train["targets"]) // config["stream"]["batch"] > 0
        if part == "air":  # labels are kept
            assert np.unique(table.train["targets"]).tolist() == list(source["classes"])


def test_what_is_no_bank_is_refused(tmp_path):
    x, y = bank(20)
    bad, large = x.copy(), x.astype(np.float64)
    bad[17, 3], large[3, 2] = np.nan, 1e300

    def npz(name, save=np.savez, **arrays):
        save(tmp_path / name, **arrays)
        return str(tmp_path / name)

    alone = tmp_path / "alone_features.npy"
    np.save(alone, x)
    short = tmp_path / "short_features.npy"
    short.write_bytes(alone.read_bytes()[:-8])
    np.save(tmp_path / "short_labels.npy", y)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_bytes(b"text")
    (tmp_path / "text.csv").write_bytes(b"text")
    whole = npz("whole.npz", features=x, labels=y)
    cases = [
        ("no such file or folder", {"path": str(tmp_path / "none")}),
        ("is no .npz, no \\*features", {"path": str(tmp_path / "text.csv")}),
        ("cannot be read", {"path": str(tmp_path / "text.npz")}),
        ("holds nothing; save features and labels", {"path": str(tmp_path / "empty")}),
        ("holds a, b; save features", {"path": npz("names.npz", a=x, b=y)}),
        ("its labels are not beside it; save them as alone_labels.npy", {"path": str(alone)}),
        ("cannot be read", {"path": str(short)}),
        ("features is compressed", {"path": npz("small.npz", np.savez_compressed, features=x, labels=y)}),
        (
            r"features of shape \(20, 2, 3\); expected \[N, D\]",
            {"path": npz("a.npz", features=x.reshape(20, 2, 3), labels=y)},
        ),
        (r"features of shape \(0, 6\)", {"path": npz("b.npz", features=x[:0], labels=y[:0])}),
        ("features of int64; store float32", {"path": npz("c.npz", features=x.astype(int), labels=y)}),
        (r"20 rows of features and labels of shape \(19,\)", {"path": npz("d.npz", features=x, labels=y[1:])}),
        ("labels of int64; expected whole numbers from 0 on", {"path": npz("e.npz", features=x, labels=y - 1)}),
        ("labels of float64; expected", {"path": npz("f.npz", features=x, labels=y.astype(float))}),
        ("Python objects, which are not loaded", {"path": npz("g.npz", features=x, labels=np.array([{}] * 20))}),
        (
            r"features\[17, 3\]=nan: no finite float32",
            {"path": npz("h.npz", features=bad, labels=y), "classes": [1], "held_out": 0.5},
        ),
        (r"features\[3, 2\]=1e\+300: no finite", {"path": npz("i.npz", features=large, labels=y), "held_out": 0.2}),
        (
            r"6 features and held-out rows 5",
            {"path": whole, "held_out_path": npz("j.npz", features=x[:, 1:], labels=y)},
        ),
        ("held_out=1.0: of features a share", {"path": whole, "held_out": 1.0}),
        ("held_out=nan", {"path": whole, "held_out": math.nan}),
        ("held_out=0.5: held_out_path is given as well", {"path": whole, "held_out": 0.5, "held_out_path": str(alone)}),
        ("is path as well", {"path": whole, "held_out_path": whole}),
        ("held_out=1e-09: of 20 rows; leave some", {"path": whole, "held_out": 1e-9}),
        ("classes=.*: no training row has a label of .9.", {"path": whole, "classes": [9]}),
        ("imbalance=0.5: a ratio of at least 1", {"path": whole, "imbalance": 0.5}),
        ("imbalance=inf", {"path": whole, "imbalance": math.inf}),
        ("si_blurry: needs rows that are held out anyway", {"path": whole, "si_blurry": {"task": 0, "tasks": 1}}),
        ("limit=0", {"path": whole, "limit": 0}),
    ]
    for words, options in cases:
        with pytest.raises(UserError, match=words) as error:
            made(**options)
        assert "\n" not in str(error.value)
    assert made(
        path=npz("k.npz", features=bad, labels=y), classes=[0, 2, 3], held_out=0.5
    )  # the row belongs to another task
