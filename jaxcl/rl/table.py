"""Problems as rows of a stream: their prompts, and behind them a worked chain to be supervised by.

    form     behind the prompt               what is learned from a row
    prompt   nothing                         what its rollouts earn
    sft      the discrete chain, the answer  cross-entropy of chain and answer, or of the chosen completion
    csft     mixtures of tokens, the answer  divergence of the distributions of thoughts, cross-entropy of the answer

All rows of a run have one shape: prompts are padded on the left, chains on the right. A prompt is the first P places
of its row in every form, so that a stream of worked rows serves stages that learn from rollouts as well.

Stages that learn from pairs (dpo) have rows of their own, in columns beside these: prompt and chosen completion are
segment 1, the prompt again and the rejected completion segment 2, packed without gaps. One forward pass sees both, and
what is learned from a row needs no other. The sides are those of the file; generated problems prefer their own worked
chain and answer to those of the next problem that has another answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl.data.prepare import Corpus
from jaxcl.data.rows import NAMES, Columns, Rows, from_columns
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.rl.tasks import SPECIAL, Problems, Targets
from jaxcl.schema import UserError
from jaxcl.types import Batch

Form = Literal["prompt", "sft", "csft"]
NUMBER = "problem"  # column of the number of a problem, int32 [n]
PAIR = "pair_"  # before the names of the columns of a pair
REJECTED = "rejected"  # column of Batch.extra, bool [B, L]: what belongs to the rejected side; the mark of pairs


class Size(NamedTuple):
    """What the rows of all domains of a run have in common."""

    prompt: int  # P
    tail: int  # most tokens behind a prompt: chain and answer
    support: int  # S, most tokens in the mixture of a thought
    pair: int = 0  # most tokens of a pair, both prompts included; 0 = none are learned from

    @property
    def length(self) -> int:
        """L of the longest row."""
        return max(self.prompt + self.tail, self.pair) - 1


def joined(problems: Mapping[str, Problems]) -> dict[str, Problems]:
    """Returns generated problems of several tasks in one vocabulary: equal names are one token.

    Problems of text have that of their tokenizer and stay as they are.

    Raises:
      UserError: some are generated and some are text.
    """
    kinds = {name: bool(one.names) for name, one in problems.items()}
    if len(set(kinds.values())) > 1:
        made, text = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise UserError(f"config.sources: {made} makes its own vocabulary and {text} is text; train on one kind")
    if not any(kinds.values()) or len({one.names for one in problems.values()}) == 1:
        return dict(problems)
    names = tuple(dict.fromkeys((*SPECIAL, *(name for one in problems.values() for name in one.names))))
    places = {name: i for i, name in enumerate(names)}
    return {key: _renamed(one, names, np.array([places[name] for name in one.names])) for key, one in problems.items()}


def _renamed(problems: Problems, names: tuple[str, ...], to: np.ndarray) -> Problems:
    """Returns the problems with token i as to[i]."""

    def tokens(x: Any) -> Any:
        return None if x is None else to[x].astype(np.int32)

    targets = problems.targets
    return problems._replace(
        vocab=len(names),
        names=names,
        prompts=tokens(problems.prompts),
        answers=tokens(problems.answers),
        traces=tokens(problems.traces),
        targets=None if targets is None else Targets(tokens(targets.tokens), targets.shares),
        held_out=None if problems.held_out is None else _renamed(problems.held_out, names, to),
    )


def words_of(problems: Problems) -> Tokenizer:
    """Returns the vocabulary of generated problems as a tokenizer of words between spaces."""
    places = {name: i for i, name in enumerate(problems.names)}

    def encode(text: str) -> np.ndarray:
        return np.array([places[word] for word in text.split()], np.uint32)

    return Tokenizer(
        name="task",
        vocab=problems.vocab,
        bos=problems.bos,
        eos=problems.eos,
        pad=problems.pad,
        encode=encode,
        encode_many=lambda texts: [encode(text) for text in texts],
        decode=lambda tokens: " ".join(problems.names[int(token)] for token in tokens),
        fingerprint=hashlib.sha256("\n".join(problems.names).encode()).hexdigest(),
    )


def size_of(problems: Sequence[Problems], form: Form, words: Tokenizer) -> Size:
    """Returns the size of the rows of all problems, those held out included.

    Raises:
      UserError: some of them have nothing to be supervised by.
    """
    every = [part for one in problems for part in (one, one.held_out) if part is not None]
    prompt = max(one.prompts.shape[1] for one in every)
    if form == "prompt":
        return Size(prompt, 1, 0)
    for one in every:
        if form == "csft" and one.targets is None:
            raise UserError(f"config.stream learn='csft': {one.description['name']} has no distributions; use 'sft'")
        if one.traces is None and not one.worked and not one.chosen:
            raise UserError(f"config.stream learn={form!r}: {one.description['name']} has no worked chains; use 'rl'")
    support = max(one.targets.tokens.shape[2] for one in every if one.targets is not None) if form == "csft" else 0
    return Size(prompt, max(len(tail) for one in every for tail in tails(one, words)), support)


def tails(problems: Problems, words: Tokenizer) -> list[list[int]]:
    """Returns what stands behind each prompt of a worked row: the tokens of a chain and the answer.

    Of text without worked chains it is the chosen completion, if there are pairs.
    """
    if problems.traces is not None:
        answers = np.asarray(problems.answers)
        return np.concatenate([problems.traces, answers], axis=1).tolist()
    if not problems.worked:
        return _coded(problems, problems.chosen, words)
    texts = [f"{one}\n\\boxed{{{answer}}}" for one, answer in zip(problems.worked, problems.answers, strict=True)]
    return _coded(problems, texts, words)


def _coded(problems: Problems, texts: Sequence[str], words: Tokenizer) -> list[list[int]]:
    """Returns the tokens of completions, each with its end; none of an empty one."""
    coded = words.encode_many([f" {text}" for text in texts])
    return [[*map(int, tokens), problems.eos] if text else [] for text, tokens in zip(texts, coded, strict=True)]


def pair_of(problems: Sequence[Problems], words: Tokenizer) -> int:
    """Returns the most tokens of a pair of these problems; those held out are only evaluated on.

    Raises:
      UserError: some domain has no pairs.
    """
    return max(len(sides[0]) + len(sides[1]) for one in problems for sides in pairs(one, words))


def pairs(problems: Problems, words: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens of prompt and chosen completion, and of prompt and rejected completion, of every problem.

    Both are empty where a record has no pair.

    Raises:
      UserError: there is no pair.
    """
    name = problems.description["name"]
    prompts = [row[used > 0].tolist() for row, used in zip(problems.prompts, problems.segments, strict=True)]
    if problems.chosen:
        both = (_coded(problems, texts, words) for texts in (problems.chosen, problems.rejected))
        return [
            (prompt + one, prompt + other) if one else ([], [])
            for prompt, one, other in zip(prompts, *both, strict=True)
        ]
    if problems.traces is None:
        raise UserError(f"config.stream learn='dpo': {name} has no pairs; name its fields chosen and rejected")
    number = np.unique(np.asarray(problems.answers), axis=0, return_inverse=True)[1].ravel()
    last = np.flatnonzero(number != np.roll(number, -1))  # of a run of problems with one answer
    if not last.size:
        raise UserError(f"config.stream learn='dpo': {name} has no pairs, all its answers are equal; use 'sft'")
    count, own = len(prompts), tails(problems, words)
    other = (last[np.searchsorted(last, np.arange(count)) % last.size] + 1) % count
    return [(prompt + own[i], prompt + own[other[i]]) for i, prompt in enumerate(prompts)]


