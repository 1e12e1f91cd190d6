"""Document sources: real text from the installation, files of text, JSON lines and records, and their errors."""

import ast
import gzip
import json

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxcl import schema
from jaxcl.data import sources
from jaxcl.data.sources import array_record, embedded, jsonl, text
from jaxcl.schema import UserError


@pytest.mark.parametrize("domain", ["prose", "code", "headers"])
def test_embedded_text_is_there_and_always_the_same(domain):
    source = embedded.make(domain=domain, max_bytes=300_000)
    docs = list(source.documents())
    assert docs == list(source.documents())
    assert sum(len(d.encode()) for d in docs) == 300_000
    assert all(d.strip() for d in docs)
    assert max(map(len, docs)) <= 8192
    assert len(docs) > 40
    names = [entry[0] for entry in source.listing[1:]]
    assert not any("test" in name.split("/") for name in names)
    assert source.licence


def test_embedded_domains_differ():
    share = {}
    for domain in ("prose", "code", "headers"):
        joined = "\n".join(embedded.make(domain=domain, max_bytes=300_000).documents())
        share[domain] = {word: joined.count(word) for word in ("#define", "self.", "def ", " the ")}
    assert max(share, key=lambda d: share[d]["#define"]) == "headers"
    assert max(share, key=lambda d: share[d]["self."]) == "code"
    assert max(share, key=lambda d: share[d][" the "]) == "prose"


def test_code_loses_its_docstrings_and_nothing_else(tmp_path):
    module = tmp_path / "m.py"
    module.write_text('"""Top."""\nX = """kept"""\n\n\ndef f():\n    """Gone.\n\n    All of it."""\n    return 1\n\n\n'
                      'class A:\n    """Only this."""\n\n\ndef g(): """one line"""\n')  # fmt: skip
    (code,) = embedded._code(str(module))
    (prose,) = embedded._prose(str(module))
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(
        'X = """kept"""\ndef f():\n    return 1\nclass A:\n    pass\ndef g(): """one line"""'
    ))  # fmt: skip
    assert prose == "Top.\n\nGone.\n\nAll of it.\n\nOnly this.\n\none line"


def test_the_language_reference_is_prose_and_long_files_are_cut_at_lines(tmp_path):
    topics = tmp_path / "topics.py"
    topics.write_text("# made\ntopics = {'a': 'one', 'b': 'two'}\n")
    assert list(embedded._prose(str(topics))) == ["one", "two"]
    assert list(embedded._code(str(topics))) == []
    long = "".join(f"line {i}\n" for i in range(5000)) + "x" * 20000
    pieces = list(embedded._pieces(long))
    assert "".join(pieces) == long
    assert max(map(len, pieces)) == 8192
    assert all(p.endswith("\n") for p in pieces[:4])


def test_text_files_and_paragraphs(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("one\ntwo\n\n\nthree\n \nfour\n")
    (tmp_path / "deep" / "a.txt").write_text("µ")
    (tmp_path / "blank.txt").write_text(" \n")
    pattern = str(tmp_path / "**" / "*.txt")
    assert list(text.make(path=pattern).documents()) == ["one\ntwo\n\n\nthree\n \nfour\n", "µ"]
    assert list(text.make(path=pattern, split="paragraph").documents()) == ["one\ntwo", "three", "four\n", "µ"]
    assert list(text.make(path=pattern, split="paragraph", max_bytes=9).documents()) == ["one\ntwo", "th"]
    assert list(text.make(path=[str(tmp_path / "deep/a.txt")] * 2).documents()) == ["µ"]
    before = text.make(path=pattern).listing
    (tmp_path / "b.txt").write_text("changed")
    assert text.make(path=pattern).listing != before


def test_json_lines_plain_and_compressed(tmp_path):
    lines = "".join(json.dumps({"text": f"doc {i}", "other": f"x{i}"}) + "\n\n" for i in range(3))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    docs = [f"doc {i}" for i in range(3)]
    assert list(jsonl.make(path=str(tmp_path / "*.jsonl*")).documents()) == docs * 2
    assert list(jsonl.make(path=str(tmp_path / "a.jsonl"), column="other").documents()) == ["x0", "x1", "x2"]


def test_array_records_of_text_and_json(tmp_path):
    for name, records in {"t": ["a", "µ"], "j": ['{"text": "a"}', '{"text": "b"}']}.items():
        writer = ArrayRecordWriter(str(tmp_path / name), "group_size:1")
        for record in records:
            writer.write(record.encode())
        writer.close()
    assert list(array_record.make(path=str(tmp_path / "t")).documents()) == ["a", "µ"]
    assert list(array_record.make(path=str(tmp_path / "j"), column="text").documents()) == ["a", "b"]


def test_errors_name_file_and_remedy(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"txt": "no"}\n')
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    (tmp_path / "c.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off"}\n' * 50)[:-12])
    (tmp_path / "e.jsonl").write_text("[1]\n")
    (tmp_path / "f.rec").write_bytes(b"nothing")

    def drain(name, **options):
        return list(schema.make("jaxcl.data.sources", {"name": name, **options}, field="data.x").documents())

    for words, name, options in [
        ("no such file", "text", {"path": str(tmp_path / "none*.txt")}),
        ("names no file", "text", {"path": []}),
        ("latin.txt: not UTF-8 at byte 3", "text", {"path": str(tmp_path / "latin.txt")}),
        (r"a.jsonl:2: no column 'text'; did you mean 'txt'", "jsonl", {"path": str(tmp_path / "a.jsonl")}),
        ("b.jsonl:1: not JSON", "jsonl", {"path": str(tmp_path / "b.jsonl")}),
        ("c.jsonl:1: column 'text' holds int", "jsonl", {"path": str(tmp_path / "c.jsonl")}),
        ("d.jsonl.gz: cannot be read", "jsonl", {"path": str(tmp_path / "d.jsonl.gz")}),
        ("e.jsonl:1: expected a JSON object", "jsonl", {"path": str(tmp_path / "e.jsonl")}),
        ("f.rec: no", "array_record", {"path": str(tmp_path / "f.rec")}),
        ("domain='verse'", "embedded", {"domain": "verse"}),
        ("did you mean 'jsonl'", "json", {"path": "x"}),
    ]:
        with pytest.raises(UserError, match=words):
            drain(name, **options)


def test_limit_cuts_between_characters():
    assert list(sources.limited(iter(["ab", "µµ", "c"]), 5)) == ["ab", "µ"]
    assert list(sources.limited(iter(["ab", "µµ", "c"]), None)) == ["ab", "µµ", "c"]
