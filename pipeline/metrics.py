"""A run's numbers as a text file for Prometheus, to be read by the textfile collector of its node exporter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files.atomic import output_file
from pipeline.progress import Pace
from pipeline.report import Report

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


def write_metrics(path: Path, job: str, pace: Pace, report: Report, running: bool) -> None:
    """Replace the file by the current numbers. Raises OutputError if it cannot be written.

    job: the job's name, which is a label of every sample. report: numbers of the documents that are done.
    """
    from prometheus_client import CollectorRegistry, generate_latest  # slow to import, and seldom used
    from prometheus_client.registry import Collector

    class RunCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            return _metrics(job, pace, report, running)

    registry = CollectorRegistry()
    registry.register(RunCollector())
    with output_file(path, ending=".part") as temporary:  # the collector also reads hidden files that end in .prom
        temporary.write_bytes(generate_latest(registry))


def _metrics(job: str, pace: Pace, report: Report, running: bool) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def gauge(name: str, meaning: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"pipeline_{name}", meaning, labels=["job"])
        metric.add_metric([job], value)
        return metric

    def gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
        metric = GaugeMetricFamily(f"pipeline_{name}", meaning, labels=["job", label])
        for text, value in values.items():
            metric.add_metric([job, text], value)
        return metric

    def counter(name: str, meaning: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"pipeline_{name}", meaning, labels=["job"])
        metric.add_metric([job], value)
        return metric

    yield gauge("running", "1 while the run goes on.", running)
    yield gauge("updated_timestamp_seconds", "When this file was written.", time.time())
    yield gauge("documents", "Documents of the job.", pace.documents)
    yield gauge("documents_done", "Documents whose rows are all committed.", pace.documents_done)
    yield gauge("rows", "Rows of the job.", pace.rows)
    yield gauge("rows_done", "Rows done, those in hand included.", pace.rows_done)
    outcomes = {"answered": report.rows_answered, "kept": report.rows_kept, "failed": report.rows_failed}
    outcomes |= {"skipped": report.rows_skipped} if report.rows_skipped else {}
    yield gauges("rows_committed", "Rows committed, by outcome.", "outcome", outcomes)
    yield gauges("failures", "Failed rows by type.", "type", report.failures)
    sources = {"built": report.prefixes_built, "restored": report.prefixes_restored}
    yield gauges("prefixes", "Prefixes used, by source.", "source", sources)
    yield counter("prefilled_tokens", "Tokens of contexts prefilled.", pace.prefilled_tokens)
    yield counter("restored_tokens", "Tokens of contexts restored from the store.", pace.restored_tokens)
    yield counter("answer_tokens", "Tokens of answers committed.", report.answer_tokens)
    yield counter("seconds", "Seconds since the run began.", pace.seconds)
    parts = CounterMetricFamily("pipeline_part_seconds", "Seconds of each part of the work.", labels=["job", "part"])
    parts.add_metric([job, "prefill"], report.prefill_seconds)
    parts.add_metric([job, "restore"], report.restore_seconds)
    parts.add_metric([job, "answer"], report.answer_seconds)
    yield parts
    yield counter("restarts", "Restarts of the model's process.", report.restarts)
