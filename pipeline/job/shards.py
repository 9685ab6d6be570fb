"""Shards: shares of a job's documents that several machines, or several runs on one machine, answer.

answers.parquet.shards/3-of-16.parquet             the result of shard 3/16: the rows of its documents
answers.parquet.shards/3-of-16.parquet.run.json    its run file, as beside any result
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

MAX_SHARDS = 10_000
_SHARD = re.compile(r"([1-9][0-9]*)/([1-9][0-9]*)")
_RUN_FILE = re.compile(r"([1-9][0-9]*)-of-([1-9][0-9]*)\.parquet\.run\.json")


@dataclass(frozen=True)
class Shard:
    """The shard with a number, from 1 to `count`, of `count` shards of a job.

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
        """Parse a shard in the form K/N. Raises JobError."""
        match = _SHARD.fullmatch(text)
        if match is None or not int(match[1]) <= int(match[2]) <= MAX_SHARDS:
            raise JobError(f"--shard {text}: expected K/N, with K from 1 to N and N up to {MAX_SHARDS:,}, such as 3/16")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, document_id: str, count: int) -> Shard:
        """Return which of `count` shards has the group of documents that begins with this document."""
        return cls(document_number(document_id) % count + 1, count)

    def output(self, output: Path) -> Path:
        """Return the result file of the shard. output: the result file of the job."""
        return shards_folder(output) / f"{self.number}-of-{self.count}.parquet"


def document_number(document_id: str) -> int:
    """Return eight bytes of a digest of a document's id, as a number."""
    return int.from_bytes(blake2b(document_id.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class ShardStatus:
    """The numbers of rows of a shard, as its last run wrote them at the time `updated`.

    done: answered or skipped. failed: answered with an error. left: neither. If the last run was of a part of the job,
    the numbers are those of the part, and the state says so.
    """

    shard: str
    state: str
    rows: int
    done: int
    failed: int
    left: int
    updated: str


def shards_folder(output: Path) -> Path:
    """Return the folder of the results of a job's shards. output: the result file of the job."""
    return output.with_name(f"{output.name}.shards")


def shard_statuses(output: Path) -> Iterator[ShardStatus]:
    """Yield the statuses that the shards' runs have written, by number. Shards that have not started are left out."""
    matches = ((_RUN_FILE.fullmatch(file.name), file) for file in shards_folder(output).glob("*.run.json"))
    files = {Shard(int(match[1]), int(match[2])): file for match, file in matches if match}
    for shard, file in sorted(files.items(), key=lambda item: (item[0].count, item[0].number)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads(file.read_bytes())
            rows, done = report["rows"], report["rows_kept"] + report["rows_answered"]
            done += report.get("rows_skipped", 0)
            state, failed = report["state"] + (", a part" if report.get("part") else ""), report["rows_failed"]
            yield ShardStatus(str(shard), state, rows, done, failed, rows - done - failed, str(report["updated"]))
