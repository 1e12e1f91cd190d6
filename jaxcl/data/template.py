"""Jinja templates from elsewhere: sandboxed, and bounded in how long they run and how much text they make.

A template is a program. Jinja's immutable sandbox keeps it from the interpreter and from changing what it is given.
What is added here counts the turns of its loops and the calls of its macros, and looks at the size of a text or a list
before it is made. Loops, macros and `~` are found in the syntax tree, operators and calls by the hooks of the sandbox.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

STEPS = 300_000  # turns of all loops of one rendering, those of filters too
SECONDS = 60.0  # of the processor
SPARE = 2**20  # characters or items that may be made besides
TIMES = 16  # how often what the template is given may come in what it makes
BITS = 256  # of whole numbers
_WIDE = re.compile(r"\*|\d{4,}")  # a width that is an argument, or a thousand and more
# What makes long texts of short ones by a number, and is in no template of a released model.
_WITHOUT = {"center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate", "to_bytes"}
_LOOPS = (
    "groupby",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "select",
    "selectattr",
    "sort",
    "sum",
    "unique",
)
_FILTERS = ("center", "wordwrap", "format", "batch", "slice", "xmlattr", "urlize", "pprint", "random")


class TooMuch(Exception):
    """A template that runs longer, or makes more, than one of a chat needs."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, size: int) -> None:
        """Begins a rendering of so many characters."""
        self.steps, self.made, self.longest = STEPS, 0, SPARE + TIMES * size
        self.end = time.thread_time() + SECONDS

    def tick(self) -> bool:
        """Counts one turn of a loop, or one call of a macro."""
        self.steps -= 1
        if self.steps < 0:
            raise TooMuch(f"runs more than {STEPS:,} turns of loops")
        if time.thread_time() > self.end:
            raise TooMuch(f"takes more than {SECONDS:.0f} s")
        return True

    def counted(self, values: Any) -> Iterator[Any]:
        """Yields values, each of which is a turn of a loop."""
        for value in values:
            self.tick()
            yield value

    def check(self, size: int) -> None:
        """Checks the length of a text or a list that is about to be made."""
        if size > self.longest:
            raise TooMuch(f"makes a text or a list of more than {self.longest:,} characters or items")

    def shown(self, value: Any) -> Any:
        """Counts what is written out, also into a variable."""
        self.made += len(value) if isinstance(value, str) else 64
        self.check(self.made)
        return value

    def joined(self, *parts: Any) -> str:
        """Returns what `~` makes of its operands."""
        texts = [str(part) for part in parts]
        self.check(sum(map(len, texts)))
        return "".join(texts)

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Checks what an operator is about to make."""
        whole = [part for part in (left, right) if isinstance(part, int)]
        sized = [len(part) for part in (left, right) if hasattr(part, "__len__")]
        if operator == "+" and len(sized) == 2:
            self.check(sum(sized))
        elif operator == "*" and sized and whole:
            self.check(sized[0] * max(whole[0], 0))
        elif operator == "%" and isinstance(left, (str, bytes)):
            if _WIDE.search(left if isinstance(left, str) else left.decode("latin1")):
                raise TooMuch("formats with a width of a thousand or more")
        elif len(whole) == 2 and operator in ("*", "**"):
            bits = [part.bit_length() for part in whole]
            if (bits[0] * max(right, 1) if operator == "**" else sum(bits)) > BITS:
                raise TooMuch(f"computes numbers of more than {BITS} bits")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """Checks a call of a method of a text."""
        function = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        name, own = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if isinstance(own, str):
            if name == "format" and _WIDE.search(own):
                raise TooMuch("formats with a width of a thousand or more")
            if name == "replace" and len(arguments) >= 2:
                self.replaced(own, *arguments[:2])
            elif name == "join" and arguments and hasattr(arguments[0], "__len__"):
                self.check(len(own) * len(arguments[0]))

    def replaced(self, text: Any, old: Any, new: Any) -> None:
        """Checks what a replacement is about to make."""
        text, old, new = str(text), str(old), str(new)
        self.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def make(text: str, extensions: list[Any], names: dict[str, Any]) -> tuple[Any, Budget]:
    """Returns a template that was compiled, and what bounds it: call `begin` before each rendering.

    Args:
      text: of the template.
      extensions: of Jinja.
      names: functions that it may call.

    Raises:
      ImportError: Jinja is not installed.
      jinja2.TemplateError: no template.
    """
    import jinja2  # noqa: PLC0415
    import jinja2.sandbox  # noqa: PLC0415  (only those who have chats need it)
    from jinja2 import nodes  # noqa: PLC0415

    budget = Budget()

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.operate(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            budget.call(__obj, args)
            return super().call(__context, __obj, *args, **kwargs)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _WITHOUT and super().is_safe_attribute(obj, attr, value)

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=budget.shown)
    # As filters, which are called without detours; with a context, so that they are not computed when it is compiled.
    made.filters |= {"tick": jinja2.pass_context(lambda _, value: budget.tick())}
    made.filters |= {"joined": jinja2.pass_context(lambda _, parts: budget.joined(*parts))}
    _guard(made, budget)
    made.globals |= names
    tree: Any = made.parse(text)
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        tick = nodes.Filter(nodes.Const(None), "tick", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(tick, node.test)
    _replace_joins(tree, nodes)
    return made.from_string(tree.set_environment(made)), budget


def _guard(environment: Any, budget: Budget) -> None:
    """Leaves out filters that make much of little, and bounds those that chats need."""
    from jinja2 import pass_eval_context  # noqa: PLC0415

    for name in _FILTERS:
        environment.filters.pop(name, None)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    for name in _LOOPS:
        environment.filters[name] = _counting(environment.filters[name], budget)
    own = dict(environment.filters)

    def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
        budget.replaced(value, old, new)
        return str(value).replace(str(old), str(new), -1 if count is None else count)

    def indent(value: Any, width: Any = 4, *rest: Any, **options: Any) -> str:
        budget.check(str(value).count("\n") * (len(width) if isinstance(width, str) else int(width)))
        return own["indent"](value, width, *rest, **options)

    @pass_eval_context
    def join(context: Any, value: Any, between: Any = "", attribute: Any = None) -> str:
        items = list(budget.counted(value))
        budget.check(len(items) * len(str(between)))
        return own["join"](context, items, between, attribute)

    def to_json(value: Any, **options: Any) -> str:
        if not (options.get("indent") is None or 0 <= int(options["indent"]) <= 16):
            raise TooMuch("indents JSON by more than 16")
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.filters |= {"replace": replace, "indent": indent, "join": join, "tojson": to_json}


def _counting(function: Any, budget: Budget) -> Any:
    """Returns a filter that counts the items of what it is applied to."""
    place = int(hasattr(function, "jinja_pass_arg"))  # behind what Jinja passes to it

    @functools.wraps(function)
    def counting(*arguments: Any, **options: Any) -> Any:
        given = list(arguments)
        given[place] = list(budget.counted(given[place]))
        return function(*given, **options)

    return counting


def _replace_joins(node: Any, nodes: Any) -> None:
    """Replaces every `~` below a node of the syntax tree by a call that looks at the sizes first."""
    for name, value in list(node.iter_fields()):
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            if not isinstance(item, nodes.Node):
                continue
            _replace_joins(item, nodes)
            if isinstance(item, nodes.Concat):
                call = nodes.Filter(nodes.List(item.nodes), "joined", [], [], None, None)
                call.set_lineno(item.lineno)
                if isinstance(value, list):
                    value[i] = call
                else:
                    setattr(node, name, call)
