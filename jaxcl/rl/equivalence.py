"""Whether two short mathematical texts say the same: numbers, percents, units, sets, intervals. Never raises.

Deliberately small: no algebra, no powers, nothing is evaluated. What is not understood is compared as text, without
white space and the LaTeX that only changes looks. `verify.math` knows more and costs more.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 300  # characters; longer texts are compared as text
DEEPEST = 6  # sets within sets
_SHORT = re.compile("[mghslLVWJ]|[cmk]m|k?g|mg|ml|ft|in|mi|lb|oz|hr|am|pm")  # units; 2x and 3ab have none
_LOOKS = (  # LaTeX and signs that do not change a meaning
    (re.compile(r"\\(?:left|right|bigl|bigr|displaystyle|limits)(?![A-Za-z])|\\[!,;: ]|\\?[$£€¥]|\\\(|\\\)"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree"), " degrees "),
    (re.compile("[−–]"), "-"),
    (re.compile(r"\\cdot|\\times|×"), "*"),
    (re.compile(r"\\cup|∪"), " U "),
    (re.compile(r"\\infty|∞"), "inf"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile("[\u00a0\u2009\u202f]"), " "),
)
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"  # 1,234.5
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\frac\s*\{{\s*(?P<top>-?\d+)\s*\}}\s*\{{\s*(?P<bottom>-?\d+)\s*\}}"
    rf"|(?P<whole>\d+)(?:\s+|\s*(?=\\frac))(?:(?P<over>\d+)\s*/\s*(?P<under>\d+)"
    rf"|\\frac\s*\{{\s*(?P<up>\d+)\s*\}}\s*\{{\s*(?P<down>\d+)\s*\}})"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<power>[-+]?\d{{1,3}})(?![\d.])"
    rf"|\s*\*\s*10\s*\^\s*\{{?\s*(?P<ten>[-+]?\d{{1,3}})\s*\}}?)?"
    rf"(?:\s*/\s*(?P<divisor>{_PLAIN}))?)\s*(?P<percent>%?)(?P<unit>.*)",
    re.DOTALL,
)
_UNIT = re.compile(r"\s*(?:[A-Za-z](?:[A-Za-z.\s/]|\^\s*\{?[23]\}?)*)?")
_NAMED = re.compile(r"\s*(?:[A-Za-z]|\\?[A-Za-z]{2,})\s*(?:=|\\in|∈)\s*(?P<rest>[^=]+)")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_LAST = re.compile(rf"-?(?:{_PLAIN})(?:\s*/\s*\d+)?%?")


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction
    percent: bool
    unit: str  # without case and plural

    def agrees(self, other: Number) -> bool:
        """Returns whether both mean the same: 50 % is 50 and 0.5; a unit counts only against another."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.percent == other.percent:
            return self.value == other.value
        percent, plain = (self.value, other.value) if self.percent else (other.value, self.value)
        return plain in (percent, percent / 100)


def equal(gold: str, answer: str, depth: int = 0) -> bool:
    """Returns whether two texts say the same.

    Numbers: `1/2`, `\\frac{1}{2}`, `0.5`, `1 1/2`, `1,234.50`, `1.5e3`, `50%`, `5 cm`, `x = 5`. Groups: `{1, 2}` in any
    order and `1, 2` like it; `(1, 2)` and `[1, 2)` in theirs, with their brackets; unions of them in any order.
    """
    one, other = _clean(gold), _clean(answer)
    if _squeezed(one) == _squeezed(other):
        return bool(_squeezed(one))
    if max(len(one), len(other)) > LONGEST or depth > DEEPEST:
        return False
    numbers = _number(one), _number(other)
    if numbers[0] is not None or numbers[1] is not None:
        return numbers[0] is not None and numbers[1] is not None and numbers[0].agrees(numbers[1])
    groups = _group(one), _group(other)
    if groups[0] is None or groups[1] is None or groups[0][0] != groups[1][0]:
        return False
    kind, parts = groups[0]
    others = groups[1][1]
    if kind not in ("{}", "U"):
        return len(parts) == len(others) and all(equal(a, b, depth + 1) for a, b in zip(parts, others, strict=True))
    covers = [[equal(a, b, depth + 1) for b in others] for a in parts]  # a set has no order and no repetition
    return all(map(any, covers)) and all(map(any, zip(*covers, strict=True)))


