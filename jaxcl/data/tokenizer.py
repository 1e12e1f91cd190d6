"""Tokenizers: plain bytes, or any `tokenizer.json` of Hugging Face tokenizers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl.schema import UserError

BYTE_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")  # of the tokens that the byte tokenizer adds
_BOS = ("<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>", "[CLS]")
_EOS = ("<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>", "[SEP]")


class Tokenizer(NamedTuple):
    """Text to token numbers and back. `encode` adds no special tokens and never produces one from text.

    A document is stored as `bos, tokens ..., eos`; `bos` separates packed documents.
    """

    name: str
    vocab: int  # number of tokens, special ones included; a model may round it up
    bos: int
    eos: int
    pad: int | None
    encode: Callable[[str], np.ndarray]  # -> uint32 [n]
    encode_many: Callable[[Sequence[str]], list[np.ndarray]]  # the same for several documents, in parallel if it can
    decode: Callable[[Any], str]  # token numbers [n] -> text; special tokens are left out
    fingerprint: str  # sha256: equal fingerprints encode every text alike


def make(
    *,
    name: Literal["byte", "hf"] = "byte",
    path: str | None = None,
    bos: str | None = None,
    eos: str | None = None,
) -> Tokenizer:
    """Returns the tokenizer.

    Args:
      name: "byte" for UTF-8 bytes (256 numbers, then bos, eos, pad), "hf" for a file.
      path: `tokenizer.json`, or the folder that holds it; needs name="hf".
      bos: token in front of each document; by default the usual names are looked up, `eos` if none exists.
      eos: token after each document; by default the usual names are looked up.

    Raises:
      UserError: no file, not a tokenizer, or no such token in it.
    """
    if name == "byte":
        if path or bos or eos:
            raise UserError("config.tokenizer: path, bos and eos belong to name='hf'; the byte tokenizer has none")
        return _byte()
    if not path:
        raise UserError("config.tokenizer.path: missing; name='hf' needs the path of a tokenizer.json")
    return _hf(path, bos, eos)


def _byte() -> Tokenizer:
    """Returns the tokenizer of UTF-8 bytes; lone surrogates survive the round trip."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)

    def decode(tokens: Any) -> str:
        numbers = np.asarray(tokens).ravel()
        return bytes(numbers[numbers < 256].astype(np.uint8)).decode("utf-8", "replace")

    fingerprint = hashlib.sha256(b"jaxcl byte tokenizer 1").hexdigest()
    return Tokenizer("byte", 259, 256, 257, 258, encode, lambda texts: [encode(t) for t in texts], decode, fingerprint)


def byte_json() -> str:
    """Returns the tokenizer of bytes as the text of a tokenizer.json, with the same numbers."""
    import tokenizers  # noqa: PLC0415  (only those who use it pay for the import)

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the alphabet of byte-level BPE
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(list(BYTE_NAMES))
    return tok.to_str()


def _hf(path: str, bos: str | None, eos: str | None) -> Tokenizer:
    """Returns the tokenizer of a file."""
    import tokenizers  # noqa: PLC0415  (only those who use it pay for the import)

    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UserError(f"config.tokenizer.path={path!r}: no such file; give the path of a tokenizer.json")
    try:
        with open(file, "rb") as stream:
            content = stream.read()
        tok = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"config.tokenizer.path={path!r}: not a tokenizer.json ({error})") from error
    tok.encode_special_tokens = True  # text that looks like a special token stays text
    tok.no_padding()
    tok.no_truncation()
    end = _token(tok, f"eos of {path}", [eos] if eos else _EOS)
    begin = _token(tok, f"bos of {path}", [bos] if bos else [*_BOS, *_EOS])
    pad = tok.token_to_id("<pad>")

    def numbers(encoding: Any) -> np.ndarray:
        return np.array(encoding.ids, np.uint32)

    return Tokenizer(
        "hf",
        1 + max(tok.get_vocab(with_added_tokens=True).values()),  # numbers may have gaps
        begin,
        end,
        tok.token_to_id("[PAD]") if pad is None else pad,
        lambda text: numbers(tok.encode(text, add_special_tokens=False)),
        lambda texts: [numbers(e) for e in tok.encode_batch(list(texts), add_special_tokens=False)],
        lambda tokens: tok.decode([int(t) for t in np.asarray(tokens).ravel()], skip_special_tokens=True),
        hashlib.sha256(content + f"/{begin}/{end}".encode()).hexdigest(),
    )


def _token(tok: Any, field: str, names: Sequence[str]) -> int:
    """Returns the number of the first of these tokens that exists."""
    numbers = [number for number in map(tok.token_to_id, names) if number is not None]
    if not numbers:
        raise UserError(f"config.tokenizer: {field}: no token {' or '.join(names)}; name one that the file has")
    return numbers[0]
