"""Verifiable problems: one module per task, whose `make(**options)` returns `Problems`; what the modules share is here.

Everything is a function of the options and the seed. A generated task makes its own small vocabulary; `questions` reads
files and writes its prompts with a tokenizer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcl import schema
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.rl.verify import Verifier
from jaxcl.schema import UserError

PAD, BOS, EOS = range(3)  # of the vocabularies that the generated tasks make
SPECIAL = ("<pad>", "<bos>", "<eos>")
TEXTS = ("worked", "chosen", "rejected")  # fields of problems that may have no texts


class Targets(NamedTuple):
    """A distribution over the vocabulary for each thought of each problem, as its support alone: never [N, T, V].

    A token may stand in the support several times, its shares add; what is not used has the share 0.
    """

    tokens: np.ndarray  # int32 [N, T, S]
    shares: np.ndarray  # float32 [N, T, S]; they sum to 1 over S

    def dense(self, rows: Any, vocab: int) -> np.ndarray:
        """Returns the distributions of some problems.

        Args:
          rows: int [n], numbers of the problems.
          vocab: V.

        Returns:
          float32 [n, T, V].
        """
        tokens, shares = self.tokens[rows], self.shares[rows]
        n, t, _ = tokens.shape
        full = np.zeros((n, t, vocab), np.float32)
        np.add.at(full, (np.arange(n)[:, None, None], np.arange(t)[None, :, None], tokens), shares)
        return full


class Problems(NamedTuple):
    """N problems whose answers can be checked."""

    description: dict[str, Any]  # JSON: name of the task and its options
    vocab: int  # V
    names: tuple[str, ...]  # of the tokens [V]; empty with a tokenizer
    pad: int
    bos: int
    eos: int
    prompts: np.ndarray  # int32 [N, P], padded on the left
    segments: np.ndarray  # int32 [N, P]: 1 = prompt, 0 = padding
    answers: np.ndarray | tuple[str, ...]  # int32 [N, A] tokens; or N texts, which the verifier understands
    verifier: Verifier  # rewards an answer, a list of tokens or a text, given the right one
    thoughts: int  # T, steps between prompt and answer; 0 = as many as the run allows
    baselines: dict[str, float]  # accuracy on these problems of guessers that do not reason
    traces: np.ndarray | None = None  # int32 [N, T]: tokens of a good chain, for discrete supervision
    targets: Targets | None = None  # of the T thoughts, for supervision by distributions (CSFT)
    worked: tuple[str, ...] = ()  # N texts: written solutions, if there are any
    chosen: tuple[str, ...] = ()  # N texts to be preferred to those rejected, if there are any; empty: no such pair
    rejected: tuple[str, ...] = ()  # N texts
    licence: str | None = None
    held_out: Problems | None = None  # for evaluation: shares no problem with these

    def verify(self, number: int, answer: Any) -> float:
        """Returns the reward of an answer to problem `number`; untrusted ones are for `jaxcl.rl.pool` if costly."""
        return self.verifier.score(self.gold(number), answer)

    def gold(self, number: int) -> str | list[int]:
        """Returns the right answer as the verifier wants it."""
        answer = self.answers[number]
        return answer if isinstance(answer, str) else [int(token) for token in answer]


def make(options: Mapping[str, Any], tokenizer: Tokenizer | None = None, *, field: str = "task") -> Problems:
    """Returns the problems of a configuration.

    Args:
      options: `name` and options of the module's `make`.
      tokenizer: for tasks of text; those that make their own vocabulary take none.
      field: the configuration field, for messages.

    Raises:
      UserError: bad options, or no tokenizer for a task of text.
    """
    if not isinstance(options, Mapping) or options.get("name") != "questions":
        return schema.make("jaxcl.rl.tasks", options, field=field)
    if tokenizer is None:
        raise UserError(f"config.{field}.name='questions': needs a tokenizer; train a model that has one")
    return schema.make("jaxcl.rl.tasks", options, tokenizer, field=field)


def part(problems: Problems, rows: np.ndarray) -> Problems:
    """Returns some of the problems, without baselines and held-out part; `rows` are their numbers, int [n]."""

    def texts(given: Sequence[str]) -> tuple[str, ...]:
        return tuple(given[int(i)] for i in rows)

    answers = problems.answers
    return problems._replace(
        prompts=problems.prompts[rows],
        segments=problems.segments[rows],
        answers=answers[rows] if isinstance(answers, np.ndarray) else texts(answers),
        traces=None if problems.traces is None else problems.traces[rows],
        targets=None if problems.targets is None else Targets(*(x[rows] for x in problems.targets)),
        **{name: texts(given) for name in TEXTS if (given := getattr(problems, name))},
        baselines={},
        held_out=None,
    )


def split(groups: np.ndarray, share: float, seed: int, *, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits problems so that no group is in both parts.

    Args:
      groups: int [N], the group of each problem.
      share: of the groups that are held out.
      seed: chooses them.
      field: names the option in messages.

    Returns:
      Numbers of the problems for training and of those held out, int [n] each, in order.

    Raises:
      UserError: a part would be empty.
    """
    if not 0 < share < 1:
        raise UserError(f"config.{field}={share}: must lie between 0 and 1, a share of the problems")
    unique, member = np.unique(groups, return_inverse=True)
    count = round(share * len(unique))
    if not 0 < count < len(unique):
        raise UserError(
            f"config.{field}={share}: holds out {count} of {len(unique)} groups of problems; leave some in both parts"
        )
    held = np.zeros(len(unique), bool)
    held[generator("split", seed).permutation(len(unique))[:count]] = True
    return np.flatnonzero(~held[member]), np.flatnonzero(held[member])


