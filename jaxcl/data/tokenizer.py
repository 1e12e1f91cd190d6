"""Tokenizers: plain bytes, any `tokenizer.json` of Hugging Face tokenizers, or a SentencePiece model."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl.data import chat, pieces
from jaxcl.data.sources import Chat
from jaxcl.schema import UserError

BYTE_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")  # of the tokens that the byte tokenizer adds
MOST = 2**24  # tokens: a model has a row for each number
_BOS = ("<|begin_of_text|>", "<bos>", "<s>", "<|startoftext|>", "[CLS]")
_EOS = ("<|end_of_text|>", "<eos>", "</s>", "<|endoftext|>", "[SEP]")
_PAD = ("<pad>", "[PAD]", "<|pad|>")


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
    fingerprint: str  # sha256: equal fingerprints encode every text and conversation alike
    chat: Callable[[Chat], tuple[np.ndarray, np.ndarray]] | None = None  # -> uint32 [n], trained bool [n]: see chat.py


class _Folder(NamedTuple):
    """What the files beside a tokenizer say of it."""

    names: dict[str, str]  # bos_token, eos_token ... -> text
    chat: str | None  # template
    place: str  # file of the template


def make(
    *,
    name: Literal["byte", "hf", "sentencepiece"] = "byte",
    path: str | None = None,
    bos: str | None = None,
    eos: str | None = None,
    template: str | None = None,
) -> Tokenizer:
    """Returns the tokenizer.

    Args:
      name: "byte" for UTF-8 bytes (256 numbers, then bos, eos, pad), "hf" for a file of Hugging Face tokenizers,
        "sentencepiece" for a model of that library.
      path: `tokenizer.json` or `tokenizer.model`, or the folder that holds it. A folder with the latter alone is
        read by SentencePiece. tokenizer_config.json and special_tokens_map.json beside it say what bos and eos are.
      bos: token in front of each document; by default what the folder says, then the usual names, then `eos`.
      eos: token after each document; by default what the folder says, then the usual names.
      template: file with a Jinja template for conversations; by default that of the folder, and see `chat.make`.

    Raises:
      UserError: no file, not a tokenizer, no such token in it, or a template that cannot be read.
    """
    if name == "byte":
        if path or bos or eos:
            raise UserError("config.tokenizer: path, bos and eos belong to name='hf'; the byte tokenizer has none")
        return _byte(_template(template, _Folder({}, None, "")))
    file = {"hf": "tokenizer.json", "sentencepiece": "tokenizer.model"}[name]
    if not path:
        raise UserError(f"config.tokenizer.path: missing; name={name!r} needs the path of a {file}")
    folder = _folder(path)
    if os.path.isdir(path):
        models = [n for n in ("tokenizer.json", "tokenizer.model") if os.path.isfile(os.path.join(path, n))]
        file = models[0] if name == "hf" and models else file
        path = os.path.join(path, file)
    if not os.path.isfile(path):
        raise UserError(f"config.tokenizer.path={path!r}: no such file; give the path of a {file}")
    with open(path, "rb") as stream:
        content = stream.read()
    if name == "sentencepiece" or path.endswith("tokenizer.model"):
        return _sentencepiece(content, path, bos, eos, template, folder)
    return _hf(content, path, bos, eos, template, folder)


def _folder(path: str) -> _Folder:
    """Returns what the files beside a tokenizer say."""
    root = path if os.path.isdir(path) else os.path.dirname(path)
    config, place = {}, os.path.join(root, "tokenizer_config.json")
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        if os.path.isfile(os.path.join(root, file)):
            config |= _json(os.path.join(root, file))
    known = {key: x.get("content") if isinstance(x, dict) else x for key, x in config.items() if key.endswith("_token")}
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise UserError(f"{place}: chat_template is {type(found).__name__}, not text; replace the file")
    if os.path.isfile(file := os.path.join(root, "chat_template.jinja")):
        found, place = _read(file), file
    return _Folder({key: x for key, x in known.items() if isinstance(x, str)}, found, place)


def _json(path: str) -> dict[str, Any]:
    """Returns the object of a JSON file."""
    try:
        with open(path, encoding="utf-8") as stream:
            return dict(json.load(stream))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object; replace the file") from error


def _template(path: str | None, folder: _Folder, **names: str) -> chat.Template | None:
    """Returns the template of a file, or else that of the folder; `names` are those that the folder does not know."""
    text, place = (_read(path), path) if path else (folder.chat, folder.place)
    return chat.Template(text, place, names | folder.names) if text else None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.tokenizer.template={path!r}: cannot be read ({error}); name a Jinja file") from error


def _digest(content: bytes, bos: int, eos: int, template: chat.Template | None) -> str:
    """Returns the fingerprint of a tokenizer."""
    form = json.dumps([template.text, template.names], sort_keys=True) if template else ""
    return hashlib.sha256(content + f"/{bos}/{eos}{form}".encode()).hexdigest()


def _byte(template: chat.Template | None) -> Tokenizer:
    """Returns the tokenizer of UTF-8 bytes; lone surrogates survive the round trip."""

    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)

    def decode(tokens: Any) -> str:
        numbers = np.asarray(tokens).ravel()
        return bytes(numbers[numbers < 256].astype(np.uint8)).decode("utf-8", "replace")

    def coded(text: str) -> chat.Coded:
        place = np.repeat(np.arange(len(text)), [len(c.encode("utf-8", "surrogatepass")) for c in text])
        return chat.Coded(encode(text), place, place + 1, np.zeros(len(place), bool))

    fingerprint = hashlib.sha256(b"jaxcl byte tokenizer 1").hexdigest()
    fingerprint = _digest(b"bytes", 256, 257, template) if template else fingerprint
    talk = chat.make(chat.Coder(coded, coded, (), 256, 257), template)
    many = lambda texts: [encode(t) for t in texts]  # noqa: E731
    return Tokenizer("byte", 259, 256, 257, 258, encode, many, decode, fingerprint, talk)


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


def _hf(
    content: bytes, path: str, bos: str | None, eos: str | None, template: str | None, folder: _Folder
) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json."""
    tok = _tokenizers(content, path, parse=False)
    parsing = functools.cache(lambda: _tokenizers(content, path, parse=True))
    added = tok.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    end = _token(tok, path, "eos", eos, folder, _EOS, special)
    begin = _token(tok, path, "bos", bos, folder, (*_BOS, *_EOS, tok.id_to_token(end)), special)
    highest = max(tok.get_vocab(with_added_tokens=True).values())  # numbers may have gaps
    if highest >= MOST:
        raise UserError(f"config.tokenizer.path={path!r}: a token has the number {highest:,}, above {MOST:,}; mend it")
    names = {"bos_token": tok.id_to_token(begin), "eos_token": tok.id_to_token(end)}
    form = _template(template, folder, **({} if folder.names else names))
    pads = [number for number in map(tok.token_to_id, _PAD) if number is not None]

    def numbers(encoding: Any) -> np.ndarray:
        return np.array(encoding.ids, np.uint32)

    def coded(encoding: Any) -> chat.Coded:
        place = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return chat.Coded(numbers(encoding), place[:, 0], place[:, 1], np.isin(encoding.ids, [*special]))

    coder = chat.Coder(
        lambda text: coded(tok.encode(without_surrogates(text), add_special_tokens=False)),
        lambda text: coded(parsing().encode(without_surrogates(text), add_special_tokens=False)),
        tuple(special.values()),
        begin,
        end,
    )
    return Tokenizer(
        "hf",
        1 + highest,
        begin,
        end,
        pads[0] if pads else None,
        lambda text: numbers(tok.encode(without_surrogates(text), add_special_tokens=False)),
        lambda texts: [
            numbers(e) for e in tok.encode_batch([*map(without_surrogates, texts)], add_special_tokens=False)
        ],
        lambda tokens: tok.decode([int(t) for t in np.asarray(tokens).ravel()], skip_special_tokens=True),
        _digest(content, begin, end, form),
        chat.make(coder, form),
    )


