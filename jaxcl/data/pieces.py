"""SentencePiece models: Llama 2, Mistral 7B, T5 and others that come with a `tokenizer.model`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from jaxcl.data.chat import Coded, Coder
from jaxcl.schema import UserError


def load(content: bytes, path: str) -> Any:
    """Returns the processor of a model file.

    Raises:
      UserError: not a model, or sentencepiece is not installed.
    """
    try:
        import sentencepiece  # noqa: PLC0415  (only those who use it need it)
    except ImportError as error:
        raise UserError(f"config.tokenizer.path={path!r}: needs SentencePiece: pip install 'jaxcl[hf]'") from error
    try:
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
        model.id_to_piece(list(range(model.get_piece_size())))  # all of them are text
        return model
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"config.tokenizer.path={path!r}: not a SentencePiece model; replace the file") from error


def number(model: Any, name: str) -> int | None:
    """Returns the number of a piece, or None."""
    found = model.piece_to_id(name)
    return found if model.id_to_piece(found) == name else None


def encode(model: Any, text: str) -> np.ndarray:
    """Returns tokens uint32 [n]; control symbols never come out of text."""
    return np.array(model.encode(_sound(text)), np.uint32)


def decode(model: Any, tokens: Any) -> str:
    """Returns the text of tokens [n] without control symbols."""
    numbers = [int(t) for t in np.asarray(tokens).ravel()]
    return model.decode([n for n in numbers if n < model.get_piece_size() and not model.is_control(n)])


def coder(model: Any, bos: int, eos: int) -> Coder:
    """Returns what conversations need. Text behind a special token begins anew, with the model's dummy prefix."""
    names = {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i)}
    found = re.compile("|".join(f"({re.escape(name)})" for name in names)) if names else None

    def plain(text: str) -> Coded:
        text = _sound(text)
        pieces = model.encode(text, return_type="proto").pieces
        size = np.cumsum([0, *(len(letter.encode()) for letter in text)])  # the places of pieces are in bytes
        begin, end = (np.searchsorted(size, [getattr(piece, name) for piece in pieces]) for name in ("begin", "end"))
        return Coded(np.array([piece.id for piece in pieces], np.uint32), begin, end, np.zeros(len(pieces), bool))

    def parsed(text: str) -> Coded:
        parts, at = [], 0
        for match in found.finditer(text) if found else ():
            parts += [_moved(plain(text[at : match.start()]), at)]
            begin, end = (np.array([place], np.int64) for place in match.span())
            parts += [Coded(np.array([names[match[0]]], np.uint32), begin, end, np.ones(1, bool))]
            at = match.end()
        parts += [_moved(plain(text[at:]), at)]
        return Coded(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    return Coder(plain, parsed, tuple(names), bos, eos)


def _sound(text: str) -> str:
    """Returns the text with lone surrogates, which the library refuses, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _moved(coded: Coded, by: int) -> Coded:
    """Returns the same tokens `by` characters later."""
    return coded._replace(begin=coded.begin + by, end=coded.end + by)
