"""From `config.policy`, `objective` and `rollout` to what a run on verifiable problems needs besides its model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcl import losses, schema
from jaxcl import mesh as meshes
from jaxcl.data import stream as streams
from jaxcl.data.prepare import Corpus
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.rl import explore, objectives, supervised, table
from jaxcl.rl.judge import Judge
from jaxcl.rl.objectives import Objective
from jaxcl.rl.pool import Pool
from jaxcl.rl.tasks import Problems
from jaxcl.rl.thoughts import Policy
from jaxcl.schema import UserError
from jaxcl.types import Batch, Model, Output

WORKED = ("soft", "support", "shares", "goal", "goal_shares")  # columns of csft alone
EXAMPLES = {"objective": "'rloo' or 'grpo(kl=0.01)', or two, as in 'rloo + dpo(beta=5.0)'"}


class Way(NamedTuple):
    """What a stage says of how it learns."""

    learn: Literal["rl", "sft", "csft", "dpo"] | None = None


class Options(NamedTuple):
    """The sections of a config that only runs on problems have."""

    policy: Any = None
    objective: Any = None
    rollout: Mapping[str, Any] | None = None


class Practice(NamedTuple):
    """What is drawn from a model, how it is rewarded, and how it is learned from."""

    problems: dict[str, Problems]  # domain -> those for training
    words: Tokenizer
    size: table.Size
    form: table.Form
    learns: tuple[str, ...]  # of each stage
    policy: Policy
    policies: dict[str, Policy]  # of evaluations
    objective: Objective  # of rollouts
    preference: Callable[..., Any]  # of pairs, see `supervised.preference`
    rollout: explore.Rollout
    limits: explore.Limits
    judge: Judge

    @property
    def length(self) -> int:
        """Longest row that the model must take."""
        return max(self.size.length, self.size.prompt + self.limits.total)

    def corpora(self) -> dict[str, Corpus]:
        """Returns the rows of every domain."""
        made = {}
        for (name, one), first in zip(self.problems.items(), self.judge.first, strict=False):
            made[name] = table.corpus(one, self.form, self.size, self.words, int(first))
        return made

    def loss(self, options: Mapping[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns the training loss (output, batch) -> (sum, weight), and the log-probabilities of what was drawn.

        Raises:
          UserError: an option that no stage has a use for.
        """
        if options.get("z_loss") and "sft" not in self.learns:
            raise UserError(
                f"config.loss.z_loss={options['z_loss']}: of the cross-entropy, which learn='sft' alone has; leave it "
                f"out, since the stages have {', '.join(map(repr, dict.fromkeys(self.learns)))}"
            )

        def worked(output: Output, rows: Batch) -> tuple[jax.Array, jax.Array]:
            if table.REJECTED in rows.extra:
                return self.paired(output, rows)[0]
            if "goal" in rows.extra:
                return supervised.csft(output, rows)
            return losses.cross_entropy(output, rows, **options)

        return explore.loss_of(self.policy, self.objective, self.rollout.temperature, self.limits, worked)

    def paired(self, output: Output, rows: Batch) -> tuple[Any, dict[str, Any]]:
        """Returns the loss of pairs, and what else there is to tell of them: name -> (sum, weight)."""
        return self.preference(losses.log_probs(output, rows.targets)[0], rows)

    def told(self, loss: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
        """Returns the function (output, batch) -> the loss of any rows, and what else there is to tell of them."""
        return lambda output, rows: (
            self.paired(output, rows) if table.REJECTED in rows.extra else (loss(output, rows), {})
        )

    def explorer(self, mesh: jax.sharding.Mesh, model: Model, seed: int) -> explore.Explorer:
        """Returns the source of rollouts on a mesh."""
        names = ("policy", "objective", "rollout", "limits", "size", "judge")
        return explore.make(mesh, model, seed=seed, **{name: getattr(self, name) for name in names})

    def numbers(self, flow: streams.Stream, index: streams.Index) -> np.ndarray:
        """Returns the numbers of the problems of a batch, int [N]; -1 = padding."""
        return np.where(index.source >= 0, self.judge.first[index.source] + index.row, -1)

    def trim(self, batch: Batch, stage: int) -> Batch:
        """Returns rows of the stream with the columns that a stage has a use for."""
        unused = {table.NUMBER, *(() if self.learns[stage] == "csft" else WORKED)}
        batch = table.of_pairs(batch) if self.learns[stage] == "dpo" else batch
        kept = {k: v for k, v in batch.extra.items() if k not in unused and not k.startswith(table.PAIR)}
        return dataclasses.replace(batch, extra=kept)


def make(
    problems: Mapping[str, Problems], words: Tokenizer | None, stages: Sequence[Mapping[str, Any]], options: Options
) -> Practice:
    """Returns the practice of a run.

    Args:
      problems: domain -> problems.
      words: the tokenizer of problems of text.
      stages: of `config.stream`.
      options: of the config.

    Raises:
      UserError: whatever is wrong with them.
    """
    ordered = table.joined({name: problems[name] for name in sorted(problems)})  # the order of a stream's sources
    every = list(ordered.values())
    words = words or table.words_of(every[0])
    rollout = schema.call(explore.Rollout, options.rollout or {}, field="rollout")
    policy = policy_of(options.policy or "hard")
    rolled, pairs = objectives_of(options.objective)
    learns = learns_of(stages, rolled, pairs)
    limits = explore.limits_of(rollout, every, words)
    objective = objective_of(rolled or "rloo", limits, rollout.ahead)
    preference = schema.call(supervised.preference, pairs or {}, field="objective")
    if rollout.tags and every[0].names:
        raise UserError(
            f"config.rollout.tags={list(rollout.tags)}: of text; generated problems have none, leave it out"
        )
    explore.check(rollout, objective if "rl" in learns else None)
    for name, one in ordered.items():
        if one.held_out is None:
            raise UserError(f"config.sources.{name}: holds out no problem; set its held_out")
    if policy.gated and "csft" in learns:
        where = f"config.stream.stages[{learns.index('csft')}].learn='csft'"
        raise UserError(
            f"{where}: feeds mixtures past the gate of {policy.name}; set learn='sft', or let a run with "
            "config.policy='soft' learn it and start from that (config.model.start)"
        )
    form = "csft" if "csft" in learns else "sft" if "sft" in learns or rollout.demonstrations else "prompt"
    size = table.size_of(every, form, words)
    size = size._replace(pair=table.pair_of(every, words)) if "dpo" in learns else size
    policies = {one.name: one for one in (policy_of(mode, "rollout.modes") for mode in rollout.modes)}
    policies = {policy.name: policy} | policies | {policy.name: policy}  # the run's own goes before one of its name
    for name, one in policies.items():
        if one.gated and not policy.gated:
            raise UserError(
                f"config.rollout.modes: {name} needs a gate; train with config.policy='hrpo', or leave it out"
            )
    how = {"workers": rollout.workers, "timeout": rollout.timeout, "memory": rollout.memory}
    try:
        pools = [Pool(one.verifier, **how) for one in every]
    except UserError as error:
        raise UserError(str(error).replace("config.verifier.", "config.rollout.")) from error
    judge = Judge(every, pools, words.decode)
    return Practice(ordered, words, size, form, learns, policy, policies, objective, preference, rollout, limits, judge)


def one_of(given: Any, field: str) -> dict[str, Any]:
    """Returns 'name', 'name(option=1)' or a dict as a dict."""
    if isinstance(given, Mapping):
        return dict(given)
    try:
        parts = schema.parse(given, field=field) if isinstance(given, str) else []
    except UserError:
        parts = []
    if len(parts) != 1:
        example = EXAMPLES.get(field, "'soft' or 'soft(temperature=1.0)'")
        raise UserError(f"config.{field}={given!r}: write one name, as in {example}")
    return parts[0]


def check(practice: Practice | None, options: Options, method: Any, alignment: bool, model: Mapping[str, Any]) -> None:
    """Raises UserError if an option needs a part of the method that is not there, or has no meaning for problems."""
    if practice is None:
        return
    if alignment:
        raise UserError("config.evaluation.alignment=True: compares losses of text; leave it out for problems")
    if "rl" in practice.learns and model.get("capacity") is not None:
        raise UserError(
            f"config.model.capacity={model['capacity']}: not where answers are drawn: a token of one has no row yet "
            "that this could be a share of, and would be learned by another network; leave it out"
        )
    entries = schema.parse(method, field="method") if isinstance(method, str) else method
    entries = [entries] if isinstance(entries, Mapping) else entries
    names = {entry.get("name") for entry in entries if isinstance(entry, Mapping)}
    if practice.rollout.demonstrations and "chord" not in names:
        raise UserError("config.rollout.demonstrations=True: nothing learns from them; add chord to config.method")
    kl = (objectives_of(options.objective)[0] or {}).get("kl")
    if kl and "reference" not in names:
        raise UserError(f"config.objective kl={kl}: the divergence is from a reference; add reference to config.method")
    if "dpo" in practice.learns and "reference" not in names:
        raise UserError("config.stream learn='dpo': compares with a reference; add reference to config.method")


def objectives_of(given: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Returns the objective of rollouts and the options of dpo, None for what `config.objective` does not have.

    Raises:
      UserError: it has more than one of a kind, or is none.
    """
    if not given:
        return None, None
    try:
        entries = schema.parse(given, field="objective") if isinstance(given, str) else []
    except UserError:
        entries = []
    entries = entries or [one_of(given, "objective")]
    pairs = [entry for entry in entries if entry.get("name") == "dpo"]
    rolled = [entry for entry in entries if entry.get("name") != "dpo"]
    if len(pairs) > 1 or len(rolled) > 1:
        raise UserError(f"config.objective={given!r}: name one for rollouts and dpo for pairs, as in 'rloo + dpo'")
    options = {key: value for key, value in pairs[0].items() if key != "name"} if pairs else None
    return rolled[0] if rolled else None, options


def learns_of(stages: Sequence[Mapping[str, Any]], rolled: Any, pairs: Any) -> tuple[str, ...]:
    """Returns how each stage learns; `rolled` and `pairs` are those of `objectives_of`.

    Raises:
      UserError: there is no such way, or the objective is not that of the stages.
    """
    for i, stage in enumerate(stages):
        schema.check(Way, {"learn": stage.get("learn")}, field=f"stream.stages[{i}]")
    learns = tuple(stage.get("learn") or ("rl" if rolled else "sft" if pairs is None else "dpo") for stage in stages)
    if "rl" in learns and not rolled:
        raise UserError("config.objective: missing, but a stage has learn='rl'; choose one, such as 'rloo'")
    if rolled and "rl" not in learns:
        raise UserError(
            f"config.objective {rolled.get('name')}: no stage learns from rollouts; give one learn='rl', or leave "
            f"{rolled.get('name')} out"
        )
    if pairs is not None and "dpo" not in learns:
        raise UserError("config.objective dpo: no stage learns from pairs; give one learn='dpo', or leave dpo out")
    return learns


def policy_of(given: Any, field: str = "policy") -> Policy:
    """Returns the policy that is described."""
    return schema.make("jaxcl.rl.thoughts", one_of(given, field), field=field)


def objective_of(given: Any, limits: explore.Limits, ahead: bool) -> Objective:
    """Returns the objective of `config.objective`; its longest completion is that of the limits.

    Raises:
      UserError: also if it takes rollouts of the parameters before for those of the present ones.
    """
    options = one_of(given, "objective")
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"config.objective={given!r}: has no name, such as 'rloo'")
    if name == "dr_grpo":
        options = {"length": limits.thoughts + limits.answer} | options
    if ahead and name in ("rloo", "remax", "reinforce") and options.get("correction", "none") == "none":
        raise UserError(
            f"config.rollout.ahead=True: {name} knows no ratio to the policy one step before; take grpo, or "
            f"config.objective=\"{name}(correction='sequence', proximal='current')\""
        )
    return objectives.make(name, **options)


def stripped(flow: streams.Stream, practice: Practice | None) -> Callable[..., Batch]:
    """Returns the function (index, stage, part, recall) -> host rows of a batch."""
    if practice is None:
        return lambda index, stage, part=None, recall=None: flow.read(index, part, recall)
    return lambda index, stage, part=None, recall=None: practice.trim(flow.read(index, part, recall), stage)


def place(mesh: jax.sharding.Mesh, flow: streams.Stream, read: Callable[..., Batch]) -> Callable[..., Batch]:
    """Returns the function (index, stage, recall) -> rows on the devices."""

    def run(index: streams.Index, stage: int, recall: streams.Recall | None = None) -> Batch:
        return meshes.place(mesh, functools.partial(read, index, stage, recall=recall), rows=flow.width)

    return run
