"""Every reader of files from elsewhere, on files that are damaged or made up: a value, or one line that names the file.

Nothing else: no other exception, no code that is run, no file outside the folder, no memory or time without bounds.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import fake_run
import hostile
import jax
import numpy as np
import pyarrow
import pytest
from array_record.python import array_record_module
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from jaxcl import folder, goodput, manifests, metrics, report, saved, schema
from jaxcl.checkpoint import Checkpoints
from jaxcl.data import clean, tokenizer
from jaxcl.data.sources import Chat
from jaxcl.evaluate import tasks
from jaxcl.hf import files, peft, read
from jaxcl.models import transformer
from jaxcl.models.config import resolve
from jaxcl.schema import UserError
from jaxcl.types import TrainState

FIXTURES = Path(__file__).parent / "fixtures"
EXAMPLES = 24
ROWS = [{"text": f"row {i}", "messages": [{"role": "user", "content": "2 + 2?"}], "n": i} for i in range(3)]
PROMPTS = [{"prompt": "2 +", "answer": "4", "stage": "a"}, {"prompt": "3 +", "answer": "5", "stage": "b"}]
TURNS = Chat((("user", "2 + 2?"), ("assistant", "4")))


class Reader(NamedTuple):
    """A file beside others, and what reads it."""

    target: str  # the file that is damaged
    sound: bytes  # as it should be
    read: Callable[[Path], Any]  # folder -> value, all of which is looked at
    mutated: Any = None  # strategy of bytes; None = mutations of the sound ones
    beside: Mapping[str, bytes] = MappingProxyType({})  # other files
    names: str | None = None  # what a message says instead of the name of the target
    seal: Callable[[Path], None] = lambda place: None  # what is done before it is read
    examples: int = EXAMPLES


def source(name, file, **options):
    def documents(place):
        path = str(place / file) if file else str(place)
        options_of = {"name": name, "path": path, **options}
        return list(schema.make("jaxcl.data.sources", options_of, field="sources.x").documents())

    return documents


def table(name, file, **more):
    def rows(place):
        options = {"name": name, "path": str(place / file) if file else str(place), **more}
        made = schema.make("jaxcl.data.sources", options, field="sources.x")
        return [np.asarray(part[key][0:3]) for part in (made.train, made.held_out) for key in part]

    return rows


def as_json(value):
    """Returns the bytes of a JSON file, and what damages it."""
    return {"sound": json.dumps(value).encode(), "mutated": hostile.of_json(value)}


def as_lines(rows):
    """Returns the bytes of JSON lines, and what damages them."""
    return {"sound": lines(rows), "mutated": hostile.of_lines(rows)}


def lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def of_parquet(**options):
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, **options)
    return out.getvalue()


def of_arrow():
    out = io.BytesIO()
    made = pyarrow.Table.from_pylist(ROWS)
    with ipc.new_stream(out, made.schema) as stream:
        stream.write_table(made)
    return out.getvalue()


def of_records():
    with tempfile.TemporaryDirectory() as folder:
        writer = array_record_module.ArrayRecordWriter(f"{folder}/made", "group_size:1")
        for row in ROWS:
            writer.write(json.dumps(row).encode())
        writer.close()
        return Path(folder, "made").read_bytes()


def of_sentencepiece():
    import sentencepiece

    out = io.BytesIO()
    text = iter(["the cat sat on the mat", "a river and a stone"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=out, vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


def words(place, **options):
    made = tokenizer.make(path=str(place), **{"name": "hf"} | options)
    assert made.chat
    return made.encode("a cat"), made.encode_many(["a", "b"]), made.decode([0, 1]), made.chat(TURNS)


def weights(place):
    tensors = files.open_folder(place)
    read.stored_dtype(place)
    return [tensors.read(name) for name in tensors.file_of]


@functools.cache
def shapes_of(config):
    return jax.eval_shape(transformer.from_config(config).init, jax.random.key(0))


def shape(place):
    return resolve(read.fields(place) | {"vocab_multiple": 16})


def model(place):
    """Reads as a run does that starts from a folder: fields, shapes, then parameters."""
    config = shape(place)
    return read.load(place, config, shapes_of(config))


def adapter(place):
    found = peft.options(place)
    with pytest.raises(UserError, match="base_model_name_or_path"):
        peft.base(place)
    peft.check_base(place, {"a": jax.numpy.zeros(2)})
    tensors = peft._open(place)
    return found, [tensors.read(name) for name in tensors.file_of]


def saved_run():
    """Returns the files of a checkpoint of one leaf and a number."""
    state = TrainState(jax.numpy.int32(5), {"w": jax.numpy.arange(6.0)}, (), {})
    with tempfile.TemporaryDirectory() as place:
        with Checkpoints(f"{place}/checkpoints") as checkpoints:
            checkpoints.save(5, state, {"ledger": {}})
        return folder_of(Path(place))


def seal(place):
    """Makes a manifest of what was forged, with a checksum that is right."""
    text = (place / "forged").read_bytes().replace(b"\n", b" ")
    line = text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"
    (place / "checkpoints" / "5" / manifests.MANIFEST).write_bytes(line)


def configured(place):
    return folder.about(place), folder.finished(place, {"a": 1})


def folder_of(place):
    """Returns the files below a folder."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@functools.cache
