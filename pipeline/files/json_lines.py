"""Rows of JSON Lines: a key that a line lacks is null; a key that no line of a file has is an error."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.files.columns import Needs
from pipeline.files.encoding import Unreadable, decode_line, split_lines, wrong_character
from pipeline.files.formats import Format, InputFile, Rows


class JsonLines(Format):
    """Files with a JSON object on each line that is not blank."""

    name = "JSON Lines"
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson")
    may_be_compressed = True

    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the keys of all lines. Raises InputError if a line is wrong."""
        return list(dict.fromkeys(key for _, values in self.rows(file, needs, None, 1) for key in values))

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number and the object of each line that is not blank."""
        return _rows(file, needs)

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"line {number} of {file}"


def _rows(file: InputFile, needs: Needs) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.opened_as_text(JsonLines.name, needs) as (content, encoding, offset):
        for number, line in enumerate(split_lines(content, "\n".encode(encoding)), start=1):
            values = _parse(line, encoding, offset, f"line {number} of {file}", needs)
            if values is not None:
                yield number, values
            offset += len(line)


def _parse(line: bytes, encoding: str, offset: int, place: str, needs: Needs) -> dict[str, Any] | None:
    """Return the object of a line, or None if the line is blank. offset: bytes of the file before the line."""
    text, undecoded = decode_line(line, encoding, offset)
    undecoded = f"{undecoded}{needs.remedy}" if undecoded else ""
    text = text.removeprefix("\ufeff")
    if not text.strip():
        return None
    try:
        values = json.loads(text, strict="\0" not in text)  # one NUL byte costs one row
        if undecoded or "\\u" in text or "\0" in text:
            pairs = values.items() if isinstance(values, dict) else ()
            reasons = {name: reason for name, value in pairs if (reason := wrong_character(value, undecoded))}
            values = values | {name: Unreadable(reason) for name, reason in reasons.items()} if reasons else values
    except (ValueError, RecursionError) as error:
        if undecoded:
            raise InputError(f"{place} {undecoded}") from None
        remedy = f"; it has NUL bytes{needs.remedy}" if "\0" in text else ""
        raise InputError(f"{place} is not JSON: {one_line(error)}{remedy}") from None
    return checked_object(values, place, needs)


def checked_object(values: Any, place: str, needs: Needs) -> dict[str, Any]:
    """Return a row. Raises InputError if it is no JSON object, or has a value of another type than a column needs."""
    if not isinstance(values, dict):
        raise InputError(f'{place} is no JSON object, such as {{"id": "a", "text": "…"}}')
    for column in needs.columns:
        value = values.get(column.name)
        if value is not None and not isinstance(value, Unreadable) and not column.kind.fits_value(value):
            shown = json.dumps(value, ensure_ascii=False)
            shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
            raise InputError(
                f"{column.user} the column '{column.name}', which in {place} is {shown}; expected {column.kind.words}"
            )
    return values
