"""Damaged checkpoints and corpora through the commands: one line on stderr, status 2, nothing written."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hf_folder
import jax
import processes
import pyarrow.parquet
import pytest
import small
import tokenizers

from jaxcl import console, network
from jaxcl.hf import __main__ as command
from jaxcl.hf import files
from jaxcl.schema import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "hf" / "llama_sharded"
LAST = "model-00003-of-00003.safetensors"


def all_is_writable():
    """Returns whether this user may write where nobody may, as root can."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        return os.access(folder, os.W_OK)


def words(folder, count):
    """Writes a tokenizer of `count` words."""
    names = ["<s>", "</s>", *small.WORDS, *(f"w{i}" for i in range(count))][:count]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))


def checkpoint(folder):
    """Returns a new checkpoint folder of 73 rows, with a tokenizer of as many words."""
    shutil.copytree(FIXTURE, folder)
    words(folder, 73)
    return folder


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# name -> what is done to a checkpoint, and what the line must hold: the file and the remedy
MODELS = {
    "wrong family": (
        lambda f: edit(f / "config.json", model_type="gpt_neox"),
        ["config.json: model_type='gpt_neox'"],
    ),
    "missing shard": (lambda f: (f / LAST).unlink(), [f"{LAST}: no such file", "fetch this shard"]),
    "truncated shard": (
        lambda f: (f / LAST).write_bytes((f / LAST).read_bytes()[:-9]),
        [f"{LAST}: damaged or cut short", "fetch it again"],
    ),
    "empty shard": (lambda f: (f / LAST).write_bytes(b""), [f"{LAST}: damaged or cut short", "fetch it again"]),
    "shard outside": (
        lambda f: edit(f / files.INDEX, weight_map={"a": "../a.safetensors"}),
        [f"{files.INDEX}: names '../a.safetensors'", "do not use this checkpoint"],
    ),
    "large tokenizer": (lambda f: words(f, 80), []),
}
# What only training says, and only arithmetic.
OWN = {"wrong family": "no family that jaxcl reads", "large tokenizer": "grow the embedding with config.model.vocab=80"}
SUM = {"wrong family": "only models of one family", "large tokenizer": "tokenizer.json: has a token number 79, but the"}


def saved(folder, name):
    """Writes a folder as `save_to_disk` of datasets does, whose file is `name`."""
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
    (folder.parent / "outside.arrow").write_bytes(b"")
    return {"name": "hf_dataset", "path": str(folder)}


def written(path, content):
    path.write_bytes(content)
    return {"name": path.suffix[1:], "path": str(path)}


def parquet(path, table):
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return {"name": "parquet", "path": str(path)}


CORPORA = {
    "absent column": (
        lambda f: written(f / "a.jsonl", b'{"txt": "one"}\n'),
        ["a.jsonl:1: no column 'text'", "did you mean 'txt'"],
    ),
    "absent column of Parquet": (
        lambda f: parquet(f / "a.parquet", {"body": ["one"]}),
        ["a.parquet: no column 'text'", "choose from body"],
    ),
    "empty file": (lambda f: written(f / "b.jsonl", b""), ["b.jsonl: holds no records", "replace the file"]),
    "empty Parquet file": (
        lambda f: written(f / "b.parquet", b""),
        ["b.parquet: cannot be read", "replace the file"],
    ),
    "file outside": (
        lambda f: saved(f / "set", "../outside.arrow"),
        ["state.json: names '../outside.arrow'", "do not use this dataset"],
    ),
}


