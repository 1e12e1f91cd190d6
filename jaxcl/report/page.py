"""The page around a report: one self-contained HTML file, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

GENERATOR = "jaxcl.report"

STYLE = """
:root { color-scheme: light dark;
  --ground: #fbfaf8; --surface: #ffffff; --ink: #1d1c1a; --soft: #5d5a55; --rule: #e3dfd8; --shade: #f3f0eb;
  --accent: #1f5fae; --good: #14733f; --bad: #b0331f; --heat: #d9541e; --note: #fff4d6; --note-rule: #d9a514;
  --c0: #1f5fae; --c1: #c2500a; --c2: #157a4c; --c3: #8a3ca8; --c4: #b32457; --c5: #0d7783; --c6: #7a5c00;
  --c7: #56606b; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #161618; --surface: #1e1f22; --ink: #ecebe8; --soft: #a9a7a2; --rule: #36373b; --shade: #26272b;
  --accent: #7fb2f5; --good: #6fcf97; --bad: #ff9a85; --heat: #e0622c; --note: #3a3217; --note-rule: #d9a514;
  --c0: #7fb2f5; --c1: #f7a35c; --c2: #6fcf97; --c3: #d39bea; --c4: #ff8fb1; --c5: #5fd0dc; --c6: #dcc06a;
  --c7: #b4bcc6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 48px 0 6px; }
h3 { font-size: 0.95rem; margin: 0 0 6px; font-weight: 600; }
p { margin: 6px 0 12px; max-width: 68ch; }
.sub { color: var(--soft); margin: 0; }
.pill { display: inline-block; font-size: 0.8rem; font-weight: 600; padding: 1px 10px; border-radius: 99px;
  margin-left: 8px;
  border: 1px solid currentColor; color: var(--good); vertical-align: 2px; }
.pill.going { color: var(--c1); }
.verdict { border-left: 4px solid var(--accent); padding: 2px 0 2px 18px; margin: 24px 0; }
.verdict p { font-size: 1.08rem; margin: 8px 0; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin: 20px 0 8px; padding: 0; }
.tiles div { background: var(--surface); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.tiles dt { font-size: 0.83rem; color: var(--soft); }
.tiles dd { margin: 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: 0.78rem; font-weight: 400; line-height: 1.35; color: var(--soft); }
figure, .card { background: var(--surface); border: 1px solid var(--rule); border-radius: 10px; padding: 16px;
  margin: 14px 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); gap: 14px;
  margin: 14px 0; }
.pairs figure, .pairs .card { margin: 0; min-width: 0; }
figcaption, .hint { color: var(--soft); font-size: 0.87rem; margin: 8px 0 0; max-width: 78ch; }
svg { display: block; width: 100%; height: auto; }
svg.narrow, .legend.narrow { display: none; }
svg text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--soft); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; } svg .stage { font-weight: 600; }
svg .grid { stroke: var(--rule); fill: none; } svg .axis { stroke: var(--soft); fill: none; }
svg .span { fill: var(--shade); } svg .boundary { stroke: var(--soft); stroke-dasharray: 2 4; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .thin { stroke-width: 1.1; }
svg .dashed { stroke-dasharray: 6 4; } svg .band { stroke: none; opacity: 0.16; } svg .name { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0 0 6px; padding: 0;
  font-size: 0.87rem; }
.key { display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 0.95rem; padding-bottom: 8px; }
th, td { padding: 7px 8px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; font-size: 0.85rem; } thead th { color: var(--soft); vertical-align: bottom; }
th:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; overflow-wrap: anywhere; }
tbody tr:last-child > * { border-bottom: 0; }
td.heat { background: color-mix(in srgb, var(--heat) var(--share), var(--surface)); }
td.ally { background: color-mix(in srgb, var(--c0) var(--share), var(--surface)); }
td.own { font-weight: 700; box-shadow: inset 0 0 0 2px var(--accent); }
.pm { color: var(--soft); font-size: 0.84em; font-weight: 400; } .good { color: var(--good); font-weight: 600; }
  .bad { color: var(--bad); font-weight: 600; }
.note { background: var(--note); border-left: 4px solid var(--note-rule); border-radius: 6px; padding: 10px 14px;
  margin: 14px 0; max-width: none; }
.bar { display: flex; height: 14px; width: 100%; min-width: 120px; border-radius: 4px; overflow: hidden;
  background: var(--shade); }
.bar i { display: block; background: var(--c0); } .bar i.old { background: var(--c1); }
details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--shade); border-radius: 8px; padding: 14px;
  font: 0.82rem/1.5 ui-monospace, Menlo, Consolas,
  "Liberation Mono", monospace; }
footer { color: var(--soft); font-size: 0.85rem; margin-top: 48px; }
@media (max-width: 640px) {
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  main { padding: 24px 14px 48px; } h1 { font-size: 1.5rem; } figure, .card { padding: 12px; }
  th[scope=row] { position: sticky; left: 0; background: var(--surface); white-space: normal; min-width: 104px; }
  td.text { min-width: 140px; }
  svg.wide { display: none; } svg.narrow { display: block; } .legend.narrow { display: flex; } th,
  td { padding: 6px 8px; } }
@media print { body { background: none; } figure, .card, .tiles div { break-inside: avoid; } }
"""
PALETTE = "".join(
    f"svg .line.c{i} {{ stroke: var(--c{i}) }} svg .band.c{i}, svg text.c{i} {{ fill: var(--c{i}) }} "
    f".key.c{i} {{ background: var(--c{i}) }}\n"
    for i in range(8)
)


def html(title: str, body: str) -> str:
    """Returns the whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{GENERATOR}">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{PALETTE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, hint: str = "") -> str:
    """Returns a table in a card; cells are HTML, the first of each row is its heading.

    A cell may begin with `<td`, one of the head with `<th`; else it is wrapped. Scrolls sideways on narrow screens.
    """
    if not rows:
        return ""
    heads = "".join(cell if cell.startswith("<th") else f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    note = f'<p class="hint">{hint}</p>' if hint else ""
    return (
        f'<div class="card"><div class="scroll" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>{note}</div>"
    )


def text_head(name: str) -> str:
    """Returns the head of a column of text, which is set to the left."""
    return f'<th scope="col" class="text">{name}</th>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Returns figures side by side: (name, value, what it means)."""
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}<small>{hint}</small></dd></div>" for name, value, hint in entries)
        + "</dl>"
    )


def pairs(figures: Sequence[str]) -> str:
    """Returns small figures two by two where the screen is wide enough."""
    return f'<div class="pairs">{"".join(figures)}</div>'
