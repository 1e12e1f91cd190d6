"""Tokenizers: bytes round trip, files of Hugging Face tokenizers, no special token out of text, errors."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data import tokenizer
from jaxcl.schema import UserError


@pytest.fixture
def file(tmp_path):
    """A small byte-level BPE with a beginning and an end of text."""

    def save(special=("<s>", "</s>", "<pad>"), name="tokenizer.json"):
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tok.train_from_iterator(["the cat sat on the mat"] * 5, trainer)
        tok.save(str(tmp_path / name))
        return str(tmp_path / name)

    return save


@given(st.text())
def test_bytes_round_trip(text):
    tok = tokenizer.make()
    tokens = tok.encode(text)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == list(text.encode())
    assert tok.decode(np.concatenate([[tok.bos], tokens, [tok.eos, tok.pad]])) == text


def test_byte_numbers_are_distinct_and_inside_the_vocabulary():
    tok = tokenizer.make(name="byte")
    assert len({tok.bos, tok.eos, tok.pad} - set(range(256))) == 3
    assert max(tok.bos, tok.eos, tok.pad) == tok.vocab - 1
    assert tok.encode("\ud800").size == 3  # a lone surrogate does not stop a run


def test_file_round_trips_and_special_tokens_in_text_stay_text(file):
    path = file()
    tok = tokenizer.make(name="hf", path=path)
    text = "the cat <s> sat</s> on the µmat"
    tokens = tok.encode(text)
    assert tok.decode(tokens) == text
    assert not {tok.bos, tok.eos, tok.pad} & set(tokens.tolist())
    assert (tok.bos, tok.eos, tok.pad) == (0, 1, 2)
    assert tokens.max() < tok.vocab
    assert len(tok.encode("the cat")) < len("the cat")
    for one, many in zip((tok.encode("a"), tok.encode("the mat")), tok.encode_many(["a", "the mat"]), strict=True):
        np.testing.assert_array_equal(one, many)


def test_a_lone_surrogate_does_not_stop_a_run(file):
    tok = tokenizer.make(name="hf", path=file())
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.encode_many(["a\ud800b"])[0].tolist() == tok.encode("a\ufffdb").tolist()


def test_one_special_token_serves_both_ends(file):
    tok = tokenizer.make(name="hf", path=file(["<|endoftext|>"]))
    assert tok.bos == tok.eos == 0
    named = tokenizer.make(name="hf", path=file(["<x>", "<y>"], "other.json"), bos="<y>", eos="<x>")
    assert (named.bos, named.eos) == (1, 0)


def test_a_vocabulary_with_gaps_ends_with_its_largest_number(tmp_path):
    words = {"<s>": 0, "</s>": 1, "cat": 40}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="cat"))
    tok.save(str(tmp_path / "gap.json"))
    assert tokenizer.make(name="hf", path=str(tmp_path / "gap.json")).vocab == 41


def test_fingerprint_tells_tokenizers_apart(file):
    path = file()
    prints = [tokenizer.make(name="hf", path=path).fingerprint, tokenizer.make().fingerprint]
    prints += [tokenizer.make(name="hf", path=path, bos="<pad>").fingerprint]
    assert len(set(prints)) == 3
    assert tokenizer.make(name="hf", path=path).fingerprint == prints[0]


def test_errors_name_the_field(file, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for options, words in [
        ({"name": "hf"}, "tokenizer.path: missing"),
        ({"name": "hf", "path": "/nowhere/tokenizer.json"}, "no such file"),
        ({"name": "hf", "path": str(tmp_path / "broken.json")}, "not a tokenizer.json"),
        ({"name": "hf", "path": file(), "eos": "<end>"}, "no token <end>"),
        ({"name": "hf", "path": file(["<x>"], "x.json")}, "no token <|end_of_text|>"),
        ({"name": "byte", "path": "x"}, "belong to name='hf'"),
    ]:
        with pytest.raises(UserError, match=words.replace("|", r"\|")):
            tokenizer.make(**options)