def fake():
    """Returns the files of a run of a few steps."""
    with tempfile.TemporaryDirectory() as place:
        return folder_of(fake_run.make(Path(place, "fake"), steps=4, every=2))


def _texts():
    one = lines(ROWS)
    whole = {"messages": "messages", "where": {"n": [0, 1, 2]}}
    yield "text", Reader("x.txt", "naïve letters\n\nand more".encode(), source("text", "x.txt"))
    yield "JSON lines", Reader("x.jsonl", one, source("jsonl", "x.jsonl"))
    yield "chats", Reader("x.jsonl", read=source("jsonl", "x.jsonl", **whole), **as_lines(ROWS))
    yield "gzip", Reader("x.jsonl.gz", gzip.compress(one, mtime=0), source("jsonl", "x.jsonl.gz"))
    zstd = pyarrow.compress(one, codec="zstd", asbytes=True)
    yield "zstd", Reader("x.jsonl.zst", zstd, source("jsonl", "x.jsonl.zst"))
    for name, options in {"plain": {"compression": "none", "use_dictionary": False}, "packed": {}}.items():
        for kind, columns in {"": {}, " chats": whole}.items():
            documents = source("parquet", "x.parquet", **columns)
            yield f"Parquet, {name}{kind}", Reader("x.parquet", of_parquet(**options), documents)
    yield "ArrayRecord", Reader("x.array_record", of_records(), source("array_record", "x.array_record"))
    against = lambda p: list(clean._records(str(p / "x.jsonl"), ["text"]))  # noqa: E731
    yield "texts to be clean of", Reader("x.jsonl", read=against, **as_lines(ROWS))
    yield "task", Reader("x.jsonl", read=lambda p: tasks.read(p / "x.jsonl"), **as_lines(PROMPTS))


def _folders():
    state = {"_data_files": [{"filename": "data.arrow"}], "_split": "train", "_indices_data_files": None}
    arrow, whole = of_arrow(), source("hf_dataset", "")
    held = {"data.arrow": arrow, "state.json": json.dumps(state).encode()}
    yield "Arrow", Reader("data.arrow", arrow, whole, beside=held)
    yield "Arrow chats", Reader("data.arrow", arrow, source("hf_dataset", "", messages="messages"), beside=held)
    yield "state of a dataset", Reader("state.json", read=whole, beside=held, names="", **as_json(state))
    about = as_json({"license": "mit", "features": {}})
    yield "facts of a dataset", Reader("dataset_info.json", read=whole, beside=held, **about)
    both = {f"train/{name}": data for name, data in held.items()}
    splits = as_json({"splits": ["train", "test"]})
    yield "splits of a dataset", Reader("dataset_dict.json", read=whole, beside=both, names="", **splits)
    readme = b"---\nlicense: mit\ntags:\n- a\n---\ntext"
    yield "front matter", Reader("README.md", readme, whole, beside={"train.jsonl": lines(ROWS)})


