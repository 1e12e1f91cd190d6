"""From `config.sources` to the rows of every domain, and to the model that fits them: text, tables or problems."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcl import adapters, schema
from jaxcl import network as networks
from jaxcl import practice as practices
from jaxcl.data import clean, prepare, tabular
from jaxcl.data import rows as tables
from jaxcl.data import tokenizer as tokenizers
from jaxcl.data.sources import Source, Table
from jaxcl.rl import tasks
from jaxcl.rl.tasks import Problems
from jaxcl.schema import UserError


class Packing(NamedTuple):
    """How text becomes rows."""

    length: int  # L, tokens per row
    held_out: float = 0.05  # share of the documents that is only evaluated on
    directory: str = "~/.cache/jaxcl"  # folder of packed rows


class Domains(NamedTuple):
    """What a run is trained on."""

    network: networks.Network
    pack: Callable[[], dict[str, prepare.Corpus]]  # tokenises and packs text, so that all else can be checked before
    practice: practices.Practice | None  # of problems alone


class Sections(NamedTuple):
    """What a config says of them."""

    sources: Mapping[str, Mapping[str, Any]]
    packing: Mapping[str, Any]
    tokenizer: Mapping[str, Any] | None
    model: Mapping[str, Any]
    adapter: str | Mapping[str, Any] | None
    stages: Sequence[Mapping[str, Any]] = ()  # of `config.stream`; problems are learned from as they say
    options: practices.Options = practices.Options()  # of problems alone


def make(given: Sections) -> Domains:
    """Returns the domains of a config: text for a language model, tables for a classifier, problems to be solved.

    Raises:
      UserError: whatever is wrong with the sections.
    """
    sources, packing, tokenizer, model, adapter, stages, options = given
    if not sources:
        raise UserError(
            "config.sources: empty; name at least one, e.g. dict(text=dict(name='embedded', domain='prose'))"
        )
    if practising(sources):
        return _of_problems(given)
    refuse_practice(stages, options)
    made = {name: source_of(name, one) for name, one in sources.items()}
    kinds = {name: isinstance(source, Table) for name, source in made.items()}
    if of_tables(kinds, tokenizer=tokenizer, packing=packing):
        corpora = {name: tabular.corpus(table) for name, table in made.items()}
        example = next(tables.batches(next(iter(corpora.values())).train, size=1))
        network = networks.classifier(model, example, tabular.classes(made.values()))
        if adapter:
            first = corpora.get(next(iter(mixture_of(stages)), ""), next(iter(corpora.values())))
            draw = adapters.drawing(first.train)
            network = adapters.make(network, model, adapter, example, len(stages), draw)
        return Domains(network, lambda: corpora, None)
    packed = schema.call(Packing, packing, field="packing")
    model = networks.based(model, adapter)
    words = networks.tokenizer_of(tokenizer, model)
    network = networks.make(model, words, packed.length, adapter)
    return Domains(network, lambda: _packed(made, words, packed), None)


def mixture_of(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the mixture of the first stage; what is wrong with it is said elsewhere."""
    found = stages[0].get("mixture") if stages else None
    return found if isinstance(found, Mapping) else {}


def practising(sources: Mapping[str, Any]) -> bool:
    """Returns whether the sources are problems.

    Raises:
      UserError: some are and some are not.
    """
    known = {module.name for module in pkgutil.iter_modules(tasks.__path__)}
    kinds = {name: isinstance(one, Mapping) and one.get("name") in known for name, one in sources.items()}
    if len(set(kinds.values())) > 1:
        problems, rest = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise UserError(f"config.sources: {problems} has problems and {rest} has none; train on one kind")
    return any(kinds.values())


def refuse_practice(stages: Sequence[Mapping[str, Any]], options: practices.Options) -> None:
    """Raises UserError for what only problems have a use for."""
    for key, value in options._asdict().items():
        if value:
            raise UserError(f"config.{key}: of problems, as dict(name='mnns'); config.sources has none, leave it out")
    for i, stage in enumerate(stages):
        if isinstance(stage, Mapping) and stage.get("learn"):
            raise UserError(f"config.stream.stages[{i}].learn: of problems; config.sources has none, leave it out")


