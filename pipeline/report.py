"""What a run did, as numbers. Knows nothing of how they come about, and imports nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

_GROWING = (  # counts that add up, of prefixes, tokens and seconds
    "prefixes_built",
    "prefixes_restored",
    "context_tokens",
    "prefilled_tokens",
    "prefix_bytes",
    "prefill_seconds",
    "restore_seconds",
    "answer_seconds",
)


@dataclass(frozen=True)
class WorkerReport:
    """What one worker of a run on many machines did so far. ``log``: where on its machine its log is."""

    host: str
    pid: int
    log: str
    documents: int = 0
    answers: int = 0
    prefilled_tokens: int = 0
    documents_per_second: float = 0.0  # since it was ready
    answers_per_second: float = 0.0
    prefill_tokens_per_second: float = 0.0  # while it prefilled
    lost: bool = False  # it died, or its machine went


@dataclass
class Report:
    """What a run did: counts, tokens, bytes and seconds; written to ``<output>.run.json``."""

    documents: int = 0
    documents_done: int = 0  # the first so many of the input; a run that goes on from this report passes over them
    rows: int = 0
    rows_kept: int = 0
    rows_answered: int = 0
    rows_failed: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # by error_type; no Counter, which asdict spoils
    first_failures: dict[str, str] = field(default_factory=dict)  # which row was the first of each type, and why
    documents_truncated: int = 0  # of those with something to answer, as are
    documents_split: int = 0
    prefixes_built: int = 0
    prefixes_restored: int = 0
    context_tokens: int = 0
    prefilled_tokens: int = 0
    answer_tokens: int = 0
    attention: str | None = None  # what attends prefixes: "NumPy", "kernel" (a GPU's) or "MLX"
    kernels: str | None = None  # where those of a CUDA GPU came from: how many from the cache, how many compiled
    resident: dict[str, int] = field(default_factory=dict)  # how prefixes were attended: "packed" or "dense", how many
    prefix_bytes: int = 0
    effective_bits: float = 0.0  # mean over the prefixes
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    restore_seconds: float = 0.0
    answer_seconds: float = 0.0
    restarts: int = 0  # of the model's process, which had died
    workers: dict[str, WorkerReport] = field(default_factory=dict)  # of a run on many machines, by name
    interrupted: bool = False
    stopped_at: str | None = None  # the failure that the run was to stop at

    def copy(self) -> Report:
        """The numbers as they are now."""
        return replace(
            self,
            failures=dict(self.failures),
            first_failures=dict(self.first_failures),
            resident=dict(self.resident),
            workers=dict(self.workers),
        )

    def add_failure(self, error_type: str, what: str) -> None:
        """Count a failed row; ``what`` names it and says why."""
        self.rows_failed += 1
        self.failures[error_type] = self.failures.get(error_type, 0) + 1
        self.first_failures.setdefault(error_type, what)

    def add_growth(self, before: Report, after: Report) -> None:
        """Count what another's counts of prefixes, tokens and seconds have grown by; its rows are counted elsewhere."""
        mine, theirs = (report.prefixes_built + report.prefixes_restored for report in (self, after))
        grown = theirs - before.prefixes_built - before.prefixes_restored
        if grown:
            bits = theirs * after.effective_bits - (theirs - grown) * before.effective_bits
            self.effective_bits = (mine * self.effective_bits + bits) / (mine + grown)
        for name in _GROWING:
            setattr(self, name, getattr(self, name) + getattr(after, name) - getattr(before, name))
        for how, count in after.resident.items():
            self.resident[how] = self.resident.get(how, 0) + count - before.resident.get(how, 0)
        self.attention = after.attention or self.attention
        self.kernels = after.kernels or self.kernels
