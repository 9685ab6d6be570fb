"""How far a run is, and how fast. Knows counts; nothing of where they come from or how they are shown."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report import Report


@dataclass(frozen=True)
class Pace:
    """A run at one moment; None is what cannot be known yet.

    ``hit_rate`` is the share of prefixes that were in the store; ``rows_done`` counts those in hand as well.
    """

    seconds: float
    rows: int
    rows_done: int
    documents: int
    documents_done: int
    prefilled_tokens: int
    prefill_tokens_per_second: float | None
    answers_per_second: float | None
    hit_rate: float | None
    seconds_left: float | None

    @classmethod
    def of(cls, seconds: float, rows: int, rows_done: int, prefilled: tuple[int, float], report: Report) -> Pace:
        """After so many seconds, of which tokens took so many to prefill; ``report`` is of the documents done."""
        prefixes = report.prefixes_built + report.prefixes_restored
        rate = max(0, rows_done - report.rows_kept) / seconds if seconds else 0.0
        return cls(
            seconds=seconds,
            rows=rows,
            rows_done=rows_done,
            documents=report.documents,
            documents_done=report.documents_done,
            prefilled_tokens=prefilled[0],
            prefill_tokens_per_second=prefilled[0] / prefilled[1] if prefilled[1] else None,
            answers_per_second=rate or None,
            hit_rate=report.prefixes_restored / prefixes if prefixes else None,
            seconds_left=(rows - rows_done) / rate if rate else None,
        )

    def __str__(self) -> str:
        """A line of a log."""
        rows = f"{self.seconds:.0f} s: {self.rows_done:,} of {self.rows:,} rows"
        return ", ".join([rows, *self.details()])

    def details(self) -> list[str]:
        """What there is to say beside the rows, the most wanted first."""
        said = []
        if self.seconds_left is not None:
            said.append(f"{_duration(self.seconds_left)} left")
        if self.documents:
            said.append(f"{self.documents_done:,}/{self.documents:,} documents")
        if self.answers_per_second:
            said.append(f"{self.answers_per_second:.3g} answers/s")
        if self.hit_rate is not None:
            said.append(f"{self.hit_rate:.0%} hits")
        if self.prefill_tokens_per_second:
            said.append(f"prefill {self.prefill_tokens_per_second:,.0f} tokens/s")
        return said


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
