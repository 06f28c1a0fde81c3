"""A page of sections, written as HTML in one file and as Markdown."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #555; --line: #ddd; --page: #fff;
  --good: #1b6e2c; --bad: #b00020; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #b0b0b0; --line: #444;
  --page: #16181b; --good: #7fd694; --bad: #ff8a95; --link: #8ab8f0; }
  figure img { filter: invert(.91) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
a { color: var(--link); } h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
h3 { margin-top: 2rem; } p, li, figcaption, summary { max-width: 46rem; }
nav { border: 1px solid var(--line); padding: .2rem 1rem; margin: 2rem 0; }
nav ul { columns: 14rem; padding-left: 1.2rem; } nav ul ul { columns: auto; }
table { border-collapse: collapse; } .wide { overflow-x: auto; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem 1rem .35rem 0; text-align: left;
  vertical-align: top; overflow-wrap: normal; } thead th { vertical-align: bottom; }
th { max-width: 16rem; overflow-wrap: break-word; }
tbody th { font-weight: 600; } small { color: var(--soft); font-weight: 400; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; display: block; }
.broad img { min-width: 44rem; } figcaption { color: var(--soft); }
summary { cursor: pointer; padding: .3rem 0; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
@media (max-width: 40rem) { nav ul ul { display: none; } th, td { padding-right: .7rem; } }
@media print { body { max-width: none; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; } table { font-size: 9pt; } td, th { padding-right: .5rem; }
  .broad img { min-width: 0; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } details::details-content { content-visibility: visible; } }
"""


BROAD = 1000  # pixels, from which a figure has panels side by side


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere."""

    text: str
    address: str


Cell = str | Link


@dataclass(frozen=True)
class Section:
    """A heading, text, points, a table and a figure, each of which may be missing."""

    title: str
    text: str = ""
    headings: tuple[str, ...] = ()  # what follows a line break is smaller
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    figure: bytes = b""  # PNG; `text` is then its caption
    level: int = 2
    points: tuple[str, ...] = ()
    folded: str = ""  # what stands for the section until it is opened; empty: it is open


# --- HTML -----------------------------------------------------------------------------------------


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One self-contained page; every text is escaped.

    What comes before the second heading of level 2 is the page's start; the contents follow it.
    """
    parts, contents = [], _contents(sections)
    tops, above = 0, ""
    for i, section in enumerate(sections):
        above = section.title or above
        tops += section.level == 2 and bool(section.title)
        if tops == 2 and contents:
            parts.append(contents)
            contents = ""
        parts.append(_html_section(section, f"s{i}", above))
    head = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
    )
    body = "\n".join([f"<main><h1>{html.escape(title)}</h1>", *parts, "</main>"])
    return f"{head}<body>{body}</body></html>\n"


def _contents(sections: Sequence[Section]) -> str:
    """A list of the headings after the first, those of level 3 under theirs."""
    named = [(i, s) for i, s in enumerate(sections) if s.title and s.level in (2, 3)]
    groups: list[list[tuple[int, Section]]] = []
    for _, same in groupby(named, key=lambda item: item[1].level):
        for item in same:
            if item[1].level == 2:
                groups.append([item])
            elif groups:
                groups[-1].append(item)
    if len(groups) < 3:
        return ""

    def entry(i: int, section: Section) -> str:
        return f"<a href='#s{i}'>{html.escape(section.title)}</a>"

    items = []
    for (i, top), *under in groups[1:]:
        below = "".join(f"<li>{entry(*item)}</li>" for item in under)
        items.append(f"<li>{entry(i, top)}{below and f'<ul>{below}</ul>'}</li>")
    return f"<nav aria-label='Contents'><ul>{''.join(items)}</ul></nav>"


def as_fragment(sections: Sequence[Section]) -> str:
    """HTML to stand inside another page, such as a notebook."""
    return "\n".join(_html_section(section, "") for section in sections)


