"""Adapter for lm-evaluation-harness: python -m jaxcl.evaluate.harness RUN --tasks=NAMES [--include_path=FOLDER].

RUN is the folder of a run, or of a Hugging Face checkpoint. `pip install 'jaxcl[eval]'` installs the harness.
Requests are scored as `jaxcl.evaluate` scores its own tasks; those that are too long lose their beginning, as with
the harness's own models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcl import console
from jaxcl.evaluate import engine as engines
from jaxcl.evaluate import subject
from jaxcl.schema import UserError
from jaxcl.types import Params

MAX_TOKENS = 256  # of a generation that does not say, as in the harness
# What a request of generation may say beside `until` and the number of tokens; all else would not be greedy.
GREEDY = {"do_sample": (False,), "temperature": (0, 0.0, 1.0), "top_p": (1, 1.0), "num_beams": (1,)}


class Answers:
    """What `lm_eval.api.model.LM` asks for; its requests need `args` alone."""

    def __init__(self, engine: engines.Engine, params: Params):
        self._engine, self._params = engine, params

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Returns (log-probability of the continuation, whether it is the greedy one) for (context, continuation)."""
        made = [engines.pair(self._engine.words, *request.args) for request in requests]
        longest = self._engine.max_length + 1
        short = [engines.Request(r.tokens[-longest:], min(r.scored, longest - 1)) for r in made]
        asked = [request for request in short if request.scored > 0]
        found = iter(engines.log_likelihoods(self._engine, self._params, asked))
        return [tuple(next(found)) if request.scored > 0 else (0.0, True) for request in short]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Returns the log-probability of each text; long ones in rows of the model's full length."""
        texts = [engines.begin(self._engine.words, request.args[0]) for request in requests]
        rows = [list(engines.windows(text, self._engine.max_length)) for text in texts]
        found = iter(engines.log_likelihoods(self._engine, self._params, [row for text in rows for row in text]))
        return [sum(next(found).log_probability for _ in text) for text in rows]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Returns the greedy continuation of each context, up to the first of its stop strings.

        Raises:
          UserError: a request that is not greedy.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_rules(request.args[1], self._engine.max_length), []).append(i)
        found = [""] * len(requests)
        for (steps, stop), members in groups.items():
            longest = self._engine.max_length - steps + 1
            prompts = [engines.begin(self._engine.words, requests[i].args[0])[-longest:] for i in members]
            texts = engines.generations(self._engine, self._params, prompts, steps, stop, None)
            for i, text in zip(members, texts, strict=True):
                found[i] = text
        return found


def _rules(options: dict[str, Any], max_length: int) -> tuple[int, tuple[str, ...]]:
    """Returns the number of tokens and the stop strings of a request of generation."""
    for key, allowed in GREEDY.items():
        if options.get(key, allowed[0]) not in allowed:
            raise UserError(f"generation_kwargs: {key}={options[key]!r}: jaxcl generates greedily; choose {allowed[0]}")
    until = options.get("until") or ()
    steps = int(options.get("max_gen_toks", options.get("max_new_tokens", MAX_TOKENS)))
    return max(1, min(steps, max_length // 2)), (until,) if isinstance(until, str) else tuple(until)


def model(path: Path, *, step: int | None = None) -> Any:
    """Returns the model in a folder as an `lm_eval.api.model.LM`.

    Args:
      path: folder of a run, or of a Hugging Face checkpoint.
      step: of a checkpoint of the run; None = the newest.

    Raises:
      UserError: the harness is not installed, or see `jaxcl.evaluate.subject.load`.
    """
    try:
        from lm_eval.api.model import LM  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  it needs torch
    except ImportError:
        raise UserError("lm_eval: not installed; pip install 'jaxcl[eval]'") from None
    made = subject.load(path, steps=None if step is None else str(step))
    # The harness wants a subclass of its own class, which exists only where it is installed.
    adapter = type("JaxclLM", (Answers, LM), {"tokenizer_name": property(lambda self: made.found.tokenizer.name)})
    adapted = adapter(subject.engine_of(made), made.params(made.steps[0]))
    LM.__init__(adapted)
    return adapted


def main(argv: list[str]) -> None:
    """Runs tasks of the harness and shows its table."""
    parser = console.Parser(prog="python -m jaxcl.evaluate.harness", description="lm-evaluation-harness on a run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of a Hugging Face checkpoint")
    parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
    parser.add_argument("--include_path", help="folder of task files (YAML) beside those of the harness")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest by default")
    parser.add_argument("--num_fewshot", type=int, help="examples; as the task says by default")
    parser.add_argument("--limit", type=int, help="records of a task, at the most")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(argv)
    if options.out and options.out.exists():
        raise UserError(f"{options.out}: exists; write to another --out")
    adapted = model(options.run, step=options.step)
    from lm_eval import evaluator, tasks, utils  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    manager = tasks.TaskManager(include_path=options.include_path)
    try:
        results = evaluator.simple_evaluate(
            model=adapted,
            tasks=options.tasks.split(","),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
        )
    except KeyError as error:
        raise UserError(f"--tasks={options.tasks}: the harness knows no task {error}; see --include_path") from None
    print(utils.make_table(results))
    if options.out:
        options.out.write_text(json.dumps({"results": results["results"]}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    console.cli(main)
