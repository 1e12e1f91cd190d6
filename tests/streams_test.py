"""Streams of analytic learning: images and features that they are made of, one compilation for all seeds, tables."""

import importlib
import json
import zipfile

import jax
import numpy as np
import pytest
from absl import flags

from jaxcl import main, program, schema, sweep, train
from jaxcl.report import classified, run
from jaxcl.schema import UserError


def config_of(name, text):
    return main.plain(importlib.import_module(f"configs.{name}").get_config(text))


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """The four files of MNIST in small: 30 and 10 images of each digit, whose first pixels are digit and number."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, count in (("train", 30), ("t10k", 10)):
        labels = np.tile(np.arange(10), count)
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = labels, np.arange(len(labels)) // 10
        idx(folder / f"{name}-images-idx3-ubyte", images)
        idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folder


def test_a_seed_orders_the_digits_and_draws_rows_of_both_splits(recipe, mnist, tmp_path, monkeypatch):
    prepare = recipe("analytic", "prepare")
    monkeypatch.setattr(prepare, "ROWS", (20, 5))
    with (
        np.load(prepare.mnist(str(mnist), tmp_path, 3)) as first,
        np.load(prepare.mnist(str(mnist), tmp_path, 4)) as other,
    ):
        assert not np.array_equal(first["order"], other["order"])
        for name, count, most in (("train", 20, 30), ("test", 5, 10)):
            pixels, labels = first[f"x_{name}"], first[f"y_{name}"]
            assert np.array_equal(first["order"][labels], pixels[:, 0, 0])  # label k is the k-th digit of the order
            assert np.bincount(labels).tolist() == [count] * 10
            numbers = pixels[labels == 0, 0, 1]
            assert len(set(numbers.tolist())) == count
            assert numbers.max() < most


@pytest.mark.parametrize("folder", ["analytic", "hyperinterval"])
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_launcher_names_its_flags(folder, recipe, mnist, tmp_path, monkeypatch):
    """And not the fields of a config that they set; nothing is made."""
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("JAXCL_MNIST", raising=False)
    launch = recipe(folder, "launch")
    monkeypatch.setattr(launch.sweep, "run", lambda config, workdir: pytest.fail("it began"))
    part = launch.KNOWN[0]
    (mnist / "t10k-images-idx3-ubyte").rename(mnist / "elsewhere")
    remedy = "give the folder of the four files of MNIST"
    for given, words in (
        (["--mnist=nowhere"], f"--mnist=nowhere: is no folder; {remedy}"),
        (["--mnist=empty"], f"--mnist=empty: holds no train-images-idx3-ubyte or .gz of it; {remedy}"),
        ([f"--mnist={mnist}"], f"--mnist={mnist}: has no test images; {remedy}"),
        ([], f"--mnist: missing; {remedy}, or set JAXCL_MNIST"),
        (["--parts=wrong"], "--parts=wrong: choose from "),
        (["--parts="], "--parts=: choose from "),
    ):
        monkeypatch.delenv("JAXCL_MNIST", raising=False)  # which a launcher sets
        flags.FLAGS.unparse_flags()
        flags.FLAGS["mnist"].unparse()
        with pytest.raises(UserError) as error:
            launch.launch(["launch.py", f"--workdir={tmp_path / 'out'}", f"--parts={part}", *given])
        assert str(error.value).startswith(words)
    assert not list((tmp_path / "out").rglob("*"))


def test_characters_are_drawn_by_other_hands_and_averaged(recipe, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    prepare = recipe("analytic", "prepare")
    monkeypatch.setattr(prepare, "CHARACTERS", 4)
    places = [(a, c) for a in ("Greek", "Latin") for c in ("character01", "character02")]
    for archive, own in (("images_background_small1", places[:3]), ("images_background_small2", places[2:])):
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w") as files:  # one character is in both
            for alphabet, character in own:
                for hand in range(20):
                    pixels = np.full((105, 105), 255, np.uint8)
                    pixels[: 5 * hand] = 0  # ink
                    with files.open(f"{archive}/{alphabet}/{character}/{hand:02}.png", "w") as stream:
                        image.fromarray(pixels).convert("1").save(stream, "png")
    with np.load(prepare.omniglot(str(tmp_path), tmp_path / "out", 0)) as found:
        assert found["x_train"].shape == (60, 28, 28)
        assert np.bincount(found["y_test"]).tolist() == [5] * 4
        for label in range(4):
            ink = [found[f"x_{n}"][found[f"y_{n}"] == label].mean(axis=(1, 2)) / 255 for n in ("train", "test")]
            np.testing.assert_allclose(sorted(np.concatenate(ink)), np.arange(20) * 5 / 105, atol=0.01)
    monkeypatch.setattr(prepare, "CHARACTERS", 9)
    with pytest.raises(UserError, match="has 4 characters; give archives of at least 9"):
        prepare.omniglot(str(tmp_path), tmp_path / "out", 1)


CNN = {"name": "cnn", "inputs": (28, 28, 1), "channels": (2, 2, 2), "hidden": (), "classes": 10}


@pytest.fixture
def data(recipe, mnist, tmp_path, monkeypatch):
    """Images of two seeds, and features of a network that is not trained."""
    prepare = recipe("analytic", "prepare")
    monkeypatch.setattr(prepare, "ROWS", (20, 5))
    monkeypatch.setattr(prepare, "BLOCK", 64)
    monkeypatch.setenv("JAXCL_ANALYTIC", str(tmp_path / "data"))
    for seed in (0, 1):
        images = prepare.mnist(str(mnist), tmp_path / "data", seed)
        params = schema.make("jaxcl.models", CNN, field="model").init(jax.random.key(seed))
        prepare.features(images, tmp_path / "data" / f"mnist-random-{seed}.npz", CNN, params)
    return tmp_path / "data"


def test_features_are_those_of_the_network_row_by_row(data):
    with np.load(data / "mnist-1.npz") as images, np.load(data / "mnist-random-1.npz") as bank:
        network = schema.make("jaxcl.models", {**CNN, "output": "hidden"}, field="model")
        params = network.init(jax.random.key(1))
        for name, few in (("train", (0, 63, 64, 199)), ("test", (0, 49))):
            assert np.array_equal(images[f"y_{name}"], bank[f"{name}_labels"])
            rows = np.array(few)
            zeros = np.zeros(len(rows), np.int32)
            x = images[f"x_{name}"][rows].astype(np.float32) / 255
            batch = program.Batch(x, zeros, zeros.astype("f"), zeros, zeros, zeros)
            want = network.apply(params, batch).hidden
            np.testing.assert_allclose(bank[f"{name}_features"][rows], want, rtol=2e-3, atol=1e-3)  # float16


def small(config):
    """Returns a run of two tasks on the features of `data`: two digits each, two batches."""
    stages = [stage | {"steps": 3} for stage in config["stream"]["stages"][:2]]
    sources = {stage["name"]: config["sources"][stage["name"]] for stage in stages}
    stream = config["stream"] | {"stages": stages, "batch": 8}
    changed = {"sources": sources, "stream": stream, "evaluation": {"every": 2, "rows": 100}}
    adapter = config["adapter"] and config["adapter"] | ({"width": 16} if "width" in config["adapter"] else {})
    return config | changed | {"adapter": adapter, "model": config["model"] | {"inputs": 18}}


@pytest.mark.parametrize("label", ["naive", "acil"])
def test_a_pass_has_the_figures_of_the_run(recipe, data, tmp_path, label):
    passes = recipe("analytic", "passes")
    runs = [one for seed in (0, 1) for one in sweep.expand(config_of("analytic_compare", f"random,{seed}"))]
    programs, found = {}, []
    for config in (small(one) for one in runs if one["label"] == label):
        found.append(passes.run(config, programs)[0])
    assert len(programs) == 1
    (own,) = programs.values()
    assert own.step._cache_size() == own.end_task._cache_size() == 1  # of both seeds
    assert found[0]["figures"] != found[1]["figures"]
    train.run(config, str(tmp_path / "run"), final=False)
    want = classified.of(run.load(tmp_path / "run"))
    for name in ("a_auc", "a_avg", "a_last", "mean_class", "learned"):
        assert found[1]["figures"][name] == pytest.approx(want["figures"][name], abs=1e-5)
    known = [step in found[1]["steps"] for step in want["steps"]]
    assert found[1]["seen"] == pytest.approx(np.array(want["seen"])[known].tolist(), abs=1e-4)


PARTS = ("pixels", "random", "trained", "omniglot", "imbalanced", "blurry")


@pytest.mark.parametrize("part", PARTS)
def test_streams_are_one_pass_over_whole_batches(part):
    config = config_of("analytic_streams", f"{part},2")
    names = [stage["name"] for stage in config["stream"]["stages"]]
    assert names == sorted(config["sources"])
    assert all(one["path"].endswith("-2.npz") for one in config["sources"].values())
    steps, batch = [stage["steps"] for stage in config["stream"]["stages"]], config["stream"]["batch"]
    total = {"omniglot": 242 * 15, "imbalanced": 2977}.get(part, 12000)
    assert total - len(steps) * batch < sum(steps) * batch <= total
    arms = sweep.expand(config_of("analytic_compare", f"{part},2"))
    assert {"naive", "nmc", "acil"} <= {one["label"] for one in arms}
    assert {one["seed"] for one in arms} == {2}
    trained = arms[0]["stream"]
    rows = [one["steps"] * trained["batch"] for one in trained["stages"]]
    assert rows == [n * batch * {"blurry": 1, "imbalanced": 4, "omniglot": 5}.get(part, 2) for n in steps]
    assert arms[0]["evaluation"]["every"] * trained["batch"] == config["evaluation"]["every"] * batch


@pytest.mark.parametrize("text", ["", "elsewhere", "pixels,x", "pixels,-1"])
def test_other_parts_are_refused(text):
    for name in ("analytic_streams", "analytic_compare"):
        with pytest.raises(ValueError, match="PART,SEED"):
            config_of(name, text)


def test_the_network_is_trained_on_the_first_task_alone():
    config = config_of("analytic_streams", "backbone,0")
    assert [stage["name"] for stage in config["stream"]["stages"]] == ["task_00"]
    assert config["sources"]["task_00"]["classes"] == [0, 1]
    assert config["adapter"] is None


PAPERS = ("acil", "gacil", "dsal", "gkeal", "ranpac", "slda", "fecam", "aef_ocl", "air")


@pytest.mark.parametrize("part", PAPERS)
def test_the_papers_can_run_on_a_bank(recipe, part, tmp_path, monkeypatch):
    papers = importlib.import_module("configs.analytic_papers")
    assert {*papers.PARTS} == {*PAPERS}
    assert all(stage["steps"] > 0 for stage in papers.get_config(part).stream.stages)  # at the sizes of CIFAR-100
    rows, classes = 100 if part in ("aef_ocl", "air") else 4, papers.CLASSES  # a tail of 100 : 1 ends with one row
    monkeypatch.setattr(papers, "ROWS", rows)
    monkeypatch.setitem(papers.PARTS, part, (*papers.PARTS[part][:4], 2))
    monkeypatch.setenv("JAXCL_BANK", str(tmp_path / "bank.npz"))
    config = main.plain(papers.get_config(part)) | {"mesh": {"devices": jax.devices()[:1]}}
    inputs, labels = config["model"]["inputs"], np.repeat(np.arange(classes), rows)
    arrays = {"train_features": np.ones((len(labels), inputs), np.float16), "train_labels": labels}
    np.savez(tmp_path / "bank.npz", **arrays, test_features=arrays["train_features"], test_labels=labels)
    if "width" in config["adapter"]:
        config["adapter"]["width"] = 16
    plan, corpora, _ = recipe("analytic", "passes").planned(config)
    ends = np.diff([0, *plan.flow.boundaries])
    total = sum(len(one.train) for one in corpora.values())
    assert total - 2 * len(ends) < 2 * ends.sum() <= total  # one pass over whole batches
    known = {label for one in corpora.values() for label in np.asarray(one.held_out.labels).tolist()}
    assert known == set(range(classes))
    method = "ds_al" if part == "dsal" else "acil" if part == "gacil" else part
    assert config["method"].startswith(method)


def test_tables_are_means_over_seeds_and_differences_are_paired(recipe, tmp_path, capsys):
    claims = recipe("analytic", "claims")
    for label, shift in (("naive", 0.0), ("nmc", 0.2), ("acil", 0.3), ("air", 0.5)):
        for seed in (0, 1):
            figures = dict.fromkeys(claims.FIGURES, 0.3 + shift + 0.1 * seed)
            one = {"label": label, "seed": seed, "figures": figures, "cpu_s": 1.0, "steps": [1, 2, 3], "ends": [2, 3]}
            path = tmp_path / "runs" / "imbalanced" / f"{label}-seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(one | {"seen": [0.1, 0.2, 0.3], "mean_class": [0.1, 0.2, 0.3]}))
    found = claims.read(tmp_path / "runs")
    claims.table(found["imbalanced"])
    assert "| acil | 65.0 ± 63.5 |" in capsys.readouterr().out  # t of one degree of freedom: 12.706 * 5
    told = claims.orders(found)
    assert told["imbalanced: air - acil, mean_class"]["mean"] == pytest.approx(20.0)
    assert told["imbalanced: nmc - naive, mean_class"] == pytest.approx({"mean": 20.0, "half_width": 0.0}, abs=1e-9)
    assert "Analytic learning" in claims.curves(found)
    with pytest.raises(UserError, match=r"holds no runs.*launch\.py"):
        claims.read(tmp_path)
