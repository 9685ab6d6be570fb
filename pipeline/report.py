"""The numbers of a run: rows, prefixes, tokens, bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.output.rows import Row

MOST_CUT_QUERIES = 100
Stage = Literal["prefill", "restore", "answer"]


@dataclass(frozen=True)
class WorkerReport:
    """Numbers of one worker of a distributed run. ``log`` is the path of its log file on its machine."""

    host: str
    pid: int
    log: str
    documents: int = 0
    answers: int = 0
    prefilled_tokens: int = 0
    documents_per_second: float = 0.0  # since the worker was ready
    answers_per_second: float = 0.0
    prefill_tokens_per_second: float = 0.0  # during prefill
    lost: bool = False  # the worker or its machine died


@dataclass
class WorkStats:
    """Counts and seconds of work that an executor did. ``prefix_bits`` is a sum over the prefixes."""

    prefixes_built: int = 0
    prefixes_restored: int = 0
    context_tokens: int = 0
    prefilled_tokens: int = 0
    prefix_bytes: int = 0
    prefix_bits: float = 0.0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    restore_seconds: float = 0.0
    answer_seconds: float = 0.0
    attention: str | None = None
    batching: str | None = None
    kernels: str | None = None
    resident: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    processes: int = 1
    workers: dict[str, WorkerReport] = field(default_factory=dict)
    segments_of_other_versions: int = 0
    other_versions: str = ""

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the duration of the block to the seconds of a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_seconds(stage, time.monotonic() - started)

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        """Add seconds to a stage."""
        if stage == "prefill":
            self.prefill_seconds += seconds
        elif stage == "restore":
            self.restore_seconds += seconds
        else:
            self.answer_seconds += seconds


@dataclass
class CutAnswers:
    """Answers that `max_tokens` cut off.

    rows: how many they are. queries: how many of each query. max_tokens: the largest limit that cut one of a query's
    answers. Of many queries, the first are named.
    """

    rows: int = 0
    queries: dict[str, int] = field(default_factory=dict)
    max_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count the row of such an answer."""
        query_id, tokens = row.query_id, row.answer_tokens or 0
        self.rows += 1
        if query_id in self.queries or len(self.queries) < MOST_CUT_QUERIES:
            self.queries[query_id] = self.queries.get(query_id, 0) + 1
            self.max_tokens[query_id] = max(self.max_tokens.get(query_id, 0), tokens)


@dataclass
class Report:
    """Numbers of a run. They are written to ``<output>.run.json``."""

    documents: int = 0
    documents_done: int = 0  # their rows are on disk
    rows: int = 0
    rows_kept: int = 0
    rows_answered: int = 0
    rows_failed: int = 0
    rows_skipped: int = 0  # because the condition of their query does not hold, kept ones included
    rows_kept_unanswered: int = 0  # kept rows that failed or were skipped, which are counted there too
    rows_beside: int = 0  # rows of the result that this run, of a part of the job, left as they were
    failures: dict[str, int] = field(default_factory=dict)  # by error_type; asdict cannot copy a Counter
    first_failures: dict[str, str] = field(default_factory=dict)  # the first failed row of each error_type, and why
    cut: CutAnswers = field(default_factory=CutAnswers)  # among the rows that were answered, kept or failed
    documents_truncated: int = 0
    documents_split: int = 0
    prefixes_built: int = 0
    prefixes_restored: int = 0
    context_tokens: int = 0
    prefilled_tokens: int = 0
    answer_tokens: int = 0
    attention: str | None = None  # the implementation of attention over prefixes: "NumPy", "kernel" (GPU) or "MLX"
    batching: str | None = None  # the rows that share a batch: decoded "together", of "equal lengths", or "one by one"
    kernels: str | None = None  # of a CUDA GPU: how many came from the cache and how many were compiled
    resident: dict[str, int] = field(default_factory=dict)  # prefixes by how they were attended: "packed" or "dense"
    prefix_bytes: int = 0
    effective_bits: float = 0.0  # mean over the prefixes
    seconds: float = 0.0
    load_seconds: float = 0.0  # of the model; the longest where several processes load it
    prefill_seconds: float = 0.0
    restore_seconds: float = 0.0
    answer_seconds: float = 0.0
    processes: int = 1  # of this machine that shared the work; the seconds of stages are sums over them
    restarts: int = 0  # of the model's process or of workers, after deaths
    workers: dict[str, WorkerReport] = field(default_factory=dict)  # of a distributed run, by name
    rows_of_other_versions: int = 0  # of the rows that were kept
    segments_of_other_versions: int = 0  # of the stored segments that were used
    other_versions: str = ""  # how the first of these differ from the versions now
    interrupted: bool = False
    stopped_at: str | None = None  # the failed row that stopped the run, with --fail-fast

    @property
    def rows_done(self) -> int:
        """The rows of the documents that are done."""
        return self.rows_kept + self.rows_answered + self.rows_failed + self.rows_skipped

    @property
    def rows_found(self) -> int:
        """Those of them that were there when the run started."""
        return self.rows_kept + self.rows_kept_unanswered

    def copy(self) -> Report:
        """Return a copy that does not change when this report does."""
        return replace(
            self,
            failures=dict(self.failures),
            first_failures=dict(self.first_failures),
            cut=replace(self.cut, queries=dict(self.cut.queries), max_tokens=dict(self.cut.max_tokens)),
            resident=dict(self.resident),
            workers=dict(self.workers),
        )

    def add_failure(self, error_type: str, description: str) -> None:
        """Count a failed row. ``description`` names the row and the reason."""
        self.rows_failed += 1
        self.failures[error_type] = self.failures.get(error_type, 0) + 1
        self.first_failures.setdefault(error_type, description)

    def add_work(self, stats: WorkStats) -> None:
        """Add the work of an executor. A worker's numbers replace its earlier ones."""
        earlier = self.prefixes_built + self.prefixes_restored
        added = stats.prefixes_built + stats.prefixes_restored
        if added:
            self.effective_bits = (earlier * self.effective_bits + stats.prefix_bits) / (earlier + added)
        self.prefixes_built += stats.prefixes_built
        self.prefixes_restored += stats.prefixes_restored
        self.context_tokens += stats.context_tokens
        self.prefilled_tokens += stats.prefilled_tokens
        self.prefix_bytes += stats.prefix_bytes
        self.load_seconds = max(self.load_seconds, stats.load_seconds)
        self.prefill_seconds += stats.prefill_seconds
        self.restore_seconds += stats.restore_seconds
        self.answer_seconds += stats.answer_seconds
        for how, count in stats.resident.items():
            self.resident[how] = self.resident.get(how, 0) + count
        self.attention = stats.attention or self.attention
        self.batching = stats.batching or self.batching
        self.kernels = stats.kernels or self.kernels
        self.processes = max(self.processes, stats.processes)
        self.restarts += stats.restarts
        self.workers |= stats.workers
        self.segments_of_other_versions += stats.segments_of_other_versions
        self.other_versions = self.other_versions or stats.other_versions
