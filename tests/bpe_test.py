"""Training a BPE in one command: what it writes, that it is reproducible, what it refuses."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxcl import bpe
from jaxcl.data import files, tokenizer
from jaxcl.schema import UserError

TEXTS = [
    "the cat sat on the mat 12345",
    "le chat était là, élève",
    "猫がマットの上に座った。猫が",
    "naïve café\n\n  the end",
] * 5
AGAIN = "import sys\nfrom jaxcl import bpe, console\nconsole.cli(bpe.main)\n"


@pytest.fixture
def corpus(tmp_path):
    """One folder with the same text in each kind of file."""
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "other": f"zqzq {i}"}) + "\n" for i, text in enumerate(TEXTS))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def trained(out, *arguments):
    bpe.main([str(out), *map(str, arguments)])
    return tokenizer.make(name="hf", path=str(out))


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.jsonl.gz"])
def test_any_text_round_trips_and_what_was_seen_is_shorter(corpus, name, capsys):
    tok = trained(corpus / "out", "--vocab=300", corpus / name)
    assert tok.vocab == 300
    assert "300 tokens" in capsys.readouterr().out
    every = "".join(chr(c) for c in range(0xD800)) + "𝒳🎉 <|pad|> \r\n\t <|begin_of_text|>"  # nothing is normalised
    for text in [*TEXTS, every, "e\u0301 é ﬁ", ""]:
        tokens = tok.encode(text)
        assert tok.decode(tokens) == text
        assert not {tok.bos, tok.eos, tok.pad} & set(tokens.tolist())
    assert len(tok.encode("the cat")) < 4
    assert {tok.bos, tok.eos, tok.pad} == {0, 1, 2}
    assert (tok.bos, tok.eos) == (0, 1)


def test_merges_respect_the_boundaries(corpus):
    tok = trained(corpus / "out", "--vocab=600", corpus / "a.txt")  # enough to merge all that may be merged
    words = [tok.decode([number]) for number in range(tok.vocab)]
    assert " mat" in words
    assert "123" in words
    assert not any("1234" in word for word in words), "at most three digits"
    assert not any("the cat" in word or "。猫" in word[1:] for word in words), "one word at the most"
    lone = trained(corpus / "lone", "--vocab=400", save(corpus, "x.txt", "ne\u0301e ne\u0301e"))
    assert "ne\u0301e" in [lone.decode([n]) for n in range(lone.vocab)], "an accent belongs to its word"


def save(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_equal_corpora_give_equal_bytes(corpus):
    """In another process too, and however the files are ordered on the command line."""
    files = [str(corpus / "b.jsonl"), str(corpus / "a.txt")]
    bpe.main([str(corpus / "one"), "--vocab=320", *files])
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", AGAIN, str(corpus / "two"), *files[::-1], "--vocab=320"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (corpus / "one" / name).read_bytes() == (corpus / "two" / name).read_bytes()
    other = trained(corpus / "three", "--vocab=321", *files)
    assert other.fingerprint != tokenizer.make(name="hf", path=str(corpus / "one")).fingerprint


def test_the_folder_says_which_tokens_are_special_and_starts_a_text_with_one(corpus):
    import tokenizers

    trained(corpus / "out", "--vocab=300", corpus / "a.txt")
    config = json.loads((corpus / "out" / "tokenizer_config.json").read_text())
    assert [config[f"{end}_token"] for end in ("bos", "eos", "pad")] == list(bpe.SPECIAL)
    assert sorted(p.name for p in (corpus / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    tok = tokenizers.Tokenizer.from_file(str(corpus / "out" / "tokenizer.json"))
    assert tok.encode("the").ids[0] == 0
    assert tok.encode("a", "b").ids.count(0) == 2
    assert tok.encode("<|end_of_text|>").ids == [0, 1]
    np.testing.assert_array_equal(tok.encode("the", add_special_tokens=False).ids, tok.encode("the").ids[1:])


def test_columns_and_limit(corpus):
    both = list(files.documents_of([str(corpus / "b.jsonl")], "text", "other"))
    assert both == [*TEXTS, *(f"zqzq {i}" for i in range(len(TEXTS)))]
    assert list(files.documents_of([str(corpus / "a.txt")], "x", "y")) == ["\n\n".join(TEXTS)], "a text has no columns"
    words = [trained(corpus / f"{n}", "--vocab=300", corpus / "b.jsonl", *more).encode("zqzq")
             for n, more in enumerate([(), ("--column=other",), ("--column=text", "--column=other")])]  # fmt: skip
    assert len(words[0]) == 4
    assert len(words[1]) == 1
    assert len(words[2]) == 1
    little = trained(corpus / "little", "--vocab=300", corpus / "b.jsonl", "--max_bytes=28")
    assert len(little.encode("猫が")) == 6, "only the first text was read"


def test_parquet(corpus):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), corpus / "d.parquet")
    assert list(files.documents_of([str(corpus / "d.parquet")])) == TEXTS


def test_a_small_corpus_gives_a_smaller_vocabulary(corpus):
    assert trained(corpus / "out", save(corpus, "x.txt", "ab ab")).vocab == 256 + 3 + 2  # "ab", " ab"
    least = trained(corpus / "least", save(corpus, "x.txt", "ab ab"), "--vocab=259")
    assert least.vocab == 259
    assert least.decode(least.encode("ab 猫")) == "ab 猫"


def test_errors_are_one_line_and_nothing_is_written(corpus):
    (corpus / "full").mkdir()
    save(corpus, "blank.txt", " \n")
    save(corpus, "data.csv", "a,b")
    before = sorted(corpus.rglob("*"))
    for words, arguments in [
        (r"full: exists; choose another folder", ["full", corpus / "a.txt"]),
        (r"--vocab=258: must be at least 259", ["out", "--vocab=258", corpus / "a.txt"]),
        (r"hold no text; check them and --column", ["out", corpus / "blank.txt"]),
        (r"data.csv: its name does not tell what it is; .*\.jsonl", ["out", corpus / "a.txt", corpus / "data.csv"]),
        (r"none.txt'?: no such file", ["out", corpus / "none.txt"]),
        (r"b.jsonl:1: no column 'txt'; did you mean 'text'", ["out", corpus / "b.jsonl", "--column=txt"]),
        (r"--max_bytes=0: must be at least 1", ["out", corpus / "a.txt", "--max_bytes=0"]),
        (r"the following arguments are required: FILE", ["out"]),
        (r"invalid int value: 'many'", ["out", corpus / "a.txt", "--vocab=many"]),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            bpe.main([str(corpus / arguments[0]), *map(str, arguments[1:])])
        assert "\n" not in str(caught.value)
        assert sorted(corpus.rglob("*")) == before