def _html_section(section: Section, name: str, above: str = "") -> str:
    """A section; a table without a title of its own is named by the heading above it."""
    title, text = html.escape(section.title), html.escape(section.text)
    anchor = f" id='{name}'" if name and title else ""
    parts = [f"<h{section.level}{anchor}>{title}</h{section.level}>"] if title else []
    if section.folded:
        parts.append(f"<details><summary>{html.escape(section.folded)}</summary>")
    if section.figure:
        data = base64.b64encode(section.figure).decode()
        said = title or text.partition(". ")[0]  # the rest is read as the caption
        image = f"<img alt='{said}' src='data:image/png;base64,{data}'>"
        if int.from_bytes(section.figure[16:20], "big") > BROAD:  # the width of a PNG
            image = f"<div class='wide broad' {_region(said)}>{image}</div>"
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    else:
        parts += [f"<p>{line}</p>" for line in text.split("\n") if line]
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{html.escape(p)}</li>' for p in section.points)}</ul>")
    if section.headings:
        head = "".join(f"<th scope='col'>{_lines(cell, small=True)}</th>" for cell in
                       section.headings)  # fmt: skip
        body = "".join(f"<tr>{_html_row(row)}</tr>" for row in section.rows)
        label = title or html.escape(section.folded) or html.escape(f"Table: {above}")
        parts.append(
            f"<div class='wide' {_region(label)}><table aria-label='{label}'>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join(parts) + ("</details>" if section.folded else "")


def _region(label: str) -> str:
    """Attributes with which a keyboard scrolls an element wider than the page."""
    return f"role='region' tabindex='0' aria-label='{label}'"


def _lines(text: str, *, small: bool = False) -> str:
    """Text with its line breaks, in a heading all but the first line smaller."""
    escaped = html.escape(text).replace(" ± ", "&nbsp;±&nbsp;").replace(" … ", "&nbsp;…&nbsp;")
    first, *rest = escaped.splitlines() or [""]
    if small:
        rest = [f"<small>{line.replace('/', '/<wbr>')}</small>" for line in rest]
    else:
        bad = "<span class='bad'>{}</span>"
        rest = [bad.format(line) if line.startswith("not converged") else line for line in rest]
    return "<br>".join([first, *rest])


def _html_row(row: tuple[Cell, ...]) -> str:
    """Cells, of which the first names the row."""
    return "".join(_html_cell(cell, i == 0) for i, cell in enumerate(row))


def _html_cell(cell: Cell, names_row: bool) -> str:
    if isinstance(cell, Link):
        shown = f"<a href='{html.escape(cell.address)}'>{html.escape(cell.text)}</a>"
        return f"<td>{shown}</td>"
    if names_row and cell:
        return f"<th scope='row'>{_lines(cell)}</th>"
    mark = ""
    if cell == "DOES NOT HOLD" or cell.startswith("not converged"):
        mark = " class='bad'"
    elif re.match(r"established\b", cell):
        mark = " class='good'"
    return f"<td{mark}>{_lines(cell)}</td>"


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page's content as Markdown; a figure becomes its caption."""
    return "\n".join([f"# {_plain(title)}\n", *map(_markdown_section, sections)])


def _markdown_section(section: Section) -> str:
    parts = [f"{'#' * section.level} {_plain(section.title)}\n"] if section.title else []
    if section.folded:
        parts.append(_plain(section.folded) + ":\n")
    if section.figure:
        parts.append("(figure: see the HTML page)\n")
    parts += [_plain(line) + "\n" for line in section.text.split("\n") if line]
    if section.points:
        parts.append("".join(f"- {_plain(point)}\n" for point in section.points))
    if section.headings:
        lines = [section.headings, *section.rows]
        written = ["| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines]
        written.insert(1, "| " + " | ".join(["---"] * len(section.headings)) + " |")
        parts.append("\n".join(written) + "\n")
    return "\n".join(parts)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{_plain(cell.text)}](<{cell.address.replace('>', '%3E')}>)"
    return "<br>".join(map(_plain, cell.splitlines()))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: neither markup nor the end of a table's cell."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", text)
    return " ".join(html.escape(escaped, quote=False).splitlines())
