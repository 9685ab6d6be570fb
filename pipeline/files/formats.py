"""An input file and its format: what each format must be able to do."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError, one_line
from pipeline.files import remote
from pipeline.files.columns import Needs
from pipeline.files.compression import compression, decompressed
from pipeline.files.conversions import BEGINNING, what_else
from pipeline.files.encoding import find_encoding

Rows = Iterable[tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class InputFile:
    """An input file.

    path: its path or URL. id: its path relative to the folder that was searched.
    """

    path: str
    id: str
    format: Format

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        """The path without the suffix of a compression."""
        return self.path.removesuffix(compression(self.path))

    def open(self) -> io.BufferedReader:
        """Open the file to be read once, decompressed. Raises OSError, JobError and RemoteError."""
        return decompressed(_open(self.path), compression(self.path))

    def content(self) -> bytes:
        """Return the whole content, decompressed. Raises InputError, JobError and RemoteError."""
        try:
            with self.open() as opened:
                return opened.read()
        except OSError as error:
            raise InputError(f"{self}: cannot be read: {one_line(error)}") from None

    @contextmanager
    def opened_as_text(self, name: str, needs: Needs) -> Iterator[tuple[io.BufferedReader, str, int]]:
        """Open the file behind its byte-order mark, and give its encoding and the bytes of the mark, too.

        name: of the format, for messages. Raises InputError if the file cannot be read, or is of another format.
        """
        try:
            with self.open() as content:
                beginning = content.peek(BEGINNING)[:BEGINNING]
                if what := what_else(self.name, beginning):
                    raise InputError(f"{self}: is not {name}: it {what}")
                encoding, mark = find_encoding(beginning, needs.encoding)
                content.read(mark)
                yield content, encoding, mark
        except OSError as error:
            raise InputError(f"{self}: cannot be read: {one_line(error)}") from None

    def open_for_arrow(self) -> Any:
        """Open the file to be read by pyarrow, in any order."""
        return remote.open_remote(self.path) if remote.is_url(self.path) else pa.OSFile(self.path)


class Format(ABC):
    """A format of input files.

    name: in messages. suffixes: of the names of its files, in lower case. magic: the bytes with which every file of the
    format begins, whatever its name is; b"" if there are none. may_be_compressed: whether its files are read from the
    beginning to the end.
    """

    name: str
    suffixes: tuple[str, ...]
    magic = b""
    may_be_compressed = False

    @abstractmethod
    def columns(self, file: InputFile, needs: Needs) -> Sequence[str]:
        """Return the names of a file's columns; none if it has no rows and no header. Raises InputError."""

    def check(self, file: InputFile, needs: Needs) -> None:
        """Raise InputError if a file lacks a column that is needed, or has it in another type."""
        if names := self.columns(file, needs):
            needs.check_presence(file, names)

    @abstractmethod
    def rows(self, file: InputFile, needs: Needs, names: Collection[str] | None, rows_per_batch: int) -> Rows:
        """Return the number and the values of each row.

        names: of the columns to read; None for all that may hold texts or whole numbers. A format whose rows are read
        as a whole may return more columns. A value that is not text, though its column is, is `Unreadable`. Raises
        InputError.
        """

    @abstractmethod
    def place(self, file: InputFile, number: int) -> str:
        """Return the place of a row, for messages."""

    def unreadable(self, place: str, name: str, reason: str) -> str:
        """Return a message about the value of the column `name` in a row. reason: begins with a verb."""
        return f"the column '{name}' in {place} {reason}"


def beginning(path: str) -> bytes:
    """Return the first BEGINNING bytes of a file or URL. Raises OSError, JobError and RemoteError."""
    with _open(path) as content:
        return content.read(BEGINNING)


def listed(formats: Sequence[Format]) -> str:
    """Return the names and the suffixes of formats, for messages."""
    return ", ".join(f"{each.name} ({', '.join(f'*{suffix}' for suffix in each.suffixes)})" for each in formats)


def _open(path: str) -> io.BufferedReader:
    if remote.is_url(path):
        return io.BufferedReader(remote.open_remote(path), remote.BUFFER_BYTES)
    return open(path, "rb")
