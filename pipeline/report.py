"""What a run did, as numbers. Knows nothing of how they come about, and imports nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


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
    resident: dict[str, int] = field(default_factory=dict)  # how prefixes were attended: "packed" or "dense", how many
    prefix_bytes: int = 0
    effective_bits: float = 0.0  # mean over the prefixes
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    restore_seconds: float = 0.0
    answer_seconds: float = 0.0
    restarts: int = 0  # of the model's process, which had died
    interrupted: bool = False
    stopped_at: str | None = None  # the failure that the run was to stop at

    def copy(self) -> Report:
        """The numbers as they are now."""
        return replace(
            self,
            failures=dict(self.failures),
            first_failures=dict(self.first_failures),
            resident=dict(self.resident),
        )

    def add_failure(self, error_type: str, what: str) -> None:
        """Count a failed row; ``what`` names it and says why."""
        self.rows_failed += 1
        self.failures[error_type] = self.failures.get(error_type, 0) + 1
        self.first_failures.setdefault(error_type, what)
