"""Function signatures as configuration schemas: build an object from a dict, or say what is wrong with it."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NOT_FINITE = ("nan", "inf", "infinity")  # text on a command line; few options take infinity, and none takes nan


class UserError(Exception):
    """Bad input. The message names the field, the value and the remedy, on one line.

    `main` prints it without a traceback and exits with status 2.
    """


def nearest(name: str, choices: Sequence[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the choice most like `name`, or the list of choices."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(sorted(choices))}"


def make(package: str, options: Mapping[str, Any], *args: Any, field: str) -> Any:
    """Imports `{package}.{options['name']}` and calls its `make(*args, **rest)` after checking `rest`.

    Args:
      package: dotted package whose modules expose `make`.
      options: `name` plus keyword options of that module's `make`.
      args: positional arguments that come before the options.
      field: the configuration field, for messages.

    Raises:
      UserError: unknown name, unknown key, missing key or value of the wrong type.
    """
    rest = {key: value for key, value in options.items() if key != "name"} if isinstance(options, Mapping) else {}
    return call(maker(package, options, field=field, given=len(args)), rest, *args, field=field)


def maker(package: str, options: Mapping[str, Any], *, field: str, given: int = 0) -> Callable[..., Any]:
    """Returns `{package}.{options['name']}.make`.

    Args:
      package: see `make`.
      options: see `make`; only the name is read.
      field: see `make`.
      given: number of positional arguments that it will be called with.

    Raises:
      UserError: no or an unknown name, or a `make` that needs more than these and options: it makes something else.
    """
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise UserError(f"config.{field}: expected a dict with a 'name', got {options!r}")
    name = options["name"]
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    found = _maker(package, name, given) if name in names else None
    if found is None:
        fitting = [one for one in names if _maker(package, one, given)]
        fault = f"does not stand alone in {package}" if name in names else f"no such module in {package}"
        raise UserError(f"config.{field}.name={name!r}: {fault}{nearest(name, fitting)}")
    return found


def _maker(package: str, name: str, given: int) -> Callable[..., Any] | None:
    """Returns the `make` of a module if there is one that takes no more than `given` positional arguments."""
    function = getattr(importlib.import_module(f"{package}.{name}"), "make", None)
    if function is None:
        return None
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return function if len(needed) <= given else None


def call(function: Callable[..., Any], options: Mapping[str, Any], *args: Any, field: str) -> Any:
    """Calls `function(*args, **options)` after checking names and types against its signature."""
    check(function, options, field=field, positional=len(args))
    return function(*args, **options)


def check(function: Callable[..., Any], options: Mapping[str, Any], *, field: str, positional: int = 0) -> None:
    """Raises UserError unless `options` fit the keyword parameters of `function`."""
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    known = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    own = inspect.isclass(function) and "__init__" in vars(function)  # a class of fields has its hints itself
    hints = typing.get_type_hints(vars(function)["__init__"] if own else function)
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{dotted(field, key)}: unknown key{nearest(key, list(known))}")
        if key in hints and not fits(value, hints[key]):
            if isinstance(value, str) and _not_finite(value) and fits(0, hints[key]):
                rest = "" if "nan" in value.lower() else "; one that may be infinite is written 1e999"
                raise UserError(f"{dotted(field, key)}={value}: must be a finite number{rest}")
            listed = isinstance(value, str) and fits([value], hints[key])
            wanted = f"a list, as in [{value!r}]" if listed else spell(hints[key])
            raise UserError(f"{dotted(field, key)}={value!r}: expected {wanted}, got {type(value).__name__}")
    missing = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in options]
    if missing:
        raise UserError(f"{dotted(field, missing[0])}: missing; give it a value: {spell(hints.get(missing[0], Any))}")


def dotted(field: str, key: str) -> str:
    """Returns `config.field.key`; the top level has the empty field."""
    return f"config.{field}.{key}" if field else f"config.{key}"


def spell(hint: Any) -> str:
    """Returns an annotation as a user would say it: `int`, `'a' or 'b'`, `tuple[str, ...] or None`."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(spell, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def fits(value: Any, hint: Any) -> bool:
    """Returns whether `value` has the annotated type; an int is a float, a list is a tuple, a bool is no number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, (str, typing.TypeVar)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arm) for arm in args)
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    kind = origin or hint
    if kind in (tuple, list, Sequence) or (isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str):
        return isinstance(value, (list, tuple)) and all(fits(v, args[0]) for v in value if args)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _not_finite(text: str) -> bool:
    return text.lower().lstrip("+-") in NOT_FINITE


def _literal(node: ast.expr) -> Any:
    """Returns the value of a literal; nan and inf, which are none, as text: `check` names the option they are for."""
    text = ast.unparse(node)
    return text if _not_finite(text) else ast.literal_eval(node)


def parse(text: str, *, field: str) -> list[dict[str, Any]]:
    """Reads `er(capacity=256) + reptile(every=10, keep=0.5)` as a list of dicts with a `name` and options.

    Only names, literals and `+` are understood: nothing is evaluated.

    Raises:
      UserError: the text is anything else.
    """

    def parts(node: ast.expr) -> list[dict[str, Any]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return parts(node.left) + parts(node.right)
        if isinstance(node, ast.Name):
            return [{"name": node.id}]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            options = {word.arg: _literal(word.value) for word in node.keywords if word.arg}
            if len(options) == len(node.keywords):
                return [{"name": node.func.id, **options}]
        raise ValueError(ast.unparse(node))

    try:
        return parts(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"config.{field}={text!r}: write it as in 'er(capacity=256) + reptile(every=10, keep=0.5)'"
        ) from error


def assign(config: dict[str, Any], key: str, value: Any, text: str | None = None) -> None:
    """Sets `a.b[0].c` in nested dicts and lists. All but the last part must exist.

    Args:
      config: changed in place.
      key: dotted, with indices in brackets.
      value: the new value.
      text: how it was written, which is what is stored where a text stood before, unless the value is None, a dict or
        a list of dicts: where 'er(capacity=4)' stood, {'name': 'er', 'capacity': 4} may stand.

    Raises:
      UserError: no such section.
    """
    parts: list[Any] = [int(p) if p.isdigit() else p for p in key.replace("[", ".").replace("]", "").split(".")]
    here: Any = config
    for i, part in enumerate(parts):
        known = range(len(here)) if isinstance(here, list) else here if isinstance(here, dict) else ()
        last = i + 1 == len(parts)
        if part not in known and not (last and isinstance(here, dict)):
            place = ".".join(str(p) for p in parts[: i + 1])
            remedy = nearest(str(part), [str(k) for k in known]) if known else f"; before it stands {here!r}"
            raise UserError(f"config.{place}: no such section{remedy}")
        if not last:
            here = here[part]
    old = here[parts[-1]] if isinstance(here, list) or parts[-1] in here else None
    listed = isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)
    kept = text is None or value is None or isinstance(value, Mapping) or (listed and value)
    here[parts[-1]] = value if kept or not isinstance(old, str) else text