def everything(folder):
    """Returns all paths below a folder, but the cache of sound corpora."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "cache" not in p.relative_to(folder).parts)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    """Runs `python -m jaxcl.main` on every damage; returns the folders as they were, and what came of it."""
    place, lines, before = tmp_path_factory.mktemp("damaged"), {}, {}
    for name in (*MODELS, *CORPORA):
        folder = place / name
        folder.mkdir()
        own = checkpoint(folder / "model")
        source = {"name": "text", "path": small.corpus(place / "text")["d0"], "split": "paragraph"}
        if name in MODELS:
            MODELS[name][0](own)
        else:
            source = CORPORA[name][0](folder)
        stages = [{"name": "only", "mixture": {"d0": 1.0}}]
        settings = small.config(folder, model={"checkpoint": str(own)}, sources={"d0": source}, method="cpt")
        settings |= {"stream": {"batch": 8, "steps": 2, "stages": stages}, "evaluation": {"every": 2, "rows": 8}}
        path = small.write(settings, folder / "config.py")
        lines[name] = [f"--config={path}", f"--workdir={folder / 'run'}"]
        before[name] = everything(folder)
    (place / "cases.json").write_text(json.dumps(lines))
    (found,) = processes.run("refused", place / "cases.json", env=small.environment(place))
    return place, before, found


@pytest.mark.parametrize("name", [*MODELS, *CORPORA])
def test_training_on_damaged_input_is_refused(attempts, name):
    place, before, found = attempts
    status, err, out = found[name]
    lines = err.splitlines()
    assert (status, len(lines), out) == (2, 1, ""), err
    assert lines[0].startswith("error: ")
    for word in [*(MODELS | CORPORA)[name][1], OWN.get(name, "")]:
        assert word in lines[0]
    assert everything(place / name) == before[name]
    cached = sorted(path.name for path in (place / name).glob("cache/*"))
    assert not [entry for entry in cached if entry.startswith(".") or name in CORPORA]


@pytest.fixture
def hf(monkeypatch, capsys):
    """Runs `python -m jaxcl.hf` in this process; returns status, stdout and the lines of stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxcl.hf", *map(str, arguments)])
        code = 0
        try:
            console.cli(command.main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.mark.parametrize("name", MODELS)
def test_arithmetic_on_damaged_input_is_refused(hf, tmp_path, name):
    for side in "ab":
        checkpoint(tmp_path / side)
    MODELS[name][0](tmp_path / "b")
    before = everything(tmp_path)
    status, out, lines = hf("lerp", tmp_path / "a", tmp_path / "b", tmp_path / "out", "--weight=0.5")
    assert (status, len(lines), out) == (2, 1, ""), lines
    for word in [*MODELS[name][1], SUM.get(name, "")]:
        assert word in lines[0]
    assert everything(tmp_path) == before
    shutil.rmtree(tmp_path / "b")
    checkpoint(tmp_path / "b")
    assert hf("lerp", tmp_path / "a", tmp_path / "b", tmp_path / "out", "--weight=0.5")[0] == 0


def test_an_export_that_is_killed_is_not_there_and_the_next_one_is(tmp_path):
    """SIGKILL between two shards, before config.json, and before the folder gets its name."""
    (found,) = processes.run("killed_export", FIXTURE, tmp_path, env=small.environment(tmp_path / "compiled"))
    before = files.open_folder(FIXTURE)
    for moment, (signal, names) in found.items():
        assert signal == 9
        own = [name for name in names if name.split("/")[0] in (moment, f".{moment}.partial")]
        assert own
        assert all(name.split("/")[0] == f".{moment}.partial" for name in own)
        if moment != "_sync":  # not even under that name, which nobody would give
            assert not [name for name in own if name.endswith((".safetensors", ".json"))]
            assert len(own) > 3
        after = files.open_folder(tmp_path / moment)
        assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.file_of)
        assert len(set(after.file_of.values())) > 3
    assert not list(tmp_path.glob(".*.partial"))


@pytest.fixture
def fixed(tmp_path):
    """A folder that cannot be written, with a checkpoint in it."""
    folder = checkpoint(tmp_path / "fixed" / "model")
    for path in (*folder.iterdir(), folder, folder.parent):
        path.chmod(0o444 if path.is_file() else 0o555)
    yield folder
    for path in (folder.parent, folder):
        path.chmod(0o755)


def test_a_checkpoint_is_read_where_nothing_can_be_written(hf, fixed, tmp_path):
    before = small.tree_of(fixed)
    options = {"checkpoint": str(fixed)}
    made = network.make(options, network.tokenizer_of(None, options), 32)
    assert made.load(jax.random.key(0), jax.eval_shape(made.model.init, jax.random.key(0)))
    assert hf("add", fixed, fixed, tmp_path / "sum")[0] == 0
    assert os.access(tmp_path / "sum" / "tokenizer.json", os.W_OK)
    assert small.tree_of(fixed) == before


@pytest.mark.parametrize(
    "parent",
    ["file", pytest.param("folder", marks=pytest.mark.skipif(all_is_writable(), reason="root may write anywhere"))],
)
@pytest.mark.parametrize("verb", ["export", "add"])
def test_an_export_to_where_nothing_can_be_written_is_one_line(hf, fixed, tmp_path, monkeypatch, verb, parent):
    place = tmp_path / "mine" if parent == "file" else fixed.parent
    if parent == "file":
        place.write_text("mine")
    found = hf_folder.weights_of(fixed, *hf_folder.load(fixed))
    monkeypatch.setattr(command.weights, "load", lambda run, step=None: found)
    before = everything(tmp_path)
    arguments = [fixed, fixed] if verb == "add" else [tmp_path / "run"]
    status, out, lines = hf(verb, *arguments, place / "out")
    assert (status, len(lines), out) == (2, 1, ""), lines
    assert str(place) in lines[0]
    assert "choose another folder" in lines[0]
    assert everything(tmp_path) == before
    with pytest.raises(UserError):
        files.open_folder(place / "out")
