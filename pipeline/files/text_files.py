"""Text files: a file is one row, or each of its lines is one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.errors import InputError
from pipeline.files.columns import Needs
from pipeline.files.conversions import BEGINNING, what_else
from pipeline.files.encoding import NotText, Unreadable, decode
from pipeline.files.formats import Format, InputFile, Rows

_COLUMNS = ("id", "text")


class WholeText(Format):
    """Files that are one row each: `id` is the path relative to the folder, and `text` is the content."""

    name = "text"
    may_be_compressed = True

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the two columns of texts."""
        return _COLUMNS

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the only row, with the number 0. The file is read only if its text is wanted."""
        if names is not None and "text" not in names:
            return [(0, {"id": file.id})]
        return [(0, {"id": file.id, "text": self.text(file, needs)})]

    def text(self, file: InputFile, needs: Needs) -> str | Unreadable:
        """Return the text of a file, or why it is none. Raises InputError."""
        return _read(file, needs)

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return str(file)

    def unreadable(self, place: str, name: str, reason: str) -> str:
        """Return a message about the text of a file."""
        return f"{place} {reason}"


class TextLines(Format):
    """Files of which each line that is not blank is a row: `text` is the line, and `id` is null."""

    name = "lines of text"
    suffixes = (".txt",)
    may_be_compressed = True

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the two columns of lines."""
        return _COLUMNS

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number, from 1, and the text of each line."""
        text = _read(file, needs)
        if isinstance(text, Unreadable):
            raise InputError(f"{file} {text.reason}")
        lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1)
        return ((number, {"id": None, "text": line.strip()}) for number, line in lines if line.strip())

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"line {number} of {file}"


def _read(file: InputFile, needs: Needs) -> str | Unreadable:
    content = file.content()
    if what := what_else(file.name, content[:BEGINNING]):
        return Unreadable(what)
    try:
        return decode(content, needs.encoding)
    except NotText as error:
        return Unreadable(f"{error}{needs.remedy}")
