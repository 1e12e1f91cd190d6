"""Questions of files, in JSON lines or Parquet: GSM8K, SVAMP, multiple choice, and others of these forms.

  form     answer in the record                                      verifier
  marked   a worked solution that ends in `#### 42` (GSM8K)          boxed
  plain    a number or a short text (SVAMP: question=["Body", "Question"], answer="Answer")    boxed
  choice   index, letter or text of one of `choices`                 choice

The prompt is a template with the question; the answer asked for is `\\boxed{...}`, or a letter. A record may also hold
two completions of the prompt, one to be preferred to the other, for stages with learn="dpo".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl.data.sources import files, jsonl, parquet
from jaxcl.data.sources.records import Record
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.rl import verify
from jaxcl.rl.tasks import Problems, guess, padded, part, split
from jaxcl.schema import UserError

TEMPLATE = "Question: {question}\nThink step by step, then write the result as \\boxed{result}.\nReasoning:"
CHOICE_TEMPLATE = "Question: {question}\nThink step by step, then write the letter as \\boxed{letter}.\nReasoning:"
_READERS = {".jsonl": jsonl.read, ".jsonl.gz": jsonl.read, ".jsonl.zst": jsonl.read, ".parquet": parquet.read}


class _Item(NamedTuple):
    """One checked record."""

    place: str  # file:line
    question: str
    answer: str
    worked: str
    pair: tuple[str, str] = ("", "")  # chosen, rejected


def make(
    tokenizer: Tokenizer,
    *,
    path: str | list[str],
    form: Literal["marked", "plain", "choice"] = "marked",
    question: str | list[str] = "question",
    answer: str = "answer",
    choices: str = "choices",
    chosen: str | None = None,
    rejected: str | None = None,
    template: str | None = None,
    verifier: Mapping[str, Any] | None = None,
    held_out: float | str | list[str] = 0.1,
    longest: int | None = None,
    problems: int | None = None,
    licence: str | None = None,
    seed: int = 0,
) -> Problems:
    """Returns the problems of files; they have as many thoughts as the run allows.

    Args:
      tokenizer: encodes the prompts, each after its bos.
      path: .jsonl, .jsonl.gz, .jsonl.zst or .parquet: file, glob pattern, or a list of them.
      form: of the answers.
      question: field of the question, or several whose texts are joined by a space.
      answer: field of the answer.
      choices: field of the choices: a list of texts, or {"text": [...], "label": [...]}.
      chosen, rejected: fields of the completion to be preferred and of the other; a record with neither is no pair.
      template: of the prompt, in which {question} is replaced.
      verifier: `name` and options, see `jaxcl.rl.verify.make`; by default that of the form.
      held_out: share of the questions, or other files.
      longest: tokens that a prompt may have.
      problems: the first so many questions; None for all.
      licence: recorded in the run.
      seed: of the split.

    Raises:
      UserError: no such file or field, an answer that does not fit the form, a prompt that is too long, or half a pair.
    """
    template = template or (CHOICE_TEMPLATE if form == "choice" else TEMPLATE)
    if "{question}" not in template:
        raise UserError(f"config.task.template={template!r}: has no place for the question; write {{question}} there")
    names = [question] if isinstance(question, str) else list(question)
    fields = [*names, answer, *([choices] if form == "choice" else [])]
    sides = _sides(chosen, rejected)
    options = dict(verifier or {"name": "choice" if form == "choice" else "boxed"})
    checked = verify.of(options)
    description = {"name": "questions", "path": path, "form": form, "question": question, "answer": answer}
    description |= {"template": template, "verifier": options, "held_out": held_out, "problems": problems, "seed": seed}
    description |= dict(zip(("chosen", "rejected"), sides, strict=False))

    def read(paths: str | list[str]) -> Problems:
        records = _records(files(paths), fields, sides, problems)
        items = [_item(*one, form, names, answer, choices)._replace(pair=_pair(*one, sides)) for one in records]
        made = _problems(items, tokenizer, template, checked, form, longest)
        return made._replace(description=description, licence=licence)

    if isinstance(held_out, (str, list)):
        return _measured(read(path))._replace(held_out=_measured(read(held_out)))
    return _divided(read(path), held_out, seed)


def _divided(everything: Problems, held_out: float, seed: int) -> Problems:
    """Returns the problems, a share of them held out."""
    groups = np.unique(everything.prompts, axis=0, return_inverse=True)[1].ravel()  # equal questions stay together
    train, rest = split(groups, held_out, seed, field="task.held_out")
    return _measured(part(everything, train))._replace(held_out=_measured(part(everything, rest)))


def _measured(problems: Problems) -> Problems:
    return problems._replace(baselines={"majority": guess(problems.answers)})


def _sides(chosen: str | None, rejected: str | None) -> tuple[str, ...]:
    """Returns the fields of the two sides of a pair, or none."""
    if chosen is None and rejected is None:
        return ()
    if chosen is None or rejected is None or chosen == rejected:
        raise UserError(f"config.task.chosen={chosen!r}, rejected={rejected!r}: name two fields, or neither")
    return chosen, rejected


def _pair(place: str, record: Record, sides: Sequence[str]) -> tuple[str, str]:
    """Returns the texts of the two sides; two empty ones if the record has none."""
    given = [record.get(side) for side in sides]
    if not any(given):
        return "", ""
    texts = [text.strip() if isinstance(text, str) else "" for text in given]
    if not all(texts):
        name, text = next((name, x) for name, x, said in zip(sides, given, texts, strict=True) if not said)
        raise UserError(f"{place}: {name}={text!r}: expected a text, as the other side of the pair has one")
    if texts[0] == texts[1]:
        raise UserError(f"{place}: {' and '.join(sides)} are equal; nothing is to be preferred, remove the line")
    return texts[0], texts[1]


def _records(
    paths: Sequence[str], fields: Sequence[str], more: Sequence[str], most: int | None
) -> Iterator[tuple[str, Record]]:
    """Yields place and record; all `fields` are there, and `more` may be."""
    count = 0
    for path in paths:
        reader = next((read for end, read in _READERS.items() if path.lower().endswith(end)), None)
        if reader is None:
            raise UserError(f"{path}: its name does not tell what it is; rename it to end in {', '.join(_READERS)}")
        for place, record in reader(path, list(dict.fromkeys([*fields, *more]))):
            if count == most:
                return
            for field in fields:
                if record.get(field) is None:
                    raise UserError(f"{place}: has no field {field!r}; it has {', '.join(map(str, record))}")
            count += 1
            yield place, record


def _item(place: str, record: Record, form: str, names: Sequence[str], answer: str, choices: str) -> _Item:
    """Returns a checked record."""
    text, given = " ".join(str(record[name]).strip() for name in names), record[answer]
    if form == "choice":
        listed, labels = _choices(place, record[choices])
        lines = [f"({letter}) {choice}" for letter, choice in zip(verify.LETTERS, listed, strict=False)]
        return _Item(place, "\n".join([text, *lines]), _letter(place, given, listed, labels), "")
    if not isinstance(given, (str, int, float)) or isinstance(given, bool):
        raise UserError(f"{place}: {answer}={given!r}: expected a text or a number")
    given = f"{given:.12g}" if isinstance(given, float) else str(given)
    if form == "plain":
        return _Item(place, text, given.strip(), "")
    worked, marker, result = given.rpartition("####")
    if not marker or not result.strip():
        raise UserError(f"{place}: {answer} has no result behind '####'; set form='plain' if it is the result itself")
    return _Item(place, text, result.strip(), worked.strip())


def _choices(place: str, given: Any) -> tuple[list[str], list[str]]:
    """Returns the texts of the choices and their labels."""
    listed = given.get("text") if isinstance(given, Mapping) else given
    if not isinstance(listed, (list, tuple)) or not 2 <= len(listed) <= len(verify.LETTERS):
        raise UserError(f"{place}: choices={given!r}: expected a list of 2 to {len(verify.LETTERS)} texts")
    labels = given.get("label") if isinstance(given, Mapping) else None
    return [str(choice) for choice in listed], [str(label) for label in labels or verify.LETTERS[: len(listed)]]


def _letter(place: str, given: Any, listed: list[str], labels: list[str]) -> str:
    """Returns the letter of the right choice."""
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(listed):
        return verify.LETTERS[given]
    for names in (labels, listed):
        if isinstance(given, str) and names.count(given.strip()) == 1:
            return verify.LETTERS[names.index(given.strip())]
    raise UserError(f"{place}: answer {given!r}: expected an index from 0, a label or one of {listed}")


def _problems(
    items: Sequence[_Item],
    tokenizer: Tokenizer,
    template: str,
    verifier: verify.Verifier,
    form: str,
    longest: int | None,
) -> Problems:
    """Returns the problems of checked records."""
    if not items:
        raise UserError("config.task.path: its files have no question")
    texts = [template.replace("{question}", item.question) for item in items]
    rows = [[tokenizer.bos, *map(int, tokens)] for tokens in tokenizer.encode_many(texts)]
    for item, row in zip(items, rows, strict=True):
        if longest is not None and len(row) > longest:
            raise UserError(
                f"{item.place}: prompt of {len(row)} tokens; config.task.longest={longest}: raise it or remove the line"
            )
    pad = tokenizer.eos if tokenizer.pad is None else tokenizer.pad
    prompts, segments = padded(rows, pad)
    return Problems(
        description={},
        vocab=tokenizer.vocab,
        names=(),
        pad=pad,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        prompts=prompts,
        segments=segments,
        answers=tuple(item.answer for item in items),
        verifier=verifier,
        thoughts=0,
        baselines={},
        worked=tuple(item.worked for item in items) if form == "marked" else (),
        chosen=tuple(item.pair[0] for item in items) if any(item.pair[0] for item in items) else (),
        rejected=tuple(item.pair[1] for item in items) if any(item.pair[0] for item in items) else (),
    )
