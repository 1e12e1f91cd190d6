"""Rewards of answers: one function per way of comparing, from tokens to mathematics. Loads neither JAX nor NumPy.

`make(name, **options)` returns a `Verifier`: something that can be called here, and by name in another process. What
comes from a model is untrusted: nothing here evaluates it, powers are not computed, long texts are compared as text.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl import schema
from jaxcl.rl import equivalence
from jaxcl.schema import UserError, nearest

Answer = str | Sequence[int]
Reward = Callable[..., float]  # (gold, answer, **options) -> reward
LETTERS = "ABCDEFGHIJ"
TAIL = 4000  # characters in which a letter is looked for


class Verifier(NamedTuple):
    """How an answer is rewarded: `place` is `module:function`, called as function(gold, answer, **options)."""

    place: str
    options: dict[str, Any]
    cheap: bool  # safe and quick enough for the training process

    @property
    def right(self) -> float:
        """Least reward of a right answer: `scale`, if the function has such an option, else 1."""
        return float(self.options.get("scale", 1.0))

    def score(self, gold: Answer, answer: Answer) -> float:
        """Returns the reward, as the function gives it; nothing is caught."""
        return function(self.place)(gold, answer, **self.options)


def make(name: str, **options: Any) -> Verifier:
    """Returns a verifier.

    Args:
      name: "tokens", "exact", "number", "marked", "boxed", "choice" or "math" of this module, or
        "package.module:function" for one of your own.
      options: keyword options of that function.

    Raises:
      UserError: no such function, or options that it does not take.
    """
    place = name if ":" in name else f"{__name__}:{name}"
    if ":" not in name and name not in OWN:
        raise UserError(f"config.verifier.name={name!r}: no such verifier{nearest(name, [*OWN])}, or 'module:function'")
    schema.check(function(place), options, field="verifier", positional=2)
    try:
        inspect.signature(function(place)).bind(None, None, **options)
    except TypeError as error:
        raise UserError(f"config.verifier.name={name!r}: is called as function(gold, answer): {error}") from error
    return Verifier(place, dict(options), ":" not in name and name != "math")


def of(options: Mapping[str, Any]) -> Verifier:
    """Returns the verifier of a configuration: `name` and options."""
    if not isinstance(options.get("name"), str):
        raise UserError(f"config.verifier: expected a dict with a 'name', got {dict(options)!r}")
    return make(**options)


def function(place: str) -> Reward:
    """Returns the function at `module:name`.

    Raises:
      UserError: there is none, or its module cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"config.verifier.name={place!r}: cannot be imported ({type(error).__name__}: {error}); "
            "write 'package.module:function'"
        ) from error
    if not callable(found):
        raise UserError(f"config.verifier.name={place!r}: is no function; write 'package.module:function'")
    return found


def tokens(gold: Sequence[int], answer: Sequence[int], *, eos: int | None = None) -> float:
    """Returns 1 if the answer is token for token the right one, else 0.

    Args:
      gold: right tokens.
      answer: tokens.
      eos: token that ends either; what follows is ignored.
    """
    return float(_until(gold, eos) == _until(answer, eos))


def _until(given: Sequence[int], eos: int | None) -> list[int]:
    listed = [int(token) for token in given]
    return listed[: listed.index(eos)] if eos in listed else listed


def exact(gold: str, answer: str, *, case: bool = False) -> float:
    """Returns 1 if the texts are equal but for white space around and within them, and for case unless it counts."""
    one, other = (" ".join(text.split()) for text in (gold, answer))
    return float(one == other if case else one.casefold() == other.casefold())


def number(gold: str, answer: str) -> float:
    """Returns 1 if the last number of the answer equals that of the right one, else 0."""
    last = equivalence.last_number(answer)
    return float(last is not None and last == equivalence.last_number(gold))