def rows(problems: Problems, form: Form, size: Size, words: Tokenizer, first: int = 0) -> Rows:
    """Returns the rows of problems.

    Args:
      problems: one domain, one part.
      form: see the module.
      size: of `size_of`.
      words: encodes worked solutions of text.
      first: number of the first problem.

    Returns:
      Columns of a Batch, and `problem`; with csft also `soft`, `support`, `shares` (what is fed in place of tokens)
      and `goal`, `goal_shares` (what is to be predicted); with pairs also those of `of_pairs`, by other names.
    """
    count, have = problems.prompts.shape
    pad = ((0, 0), (size.prompt - have, 0))
    prompts = np.pad(problems.prompts, pad, constant_values=problems.pad)
    segments = np.pad(problems.segments, pad).astype(np.int32)
    number = (first + np.arange(count)).astype(np.int32)
    paired = _pairs(problems, size, words) if size.pair else {}
    if form == "prompt":
        columns = _columns(prompts, prompts, segments, segments.astype(np.float32)) | {NUMBER: number}
        made = from_columns(columns | paired)
        if paired:  # what is learned from, and not the prompts
            made = dataclasses.replace(made, tokens=paired[f"{PAIR}weights"].sum(axis=1).astype(np.int64))
        return made
    tokens = np.full((count, size.prompt + size.tail), problems.pad, np.int32)
    used = np.zeros(tokens.shape, np.int32)
    tokens[:, : size.prompt], used[:, : size.prompt] = prompts, segments
    for i, tail in enumerate(tails(problems, words)):
        end = size.prompt + len(tail)
        tokens[i, size.prompt : end], used[i, size.prompt : end] = tail, 1
    weights = used[:, 1:].astype(np.float32)
    weights[:, : size.prompt - 1] = 0
    columns = _columns(tokens[:, :-1], tokens[:, 1:], used[:, :-1], weights) | {NUMBER: number}
    return from_columns(columns | paired | (_mixtures(problems, size) if form == "csft" else {}))


