"""Rows of a JSON array of objects, one in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from pipeline.errors import InputError, one_line
from pipeline.files.columns import Needs
from pipeline.files.encoding import OpenedText, Unreadable, wrong_character
from pipeline.files.formats import InputFile, Rows
from pipeline.files.json_lines import JsonLines, checked_object

_CHARACTERS = 1 << 16  # that are read at once
_NEAR_THE_END = 16  # characters: an error there may be of an object that is not read whole

_DECODER = json.JSONDecoder(strict=False)


class JsonArray(JsonLines):
    """Files that are one array of objects. A key that an object lacks is null."""

    name = "JSON"
    suffixes = (".json",)

    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number, from 0, and the values of each object."""
        return _rows(file, needs)

    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"object {number} (from 0) of {file}"


def _rows(file: InputFile, needs: Needs) -> Iterator[tuple[int, dict[str, Any]]]:
    with (
        file.opened_as_text(JsonArray.name, needs) as (content, encoding, offset),
        OpenedText(content, encoding, offset) as text,
    ):
        for number, (values, undecoded) in enumerate(_objects(text, str(file), needs.remedy)):
            row = checked_object(values, JsonArray().place(file, number), needs)
            reasons = {name: reason for name, value in row.items() if (reason := wrong_character(value, undecoded))}
            yield number, row | {name: Unreadable(f"{reason}{needs.remedy}") for name, reason in reasons.items()}


def _objects(content: OpenedText, origin: str, remedy: str) -> Iterator[tuple[Any, str]]:
    """Yield each element of an array, and why bytes of it do not decode or "". Raises InputError.

    remedy: the end of a message about bytes that do not decode.
    """
    text = content.read(_CHARACTERS).lstrip()
    if not text.startswith("["):
        raise InputError(
            f"{origin}: is no JSON array of objects; if each of its lines is an object, let its name end in .jsonl"
        )
    text = _more(text[1:], content)
    while text[:1] != "]":
        value, undecoded, text = _next(text, content, origin, remedy)
        yield value, undecoded
        text = _more(text, content)
        if text[:1] not in ("]", ","):
            _refuse_undecoded(text, content, origin, remedy)
            there = f"there is {text[:20]!r} behind an object" if text else "it is cut off"
            raise InputError(f"{origin}: is no JSON array: {there}")
        text = text if text[0] == "]" else _more(text[1:], content)
    _refuse_undecoded(_more(text[1:], content), content, origin, remedy)


def _refuse_undecoded(text: str, content: OpenedText, origin: str, remedy: str) -> None:
    """Raise InputError if bytes of a text that is not within an element do not decode."""
    if reason := content.undecoded(text):
        raise InputError(f"{origin} {reason}{remedy}")


def _more(text: str, content: OpenedText) -> str:
    """Return the text without the space before it, and what follows it in the file if that leaves nothing."""
    while not (text := text.lstrip()) and (text := content.read(_CHARACTERS)):
        pass
    return text


def _next(text: str, content: OpenedText, origin: str, remedy: str) -> tuple[Any, str, str]:
    """Return the value with which a text begins, why bytes of it do not decode or "", and the text behind it.

    More is read until the value is whole.
    """
    while True:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else 0
            is_open = str(error).startswith("Unterminated string") or at >= len(text) - _NEAR_THE_END
            more = content.read(max(_CHARACTERS, len(text))) if is_open else ""
            if not more:
                _refuse_undecoded(text, content, origin, remedy)
                raise InputError(f"{origin}: is not JSON: {one_line(error)}") from None
            text += more
        else:
            return value, content.undecoded(text[:end]), text[end:]
