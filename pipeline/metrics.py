"""A run's numbers as a file for Prometheus, as its node exporter's textfile collector reads them.

The format is that of https://prometheus.io/docs/instrumenting/exposition_formats/. Knows names and numbers; nothing of
how they come about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.files.atomic import atomic_file
from pipeline.pace import Pace
from pipeline.report import Report

_Samples = Sequence[tuple[Mapping[str, str], float]]


def write_metrics(path: Path, job: str, pace: Pace, report: Report, running: bool) -> None:
    """Replace the file whole. ``report`` is of the documents done. Raises OutputError where the disk refuses."""
    lines = []
    for name, kind, meaning, samples in _families(pace, report, running):
        lines += [f"# HELP pipeline_{name} {meaning}", f"# TYPE pipeline_{name} {kind}"]
        for labels, value in samples:
            named = ",".join(f'{label}="{_escaped(text)}"' for label, text in {"job": job, **labels}.items())
            lines.append(f"pipeline_{name}{{{named}}} {value:.17g}")
    with atomic_file(path, ending=".part") as temporary:  # the collector reads hidden files too if they end in .prom
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _families(pace: Pace, report: Report, running: bool) -> Iterator[tuple[str, str, str, _Samples]]:
    def one(value: float) -> _Samples:
        return [({}, value)]

    def each(label: str, **values: float) -> _Samples:
        return [({label: name}, value) for name, value in values.items()]

    yield "running", "gauge", "1 while the run goes on.", one(running)
    yield "updated_timestamp_seconds", "gauge", "When this file was written.", one(time.time())
    yield "documents", "gauge", "Documents of the job.", one(pace.documents)
    yield "documents_done", "gauge", "Documents whose rows are all committed.", one(pace.documents_done)
    yield "rows", "gauge", "Rows of the job.", one(pace.rows)
    yield "rows_done", "gauge", "Rows done, those in hand included.", one(pace.rows_done)
    outcomes = each("outcome", answered=report.rows_answered, kept=report.rows_kept, failed=report.rows_failed)
    yield "rows_committed", "gauge", "Rows committed, by what became of them.", outcomes
    yield "failures", "gauge", "Failed rows by type.", each("type", **report.failures)
    prefixes = each("source", built=report.prefixes_built, restored=report.prefixes_restored)
    yield "prefixes", "gauge", "Prefixes used, by where they came from.", prefixes
    yield "prefilled_tokens_total", "counter", "Tokens of contexts prefilled.", one(pace.prefilled_tokens)
    yield "answer_tokens_total", "counter", "Tokens of answers committed.", one(report.answer_tokens)
    yield "seconds_total", "counter", "Seconds since the run began.", one(pace.seconds)
    spent = each("part", prefill=report.prefill_seconds, restore=report.restore_seconds, answer=report.answer_seconds)
    yield "part_seconds_total", "counter", "Seconds that parts of the work took.", spent
    yield "restarts_total", "counter", "Restarts of the model's process.", one(report.restarts)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
