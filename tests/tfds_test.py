"""TensorFlow Datasets without TensorFlow: a dataset built here goes the whole way; one that is not there says so."""

import functools
import io
import json
import pathlib
import struct
import sys
import zlib

import jax
import numpy as np
import processes
import pytest
import small
from absl import logging

from jaxcl import branch, program, saved, schema, train, weights
from jaxcl.data import prepare, rows, stream, tabular, tokenizer
from jaxcl.data.sources import Chat, images, tfds
from jaxcl.schema import UserError

ROOT = pathlib.Path(__file__).parent.parent


def sentence(i):
    rng = np.random.default_rng(i)
    return f"{i} µ " + " ".join(rng.choice(small.WORDS, 30))


def image(i):
    return np.full((4, 3, 1), i, np.uint8)


def png(pixels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets in array_record format: `tiny_words` and `tiny_images`."""
    import tensorflow_datasets as library

    class Tiny(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(80), "test": self._generate_examples(6)}

        def _info(self):
            return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(self.features()))

        def _generate_examples(self, count):
            for i in range(count):
                yield i, self.example(i)

    class TinyWords(Tiny, skip_registration=True):
        def features(self):
            text = library.features.Text()
            turns = library.features.Sequence({"role": text, "content": text})
            return {"text": text, "lang": text, "n": np.int32, "turns": turns, "png": library.features.Image()}

        def example(self, i):
            turns = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]
            picture = io.BytesIO(png(image(i)))
            return {"text": sentence(i), "lang": "de" if i % 2 else "fr", "n": i, "turns": turns, "png": picture}

    class TinyImages(Tiny, skip_registration=True):
        def features(self):
            pixels = library.features.Tensor(shape=(4, 3, 1), dtype=np.uint8)
            return {"image": pixels, "label": library.features.ClassLabel(num_classes=3)}

        def example(self, i):
            return {"image": image(i), "label": i % 3}

    place = tmp_path_factory.mktemp("tfds")
    for builder in (TinyWords, TinyImages):
        builder(data_dir=str(place), file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return str(place)


def words(folder, **options):
    return list(tfds.make(dataset="tiny_words", data_dir=folder, **options).documents())


def test_documents_of_a_dataset(folder, capfd):
    texts = {sentence(i) for i in range(80)}
    found = words(folder)
    assert set(found) == texts
    assert found == words(folder)
    assert words(folder, split="train[:25%]") == found[:20]
    assert len(words(folder, split="train+test")) == 86
    assert set(words(folder, where={"lang": "de", "n": [3, 4, 5]})) == {sentence(3), sentence(5)}
    chats = set(words(folder, messages="turns", split="test"))
    assert chats == {Chat((("user", f"{i}?"), ("assistant", f"{i}!"))) for i in range(6)}
    pairs = words(folder, prompt="lang", response="text", split="test")
    assert set(pairs) == {Chat((("user", "de" if i % 2 else "fr"), ("assistant", sentence(i)))) for i in range(6)}
    assert capfd.readouterr() == ("", "")


def test_what_is_wrong_is_one_line(folder, tmp_path):
    for text, options in (
        (
            "dataset='none/x': not prepared in data_dir='.*'; set download=True, or run tfds.builder",
            {"dataset": "none/x"},
        ),
        ("split='dev': not in 'tiny_words'; choose from t", {"split": "dev"}),
        ("no column 'txt'; did you mean 'text'", {"column": "txt"}),
        (r"tiny_words train\[0\]: column 'n' holds int", {"column": "n"}),
        ("dataset='none_x': cannot be downloaded", {"dataset": "none_x", "download": True}),
        ("split='train\\[:x\\]' cannot be read", {"split": "train[:x]"}),
    ):
        with pytest.raises(UserError, match=text) as error:
            words(folder, **options) if "dataset" not in options else tfds.make(data_dir=folder, **options)
        assert "\n" not in str(error.value)
    path = next(pathlib.Path(folder).glob("tiny_images/*/*train*"))
    broken = tmp_path / "broken" / path.relative_to(folder)
    broken.parent.mkdir(parents=True)
    for file in path.parent.iterdir():
        (broken.parent / file.name).write_bytes(file.read_bytes())
    broken.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(UserError, match=r"tiny_images.*cannot be read") as error:
        images.load("tiny_images", data_dir=str(tmp_path / "broken"))
    assert "\n" not in str(error.value)


def test_a_dataset_goes_through_rows_and_stream_into_training(folder, tmp_path, monkeypatch):
    build = program.build

    @functools.wraps(build)
    def on_one_device(**pieces):
        return build(**{**pieces, "mesh": {"devices": jax.devices()[:1]}})

    monkeypatch.setattr(program, "build", on_one_device)
    source = {"name": "tfds", "dataset": "tiny_words", "data_dir": folder}
    made = schema.make("jaxcl.data.sources", source, field="sources.x")
    corpus = prepare.make(made, tokenizer.make(), directory=str(tmp_path / "cache"), name="t", length=32, held_out=0.2)
    counts = {split: about["documents"] for split, about in corpus.manifest["splits"].items()}
    assert sum(counts.values()) == 80
    flow = stream.make({"t": corpus.train}, [stream.Stage("a", 2, {"t": 1.0})], batch=4)
    assert flow.at(0).inputs.shape == (4, 32)
    settings = small.config(
        tmp_path,
        sources={"t": source},
        packing__directory=str(tmp_path / "cache"),
        packing__held_out=0.2,
        stream={"batch": 8, "steps": 2, "stages": [{"name": "a", "mixture": {"t": 1.0}}]},
        method="cpt",
        schedule={"name": "constant", "peak": 1e-2},
        evaluation={"every": 2, "rows": 8},
    )
    jax.config.update("jax_disable_most_optimizations", True)  # what is tested is the way of the data
    try:
        assert train.run(settings, str(tmp_path / "run")) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    losses = [record["loss"] for record in small.records(tmp_path / "run", "train")]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    assert "tensorflow" not in sys.modules


def test_images_are_rows_of_a_classifier(folder):
    columns = images.load("tiny_images", data_dir=folder)
    assert columns["inputs"].shape == (80, 4, 3, 1)
    numbers = np.round(columns["inputs"][:, 0, 0, 0] * 255).astype(int)
    assert sorted(numbers) == list(range(80))
    np.testing.assert_array_equal(columns["targets"], numbers % 3)
    (batch,) = rows.batches(rows.from_columns(columns), size=8, limit=8)
    model = schema.make("jaxcl.models", {"name": "mlp", "inputs": 12, "hidden": [4], "classes": 3}, field="model")
    params = model.init(jax.random.key(0))
    assert model.apply(params, batch).logits.shape == (8, 3)


def test_images_are_trained_on_by_the_loop(folder, tmp_path, monkeypatch):
    """Tasks of classes through replay, a boundary, evaluation and report."""
    data = {"name": "images", "dataset": "tiny_images", "data_dir": folder, "licence": "CC0-1.0"}
    settings = {
        "label": "images",
        "model": {"name": "mlp", "inputs": 12, "hidden": [8], "classes": 3},
        "sources": {"low": {**data, "classes": [0, 1]}, "high": {**data, "classes": [2], "relabel": False}},
        "stream": {
            "batch": 8,
            "steps": 6,
            "stages": [{"name": name, "mixture": {name: 1.0}} for name in ("low", "high")],
            "replay": {"fraction": 0.25, "mode": "replace", "over": "earlier"},
        },
        "method": "er(capacity=8, fraction=0.25) + ewc",
        "optim": {"name": "sgd"},
        "schedule": {"name": "constant", "peak": 0.1},
        "evaluation": {"every": 3, "rows": 8, "alignment": True},
        "checkpoint": {"every_steps": 4},
        "mesh": {"data": 8},
        "tensorboard": False,
    }
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert train.run(settings, str(tmp_path / "run")) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    last = small.records(tmp_path / "run", "eval")[-1]
    columns = images.load("tiny_images", "test", data_dir=folder)
    made = jax.device_get(saved.params(tmp_path / "run" / "checkpoints")[1])
    x = np.maximum(columns["inputs"].reshape(6, -1) @ made["layer_0"]["kernel"] + made["layer_0"]["bias"], 0)
    logits = x @ made["layer_1"]["kernel"] + made["layer_1"]["bias"]
    right = logits.argmax(1) == columns["targets"]
    own = columns["targets"] == 2
    assert last["accuracy"] == pytest.approx({"low": right[~own].mean(), "high": right[own].mean()})
    nats = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), columns["targets"]]
    assert last["loss"] == pytest.approx({"low": nats[~own].mean(), "high": nats[own].mean()}, abs=1e-5)
    assert (last["bits_per_byte"], set(last["alignment"])) == ({}, {"low", "high"})
    shown = json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]
    assert shown == last["accuracy"]
    assert "now, accuracy" in (tmp_path / "run" / "report.html").read_text()
    told = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["sources"]
    assert {name: entry["licence"] for name, entry in told.items()} == {"low": "CC0-1.0", "high": "CC0-1.0"}
    assert told["low"]["source"]["classes"] == [0, 1]
    splits = [[told[name][split]["rows"] for split in ("train", "held_out")] for name in ("low", "high")]
    assert splits == [[54, 4], [26, 2]]  # 80 and 6 images of three classes in turn
    assert told["low"]["train"]["fingerprint"] != told["low"]["held_out"]["fingerprint"]
    table = images.make(dataset="tiny_images", classes=[0, 1], data_dir=folder)
    assert [set(part["targets"].tolist()) for part in (table.train, table.held_out)] == [{0, 1}] * 2
    odd = table._replace(held_out=table.held_out | {"targets": table.held_out["targets"] + 6})
    assert tabular.classes([table, odd]) == 8
    replayed = small.records(tmp_path / "run", "ledger")[-1]["sources"]["low"]["replayed_rows"]
    assert replayed == 12
    with pytest.raises(UserError, match="a classifier; evaluation, export and merging are for language models"):
        weights.load(tmp_path / "run")
    with pytest.raises(UserError, match="--vocab=50: only the vocabulary of a run on text can grow"):
        branch.make(tmp_path / "run", tmp_path / "branch", vocab=50)
    for change, text in (
        ({"model": {**settings["model"], "classes": 2}}, r"config\.model\.classes=2: .* labels up to 2; set it to 3"),
        (
            {"model": {**settings["model"], "inputs": 11}},
            r"config\.model\.inputs=11: .*\(4, 3, 1\); set it to 12",
        ),
        ({"sources": {"low": {**data, "classes": [7]}}}, r"classes=\[7\]: no training row has a label of \[7\]"),
        (
            {"sources": settings["sources"] | {"t": {"name": "embedded", "domain": "prose"}}},
            "low is a table and t is text",
        ),
        ({"tokenizer": {"name": "byte"}}, r"config\.tokenizer: config\.sources are tables"),
        ({"adapter": "lora"}, r"config\.adapter\.name='lora': is no adapter of a classifier"),
        ({"model": {"checkpoint": folder}}, r"config\.model\.checkpoint: a language model, but config\.sources are"),
        ({"packing": {"length": 8}}, r"config\.packing: config\.sources are tables"),
        ({"sources": {"low": {**data, "clean": {}}}}, r"config\.sources\.low\.clean: of documents"),
    ):
        with pytest.raises(UserError, match=text):
            program.build(**train.split({**settings, "evaluation": {}, **change})[1])


def test_images_that_no_package_decodes_name_it(folder, monkeypatch):
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="images need a decoder; pip install pillow"):
        images.load("tiny_words", data_dir=folder, image="png", label="n")
    with pytest.raises(UserError, match="dataset='cifar100': not prepared"):
        images.load("cifar100", data_dir=folder)


def test_configs_fail_offline_in_one_line(tmp_path):
    place, names = tmp_path / "none", ("wiki40b", "c4", "gsm8k", "mnist", "cifar100", "imagenet")
    first = {"mnist": "classes_0_1", "cifar100": "classes_0_19"}
    cases = {
        name: [
            f"--config={ROOT / 'configs' / 'tfds.py'}:{name}",
            f"--workdir={tmp_path / 'run'}",
            f"--config.sources.{first.get(name, name)}.data_dir={place}",
            *([] if name in first else [f"--config.packing.directory={tmp_path / 'cache'}"]),
        ]
        for name in names
    }
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    (found,) = processes.run("refused", path)
    for name, (status, err, _) in found.items():
        (line,) = err.splitlines()
        assert status == 2
        assert (
            "choose from wiki40b, c4, gsm8k, mnist, cifar100"
            if name == "imagenet"
            else f"not prepared in data_dir={str(place)!r}"
        ) in line
        assert name in line
    assert sorted(found) == sorted(names)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_but_errors_is_said_while_a_dataset_is_opened(capfd):
    before = logging.get_verbosity()
    with tfds._quiet():
        print("Downloading and preparing dataset")
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
    assert capfd.readouterr().out == ""