def _tokenizers():
    made = json.loads(tokenizer.byte_json())
    own = {"tokenizer.json": tokenizer.byte_json().encode()}
    small = as_json(made | {"model": made["model"] | {"vocab": {"a": 0, "b": 1, "Ġ": 9}}})
    names = {
        "eos_token": {"content": "<|pad|>"},
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    }
    template = b"{% for m in messages %}{{ '<|pad|>' + m['role'] }}: {{ m.content * 2 }}{% endfor %}"
    yield "tokenizer", Reader("tokenizer.json", read=words, names="tokenizer", **small)
    yield "bytes of a tokenizer", Reader("tokenizer.json", own["tokenizer.json"], words, names="tokenizer")
    yield "names of tokens", Reader("tokenizer_config.json", read=words, beside=own, names="token", **as_json(names))
    yield "template", Reader("chat_template.jinja", template, words, beside=own)
    if importlib.util.find_spec("sentencepiece"):
        pieces, spare = functools.partial(words, name="sentencepiece"), of_sentencepiece()
        yield "SentencePiece", Reader("tokenizer.model", spare, pieces)
        added = as_json({"<s>": 1, "</s>": 2})
        yield "added tokens", Reader("added_tokens.json", read=pieces, beside={"tokenizer.model": spare}, **added)


def _weights():
    kinds = {"windows": ("qwen2_window", model, 8), "YaRN": ("llama_yarn", shape, EXAMPLES)}
    for name, (place, reads, most) in kinds.items():
        held = folder_of(FIXTURES / "hf" / place)
        config = as_json(json.loads(held["config.json"]))
        yield (
            f"configuration, {name}",
            Reader("config.json", read=reads, beside=held, names="config", examples=most, **config),
        )
    shards = folder_of(FIXTURES / "hf" / "llama_sharded")
    index = as_json(json.loads(shards[files.INDEX]))
    yield "index of shards", Reader(files.INDEX, read=weights, beside=shards, names="stranger", **index)
    one = held[files.SINGLE]
    head, rest = one[: 8 + int.from_bytes(one[:8], "little")], one[8 + int.from_bytes(one[:8], "little") :]
    yield "weights", Reader(files.SINGLE, one, weights, hostile.of_bytes(head).map(lambda x: x + rest), held)
    lora = folder_of(FIXTURES / "peft" / "adapter")
    config = as_json(json.loads(lora[peft.CONFIG]) | {"base_model_name_or_path": "absent"})
    told = as_json({"base_checksums": {"a": [[2], "float32", 5]}})
    yield "adapter", Reader(peft.CONFIG, read=adapter, beside=lora, **config)
    yield "weights of an adapter", Reader(peft.WEIGHTS, lora[peft.WEIGHTS], adapter, beside=lora)
    based = lambda p: peft.check_base(p, {"b": jax.numpy.zeros(2), "a": jax.numpy.zeros(3)})  # noqa: E731
    yield "checksums of a base", Reader("jaxcl.json", read=based, **told)


