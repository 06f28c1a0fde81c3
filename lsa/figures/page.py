"""A page of sections, written as HTML in one file and as Markdown."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass, field

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } img { max-width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem .3rem 0; text-align: left;
  vertical-align: top; } td:first-child { white-space: nowrap; }
figure { margin: 1.5rem 0; } figcaption { color: #444; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; } .bad { color: #b00020; font-weight: 600; }
.good { color: #1b6e2c; font-weight: 600; }
"""


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere."""

    text: str
    address: str


Cell = str | Link


@dataclass(frozen=True)
class Section:
    """A heading, text, a table and a figure, each of which may be missing."""

    title: str
    text: str = ""
    headings: tuple[str, ...] = ()
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    figure: bytes = b""  # PNG; `text` is then its caption
    level: int = 2


# --- HTML -----------------------------------------------------------------------------------------


def as_html(title: str, sections: list[Section]) -> str:
    """One self-contained page; every text is escaped."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*parts, *map(_html_section, sections)]) + "</html>\n"


def as_fragment(sections: list[Section]) -> str:
    """HTML to stand inside another page, such as a notebook."""
    return "\n".join(map(_html_section, sections))


def _html_section(section: Section) -> str:
    title, text = html.escape(section.title), html.escape(section.text)
    parts = [f"<h{section.level}>{title}</h{section.level}>"] if title else []
    if section.figure:
        data = base64.b64encode(section.figure).decode()
        image = f"<img alt='{title or text}' src='data:image/png;base64,{data}'>"
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    elif text:
        parts.append(f"<p>{text}</p>")
    if section.headings:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.headings)
        body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in section.rows)
        parts.append(f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>")
    return "".join(parts)


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"<td><a href='{html.escape(cell.address)}'>{html.escape(cell.text)}</a></td>"
    mark = ""
    if cell == "DOES NOT HOLD":
        mark = " class='bad'"
    elif re.match(r"established\b", cell):
        mark = " class='good'"
    return f"<td{mark}>{'<br>'.join(html.escape(cell).splitlines())}</td>"


# --- Markdown -------------------------------------------------------------------------------------


def as_markdown(title: str, sections: list[Section]) -> str:
    """The same content; a figure is its caption."""
    return "\n".join([f"# {_plain(title)}\n", *map(_markdown_section, sections)])


def _markdown_section(section: Section) -> str:
    parts = [f"{'#' * section.level} {_plain(section.title)}\n"]
    if section.figure:
        parts.append("(figure: see the HTML page)\n")
    if section.text:
        parts.append(_plain(section.text) + "\n")
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