def generator(name: str, seed: int) -> np.random.Generator:
    """Returns the random numbers that belong to a name and a seed."""
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def guess(answers: Iterable[Any], hints: Iterable[Any] | None = None) -> float:
    """Returns the accuracy of the best guesser that sees nothing of a problem but its hint.

    It answers the most frequent answer of those with the same hint, counted on these very problems: no guesser that
    learned elsewhere does better on them.

    Args:
      answers: N hashable right answers.
      hints: N hashable hints; without any, the most frequent answer of all is given.
    """
    listed = list(answers)
    counts: dict[Any, dict[Any, int]] = {}
    for answer, hint in zip(listed, [None] * len(listed) if hints is None else hints, strict=True):
        of_hint = counts.setdefault(hint, {})
        of_hint[answer] = of_hint.get(answer, 0) + 1
    return sum(max(of_hint.values()) for of_hint in counts.values()) / len(listed)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts of several lengths, padded on the left, and their segments: int32 [N, P] each."""
    longest = max(map(len, rows))
    tokens = np.full((len(rows), longest), pad, np.int32)
    segments = np.zeros((len(rows), longest), np.int32)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        segments[i, longest - len(row) :] = 1
    return tokens, segments


def sequences(name: str, low: int, high: int, count: int, problems: int | None, seed: int) -> np.ndarray:
    """Returns sequences of digits, each once: all there are, or a random choice of them.

    Args:
      name: of the task, for the choice and for messages.
      low: smallest digit.
      high: largest digit.
      count: m, digits of a sequence.
      problems: how many sequences; None for all.
      seed: chooses them.

    Returns:
      int64 [N, m], in ascending order.

    Raises:
      UserError: too many to list, or more asked for than there are.
    """
    base = high - low + 1
    total = base**count
    if problems is None and total > 1_000_000:
        raise UserError(f"config.task.problems=None: {name} has {total} sequences of digits; say how many to draw")
    if problems is not None and not 2 <= problems <= total:
        raise UserError(f"config.task.problems={problems}: {name} has {total} sequences; choose from 2 to {total}")
    numbers = np.arange(total) if problems is None else _distinct(generator(name, seed), total, problems)
    powers = base ** np.arange(count - 1, -1, -1)
    return low + numbers[:, None] // powers[None, :] % base


def _distinct(draws: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Returns sorted distinct numbers below `total`, int64 [count], at a cost that does not depend on `total`."""
    if total <= 4 * count:
        return np.sort(draws.permutation(total)[:count])
    found = np.zeros(0, np.int64)
    while len(found) < count:
        found = np.unique(np.concatenate([found, draws.integers(0, total, 2 * count)]))
    return np.sort(draws.permutation(found)[:count])


def multisets(digits: np.ndarray) -> np.ndarray:
    """Returns int [N]: equal for sequences [N, m] that are permutations of each other."""
    return np.unique(np.sort(digits, axis=1), axis=0, return_inverse=True)[1].ravel()