def without_surrogates(text: str) -> str:
    """Returns a text with U+FFFD for lone surrogates, which JSON can hold and the libraries cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _tokenizers(content: bytes, path: str, *, parse: bool) -> Any:
    """Returns the library's object; with `parse`, text that looks like a special token becomes one."""
    import tokenizers  # noqa: PLC0415  (only those who use it pay for the import)

    try:
        tok = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"config.tokenizer.path={path!r}: not a tokenizer.json ({error})") from error
    tok.encode_special_tokens = not parse
    tok.no_padding()
    tok.no_truncation()
    return tok


def _token(
    tok: Any, path: str, end: str, asked: str | None, folder: _Folder, usual: Sequence[str], special: dict[int, str]
) -> int:
    """Returns the number of the bos or eos: the one asked for, that of the folder, or the first of the usual names.

    Of the usual names those of special tokens go first: in a large vocabulary `<s>` may also be a piece of text.
    """
    named = asked or folder.names.get(f"{end}_token")
    if named:
        number = tok.token_to_id(named)
        if number is None:
            where = "" if asked else f", which the files beside it name; set config.tokenizer.{end}"
            raise UserError(f"config.tokenizer: {end} of {path}: no token {named}{where or '; name one that it has'}")
        return number
    marked = [name for name in usual if name in special.values()]
    numbers = [number for number in map(tok.token_to_id, [*marked, *usual]) if number is not None]
    if not numbers:
        raise UserError(f"config.tokenizer: {end} of {path}: no token {' or '.join(usual)}; name one that the file has")
    return numbers[0]


def _sentencepiece(
    content: bytes, path: str, bos: str | None, eos: str | None, template: str | None, folder: _Folder
) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model."""
    model, ends = pieces.load(content, path), {}
    if os.path.isfile(file := os.path.join(os.path.dirname(path), "added_tokens.json")):
        for token in _json(file):
            if pieces.number(model, token) is None:
                raise UserError(f"{file}: {token!r} is not in the model; save the folder with a tokenizer.json instead")
    for end, asked, own in (("bos", bos, model.bos_id()), ("eos", eos, model.eos_id())):
        named = asked or folder.names.get(f"{end}_token")
        number = pieces.number(model, named) if named else own
        if number is None or (number < 0 and end == "eos"):
            raise UserError(
                f"config.tokenizer: {end} of {path}: no token {named or '</s>'}; name one that the file has"
            )
        ends[end] = number
    end, begin = ends["eos"], ends["bos"] if ends["bos"] >= 0 else ends["eos"]
    names = {"bos_token": model.id_to_piece(begin), "eos_token": model.id_to_piece(end)}
    form = _template(template, folder, **({} if folder.names else names))
    return Tokenizer(
        "sentencepiece",
        model.get_piece_size(),
        begin,
        end,
        model.pad_id() if model.pad_id() >= 0 else None,
        lambda text: pieces.encode(model, without_surrogates(text)),
        lambda texts: [pieces.encode(model, without_surrogates(text)) for text in texts],
        lambda tokens: pieces.decode(model, tokens),
        _digest(content, begin, end, form),
        chat.make(pieces.coder(model, begin, end), form),
    )
