"""A folder with a model, documents and a job: what a user would have, and the commands as a user gives them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.progress import RunObserver

if TYPE_CHECKING:
    from pipeline.report import Report

_TEXTS = [
    "The board met on the third of May and decided the budget for the year.",
    "What did the board decide? When does the lease end? Who signed the contract?",
    "  1, 2, 3;\n\n- first\n- second\n\n(x) and (y) are equal.\n\n\n",
]
_QUERIES: list[dict[str, Any]] = [
    {"id": "what", "text": "What did the board decide?"},
    {"id": "when", "text": "When does the lease end?", "max_tokens": 3},
    {"id": "who", "text": "Who signed the contract?"},
]


class Recorder(RunObserver):
    """Notes the events of runs that a test wants to see."""

    def __init__(self) -> None:
        self.prefilled: list[int] = []  # tokens of each prefill that was started
        self.rows: list[int] = []  # counts of rows done
        self.chunks: list[int] = []  # tokens of each prefill step

    def rows_done(self, count: int) -> None:
        self.rows.append(count)

    def prefill_started(self, document_id: str, tokens: int) -> None:
        self.prefilled.append(tokens)

    def prefill_advanced(self, tokens: int) -> None:
        self.chunks.append(tokens)


class Interrupting(Recorder):
    """Sends SIGINT to this process at the n-th row that is answered, or at the n-th prefill step."""

    def __init__(self, *, row: int = 0, chunk: int = 0, times: int = 1) -> None:
        super().__init__()
        self._row, self._chunk, self._times = row, chunk, times

    def rows_done(self, count: int) -> None:
        super().rows_done(count)
        self._interrupt(count == 1 and self.rows.count(1) == self._row)

    def prefill_advanced(self, tokens: int) -> None:
        super().prefill_advanced(tokens)
        self._interrupt(len(self.chunks) == self._chunk)

    def _interrupt(self, now: bool) -> None:
        for _ in range(self._times if now else 0):
            signal.raise_signal(signal.SIGINT)


class Workplace:
    """Change `documents`, `queries` and `tree` (the job) as a user edits files, then `run`."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.job_file, self.output, self.cache = folder / "job.yaml", folder / "out" / "a.parquet", folder / "cache"
        self.documents = {
            name: f"Paper {name}. {text} " * 9 for name, text in zip(["d0", "d1", "d2"], _TEXTS, strict=True)
        }
        self.queries = [dict(query) for query in _QUERIES]
        self.tree: dict[str, Any] = {
            "model": str(model),
            "documents": {"path": "docs.parquet"},
            "generation": {"max_tokens": 5, "batch_size": 3},  # a document's rows, so that none share a batch
            "cache": {"dir": "cache"},
            "output": {"path": "out/a.parquet"},
        }
        self.table: dict[str, Any] | None = None  # where queries come from, in place of `queries`
        self.observer = Recorder()
        folder.mkdir(exist_ok=True)
        self.save()

    def save(self, **sections: Any) -> Path:
        """Write documents and job file as they are now; `sections` replace those of the job."""
        self.tree |= sections
        columns = {"id": list(self.documents), "text": list(self.documents.values())}
        schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        pq.write_table(pa.table(columns, schema=schema), self.folder / "docs.parquet")
        self.job_file.write_text(yaml.safe_dump(self.tree | {"queries": self.table or self.queries}))
        return self.job_file

    def run(self, *overrides: str, observer: RunObserver | None = None) -> Report:
        """Run the job as it is now, in this process. Without an observer, `prefilled` notes the prefills.

        Rows that the job does not ask for any more are removed.
        """
        from pipeline.execution.context import RunOptions
        from pipeline.execution.runner import Runner
        from pipeline.job.job_file import load_job

        job = load_job(self.save(), overrides)
        return Runner(job, observer or self.observer, options=RunOptions(prune=True)).run()

    def run_with(self, **sections: Any) -> Report:
        """Run the job with other sections."""
        self.save(**sections)
        return self.run()

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The finished file's rows by document and query."""
        return {
            (row["document_id"], row["query_id"]): row
            for row in pq.read_table(self.output).to_pylist(maps_as_pydicts="strict")
        }

    def answers(self) -> dict[tuple[str, str], str]:
        return {pair: row["answer"] for pair, row in self.rows().items()}

    def segments(self) -> list[Path]:
        """The folders of complete segments."""
        return sorted(path.parent for path in self.cache.glob("??/*/segment.json"))

    def report(self) -> dict[str, Any]:
        """What the last run wrote about itself."""
        content: dict[str, Any] = json.loads(Path(f"{self.output}.run.json").read_text())
        return content