def last_number(text: str) -> Fraction | None:
    """Returns the last number in a text."""
    found = _LAST.findall(text[-10 * LONGEST :])
    read = _number(found[-1].rstrip("%")) if found else None
    return read.value if read else None


def last_box(text: str) -> str | None:
    """Returns what is in the last `\\boxed{}` or `\\fbox{}` that is closed; escaped braces do not count."""
    opened: list[tuple[int, bool]] = []  # where the content starts, and whether it is that of a box
    begin = end = -1
    for brace in _BRACE.finditer(text):
        if brace[0] == "}":
            start, is_box = opened.pop() if opened else (-1, False)
            if is_box and start > begin:
                begin, end = start, brace.start()
        elif brace[0][-1] == "{" and len(brace[0]) != 2:
            opened.append((brace.end(), len(brace[0]) > 1))
    return text[begin:end].strip() if begin >= 0 else None


def _clean(text: str) -> str:
    """Returns a text without what only changes its looks; of `x = 5` the right side."""
    if len(text) > 4 * LONGEST:
        return text
    for pattern, plain in _LOOKS:
        text = pattern.sub(plain, text)
    named = _NAMED.fullmatch(text)
    return (named["rest"] if named else text).strip("* \n\t").rstrip(".").strip()


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def _number(text: str) -> Number | None:
    """Returns the number that a clean text is."""
    match = _NUMBER.fullmatch(text)
    if match is None or not _UNIT.fullmatch(match["unit"]):
        return None
    attached, unit = match["unit"][:1].isalpha(), match["unit"].strip().rstrip(".")
    if unit and len(unit) <= (2 if attached else 1) and not _SHORT.fullmatch(unit):
        return None
    unit = "".join(unit.casefold().split())
    unit = unit[:-1] if len(unit) > 2 and unit.endswith("s") else unit
    try:
        if match["top"] is not None:
            value = Fraction(int(match["top"]), int(match["bottom"]))
        elif match["whole"] is not None:
            part = Fraction(int(match["over"] or match["up"]), int(match["under"] or match["down"]))
            value = int(match["whole"]) + part
        else:
            value = _plain(match["plain"]) * Fraction(10) ** int(match["power"] or match["ten"] or 0)
            value /= _plain(match["divisor"] or "1")
    except (ZeroDivisionError, ValueError):
        return None
    return Number(-value if match["sign"] == "-" else value, bool(match["percent"]), unit)


def _plain(text: str) -> Fraction:
    """Returns the value of digits with commas and a point."""
    return Fraction("0" + text.replace(",", ""))


def _group(text: str) -> tuple[str, list[str]] | None:
    """Returns the kind and the parts of a set, a union, a tuple or an interval that a clean text is."""
    text = text.replace(r"\{", "{").replace(r"\}", "}").strip()
    pieces = _split(text, "U")
    if len(pieces) > 1:
        return "U", pieces
    inner = text[1:-1]
    if len(text) > 1 and text[0] in "{[(" and text[-1] in "}])" and _balanced(inner):
        kind = text[0] + text[-1]
        return kind, _split(inner, ",") if inner.strip() else []
    pieces = _split(text, ",")
    return ("{}", pieces) if len(pieces) > 1 else None


def _balanced(text: str) -> bool:
    """Returns whether no bracket of a text closes one that was not opened in it."""
    depth = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, separator: str) -> list[str]:
    """Returns the parts between separators outside brackets; a letter must stand alone to be one."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        alone = not separator.isalpha() or (text[i - 1 : i].isspace() and text[i + 1 : i + 2].isspace())
        if character == separator and depth == 0 and alone:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
