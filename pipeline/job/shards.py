"""Shares of a job that several machines, or several runs on one, answer: whose a document is, and where results lie.

    answers.parquet.shards/3-of-16.parquet             the result of shard 3/16, of the documents that are its alone
    answers.parquet.shards/3-of-16.parquet.run.json    and so on: all that lies beside any result

Knows ids, and files by their names; nothing of documents or rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from pipeline.errors import JobError

MOST = 10_000
_WRITTEN = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")
_RUN_FILE = re.compile(r"([1-9][0-9]*)-of-([1-9][0-9]*)\.parquet\.run\.json")


@dataclass(frozen=True)
class Shard:
    """One share of a job's documents: the ``number``-th, from 1, of ``count``.

    >>> shard = Shard.of("minutes-01", 16)
    >>> print(shard, shard == Shard.parse("16/16"))
    16/16 True
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that is written like that. Raises JobError where none is."""
        written = _WRITTEN.fullmatch(text)
        if written is None or not int(written[1]) <= int(written[2]) <= MOST:
            raise JobError(f"--shard {text}: expected K/N, with K from 1 to N and N up to {MOST:,}, such as 3/16")
        return cls(int(written[1]), int(written[2]))

    @classmethod
    def of(cls, document_id: str, count: int) -> Shard:
        """The shard, of so many, of the documents that are answered together with this one and behind it."""
        digest = blake2b(document_id.encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "big") % count + 1, count)

    def output(self, output: Path) -> Path:
        """Where the shard's result goes, by where the job's does."""
        return shards_folder(output) / f"{self.number}-of-{self.count}.parquet"


@dataclass(frozen=True)
class ShardStatus:
    """Rows of a shard by what has become of them, as its last run wrote when ``updated``; failed ones are left too."""

    shard: str
    state: str
    rows: int
    done: int
    failed: int
    left: int
    updated: str


def shards_folder(output: Path) -> Path:
    """Where the results of a job's shards lie."""
    return output.with_name(f"{output.name}.shards")


def shard_statuses(output: Path) -> Iterator[ShardStatus]:
    """What the shards' runs wrote of themselves, by number; those of which none has begun are left out."""
    named = ((_RUN_FILE.fullmatch(file.name), file) for file in shards_folder(output).glob("*.run.json"))
    found = {Shard(int(name[1]), int(name[2])): file for name, file in named if name}
    for shard, file in sorted(found.items(), key=lambda item: (item[0].count, item[0].number)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(file.read_bytes())
            rows, done = told["rows"], told["rows_kept"] + told["rows_answered"]
            yield ShardStatus(
                str(shard), told["state"], rows, done, told["rows_failed"], rows - done, str(told["updated"])
            )
