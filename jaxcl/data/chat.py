"""Conversations to tokens, and which of them are trained: what the assistant says, and what ends its turns.

    encode = make(coder, template)          # template: None, or a Jinja template in the manner of Hugging Face
    tokens, trained = encode(Chat((("user", "2 + 2?"), ("assistant", "4"))))

Where the assistant speaks is found by rendering the beginnings of the conversation: turn i is what `turns[:i+1]` has
and `turns[:i]` with its generation prompt has not. So a template must only ever append; one that rewrites earlier turns
needs `{% generation %}` blocks, which say the same directly, and win where there are any. A token that reaches into a
span counts. White space behind the last special token of a turn does not: no model has to write it.

What people wrote is never read as a special token: in each content the texts of special tokens are broken up before the
template is rendered, and the stretch between two special tokens where that was necessary is encoded as plain text.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data import template as templates
from jaxcl.data.sources import Chat
from jaxcl.schema import UserError

# Noncharacters (Unicode 23.7), which text does not hold: the ends of a generation block, and what breaks up a token.
_BEGIN, _END, _GUARD = "\ufdd0\ufdd1\ufdd2"
_TODAY = datetime.datetime(2024, 7, 26)  # rows must not depend on the day; the date Llama 3.1's template falls back to

Turns = Sequence[tuple[str, str]]
Render = Callable[[Turns, bool], str]  # turns, whether to end with what invites the assistant -> text


class Coded(NamedTuple):
    """An encoded text; every column is [n]."""

    tokens: np.ndarray  # uint32
    begin: np.ndarray  # int64, first character
    end: np.ndarray  # int64, behind the last
    special: np.ndarray  # bool


class Coder(NamedTuple):
    """What a tokenizer must offer for conversations."""

    plain: Callable[[str], Coded]  # without special tokens, whatever the text
    parsed: Callable[[str], Coded]  # the texts of special tokens become those tokens
    specials: tuple[str, ...]  # their texts
    bos: int
    eos: int


class Template(NamedTuple):
    """A Jinja template."""

    text: str
    place: str  # where it was found, for messages
    names: dict[str, str]  # bos_token, eos_token ...


def make(coder: Coder, template: Template | None) -> Callable[[Chat], tuple[np.ndarray, np.ndarray]]:
    """Returns the encoder of conversations.

    Without a template the form is that of ChatML if the tokenizer has `<|im_start|>` and `<|im_end|>` as special
    tokens, and otherwise a line `role: content` for each turn, whose end is trained.

    Returns:
      A function from a Chat to tokens uint32 [n] and trained bool [n]: what follows `bos`, up to and with `eos`. A
      `bos` that the template puts in front is left out; an `eos` that it does not end with is added, and trained only
      where the assistant speaks last and the template has no special token for the end of a turn. It raises UserError
      for a template that fails or rewrites earlier turns, for a role with the text of a special token in it, and if
      Jinja is not installed.
    """
    parts = sorted(coder.specials, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, parts))) if parts else None
    render = _plain_render({"<|im_start|>", "<|im_end|>"} <= set(parts)) if template is None else _jinja(template)
    place = template.place if template else "the default chat format"

    def guarded(text: str) -> str:
        text = re.sub(f"[{_BEGIN}{_END}{_GUARD}]", "\ufffd", text)
        text = pattern.sub(lambda m: m[0][0] + _GUARD + m[0][1:], text) if pattern else text
        if parts and coder.parsed(text).special.any():  # one that the tokenizer finds in another spelling
            raise UserError(f"config.sources: a chat holds a special token as text ({text[:40]!r}); remove it there")
        return text

    def encode(chat: Chat) -> tuple[np.ndarray, np.ndarray]:
        turns = [(guarded(role), guarded(content)) for role, content in chat.turns]
        if any(_GUARD in role for role, _ in turns):
            raise UserError(f"config.sources: a chat has the role {chat.turns[0][0]!r} or one like it; rename it")
        text, spans, exact = _spans(render, turns, place)
        coded = _encode(coder, text)
        trained = np.zeros(len(coded.tokens), bool)
        for begin, end in spans:
            inside = np.minimum(coded.end, end) > np.maximum(coded.begin, begin)
            inside |= (coded.begin == coded.end) & (coded.begin >= begin) & (coded.begin < end)
            trained |= inside if exact else _trimmed(inside, coded, text, end)
        first = int(len(coded.tokens) > 0 and coded.tokens[0] == coder.bos)
        tokens, trained, special = coded.tokens[first:], trained[first:], coded.special[first:]
        if len(tokens) and tokens[-1] == coder.eos:
            return tokens, trained
        last = bool(len(tokens) and trained[-1] and not special[-1])
        return np.append(tokens, np.uint32(coder.eos)), np.append(trained, last)

    return encode


def _trimmed(inside: np.ndarray, coded: Coded, text: str, end: int) -> np.ndarray:
    """Returns a span without the white space behind its last special token."""
    places = np.flatnonzero(inside & coded.special)
    if len(places) and not text[coded.end[places[-1]] : end].strip():
        inside = inside & (np.arange(len(inside)) <= places[-1])
    return inside


def _spans(render: Render, turns: Turns, place: str) -> tuple[str, list[tuple[int, int]], bool]:
    """Returns the rendered text, the characters that the assistant says, and whether the template marks them."""
    text = render(turns, False)
    if _BEGIN in text:
        spans, pieces, size = [], [], 0
        for i, piece in enumerate(re.split(f"[{_BEGIN}{_END}]", text)):
            if i % 2:
                spans.append((size, size + len(piece)))
            pieces.append(piece)
            size += len(piece)
        return "".join(pieces), spans, True
    spans = []
    for i, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        before, after = render(turns[:i], True), render(turns[: i + 1], False)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"{place}: renders the beginning of a conversation differently once it goes on, so it is unclear what "
                "the assistant says; mark that with {% generation %} blocks (config.tokenizer.template)"
            )
        start = len(before)
        found = after.find(content.strip(), start)
        if found > start and after[start:found].strip() and before == render(turns[:i], False):
            # A header that no generation prompt gives.
            start = found
        spans.append((start, len(after)))
    return text, spans, False


def _encode(coder: Coder, text: str) -> Coded:
    """Returns the rendered text as tokens; stretches with a broken-up token are encoded as plain text, mended."""
    coded = coder.parsed(text)
    if _GUARD not in text:
        return coded
    pieces, at, first = [], 0, 0
    for i in [*np.flatnonzero(coded.special), len(coded.tokens)]:
        stop = len(text) if i == len(coded.tokens) else int(coded.begin[i])
        part = Coded(*(column[first:i] for column in coded))
        if _GUARD in text[at:stop]:
            kept = np.array([j for j in range(at, stop) if text[j] != _GUARD] + [stop])
            part = coder.plain(text[at:stop].replace(_GUARD, ""))
            ends = np.where(part.end > part.begin, kept[np.maximum(part.end - 1, 0)] + 1, kept[part.begin])
            part = part._replace(begin=kept[part.begin], end=ends)
        pieces += [part, Coded(*(column[i : i + 1] for column in coded))]
        at, first = (int(coded.end[i]), i + 1) if i < len(coded.tokens) else (stop, i)
    return Coded(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


def _plain_render(chatml: bool) -> Render:
    """Returns the default format."""
    head, tail = ("<|im_start|>{}\n", "<|im_end|>\n") if chatml else ("{}: ", "\n")

    def render(turns: Turns, prompt: bool) -> str:
        text = "".join(head.format(role) + content + tail for role, content in turns)
        return text + head.format("assistant") * prompt

    return render


def _jinja(template: Template) -> Render:
    """Returns a template's rendering, with what the templates of released models expect to find."""

    @functools.cache
    def compiled() -> tuple[Any, templates.Budget]:
        try:
            import jinja2  # noqa: PLC0415  (only those who have chats need it)
        except ImportError as error:
            raise UserError(f"{template.place}: a chat template needs Jinja: pip install 'jaxcl[hf]'") from error

        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        names = {"raise_exception": fail, "strftime_now": _TODAY.strftime}
        return templates.make(template.text, [_generation(), "jinja2.ext.loopcontrols"], names)

    def render(turns: Turns, prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        options = {"tools": None, "documents": None, "add_generation_prompt": prompt, **template.names}
        try:
            made, budget = compiled()
            budget.begin(sum(len(role) + len(content) for role, content in turns))
            return made.render(messages=messages, **options)
        except UserError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            roles = ", ".join(role for role, _ in turns[:4])
            text = " ".join(str(error).split())
            raise UserError(f"{template.place}: cannot render a chat of {roles or 'no turns'} ({text})") from error

    return render


def _generation() -> Any:
    """Returns the extension for `{% generation %}` ... `{% endgeneration %}`, which marks what is inside."""
    from jinja2 import ext, nodes  # noqa: PLC0415  (only those who have chats need it)

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (as Jinja wants it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Callable[[], str]) -> str:
            return _BEGIN + caller() + _END

    return Generation
