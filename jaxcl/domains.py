"""From `config.sources` to the rows of every domain, and to the model that fits them: text or tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxcl import network as networks
from jaxcl import schema
from jaxcl.data import clean, prepare, tabular
from jaxcl.data import rows as tables
from jaxcl.data import tokenizer as tokenizers
from jaxcl.data.sources import Source, Table
from jaxcl.schema import UserError


class Packing(NamedTuple):
    """How text becomes rows."""

    length: int  # L, tokens per row
    held_out: float = 0.05  # share of the documents that is only evaluated on
    directory: str = "~/.cache/jaxcl"  # folder of packed rows


def make(
    sources: Mapping[str, Mapping[str, Any]],
    packing: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
    model: Mapping[str, Any],
    adapter: str | Mapping[str, Any] | None,
) -> tuple[networks.Network, Callable[[], dict[str, prepare.Corpus]]]:
    """Returns the model, and what gives the rows of every domain: text for a language model, tables for a classifier.

    Text is tokenised and packed when the function is called, so that all else can be checked before.
    """
    if not sources:
        raise UserError(
            "config.sources: empty; name at least one, e.g. dict(text=dict(name='embedded', domain='prose'))"
        )
    made = {name: source_of(name, options) for name, options in sources.items()}
    kinds = {name: isinstance(source, Table) for name, source in made.items()}
    if of_tables(kinds, tokenizer=tokenizer, packing=packing, adapter=adapter):
        corpora = {name: tabular.corpus(table) for name, table in made.items()}
        example = next(tables.batches(next(iter(corpora.values())).train, size=1))
        return networks.classifier(model, example, tabular.classes(made.values())), lambda: corpora
    packed = schema.call(Packing, packing, field="packing")
    model = networks.based(model, adapter)
    words = networks.tokenizer_of(tokenizer, model)
    network = networks.make(model, words, packed.length, adapter)
    return network, lambda: _packed(made, words, packed)


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
    source = schema.make("jaxcl.data.sources", rest, field=field)
    if (how := options.get("clean")) is None:
        return source
    if isinstance(source, Table):
        raise UserError(f"config.{field}.clean: of documents; a table has none, leave it out")
    if not isinstance(how, Mapping):
        raise UserError(f"config.{field}.clean={how!r}: expected a dict of options, as in dict(near=0.8)")
    return schema.call(clean.make, how, source, field=f"{field}.clean")
