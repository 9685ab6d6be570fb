"""A folder with a model, documents and a job: what a user would have, and the commands as a user gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

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

    def run(self, *overrides: str) -> Report:
        """Run the job as it is now, in this process."""
        from pipeline.job.job_file import load_job
        from pipeline.run.runner import Runner

        return Runner(load_job(self.save(), overrides), quiet=True).run()

    def run_with(self, **sections: Any) -> Report:
        """Run the job with other sections."""
        self.save(**sections)
        return self.run()

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The finished file's rows by document and query."""
        return {(row["document_id"], row["query_id"]): row for row in pq.read_table(self.output).to_pylist()}

    def answers(self) -> dict[tuple[str, str], str]:
        return {pair: row["answer"] for pair, row in self.rows().items()}

    def segments(self) -> list[Path]:
        """The folders of complete segments."""
        return sorted(path.parent for path in self.cache.glob("??/*/segment.json"))

    def report(self) -> dict[str, Any]:
        """What the last run wrote about itself."""
        content: dict[str, Any] = json.loads(Path(f"{self.output}.run.json").read_text())
        return content
