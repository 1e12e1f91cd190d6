"""Sources of records: compression, Parquet, Hugging Face folders, conversations, filters, and their errors."""

import gzip
import json

import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from jaxcl import schema
from jaxcl.data import files, prepare, provenance, sources, tokenizer
from jaxcl.data.sources import Chat, hf_dataset, jsonl
from jaxcl.schema import UserError

ROWS = [{"text": f"doc {i} µ", "lang": ("de", "fr", "ja")[i % 3], "n": i} for i in range(9)]
TEXTS = [row["text"] for row in ROWS]
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
CHAT = Chat((("user", "Why?"), ("assistant", "So.")))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def compress(path, data):
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)


def write_arrow(path, rows, chunk=4):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=chunk)


def saved(folder, rows, split="train", licence=""):
    """Writes what `datasets.save_to_disk` writes."""
    folder.mkdir(parents=True)
    write_arrow(folder / "data-00000-of-00001.arrow", rows)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split, "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"license": licence, "features": {}}))


def store(folder, rows):
    """Writes the same records in every format and returns source options by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(lines(rows))
    (folder / "a.json.gz").write_bytes(gzip.compress(lines(rows)))
    compress(folder / "a.jsonl.zst", lines(rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=4)
    saved(folder / "saved", rows)
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    made = {name: {"name": "jsonl", "path": str(folder / name)} for name in ("a.jsonl", "a.json.gz", "a.jsonl.zst")}
    made["parquet"] = {"name": "parquet", "path": str(folder / "*.parquet")}
    made["saved"] = {"name": "hf_dataset", "path": str(folder / "saved")}
    made["array_record"] = {"name": "array_record", "path": str(folder / "a.array_record")}
    return made


def drain(options):
    return list(schema.make("jaxcl.data.sources", options, field="sources.x").documents())


def parquet_documents(path):
    return schema.make("jaxcl.data.sources", {"name": "parquet", "path": str(path)}, field="sources.x").documents()


FORMATS = ("a.jsonl", "a.json.gz", "a.jsonl.zst", "parquet", "saved", "array_record")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    options = store(tmp_path, ROWS)[kind]
    column = {"column": "text"} if kind == "array_record" else {}
    assert drain({**options, **column}) == TEXTS
    assert drain({**options, "column": "lang"}) == [row["lang"] for row in ROWS]
    assert drain({**options, "column": "text", "where": {"lang": "fr"}}) == TEXTS[1::3]
    where = {"lang": ["fr", "ja"], "n": [1, 2, 3]}
    assert drain({**options, "column": "text", "where": where}) == TEXTS[1:3]
    pairs = drain({**options, "prompt": "lang", "response": "text"})
    assert pairs == [Chat((("user", row["lang"]), ("assistant", row["text"]))) for row in ROWS]
    assert drain({**options, "column": "text", "max_bytes": 13}) == [TEXTS[0], TEXTS[1][:5]]
    for words, wrong in (
        ("no column 'txt'; did you mean 'text'", {"column": "txt"}),
        ("no column 'lnag'; did you mean 'lang'", {"column": "text", "where": {"lnag": "de"}}),
        ("column 'n' holds int, not text", {"column": "n"}),
        ("column 'text' holds str, not a list of messages", {"messages": "text"}),
        (r"column='text' and messages='m': give one of", {"column": "text", "messages": "m"}),
        ("prompt='p': needs response=", {"prompt": "p"}),
        ("response='r': needs prompt=", {"response": "r"}),
    ):
        with pytest.raises(UserError, match=words):
            drain({**options, **wrong})


@pytest.mark.parametrize("kind", [*FORMATS, "text", "embedded"])
def test_every_source_says_its_licence(tmp_path, kind):
    """And the manifest of its rows, which the run, the report and the export repeat."""
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    plain = {"text": {"name": "text", "path": str(tmp_path / "a.txt"), "split": "paragraph"}}
    plain |= {"embedded": {"name": "embedded", "domain": "prose", "max_bytes": 20_000}}
    options = plain[kind] if kind in plain else {**store(tmp_path / "s", ROWS)[kind], "column": "text"}
    if kind != "embedded":  # it knows its own
        options["licence"] = "CC0-1.0"
    made = schema.make("jaxcl.data.sources", options, field="sources.x")
    assert made.licence == "CC0-1.0" if kind != "embedded" else "PSF-2.0" in made.licence
    corpus = prepare.make(made, tokenizer.make(), directory=str(tmp_path / "c"), name="x", length=8, held_out=0.0)
    assert provenance.table({"x": corpus})["x"]["licence"] == made.licence


@pytest.mark.parametrize("kind", FORMATS)
def test_messages_become_conversations(tmp_path, kind):
    other = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]
    nobody = {"role": None, "content": None}
    rows = [{"m": TURNS, "s": other, "bad": [nobody]}, {"m": None, "s": other, "bad": [nobody]}]
    options = store(tmp_path, rows)[kind]
    assert drain({**options, "messages": "m"}) == [CHAT]  # null gives none
    assert (
        drain({**options, "messages": "s"}) == [Chat((("system", "Be brief."), ("user", "1"), ("assistant", "2")))] * 2
    )
    with pytest.raises(UserError, match=r"bad\[0\]: role or content is null"):
        drain({**options, "messages": "bad"})


def test_messages_stored_as_columns(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"m": {"role": ["user", "assistant"], "content": ["Why?", "So."]}}]))
    assert drain({"name": "jsonl", "path": str(tmp_path / "a.jsonl"), "messages": "m"}) == [CHAT]
    (tmp_path / "b.jsonl").write_bytes(lines([{"m": {"role": "user", "content": "Why?"}}]))
    with pytest.raises(UserError, match="column 'm' holds a single message; put it in a list"):
        drain({"name": "jsonl", "path": str(tmp_path / "b.jsonl"), "messages": "m"})


def test_a_conversation_is_taken_whole_or_not_at_all():
    assert sources.text_of_document(CHAT) == "Why?\nSo."
    assert list(sources.limited([CHAT, CHAT, "abc"], 16)) == [CHAT, CHAT]
    assert list(sources.limited([CHAT, CHAT, "abc"], 15)) == [CHAT]
    assert list(sources.limited([CHAT, "abc"], 10)) == [CHAT, "ab"]
    assert list(sources.limited([Chat((("user", " "),)), CHAT], None)) == [CHAT]


def test_parquet_is_read_in_batches(tmp_path):
    """A file of many rows in one group costs a bounded amount of Arrow memory."""
    text = "x" * 1000
    table = pa.table({"text": [f"{i} {text}" for i in range(30_000)], "unread": [text] * 30_000})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    del table
    before, most = pa.total_allocated_bytes(), 0
    for i, _ in enumerate(parquet_documents(tmp_path / "a.parquet")):
        if i % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    assert most < 12e6  # of 30 MB


def test_folders_of_several_splits(tmp_path):
    root = tmp_path / "dict"
    saved(root / "train", ROWS, licence="mit")
    saved(root / "test", ROWS[:2], split="test")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    options = {"name": "hf_dataset", "path": str(root)}
    assert drain(options) == TEXTS
    assert drain({**options, "split": "test"}) == TEXTS[:2]
    assert hf_dataset.make(path=str(root)).licence == "mit"
    assert hf_dataset.make(path=str(root), licence="mine").licence == "mine"
    with pytest.raises(UserError, match=r"split='tset': not in .*did you mean 'test'.*has train, test"):
        drain({**options, "split": "tset"})
    with pytest.raises(UserError, match=r"split='dev': not in .*has train"):
        drain({"name": "hf_dataset", "path": str(root / "train"), "split": "dev"})
    (root / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001.arrow: missing, but .*state.json names it"):
        drain({**options, "split": "test"})
    (root / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: missing or damaged"):
        drain(options)


@pytest.mark.parametrize(
    ("front", "licence"),
    [("license: apache-2.0", "apache-2.0"), ("license:\n- cc0-1.0\ntags: [x]", "cc0-1.0"), ("tags: [license]", None)],
)
def test_clones_of_a_repository(tmp_path, front, licence):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        part = pa.Table.from_pylist(ROWS[i * 3 : i * 3 + 3])
        parquet.write_table(part, data / f"train_sft-0000{i}-of-00002.parquet")
    (data / "my-val.jsonl").write_bytes(lines(ROWS[6:8]))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "part.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[8:])))
    (tmp_path / "README.md").write_text(f"---\nlanguage: de\n{front}\n---\nlicense: none\n")
    options = {"name": "hf_dataset", "path": str(tmp_path)}
    assert drain({**options, "split": "train_sft"}) == TEXTS[:6]
    assert drain({**options, "split": "validation"}) == TEXTS[6:8]
    assert drain({**options, "split": "test"}) == TEXTS[8:]
    assert hf_dataset.make(path=str(tmp_path), split="test").licence == licence
    with pytest.raises(UserError, match=r"split='train': not in .*has train_sft, validation, test|did you mean"):
        drain(options)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "test.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(UserError, match="split 'test' lies in more, test; give one of these folders as path"):
        drain({**options, "split": "test"})


def test_a_clone_that_names_no_split_is_all_train(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(lines(ROWS))
    assert drain({"name": "hf_dataset", "path": str(tmp_path)}) == TEXTS


def cut(path, size):
    path.write_bytes(path.read_bytes()[:-size])
    return path


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.json.gz", 12),
        ("a.jsonl.zst", 5),
        ("a.parquet", 20),
        ("saved/data-00000-of-00001.arrow", 8),  # all batches are there, the end is not
        ("saved/data-00000-of-00001.arrow", 400),
        ("a.array_record", 70_000),
    ],
)
def test_truncated_files_are_refused_in_one_line(tmp_path, name, size):
    options = store(tmp_path, ROWS * 40)
    kind = {"a.parquet": "parquet", "a.array_record": "array_record"}.get(name, name.split("/", maxsplit=1)[0])
    path = cut(tmp_path / name, size)
    with pytest.raises(UserError) as error:
        drain({**options[kind], "column": "text"})
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert "leave it out" in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet", "saved"])
def test_files_without_records_are_named(tmp_path, name):
    options = store(tmp_path, ROWS)
    kind = "parquet" if name == "a.parquet" else name
    empty = pa.table({"text": pa.array([], pa.string())})
    match name:
        case "a.jsonl":
            (tmp_path / name).write_bytes(b"\n")
        case "a.json.gz":
            (tmp_path / name).write_bytes(gzip.compress(b""))
        case "a.jsonl.zst":
            compress(tmp_path / name, b"")
        case "a.parquet":
            parquet.write_table(empty, tmp_path / name)
        case _:
            with pa.ipc.new_stream(str(tmp_path / "saved/data-00000-of-00001.arrow"), empty.schema):
                pass
    with pytest.raises(UserError, match=r"(a\.|data-0).*: holds no records; replace the file or leave it out"):
        drain(options[kind])


def test_pointers_of_git_lfs_are_explained(tmp_path):
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"train.parquet: is a Git LFS pointer.*git lfs pull"):
        drain({"name": "hf_dataset", "path": str(tmp_path)})
    with pytest.raises(UserError, match="no such folder"):
        drain({"name": "hf_dataset", "path": str(tmp_path / "none")})


def test_bytes_are_text_only_if_they_are_utf8(tmp_path):
    table = pa.table({"text": [b"\xc2\xb5", b"\xff"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents = parquet_documents(tmp_path / "a.parquet")
    assert next(documents) == "µ"
    with pytest.raises(UserError, match=r"a.parquet\[1\]: column 'text' holds bytes that are not UTF-8"):
        next(documents)


def test_a_filter_makes_other_rows_and_a_bad_file_leaves_nothing(tmp_path):
    path = store(tmp_path, ROWS * 20)["a.jsonl"]["path"]
    words = tokenizer.make()
    make = {"directory": str(tmp_path / "cache"), "name": "x", "length": 16, "held_out": 0.2}
    whole = prepare.make(jsonl.make(path=path), words, **make)
    part = prepare.make(jsonl.make(path=path, where={"lang": ["de", "ja"]}), words, **make)
    assert whole.path != part.path
    assert part.manifest["source"]["where"] == {"lang": ["de", "ja"]}
    before = sorted((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match="no column"):
        prepare.make(jsonl.make(path=path, column="body"), words, **make)
    assert sorted((tmp_path / "cache").iterdir()) == before


def test_documents_of_files_of_any_kind(tmp_path):
    store(tmp_path, ROWS)
    (tmp_path / "b[1].md").write_text("plain")
    names = ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.array_record"]
    assert list(files.documents_of([str(tmp_path / name) for name in names])) == TEXTS * 5
    assert list(files.documents_of(str(tmp_path / "*.md"))) == ["plain"]
    assert list(files.documents_of(str(tmp_path / "a.parquet"), "lang"))[:3] == ["de", "fr", "ja"]
    (tmp_path / "c.bin").write_text("x")
    with pytest.raises(UserError, match=r"c.bin: its name does not tell what it is"):
        files.documents_of([str(tmp_path / "c.bin")])