def _of_problems(given: Sections) -> Domains:
    sources, packing, tokenizer, model, adapter, stages, options = given
    if packing:
        raise UserError("config.packing: of text; config.sources are problems, leave it out")
    words, model = None, networks.based(model, adapter)
    if any(one.get("name") == "questions" for one in sources.values()):
        words = networks.tokenizer_of(tokenizer, model)
    elif tokenizer or "checkpoint" in model:
        field = "tokenizer" if tokenizer else "model.checkpoint"
        raise UserError(f"config.{field}: generated problems make their own vocabulary; leave it out")
    problems = {name: problems_of(name, one, words) for name, one in sources.items()}
    practice = practices.make(problems, words, stages, options)
    if words is None:
        model = {"vocab": -(-practice.words.vocab // 8) * 8} | model
    network = networks.make(model, practice.words, practice.length, adapter)
    if network.shape is None:
        raise UserError(f"config.model.name={model.get('name')!r}: thoughts are fed to a transformer; choose that")
    network = networks.gated(network) if practice.policy.gated else network
    return Domains(network, practice.corpora, practice)


def problems_of(name: str, options: Mapping[str, Any], words: tokenizers.Tokenizer | None) -> Problems:
    """Returns the problems of a domain."""
    try:
        return tasks.make(options, words, field=f"sources.{name}")
    except UserError as error:
        text = str(error).replace("config.task.", f"config.sources.{name}.")
        raise UserError(text.replace("config.verifier.", f"config.sources.{name}.verifier.")) from error


def of_tables(kinds: Mapping[str, bool], **sections: Any) -> bool:
    """Returns whether the domains are tables.

    Args:
      kinds: domain -> whether it is a table.
      **sections: of the config, those that only text has a use for.

    Raises:
      UserError: some are tables and some are text, or they are tables and a section is given.
    """
    if len(set(kinds.values())) > 1:
        table, text = (next(name for name, kind in kinds.items() if kind is wanted) for wanted in (True, False))
        raise UserError(f"config.sources: {table} is a table and {text} is text; train on one kind")
    tables = any(kinds.values())
    for key, value in sections.items():
        if tables and value:
            raise UserError(f"config.{key}: config.sources are tables, which have no use for it; leave it out")
    return tables


def of_text(
    sources: Mapping[str, Mapping[str, Any]], words: tokenizers.Tokenizer, packing: Packing
) -> dict[str, prepare.Corpus]:
    """Returns the packed rows of every domain, each of them text."""
    return _packed({name: source_of(name, options) for name, options in sources.items()}, words, packing)


def _packed(made: Mapping[str, Source], words: tokenizers.Tokenizer, packing: Packing) -> dict[str, prepare.Corpus]:
    return {name: prepare.make(source, words, name=name, **packing._asdict()) for name, source in made.items()}


def source_of(name: str, options: Mapping[str, Any]) -> Any:
    """Returns the `Source` or `Table` of a domain, cleaned if its options say how."""
    field, rest = f"sources.{name}", options
    if isinstance(options, Mapping):
        rest = {key: value for key, value in options.items() if key != "clean"}
    try:
        source = schema.make("jaxcl.data.sources", rest, field=field)
    except UserError as error:
        raise UserError(str(error).replace("config.sources: ", f"config.{field}: ")) from error
    if (how := options.get("clean")) is None:
        return source
    if isinstance(source, Table):
        raise UserError(f"config.{field}.clean: of documents; a table has none, leave it out")
    if not isinstance(how, Mapping):
        raise UserError(f"config.{field}.clean={how!r}: expected a dict of options, as in dict(near=0.8)")
    return schema.call(clean.make, how, source, field=f"{field}.clean")