def _arrays():
    pixels = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    labels, floats = np.array([0, 1] * 3, np.int32), np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4)
    idx = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in pixels.shape) + pixels.tobytes()
    own = b"\0\0\x08\1" + (6).to_bytes(4, "big") + labels.astype(np.uint8).tobytes()
    beside, stem = {"train-labels-idx1-ubyte": own}, "train-images-idx3-ubyte"
    yield "IDX", Reader(stem, idx, table("images", stem, held_out=2), beside=beside)
    packed = gzip.compress(idx, mtime=0)
    yield "IDX, gzip", Reader(f"{stem}.gz", packed, table("images", f"{stem}.gz", held_out=2), beside=beside)
    for name, columns in {"images": {"x": pixels}, "features": {"features": floats}}.items():
        data = hostile.arrays(**columns, **{"y" if name == "images" else "labels": labels})
        yield (
            f"{name} of an archive",
            Reader("x.npz", data, table(name, "x.npz", held_out=2 if name == "images" else 0.5)),
        )
    both = {}
    for part, array in {"features": floats, "labels": labels}.items():
        out = io.BytesIO()
        np.save(out, array)
        both[f"{part}.npy"] = out.getvalue()
    for file, data in both.items():
        header = data[10:].split(b"\n")[0].decode()
        mixed = st.one_of(hostile.of_bytes(data), hostile.padded(header), st.just(hostile.arrays(x=labels)))
        yield file, Reader(file, data, table("features", "", held_out=0.5), mixed, both, names="")


def _runs():
    whole = saved_run()
    line = as_json(json.loads(whole[f"checkpoints/5/{manifests.MANIFEST}"].split(b"\n")[0]))
    arrays = lambda p: saved.read(p / "checkpoints")  # noqa: E731
    yield "manifest", Reader("forged", read=arrays, beside=whole, names="checkpoint", seal=seal, **line)
    beside = as_json(json.loads(whole["checkpoints/5/host.json"]))
    yield "beside the arrays", Reader("host.json", read=lambda p: manifests.host(epath.Path(p)), **beside)
    about = {"id": "x", "finished": False, "facts": {"a": 1}, "versions": {}, "config": {"a": 1}}
    yield "run.json", Reader("run.json", read=configured, names="stranger", **as_json(about))
    beat = {"event": "beat", "time": 3.0, "step": 5, "spent": {"step": 1.0, "evaluation": 0.0, "save": 0.0}}
    hours = [beat | {"event": event, "time": 1.0 + i} for i, event in enumerate(("start", "ready", "beat", "end"))]
    spent = lambda p: goodput.lines(goodput.summary(p))  # noqa: E731
    yield "ledger of time", Reader("goodput.jsonl", read=spent, **as_lines(hours))
    some = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "event", "step": 1, "event": "x", "message": "y"}]
    yield "records", Reader("metrics.jsonl", read=lambda p: metrics.read(p / "metrics.jsonl"), **as_lines(some))
    for name, data in fake().items():
        rows = [json.loads(row) for row in data.splitlines()]
        sound = as_lines(rows) if len(rows) > 1 else as_json(rows[0])
        yield (
            f"report, {name}",
            Reader(name, read=lambda p: report.build([str(p)]), beside=fake(), names="stranger", **sound),
        )


READERS = dict([*_texts(), *_folders(), *_tokenizers(), *_weights(), *_arrays(), *_runs()])


def edited(name, **changes):
    """Returns the sound file of a reader of JSON with other values."""
    return json.dumps(json.loads(READERS[name].sound) | changes).encode()


CONFIGURATIONS = [
    *(("windows", edited("configuration, windows", **{key: value})) for key, value in (
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 1.5), ("max_window_layers", "x"), ("vocab_size", {}),
        ("rms_norm_eps", 10**400), ("layer_types", 5), ("layer_types", [[]]), ("hidden_act", ["silu"]),
    )),
    ("YaRN", edited("configuration, YaRN", rope_scaling={"rope_type": "yarn", "factor": 10**400})),
    ("YaRN", edited("configuration, YaRN", rope_theta=float("nan"))),
]  # fmt: skip
ADAPTERS = [
    edited("adapter", **change)
    for change in ({"lora_dropout": "x"}, {"lora_alpha": 10**400}, {"lora_alpha": float("nan")}, {"r": True})
]


def laid(reader, place):
    """Writes the sound files of a reader, and reads them."""
    (place.parent / "secret").write_text("not for readers of this folder")
    for file, data in ({**reader.beside, reader.target: reader.sound}).items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(data)
    reader.seal(place)
    reader.read(place)  # modules are loaded too
    return place


