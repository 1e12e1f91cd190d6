"""Small files that stand for much: pages of Parquet, templates of chats and numbers of tokens are bounded."""

import json
import time

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxcl.data import pages, template, tokenizer
from jaxcl.data.sources import Chat
from jaxcl.data.sources import parquet as source
from jaxcl.schema import UserError

ROWS = [
    {"text": f"{i} " + "word " * 40, "m": [{"role": "user", "content": "x" * (i % 7)}] * (i % 3)} for i in range(2000)
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"row_group_size": 100, "write_page_index": True, "data_page_size": 512},
    ],
)
def test_files_of_honest_writers_are_read(tmp_path, options):
    path = str(tmp_path / "x.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, **options)
    assert 1 <= pages.rows(path, ["text", "m"], source.BATCH) <= source.BATCH
    assert [row for _, row in source.read(path, ["text", "m"])] == ROWS


def test_a_page_that_unpacks_to_much_more_than_it_is_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["0" * 2**20], "other": ["a"]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 2**12
    assert len(next(source.read(str(path), ["text"]))[1]["text"]) == 2**20
    monkeypatch.setattr(pages, "PACKED", 2**18)
    with pytest.raises(
        UserError, match=r"x.parquet: column 'text' has a page of \d+ bytes that unpacks to 1,048,5\d\d; leave"
    ):
        next(source.read(str(path), ["text"]))
    assert next(source.read(str(path), ["other"]))[1] == {"other": "a"}  # what is not read does not matter
    monkeypatch.setattr(pages, "RATIO", 2**20)
    assert next(source.read(str(path), ["text"]))
    monkeypatch.setattr(pages, "PAGE", 2**19)
    with pytest.raises(UserError, match="unpacks to"):
        next(source.read(str(path), ["text"]))


def repeated(path, size):
    """Writes a thousand rows that refer to one long text."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array(["0" * size]))
    options = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 2**26}
    parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    assert path.stat().st_size < 2**12


def test_rows_that_refer_to_one_long_text_are_not_all_in_memory_at_once(tmp_path):
    path = tmp_path / "x.parquet"
    repeated(path, 2**22)
    before = pyarrow.total_allocated_bytes()
    assert pages.rows(str(path), ["text"], source.BATCH) == 2**27 // (2**22 + 4)
    read = source.read(str(path), ["text"])
    assert [len(next(read)[1]["text"]) for _ in range(3)] == [2**22] * 3
    assert pyarrow.total_allocated_bytes() - before < 2**28  # a thousand of them are 4 GiB
    read.close()


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"\x00",
        b"\x19\xff",
        b"\x49\xfc\xff\xff\xff\xff\x0f",
        b"\x4c" * 64,
        b"\x4b\x01\x00",
        b"\x49\x1c\x19\x1c\x00\x00\x00",
    ],
)
def test_a_footer_that_is_none_is_refused(tmp_path, footer):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError, match=r"x\.parquet: its footer, or the header of a page, is none; replace the file"):
        pages.rows(str(path), ["text"], 8)


def test_columns_that_lie_over_each_other_are_refused(tmp_path, monkeypatch):
    """Else the pages of a small file would be looked at as often as its footer says."""
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a" * 500]}), path)
    with path.open("rb") as stream:
        footer = pages._footer(stream, path.stat().st_size)
    monkeypatch.setattr(pages, "_footer", lambda *_: footer | {4: footer[4] * 2})
    assert pages.rows(str(path), ["text"], 8) == 8
    monkeypatch.setattr(pages, "_footer", lambda *_: footer | {4: footer[4] * 1000})
    with pytest.raises(UserError, match=r"x\.parquet: has columns that lie over each other"):
        pages.rows(str(path), ["text"], 8)


def chat(place, text):
    (place / "tokenizer.json").write_text(tokenizer.byte_json())
    (place / "chat_template.jinja").write_text(text)
    made = tokenizer.make(name="hf", path=str(place))
    assert made.chat
    return made.decode(made.chat(Chat((("user", "2 + 2?"), ("assistant", "4"))))[0])


BIG = "('a' * 100000)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "turns of loops"),
        ("{% set a = range(99999)|list %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}", "turns of loops"),
        ("{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}", "turns of loops"),
        ("{% set a = ([range(9999)|list] * 9999)|map('sort')|list %}", "turns of loops"),
        ("{% for i in range(9999) %}{{ range(9999)|sum }}{% endfor %}", "turns of loops"),
        (
            "{% macro f(n) %}{% for i in 'ab' %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
            "turns of loops|recursion",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "makes a text",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "makes a text",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
            "{% set n.x = y %}{% endfor %}",
            "makes a text",
        ),
        ("{{ 'a' * 99999999999 }}", "makes a text"),
        ("{{ 99999999999 * [0] }}", "makes a text"),
        ("{{ 10 ** 10 ** 9 }}", "256 bits"),
        ("{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}", "256 bits"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{{ '{:>999999999}'.format(1) }}", "width"),
        ("{{ 'a'.ljust(999999999) }}", "unsafe"),
        ("{{ 'a'|center(999999999) }}", "center"),
        ("{{ messages|tojson(indent=99999999) }}", "indents"),
        ("{{ 'a\na'|indent(999999999) }}", "makes a text"),
        (f"{{{{ {BIG}.replace('a', 'b' * 100000) }}}}", "makes a text"),
        (f"{{{{ {BIG}.replace('', 'b' * 100000) }}}}", "makes a text"),
        (f"{{{{ {BIG}|replace('a', 'b' * 100000) }}}}", "makes a text"),
        (f"{{{{ {BIG}.join({BIG}) }}}}", "makes a text"),
        (f"{{{{ {BIG}|list|join({BIG}) }}}}", "makes a text"),
        ("{{ lipsum(n=99999) }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'secret' %}", "loader"),
    ],
)
def test_a_template_that_does_too_much_is_refused_at_once(tmp_path, text, reason):
    began = time.process_time()
    with pytest.raises(UserError, match=f"chat_template.jinja: cannot render .*({reason})"):
        chat(tmp_path, text)
    assert time.process_time() - began < 5


def test_templates_do_what_they_did(tmp_path):
    text = (
        "{% macro one(m) %}{{ m.role|upper ~ ': ' ~ m.content|trim ~ '\\n' }}{% endmacro %}"
        "{%- for m in messages %}{{ one(m) + '-' * 2 + '%d' % loop.index + ' '|replace(' ', '_') }}"
        "{{ ['a', 'b']|join(', ') }}{{ [[2, 1], [3]]|map('sort')|list }}{{ [{'a': 1}]|map(attribute='a')|list|sum }}"
        "{{ 'hi'|list|sort|first }}{{ {'b': 1}|list }}{% for i in range(4) if i > 2 %}{{ i }}{% endfor %}"
        "{{ {'a': [1]}|tojson(indent=1) }}{{ 'x\\ny'|indent(2) }}{% endfor %}"
    )
    made, budget = template.make(text, [], {})
    budget.begin(10)
    found = made.render(messages=[{"role": "user", "content": " hi "}])
    assert found == "USER: hi\n--1_a, b[[1, 2], [3]]1h['b']3{\n \"a\": [\n  1\n ]\n}x\n  y"
    assert "tick" not in text
    renamed = "{% set tick = 1 %}{% set joined = 2 %}{% for i in range(3) %}{{ i ~ tick }}{% endfor %}"
    made, budget = template.make(renamed, [], {})
    budget.begin(0)
    assert made.render() == "011121"
    assert budget.steps == template.STEPS - 3


def test_long_conversations_have_room(tmp_path):
    made, budget = template.make("{% for m in messages %}{{ m ~ '|' }}{% endfor %}", [], {})
    long = ["x" * 2**20] * 40
    budget.begin(sum(map(len, long)))
    assert len(made.render(messages=long)) == 40 * (2**20 + 1)


def test_numbers_of_tokens_that_no_vocabulary_has_are_refused(tmp_path):
    made = json.loads(tokenizer.byte_json())
    made["model"]["vocab"]["far"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"a token has the number 4,294,967,295, above 16,777,216"):
        tokenizer.make(name="hf", path=str(tmp_path))
    made["model"]["vocab"]["far"] = 9999
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert tokenizer.make(name="hf", path=str(tmp_path)).vocab == 10_000
    assert np.array_equal(tokenizer.make(name="hf", path=str(tmp_path)).encode("a"), [97])
