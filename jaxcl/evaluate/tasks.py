"""Tasks as JSONL files: what a record asks shows in its keys.

  {"prompt" or "question", "choices": [...], "answer": index or text}   choice: which continuation is most likely
  {"prompt" or "question", "answer", "stage": "name"}                   fact: how likely the answer is, by stage
  {"prompt" or "question", "answer"}                                    generation: does greedy text match the answer
  {"text"}                                                              perplexity

Any record may say `delimiter`, what stands between prompt and answer: by default one space, or nothing where there is
white space or no prompt already. The stage of a fact is one of the run's, or "none" for a control. One of generation
may say `extract`, a regular expression that finds the answer in a text, and `stop`, a list of strings at which the
generated text ends. Other keys are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.schema import UserError, nearest

NO_STAGE = "none"  # of facts that entered in no stage
HELD_OUT = "held_out"  # the name of the task that no file describes: the held-out rows of the run's own domains


class Record(NamedTuple):
    """One line of a task, checked."""

    place: str  # file:line
    prompt: str  # of perplexity: the text
    answer: str = ""  # of generation and facts
    choices: tuple[str, ...] = ()
    gold: int = -1  # index of the right choice
    stage: str = ""
    delimiter: str | None = None
    extract: str | None = None
    stop: tuple[str, ...] = ()


class Task(NamedTuple):
    """A named list of records of one kind."""

    name: str
    kind: str  # choice, fact, generation, perplexity; held_out has no records
    records: tuple[Record, ...] = ()


def read_all(names: Sequence[str], *, shots: int = 0) -> list[Task]:
    """Returns the tasks of `--tasks`: paths of files, or `held_out`.

    Args:
      names: what was asked for.
      shots: records at the head of every file that are shown before each of the others, and not scored.

    Raises:
      UserError: no such file, nothing in it, a malformed line, or two tasks of one name.
    """
    made = [Task(HELD_OUT, HELD_OUT) if name == HELD_OUT else read(Path(name)) for name in names]
    for task in made:
        if [other.name for other in made].count(task.name) > 1:
            raise UserError(f"--tasks: {task.name!r} comes twice; give the files different names")
    return [with_shots(task, shots) for task in made] if shots else made


def read(path: Path) -> Task:
    """Returns the task in a file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"--tasks={path}: no such file; give the path of a JSONL file, or {HELD_OUT}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--tasks={path}: {reason}; give the path of a JSONL file") from None
    kind, first, records = "", "", []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        value = _object(line, place)
        found = kind_of(value, place)
        if kind and found != kind:
            raise UserError(
                f"{place}: a record of {found}, but {first} is one of {kind}; put each kind in its own file"
            )
        kind, first = found, first or place
        records.append(_record(found, value, place))
    if not records:
        raise UserError(f"{path}: empty; a task needs at least one record")
    return Task(path.stem, kind, tuple(records))


def kind_of(value: dict[str, Any], place: str) -> str:
    """Returns the kind of a record.

    Raises:
      UserError: its keys are those of none.
    """
    asked = "prompt" in value or "question" in value
    if asked and "answer" in value:
        return "choice" if "choices" in value else "fact" if "stage" in value else "generation"
    if "text" in value and not asked and "choices" not in value:
        return "perplexity"
    raise UserError(
        f"{place}: keys {', '.join(value) or 'none'}: expected prompt (or question) and answer, "
        "with choices or stage besides; or text"
    )


def check_stages(task: Task, stages: Sequence[str]) -> None:
    """Raises UserError for a fact of a stage that the run does not have."""
    for record in task.records:
        if record.stage and record.stage not in (*stages, NO_STAGE):
            raise UserError(
                f"{record.place}: stage {record.stage!r}: not a stage of the run{nearest(record.stage, stages)}; "
                f"a fact that entered in none, a control, has the stage {NO_STAGE!r}"
            )


def with_shots(task: Task, shots: int) -> Task:
    """Returns the task without its first `shots` records, which are put before the prompt of every other."""
    if shots < 0 or task.kind not in ("choice", "generation"):
        raise UserError(f"--shots={shots}: {task.name!r} is a task of {task.kind}; choice and generation take examples")
    if len(task.records) <= shots:
        raise UserError(f"--shots={shots}: {task.name!r} has {len(task.records)} records; use fewer examples")
    shown = [record.choices[record.gold] if record.choices else record.answer for record in task.records[:shots]]
    examples = [r.prompt + between(r, text) + text for r, text in zip(task.records[:shots], shown, strict=True)]
    prefix = "\n\n".join([*examples, ""])
    return task._replace(records=tuple(r._replace(prompt=prefix + r.prompt) for r in task.records[shots:]))


def between(record: Record, continuation: str) -> str:
    """Returns what stands between the prompt of a record and a continuation."""
    if record.delimiter is not None:
        return record.delimiter
    joined = not record.prompt or record.prompt[-1].isspace() or continuation[:1].isspace()
    return "" if joined else " "


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); write one object per line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}; write one JSON object per line")
    return value


def _record(kind: str, value: dict[str, Any], place: str) -> Record:
    """Returns the record of a line after checking the types of its values."""
    key = next(name for name in ("prompt", "question", "text") if name in value)
    prompt = _text(value, key, place)
    delimiter = None if value.get("delimiter") is None else _text(value, "delimiter", place)
    if kind == "perplexity":
        if not prompt:
            raise UserError(f"{place}: text is empty; remove the line")
        return Record(place, prompt)
    if kind == "choice":
        choices = _texts(value, "choices", place)
        if len(choices) < 2 or not all(choices):
            raise UserError(f"{place}: choices: expected at least two, none of them empty")
        return Record(place, prompt, choices=choices, gold=_gold(value["answer"], choices, place), delimiter=delimiter)
    answer = _text(value, "answer", place)
    if not answer.strip():
        raise UserError(f"{place}: answer is empty; write what is right")
    if kind == "fact":
        return Record(place, prompt, answer, stage=_text(value, "stage", place), delimiter=delimiter)
    extract = None if value.get("extract") is None else pattern(_text(value, "extract", place), f"{place}: extract")
    stop = _texts(value, "stop", place) if value.get("stop") is not None else ()
    return Record(place, prompt, answer, delimiter=delimiter, extract=extract, stop=stop)


def pattern(text: str, field: str) -> str:
    """Returns a regular expression that was checked.

    Raises:
      UserError: it is none.
    """
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{field}={text!r}: not a regular expression ({error})") from None
    return text


def _gold(answer: Any, choices: tuple[str, ...], place: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    raise UserError(
        f"{place}: answer {answer!r}: not among the choices; write one of them, or its index, 0 to {len(choices) - 1}"
    )


def _text(value: dict[str, Any], key: str, place: str) -> str:
    if not isinstance(value[key], str):
        raise UserError(f"{place}: {key}={value[key]!r}: expected text, got {type(value[key]).__name__}")
    return value[key]


def _texts(value: dict[str, Any], key: str, place: str) -> tuple[str, ...]:
    found = value[key]
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise UserError(f"{place}: {key}={found!r}: expected a list of texts")
    return tuple(found)
