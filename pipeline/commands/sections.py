"""Titled tables: as text, and as an HTML file that loads no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.commands.console import table
from pipeline.commands.page import write_template
from pipeline.printable import printable


@dataclass(frozen=True)
class Section:
    """A table with a title. heading: of its columns. note: a sentence about it."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def as_text(sections: Sequence[Section]) -> str:
    """Return the sections one below the other, with their columns aligned and each cell on one line."""
    parts = []
    for section in sections:
        rows = [[" ".join(cell.split()) for cell in row] for row in (section.heading, *section.rows)]
        parts.append("\n".join(filter(None, (printable(" ".join(section.title.split())), table(rows), section.note))))
    return "\n\n".join(parts)


def write_sections(path: Path, name: str, sections: Sequence[Section]) -> None:
    """Write the sections as a page. Raises OutputError if the file cannot be written."""
    write_template(path, "sections.html", name=name, sections=sections)