def marked(gold: str, answer: str, *, marker: str = "####", fallback: bool = False) -> float:
    """Returns 1 if what stands behind the last marker is equivalent to the right answer, else 0: GSM8K's `#### 42`.

    Args:
      gold: right answer, with or without the marker.
      answer: text.
      marker: in front of the answer, which ends with the line.
      fallback: compare the last number of a text without a marker.
    """
    found = _behind(answer, marker)
    if found is None:
        return number(_behind(gold, marker) or gold, answer) if fallback else 0.0
    return float(equivalence.equal(_behind(gold, marker) or gold, found))


def _behind(text: str, marker: str) -> str | None:
    """Returns the rest of the line behind the last marker."""
    _, found, rest = text.rpartition(marker)
    return rest.strip().split("\n")[0].strip() if found else None


def boxed(gold: str, answer: str, *, partial: float = 0.0, scale: float = 1.0) -> float:
    """Returns the reward of the last `\\boxed{}` of a text: `scale` if it is equivalent to the right answer.

    Args:
      gold: right answer, with or without a box.
      answer: text.
      partial: share of the reward for a box with another answer; "Soft Tokens, Hard Truths" (equation 11) has
        scale=100, partial=0.1: 100 right, 10 boxed, 0 otherwise.
      scale: of the reward.
    """
    found = equivalence.last_box(answer)
    if found is None:
        return 0.0
    box = equivalence.last_box(gold)
    return scale * (1.0 if equivalence.equal(gold if box is None else box, found) else partial)


def choice(gold: str, answer: str, *, choices: int = len(LETTERS)) -> float:
    """Returns 1 if the letter that the answer chooses is the right one, else 0; see `letter`."""
    return float(letter(answer, choices) == gold.strip().strip("().").upper())


def letter(text: str, choices: int = len(LETTERS)) -> str | None:
    """Returns the letter that a text chooses: boxed, behind "answer is", in parentheses, in front of `.` or alone.

    The last of the first kind that occurs is meant. A capital within a sentence is no choice: "A train ..." is none.
    """
    some = f"[{LETTERS[:choices]}]"
    box = equivalence.last_box(text)
    text = text[-TAIL:]
    if box is not None:
        text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", box).strip("{}() .")
    kinds = (
        rf"(?i:answer)(?i:\s+is)?\s*:?\s*\(?\**({some})\b(?![-'’])",
        rf"\(({some})\)",
        rf"(?:^|\n)[ \t]*({some})[ \t]*[.):](?:\s|$)",
        rf"\A\s*\**({some})\**\s*\Z",
    )
    found = (re.findall(kind, text) for kind in kinds)
    return next((matches[-1] for matches in found if matches), None)


def math(gold: str, answer: str, *, partial: float = 0.0, scale: float = 1.0) -> float:
    """Returns the reward of a text by the package Math-Verify, which also simplifies expressions.

    Only for worker processes: it has no time limit of its own here, and can take for ever.

    Args:
      gold: right answer; what is not LaTeX with its delimiters is put into a box.
      answer: text; only its boxes count.
      partial: share of the reward for a box with another answer.
      scale: of the reward.

    Raises:
      UserError: the package is missing.
    """
    try:
        math_verify: Any = importlib.import_module("math_verify")  # an extra; it loads SymPy
    except ImportError as error:
        raise UserError("config.verifier.name='math': needs math-verify; pip install 'jaxcl[rl]'") from error
    if equivalence.last_box(answer) is None:
        return 0.0
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    right = gold if "$" in gold or equivalence.last_box(gold) is not None else f"$\\boxed{{{gold}}}$"
    # Its limits are signals, which threads cannot have; the pool has limits that hold.
    parsed = [math_verify.parse(text, [latex], parsing_timeout=None) for text in (right, answer)]
    right_answer = bool(parsed[0]) and math_verify.verify(*parsed, timeout_seconds=None)
    return scale * (1.0 if right_answer else partial)


OWN: Mapping[str, Reward] = {f.__name__: f for f in (tokens, exact, number, marked, boxed, choice, math)}