def refusal(reader, place, data):
    """Returns how a file of these bytes is refused, None if it is read."""
    (place / reader.target).write_bytes(data)
    reader.seal(place)
    try:
        with hostile.watched():
            reader.read(place)
    except UserError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    assert len(text) < 2000
    assert (reader.target if reader.names is None else reader.names) in text
    return text


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_is_read_or_refused_in_one_line(name, tmp_path):
    reader = READERS[name]
    place = laid(reader, tmp_path / "stranger")

    @settings(max_examples=reader.examples)
    @given(hostile.of_bytes(reader.sound) if reader.mutated is None else reader.mutated)
    def check(data):
        refusal(reader, place, data)

    check()


DEEP = b"[" * hostile.DEEP
NPY = b"\x93NUMPY\x01\x00"
REFUSED = [  # each of these was another exception, or worse, once
    ("chats", b'{"text": "x", "n": 0, "messages": {"role": [1], "content": []}}'),
    ("chats", b'{"text": "x", "n": 0, "messages": {"role": 1, "content": 2}}'),
    ("state of a dataset", b'{"_data_files": [["data.arrow"]]}'),
    ("state of a dataset", b'{"_data_files": 3}'),
    ("state of a dataset", b'{"_split": ["train"]}'),
    ("state of a dataset", DEEP),
    ("splits of a dataset", b'{"splits": [null]}'),
    ("splits of a dataset", b'{"splits": 1.5}'),
    ("names of tokens", b'{"chat_template": [{"name": "default", "template": 1}]}'),
    ("names of tokens", b'{"chat_template": {"default": "x"}}'),
    ("names of tokens", DEEP),
    ("added tokens", b"null"),
    ("added tokens", DEEP),
    ("index of shards", b'{"weight_map": {"lm_head.weight": ["model.safetensors"]}}'),
    ("index of shards", b'{"weight_map": {"lm_head.weight": "model\\u0000"}}'),
    ("weights", (2).to_bytes(8, "little") + b"{}"),
    ("checksums of a base", b'{"base_checksums": {"a": []}}'),
    ("checksums of a base", b'{"base_checksums": [1]}'),
    ("features.npy", hostile.arrays(x=np.zeros(3))),
    ("features.npy", NPY + b"\x06\x01{'descr': " + b"(" * 150 + b" " * 100),
    ("features.npy", NPY + b"p\x00{-1: '<f4', 'fortran_order': False, 'shape': (6, 4), }".ljust(118)),
    ("manifest", b"null"),
    ("manifest", b'{"files": null, "leaves": {}}'),
    ("manifest", DEEP),
    ("beside the arrays", b"[1]"),
    ("run.json", b'{"id": "x", "finished": false, "config": ' + DEEP),
    ("run.json", b'{"id": "x", "finished": false, "config": null}'),
    ("ledger of time", b'{"event": "start"}'),
    ("ledger of time", b"null\n"),
    ("records", b'{"kind": "eval", "step": -1}\n{"kind": "eval", "step": 1}\n'),
    ("report, metrics.jsonl", b'{"kind": "eval", "step": 1, "boundary": 1000000000, "loss": {"a": 1}}\n'),
    ("report, metrics.jsonl", b'{"kind": "eval", "step": 1, "loss": [1]}\n'),
    ("report, metrics.jsonl", DEEP + b"\n\n"),
    ("report, config.json", DEEP),
    ("report, run.json", b'{"facts": {"sources": "x"}}'),
    *((f"configuration, {name}", edited) for name, edited in CONFIGURATIONS),
    *(("adapter", edited) for edited in ADAPTERS),
]


@pytest.mark.parametrize(("name", "data"), REFUSED, ids=[f"{i} {name}" for i, (name, _) in enumerate(REFUSED)])
def test_what_was_found_is_refused(name, data, tmp_path):
    reader = READERS[name]
    assert refusal(reader, laid(reader, tmp_path / "stranger"), data)
