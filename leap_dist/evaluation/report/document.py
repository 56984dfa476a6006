"""A report as a sequence of blocks, and its rendering as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2


@dataclass(frozen=True)
class Heading:
    """Heading of a section; level 1 is the title of the report."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """List of plain texts."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Table of plain texts. The first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True
    """Whether the other columns hold numbers, which are aligned to the right."""


@dataclass(frozen=True)
class Picture:
    """PNG picture."""

    path: str
    """Path of the file, relative to the folder of the report."""
    caption: str
    png: bytes


@dataclass(frozen=True)
class Verbatim:
    """Content of a text file."""

    name: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Verbatim


def markdown(blocks: Sequence[Block]) -> str:
    """Return the report as Markdown, with references to its pictures."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return the report as one HTML page with embedded pictures and style, and without scripts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__.rpartition(".")[0], "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, blocks=[(type(block).__name__, block) for block in blocks])


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph(text):
            return _escape(text)
        case Bullets(items):
            return "\n".join(f"- {_escape(item)}" for item in items)
        case Table(header, rows, numbers):
            rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in (header, rule, *rows))
        case Picture(path, caption):
            return f"![{_escape(caption)}]({path})"
        case Verbatim(name, text):
            # The fence must be longer than any fence in the file.
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{_escape(name)}:\n\n{fence}\n{text.rstrip()}\n{fence}"


def _escape(text: str) -> str:
    """Return the text on one line, so that Markdown shows it literally. Our texts hold no other special characters."""
    return re.sub(r"([\\`*|<>&\[\]])", r"\\\1", " ".join(text.split()))
