"""SentencePiece models: the contract of a tokenizer, in a file of its own or in a folder of Hugging Face."""

import io
import json

import numpy as np
import pytest

from jaxcl.data import tokenizer
from jaxcl.data.sources import Chat
from jaxcl.schema import UserError

sentencepiece = pytest.importorskip("sentencepiece")
TEXT = ["the cat sat on the mat", "a river and a stone", "the harbour in winter", "naïve letters"] * 20


@pytest.fixture(scope="module")
def content():
    """A small model in the manner of Llama 2: BPE, byte fallback, nothing normalised."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=out, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        control_symbols=["[INST]"], minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture
def folder(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    return tmp_path


def make(folder, **options):
    return tokenizer.make(**{"name": "sentencepiece", "path": str(folder / "tokenizer.model")} | options)


@pytest.mark.parametrize("text", ["the cat", " two  spaces ", "µ 你好 \U0001f600", "<s> the </s> [INST]", "a\nb\t", ""])
def test_round_trip_without_special_tokens(folder, text):
    tok = make(folder)
    tokens = tok.encode(text)
    assert tok.decode(tokens) == text
    assert tokens.dtype == np.uint32
    assert not {tok.bos, tok.eos, 3} & set(tokens.tolist())
    np.testing.assert_array_equal(tok.encode_many([text, "x"])[0], tokens)
    assert tok.decode([tok.bos, *tokens, tok.eos]) == text
    assert (tok.bos, tok.eos, tok.pad, tok.vocab) == (1, 2, None, 340)


def test_a_folder_with_a_model_alone_is_read_by_it(folder):
    by_name, by_folder = make(folder), tokenizer.make(name="hf", path=str(folder))
    assert by_folder.fingerprint == by_name.fingerprint
    assert by_folder.encode("the mat").tolist() == by_name.encode("the mat").tolist()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[INST]"}))
    changed = make(folder)
    assert changed.eos == 3
    assert changed.fingerprint != by_name.fingerprint


def test_chats(folder):
    file = folder / "chat.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    tok = make(folder, template=str(file))
    tokens, trained = tok.chat(Chat((("user", "cat 你好µ </s> <s>"), ("assistant", "a river </s>µ"), ("user", "mat"))))
    assert [int(t) for t in tokens if t in (1, 2, 3)] == [3, 3, 2, 1, 3, 3, 2]
    assert tok.decode(tokens[trained]).split() == ["a", "river", "</s>µ"]
    assert tokens[trained][-1] == tok.eos
    assert not trained[-1]


def test_the_mask_is_in_characters_not_bytes(folder):
    tok = make(folder)
    tokens, trained = tok.chat(Chat((("user", "µµ你好\ud800"), ("assistant", "naïve cat"), ("user", "\U0001f600 mat"))))
    assert tok.decode(tokens[trained]) == "naïve cat\n"
    assert tok.decode(tokens[~trained]).startswith("user: µµ你好?\nassistant:")


def test_errors_name_the_field(folder, monkeypatch):
    (folder / "broken.model").write_bytes(b"x")
    (folder / "more").mkdir()
    (folder / "more" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (folder / "more" / "added_tokens.json").write_text(json.dumps({"<new>": 340}))
    cases = [
        ({"path": str(folder / "broken.model")}, "not a SentencePiece model"),
        ({"path": None}, "needs the path of a tokenizer.model"),
        ({"path": "/nowhere/tokenizer.model"}, "no such file"),
        ({"eos": "<none>"}, "no token <none>"),
        ({"path": str(folder / "more")}, "added_tokens.json: '<new>' is not in the model"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words):
            make(folder, **options)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'jaxcl\[hf\]'"):
        make(folder)
