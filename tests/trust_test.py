"""Files from strangers: none runs code, none is read or written outside its folder, none unpacks without end."""

import gzip
import hashlib
import json
import os
import pickle
import tracemalloc

import numpy as np
import pyarrow
import pytest
from etils import epath

from jaxcl import manifests, saved, schema
from jaxcl.data import clean, shards, tokenizer
from jaxcl.data.sources import jsonl
from jaxcl.hf import files, peft
from jaxcl.schema import UserError

QUICK = True


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """Where a payload shows that it ran."""
    return tmp_path / "ran"


@pytest.fixture
def stranger(tmp_path):
    folder = tmp_path / "stranger"
    folder.mkdir()
    return folder


def corpus(name, path):
    return list(schema.make("jaxcl.data.sources", {"name": name, "path": str(path)}, field="sources.x").documents())


def images(path):
    schema.make("jaxcl.data.sources", {"name": "images", "path": str(path)}, field="sources.x")


def put(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


READERS = {
    "images of an archive": lambda f, data: images(put(f, "x.npz", data)),
    "images": lambda f, data: images(put(f, "train-images-idx3-ubyte", data)),
    "JSON lines": lambda f, data: corpus("jsonl", put(f, "x.jsonl", data)),
    "JSON lines, gzip": lambda f, data: corpus("jsonl", put(f, "x.jsonl.gz", data)),
    "JSON lines, packed": lambda f, data: corpus("jsonl", put(f, "x.jsonl.gz", gzip.compress(data))),
    "JSON lines, zstd": lambda f, data: corpus("jsonl", put(f, "x.jsonl.zst", data)),
    "Parquet": lambda f, data: corpus("parquet", put(f, "x.parquet", data)),
    "ArrayRecord": lambda f, data: corpus("array_record", put(f, "x.array_record", data)),
    "text": lambda f, data: corpus("text", put(f, "x.txt", data)),
    "Arrow": lambda f, data: corpus("hf_dataset", put(f, "x.arrow", data).parent),
    "tokenizer": lambda f, data: tokenizer.make(name="hf", path=str(put(f, "tokenizer.json", data))),
    "weights": lambda f, data: files.open_folder(put(f, "model.safetensors", data).parent),
    "weights for torch": lambda f, data: files.open_folder(put(f, "pytorch_model.bin", data).parent),
    "configuration": lambda f, data: files.config(put(f, "config.json", data).parent),
    "adapter": lambda f, data: peft._open(put(f, "adapter_model.safetensors", data).parent),
    "adapter for torch": lambda f, data: peft._open(put(f, "adapter_model.bin", data).parent),
    "counts of a cache": lambda f, data: shards.load_counts(str(put(f, "counts.npy", data)), 1, 1),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_under_any_name_is_refused_and_not_run(stranger, mark, name):
    with pytest.raises(UserError) as error:
        READERS[name](stranger, pickle.dumps(Payload(mark)))
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_the_payload_would_run(mark):
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.is_dir()


@pytest.mark.parametrize("name", ["images of an archive", "counts of a cache"])
def test_arrays_of_objects_are_refused_and_not_run(stranger, mark, name):
    objects = np.array([Payload(mark)], object)
    place = stranger / ("x.npz" if name.startswith("images") else "x.npy")
    if place.suffix == ".npz":
        np.savez(place, x=objects, y=np.zeros(1, np.int32))
    else:
        np.save(place, objects)
    with pytest.raises(UserError):
        READERS[name](stranger, place.read_bytes())
    assert not mark.exists()


def forged(place, name, file):
    """Writes a checkpoint whose manifest has `file` under a name; all its checksums are right."""
    step = place / "checkpoints" / "5"
    (step / "state").mkdir(parents=True)
    listed = {name: manifests.fingerprint(epath.Path(file))}
    text = json.dumps({"step": 5, "files": listed, "leaves": {}, "base": True})
    (step / manifests.MANIFEST).write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    return place / "checkpoints"


@pytest.mark.parametrize("name", ["../../../.profile", "state/../../../../.profile", "/"])
def test_a_checkpoint_names_no_file_outside(tmp_path, stranger, name):
    """A copy would take it from beside the run that was downloaded, and put it beside the run that is begun."""
    file = put(tmp_path, ".profile", b"echo ran")
    name = str(file) if name == "/" else name
    found = forged(stranger, name, file)
    assert (found / "5" / name).samefile(file)
    with pytest.raises(UserError, match="no file of its folder"):
        saved.copy(found, tmp_path / "home" / "runs" / "new" / "checkpoints")
    assert not (tmp_path / "home").exists()


def test_dots_in_a_name_are_no_way_out(tmp_path, stranger):
    file = put(tmp_path, "a", b"{}")
    found = forged(stranger, "state/..a..json", file)
    file.rename(found / "5" / "state" / "..a..json")
    assert saved.copy(found, tmp_path / "new") == 5
    assert (tmp_path / "new" / "5" / "state" / "..a..json").read_bytes() == b"{}"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_that_unpacks_without_end_is_refused_before_it_is_in_memory(stranger, monkeypatch, ending):
    monkeypatch.setattr(jsonl, "LONGEST", 2**16)
    data = b'{"text": "short"}\n{"text": "' + b"0" * 2**25 + b'"}\n'
    path = stranger / f"bomb{ending}"
    if ending.endswith("zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
    assert ending == ".jsonl" or path.stat().st_size < 2**18
    del data
    tracemalloc.start()
    try:
        read = jsonl.read(str(path))
        assert next(read)[1] == {"text": "short"}
        with pytest.raises(UserError, match=r"bomb.*:2: a line of more than 65,536 characters; split it"):
            next(read)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_lines_of_the_longest_length_are_read_and_the_last_needs_no_end(stranger, monkeypatch):
    lines = [b'{"text": "longest"}\n', b"\n", b'{"text": "1"}\r\n', b'{"text": "2"}']
    path = put(stranger, "x.jsonl", b"".join(lines))
    monkeypatch.setattr(jsonl, "LONGEST", len(lines[0]))
    assert list(jsonl.read(str(path))) == [
        (f"{path}:1", {"text": "longest"}),
        (f"{path}:3", {"text": "1"}),
        (f"{path}:4", {"text": "2"}),
    ]
    monkeypatch.setattr(jsonl, "LONGEST", len(lines[0]) - 1)
    with pytest.raises(UserError, match=r"x.jsonl:1: a line of more than"):
        list(jsonl.read(str(path)))


def test_evaluation_files_of_strangers_are_bounded_too(stranger, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST", 2**10)
    path = put(stranger, "bomb.jsonl.gz", gzip.compress(b'{"text": "' + b"0 " * 2**12 + b'"}\n'))
    with pytest.raises(UserError, match="a line of more than 1,024 characters"):
        list(clean._records(str(path), None))
