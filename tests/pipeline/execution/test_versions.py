"""What computed rows and segments is recorded with them, and told where it is something else than now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata

import pyarrow.parquet as pq
import pytest

from pipeline.execution.runner import Runner
from pipeline.job.job_file import load_job
from pipeline.job.shards import Shard
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace
from turboquant.io.json_file import sealed
from turboquant.io.segment_file import CHECKSUM, MANIFEST, read_manifest
from turboquant.runtime.versions import computing_versions, package_versions

Before = Callable[[], AbstractContextManager[None]]


def forget() -> None:
    package_versions.cache_clear()
    computing_versions.cache_clear()


@pytest.fixture
def before_the_upgrade(monkeypatch: pytest.MonkeyPatch) -> Iterator[Before]:
    """While the block runs, mlx-lm has the version 0.0.1."""
    now = metadata.version

    @contextmanager
    def before() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "version", lambda name: "0.0.1" if name == "mlx-lm" else now(name))
            forget()
            yield
        forget()

    yield before
    forget()


def versions_of_rows(workplace: Workplace) -> dict[tuple[str, str], str]:
    """The version of mlx-lm that is recorded for each row of the result."""
    return {pair: row["versions"]["mlx-lm"] for pair, row in workplace.rows().items()}


def test_versions_are_recorded_with_rows_and_segments(workplace: Workplace) -> None:
    workplace.run()
    assert all(row["versions"] == computing_versions() for row in workplace.rows().values())
    assert {*computing_versions()} == {"mlx", "mlx-lm", "tokenizers", "transformers", "turboquant-pipeline", "device"}
    for segment in workplace.segments():
        assert read_manifest(segment).versions == computing_versions()


def test_rows_and_prefixes_of_other_versions_are_kept_and_told(
    workplace: Workplace, before_the_upgrade: Before, caplog: pytest.LogCaptureFixture
) -> None:
    with before_the_upgrade():
        workplace.run()
    assert "other versions" not in caplog.text
    workplace.queries.insert(1, {"id": "new", "text": "Where?"})
    report = workplace.run()
    assert (report.rows_kept, report.rows_answered, report.prefixes_restored) == (9, 3, 3)
    now = metadata.version("mlx-lm")
    (line,) = [record.getMessage() for record in caplog.records if "other versions" in record.getMessage()]
    assert line == (
        f"9 kept rows and 3 stored segments are of other versions: mlx-lm was 0.0.1 and is {now}; with "
        "`versions: redo` the job computes them again"
    )
    # The rows of a document are mixed now, in its part and in the result.
    expected = {
        (d, q["id"]): now if q["id"] == "new" else "0.0.1" for d in workplace.documents for q in workplace.queries
    }
    assert versions_of_rows(workplace) == expected
    workplace.run()
    assert versions_of_rows(workplace) == expected


def test_they_are_computed_again_where_the_job_says_so(
    workplace: Workplace, before_the_upgrade: Before, caplog: pytest.LogCaptureFixture
) -> None:
    with before_the_upgrade():
        workplace.run()
    before = workplace.answers()
    report = workplace.run("versions=redo")
    assert (report.rows_kept, report.rows_answered, report.prefixes_built) == (0, 9, 3)
    assert workplace.answers() == before
    assert set(versions_of_rows(workplace).values()) == {metadata.version("mlx-lm")}
    report = workplace.run("versions=redo")
    assert (report.rows_kept, report.rows_answered) == (9, 0)
    workplace.output.unlink()
    assert workplace.run("versions=redo").prefixes_restored == 3
    assert "other versions" not in caplog.text


def test_rows_without_recorded_versions_are_kept_and_told(
    workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    workplace.run()
    pq.write_table(pq.read_table(workplace.output).drop_columns("versions"), workplace.output)
    assert workplace.run().rows_kept == 9
    assert "9 kept rows and 0 stored segments" in caplog.text
    assert "mlx, mlx-lm, tokenizers, transformers, turboquant-pipeline, device were not recorded" in caplog.text
    assert workplace.run("versions=redo").rows_answered == 9
    assert all(row["versions"] for row in workplace.rows().values())


def test_segments_of_former_releases_are_used_and_told(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    workplace.run()
    for segment in workplace.segments():
        manifest = json.loads((segment / MANIFEST).read_bytes())
        del manifest[CHECKSUM]
        manifest["versions"] = {name: manifest["versions"][name] for name in ("mlx", "mlx-lm")}
        (segment / MANIFEST).write_text(json.dumps(sealed(manifest, CHECKSUM)))
    workplace.output.unlink()
    assert workplace.run().prefixes_restored == 3
    assert "0 kept rows and 3 stored segments" in caplog.text
    assert "tokenizers, transformers, turboquant-pipeline, device were not recorded" in caplog.text


def test_shards_of_other_versions_are_merged_with_the_rows_that_no_model_answers(
    workplace: Workplace, before_the_upgrade: Before
) -> None:
    workplace.documents["d1"] = ""
    workplace.queries[0]["when"] = "id != 'd2'"
    workplace.save()
    with before_the_upgrade():
        for shard in (Shard(1, 2), Shard(2, 2)):
            Runner(load_job(workplace.job_file, (), shard), workplace.observer, shard=shard).run()
    assert invoke("merge", workplace.job_file, "--quiet").exit_code == 3
    assert set(versions_of_rows(workplace).values()) == {"0.0.1"}
    statuses = {pair: row["status"] for pair, row in workplace.rows().items()}
    assert (statuses["d1", "what"], statuses["d2", "what"]) == ("error", "skipped")
