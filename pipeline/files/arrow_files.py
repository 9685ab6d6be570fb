"""Rows of Arrow files and streams, Feather among them. A record batch is read as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError, one_line
from pipeline.files.formats import InputFile
from pipeline.files.parquet import BROKEN, Parquet


class Arrow(Parquet):
    """Arrow files with a footer, as Feather is, and streams, as the cache of Hugging Face datasets has them."""

    name = "Arrow"
    suffixes = (".arrow", ".feather", ".ipc")
    magic = b"ARROW1"

    @contextmanager
    def opened(self, file: InputFile) -> Iterator[Any]:
        """Open a file. Raises InputError."""
        try:
            with file.open_for_arrow() as source:
                is_file = source.read(len(self.magic)) == self.magic
                source.seek(0)
                yield _Batches(pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source))
        except BROKEN as error:
            raise InputError(f"{file}: cannot be read as Arrow: {one_line(error)}") from None


class _Batches:
    """An Arrow file or stream, read as Parquet is."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.schema_arrow = reader, reader.schema

    def iter_batches(self, size: int, columns: Sequence[str], use_threads: bool) -> Iterator[Any]:
        """Yield the columns of some rows at a time."""
        count = getattr(self._reader, "num_record_batches", None)
        whole = self._reader if count is None else map(self._reader.get_batch, range(count))
        for batch in whole:
            chosen = batch.select(columns)
            yield from (chosen.slice(start, size) for start in range(0, len(chosen), size))
