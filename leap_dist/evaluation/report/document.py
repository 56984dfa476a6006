"""A report as blocks of text, tables and pictures, and the same as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """Of a section; the title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of plain texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Plain texts; the first column names its row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    """Whether the other columns hold numbers."""


@dataclass(frozen=True)
class Picture:
    """A PNG, and where it lies from the report's folder on."""

    path: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Verbatim:
    """A file as it is."""

    name: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Verbatim


def markdown(blocks: Sequence[Block]) -> str:
    """The report with its pictures beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML page that needs nothing else: pictures and style are in it, and no script."""
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_literal(text)}"
        case Paragraph(text):
            return _literal(text)
        case Bullets(items):
            return "\n".join(f"- {_literal(item)}" for item in items)
        case Table(header, rows, numbers):
            rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(map(_literal, line))} |" for line in (header, rule, *rows))
        case Picture(path, caption):
            return f"![{_literal(caption)}]({path})"
        case Verbatim(name, text):
            # A fence has to be longer than any in the file.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{_literal(name)}:\n\n{fence}\n{text.rstrip()}\n{fence}"


def _literal(text: str) -> str:
    """Text on one line that Markdown shows as it is; ours has no other marks than these."""
    return re.sub(r"([\\`*|<>&\[\]])", r"\\\1", " ".join(text.split()))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Table(header, rows, numbers):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            body = "".join(
                f'<tr><th scope="row">{html.escape(first)}</th>'
                + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
                + "</tr>"
                for first, *rest in rows
            )
            table = '<table class="numbers">' if numbers else "<table>"
            return f'<div class="wide">{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(_, caption, png):
            data = base64.b64encode(png).decode()
            text = html.escape(caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
            )
        case Verbatim(name, text):
            return f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; color: #1b1b1b; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05rem; }
p, li { max-width: 60rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e4e4e4; text-align: left; white-space: nowrap; }
.numbers td, .numbers th { text-align: right; }
thead th { border-bottom: 2px solid #999; }
tr > th:first-child { text-align: left; } tbody th { font-weight: 500; }
.wide { overflow-x: auto; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #555; max-width: 60rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8125rem; }
summary { cursor: pointer; }
@media print { table { font-size: .6rem; } th, td { padding: .15rem .3rem; white-space: normal; } }
"""
