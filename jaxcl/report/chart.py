"""Line charts as inline SVG: colours come from the style sheet, so one drawing is right in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

SIZES = (("wide", 880, 320), ("narrow", 400, 280))  # one drawing per screen, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 44, 36
LABEL = 12  # longest name, in characters, that is written beside the end of its line
POINTS = 400  # drawn per line at the most; extremes of each stretch are kept


class Line(NamedTuple):
    """One curve; `colour` numbers the palette, `band` is (low, high) around it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    band: tuple[np.ndarray, np.ndarray] | None = None
    thin: bool = False


class Frame(NamedTuple):
    """What is around the curves: see `figure`."""

    title: str
    x: str
    y: str
    spans: Sequence[Span]
    zero: bool


class Span(NamedTuple):
    """A named stretch of the x axis, such as a stage."""

    name: str
    start: float
    end: float


def figure(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    spans: Sequence[Span] = (),
    zero: bool = False,
    half: bool = False,
    caption: str = "",
) -> str:
    """Returns a figure with legend, chart and caption, or nothing if there are no points to draw.

    Args:
      lines: curves to draw; NaNs break a curve.
      title: heading, also what a screen reader says.
      x: label of the x axis with its unit.
      y: label of the y axis with its unit.
      spans: stretches of the x axis, shaded in turn and named.
      zero: let the y axis start at zero and mark it.
      half: draw it small on every screen, to stand beside another.
      caption: text below.
    """
    lines = [_thin_out(line) for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return ""
    sizes = (("small", *SIZES[1][1:]),) if half else SIZES
    charts = "".join(_svg(lines, Frame(title, x, y, spans, zero), *size) for size in sizes)
    legend = "".join(
        f'<li><span class="key c{line.colour % 8}" aria-hidden="true"></span>{escape(line.name)}</li>' for line in lines
    )
    kind = "legend narrow" if _labelled(lines) else "legend"
    shown = f'<ul class="{kind}">{legend}</ul>' if len(lines) > 1 or lines[0].name else ""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(title)}</h3>{shown}{charts}{note}</figure>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = int(np.ceil(low / step - 1e-9))
    return [float(i * step) for i in range(first, int(np.floor(high / step + 1e-9)) + 1)]


def number(value: float) -> str:
    """Returns a tick label: 0.003, 1.5, 250, 12k, 3.1M."""
    if value == 0:
        return "0"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.0e}" if abs(value) < 1e-3 else f"{value:.4g}"


def _thin_out(line: Line) -> Line:
    """Keeps the lowest and the highest point of each stretch, so that spikes survive."""
    n = len(line.x)
    if n <= POINTS or line.band is not None:
        return line
    keep: set[int] = {0, n - 1}
    for part in np.array_split(np.arange(n), POINTS // 2):
        values = line.y[part]
        if np.isfinite(values).any():
            keep |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
        else:
            keep.add(int(part[0]))  # the curve breaks here
    index = np.array(sorted(keep))
    return line._replace(x=line.x[index], y=line.y[index])


def _range(lines: Sequence[Line], zero: bool) -> tuple[float, float]:
    values = [line.y for line in lines] + [edge for line in lines if line.band for edge in line.band]
    finite = np.concatenate([v[np.isfinite(v)] for v in values])
    low, high = float(finite.min()), float(finite.max())
    low = min(0.0, low) if zero else low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low - margin if low < 0 or not zero else 0.0), high + margin


def _labelled(lines: Sequence[Line]) -> bool:
    return 1 < len(lines) <= 8 and all(len(line.name) <= LABEL for line in lines)


def _svg(lines: Sequence[Line], frame: Frame, kind: str, width: int, height: int) -> str:
    labelled = kind == "wide" and _labelled(lines)
    right = RIGHT + (7.5 * max(len(line.name) for line in lines) if labelled else 0)
    low, high = _range(lines, frame.zero)
    first = min(float(line.x[0]) for line in lines)
    last = max(float(line.x[-1]) for line in lines)
    last = max([last, *(span.end for span in frame.spans)]) if last > first else first + 1
    inner_w, inner_h = width - LEFT - right, height - TOP - BOTTOM

    def px(value: float) -> float:
        return LEFT + (value - first) / (last - first) * inner_w

    def py(value: float) -> float:
        return TOP + (high - value) / (high - low) * inner_h

    parts = [f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(frame.title)}">']
    parts += _spans(frame.spans, px, inner_h)
    for value in ticks(low, high):
        at = f"{py(value):.1f}"
        mark = "axis" if frame.zero and value == 0 else "grid"
        parts.append(f'<path class="{mark}" d="M{LEFT} {at}H{width - right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{at}" dy="4">{number(value)}</text>')
    for value in ticks(first, last, 6 if kind == "wide" else 4):
        parts.append(f'<text class="middle" x="{px(value):.1f}" y="{height - BOTTOM + 17}">{number(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP + inner_h}H{width - right}"/>')
    parts.append(f'<text class="end label" x="{width - right}" y="{height - 4}">{escape(frame.x)}</text>')
    parts.append(f'<text class="label" x="4" y="14">{escape(frame.y)}</text>')
    for line in lines:
        parts += _curve(line, px, py)
    if labelled:
        parts += _end_labels(lines, py, width - right + 6)
    return "".join(parts) + "</svg>"


def _end_labels(lines: Sequence[Line], py, at: float) -> list[str]:
    """Returns the names of the lines beside their ends, moved apart where they would touch."""
    ends = sorted(((py(float(line.y[np.isfinite(line.y)][-1])), line) for line in lines), key=lambda end: end[0])
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + 15) if places else y)
    return [
        f'<text class="name c{line.colour % 8}" x="{at:.1f}" y="{place:.1f}" dy="4">{escape(line.name)}</text>'
        for place, (_, line) in zip(places, ends, strict=True)
    ]


def _spans(spans: Sequence[Span], px, height: float) -> list[str]:
    parts = []
    for i, span in enumerate(spans):
        left, right = px(span.start), px(span.end)
        if i % 2:
            parts.append(f'<rect class="span" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{height}"/>')
        if i:
            parts.append(f'<path class="boundary" d="M{left:.1f} {TOP}V{TOP + height}"/>')
        if right - left > 6.2 * len(span.name):
            parts.append(
                f'<text class="middle stage" x="{(left + right) / 2:.1f}" y="{TOP - 8}">{escape(span.name)}</text>'
            )
    return parts


def _curve(line: Line, px, py) -> list[str]:
    colour, parts = f"c{line.colour % 8}", []
    if line.band is not None:
        low, high = line.band
        good = np.isfinite(low) & np.isfinite(high)
        edge = [f"{px(a):.1f} {py(b):.1f}" for a, b in zip(line.x[good], high[good], strict=True)]
        edge += [f"{px(a):.1f} {py(b):.1f}" for a, b in zip(line.x[good][::-1], low[good][::-1], strict=True)]
        if edge:
            parts.append(f'<path class="band {colour}" d="M{"L".join(edge)}Z"/>')
    pieces, pen = [], "M"
    for a, b in zip(line.x, line.y, strict=True):
        if not np.isfinite(b):
            pen = "M"
            continue
        pieces.append(f"{pen}{px(a):.1f} {py(b):.1f}")
        pen = "L"
    weight = " thin" if line.thin else ""
    dashed = " dashed" if line.colour >= 8 else ""
    parts.append(f'<path class="line {colour}{weight}{dashed}" d="{"".join(pieces)}"/>')
    return parts