def _columns(inputs: np.ndarray, targets: np.ndarray, segments: np.ndarray, weights: np.ndarray) -> Columns:
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return {"inputs": inputs, "targets": targets, "weights": weights, "segments": segments, "positions": positions}


def _pairs(problems: Problems, size: Size, words: Tokenizer) -> Columns:
    """Returns the columns of pairs, [N, pair - 1]."""
    shape = (len(problems.prompts), size.pair)
    tokens = np.full(shape, problems.pad, np.int32)
    segments, positions, said = np.zeros((3, *shape), np.int32)
    begin = (problems.segments > 0).sum(axis=1)  # tokens of each prompt
    for i, sides in enumerate(pairs(problems, words)):
        start = 0
        for segment, side in enumerate(sides, 1):
            end = start + len(side)
            tokens[i, start:end], segments[i, start:end] = side, segment
            positions[i, start:end] = np.arange(len(side))
            said[i, start + begin[i] : end] = 1
            start = end
    columns = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": said[:, 1:].astype(np.float32)}
    columns |= {"segments": segments[:, :-1], "positions": positions[:, :-1]}
    return {PAIR + name: columns[name] for name in NAMES}


def of_pairs(batch: Batch) -> Batch:
    """Returns the pairs of rows that have them, as rows of their own, marked by `rejected`."""
    columns = {name: batch.extra[PAIR + name] for name in NAMES}
    return dataclasses.replace(batch, **columns, extra={**batch.extra, REJECTED: columns["segments"] == 2})


def _mixtures(problems: Problems, size: Size) -> Columns:
    """Returns what is fed and predicted at the places of thoughts."""
    assert problems.targets is not None
    tokens, shares = problems.targets
    count, thoughts, support = tokens.shape
    room = (count, size.prompt + size.tail - 1, size.support)
    columns: Columns = {name: np.zeros(room, np.int32) for name in ("support", "goal")}
    columns |= {name: np.zeros(room, np.float32) for name in ("shares", "goal_shares")}
    fed, said = slice(size.prompt, size.prompt + thoughts), slice(size.prompt - 1, size.prompt - 1 + thoughts)
    for place, numbers, parts in ((fed, "support", "shares"), (said, "goal", "goal_shares")):
        columns[numbers][:, place, :support] = tokens
        columns[parts][:, place, :support] = shares
    soft = np.zeros(room[:2], bool)
    soft[:, fed] = True
    return columns | {"soft": soft}


def corpus(problems: Problems, form: Form, size: Size, words: Tokenizer, first: int) -> Corpus:
    """Returns the rows of a domain as a corpus, in memory; a row is a document."""
    assert problems.held_out is not None
    train = rows(problems, form, size, words, first)
    held_out = rows(problems.held_out, form, size._replace(pair=0), words, first)
    splits = {}
    for name, part, made in (("train", problems, train), ("held_out", problems.held_out, held_out)):
        count = len(made)
        splits[name] = {"documents": count, "rows": count, "tokens": int(made.tokens.sum())}
        splits[name] |= {"bytes": int(part.prompts.nbytes), "fingerprint": made.fingerprint}
    manifest = {"source": problems.description, "licence": problems.licence, "tokenizer": {}, "splits": splits}
    return Corpus(train, held_out, manifest, "")
