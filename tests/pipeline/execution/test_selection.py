"""`run --document, --query, --limit`: a part of a job is answered, and no run takes rows away unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.output.results import Results
from pipeline.output.rows import Row
from tests.pipeline.command_line import error_of, in_terminal, invoke
from tests.pipeline.workplace import Interrupting, Workplace

pytestmark = pytest.mark.usefixtures("here")

DOCUMENTS, QUERIES = ("d0", "d1", "d2"), ("what", "when", "who")


def run(place: Workplace, *options: str, code: int = 0) -> dict[str, Any]:
    """Run the job; the report."""
    result = invoke("run", place.job_file, "--json", *options)
    assert result.exit_code == code, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def pairs(place: Workplace) -> list[str]:
    return [" ".join(pair) for pair in place.rows()]


# ---- a part is answered


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--limit", "1"], ["d0 what", "d0 when", "d0 who"]),
        (["--document", "d2", "--query", "who"], ["d2 who"]),
        (["--document", "d[12]", "--query", "w*t"], ["d1 what", "d2 what"]),
        (["--document", "*", "--limit", "2", "--query", "who", "--query", "what"], [
            "d0 what", "d0 who", "d1 what", "d1 who",
        ]),
    ],
)  # fmt: skip
def test_a_part_of_a_job_is_answered(workplace: Workplace, options: list[str], expected: list[str]) -> None:
    planned = json.loads(invoke("plan", workplace.job_file, "--json", *options).stdout)
    assert planned["status"]["rows"] == len(expected)
    report = run(workplace, *options)
    assert (report["rows"], report["rows_answered"], report["rows_beside"]) == (len(expected), len(expected), 0)
    assert pairs(workplace) == expected
    assert workplace.report()["state"] == "finished"
    after = json.loads(invoke("plan", workplace.job_file, "--json", *options).stdout)
    assert after["status"]["done"] == len(expected)


def test_a_trial_run_leaves_finished_answers(workplace: Workplace) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    report = run(workplace, "--limit", "1", "--query", "who")
    assert (report["rows_kept"], report["rows_beside"]) == (1, 8)
    assert workplace.output.read_bytes() == before
    workplace.documents["d0"] += " And changed."
    workplace.queries[0]["text"] = "What else?"
    workplace.save()
    old = workplace.rows()
    assert run(workplace, "--query", "w?o")["rows_answered"] == 1
    new = workplace.rows()
    assert [pair for pair in old if old[pair] != new[pair]] == [("d0", "who")]
    shown = invoke("run", workplace.job_file, "--document", "d1", "--query", "who").stdout
    assert "rows     0 answered, 1 kept, 0 failed of 1 (1 document)\n" in shown
    assert "others   8 rows left as they were\n" in shown


def test_an_id_is_itself_whatever_characters_it_has(workplace: Workplace) -> None:
    workplace.documents = {"a[1].txt": "One.", "a1.txt": "Two.", "*": "Three."}
    workplace.save()
    run(workplace, "--document", "a[1].txt", "--limit", "1")
    assert {pair[0] for pair in workplace.rows()} == {"a[1].txt"}


@pytest.mark.parametrize("command", ["run", "plan", "show"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--document", "d0", "--document", "x*"], "--document x*: there is no such document in "),
        (["--query", "whom"], "--query whom: the job has no such query; did you mean 'who'?"),
    ],
)
def test_what_matches_nothing_is_named(workplace: Workplace, command: str, option: list[str], words: str) -> None:
    assert words in error_of(invoke(command, workplace.job_file, *option))
    assert not workplace.output.exists()


def test_where_and_limit_of_the_job_come_first(workplace: Workplace) -> None:
    workplace.save(documents={"path": "docs.parquet", "where": "id != 'd0'", "limit": 1})
    run(workplace, "--limit", "5", "--query", "who")
    assert pairs(workplace) == ["d1 who"]
    assert "--document d2: there is no such document" in error_of(invoke("run", workplace.job_file, "--document", "d2"))


def test_documents_with_queries_of_their_own(workplace: Workplace) -> None:
    asked = [("d2", "b"), ("d0", "a"), ("d0", "b"), ("d1", "c")]
    lines = [json.dumps({"document": document, "id": query, "text": f"{query}?"}) for document, query in asked]
    (workplace.folder / "asked.jsonl").write_text("\n".join(lines))
    workplace.table = {"path": "asked.jsonl", "document_id": "document"}
    workplace.save()
    run(workplace, "--query", "b", "--limit", "2")
    assert pairs(workplace) == ["d0 b", "d2 b"]
    run(workplace, "--query", "[ac]")
    assert pairs(workplace) == ["d0 a", "d0 b", "d1 c", "d2 b"]
    refused = error_of(invoke("run", workplace.job_file, "--document", "d1", "--query", "b"))
    assert refused == "--document d1 --query b: none of these queries is asked of any of these documents"


def test_parts_of_shards_are_parts_of_the_job(workplace: Workplace) -> None:
    workplace.documents |= {f"e{number}": f"Paper {number}. " * 9 for number in range(5)}
    workplace.run()
    whole = workplace.output.read_bytes()
    workplace.output.unlink()
    done = [run(workplace, "--shard", f"{number}/2", "--limit", "3", "--query", "w?o")["rows"] for number in (1, 2)]
    assert sum(done) == 3
    assert min(done) < 3
    shown = invoke("status", workplace.job_file).stdout
    assert shown.count("finished, a part") == 2
    assert "has no row of document" in error_of(invoke("merge", workplace.job_file))
    assert sum(run(workplace, "--shard", f"{number}/2")["rows_kept"] for number in (1, 2)) == 3
    assert invoke("merge", workplace.job_file, "--quiet").exit_code == 0
    assert workplace.output.read_bytes() == whole


def test_a_part_that_is_interrupted_is_resumed_by_a_run_of_the_whole(workplace: Workplace) -> None:
    from pipeline.execution.context import RunOptions
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job
    from pipeline.job.selection import Selection

    workplace.run()
    whole = workplace.output.read_bytes()
    workplace.output.unlink()
    run(workplace, "--query", "who")
    part = RunOptions(Selection(queries=("what", "when")))
    report = Runner(load_job(workplace.save()), Interrupting(row=1), options=part).run()
    assert report.interrupted
    assert len(workplace.rows()) == 3
    assert run(workplace)["rows_kept"] >= 4
    assert workplace.output.read_bytes() == whole


def test_failed_rows_outside_the_part_stay_and_inside_are_kept_if_asked(workplace: Workplace) -> None:
    workplace.documents["d1"] = " "
    workplace.save()
    run(workplace, code=3)
    workplace.documents["d1"] = "Not blank any more."
    workplace.save()
    assert run(workplace, "--document", "d0")["rows_failed"] == 0
    assert workplace.rows()["d1", "who"]["status"] == "error"
    assert run(workplace, "--document", "d1", "--query", "who")["rows_answered"] == 1
    assert [row["status"] for pair, row in workplace.rows().items() if pair[0] == "d1"] == ["error", "error", "ok"]


def test_a_prefix_is_dropped_with_the_last_answer_of_the_job_not_of_the_part(workplace: Workplace) -> None:
    workplace.save(cache={"dir": "cache", "keep": "job"})
    run(workplace, "--query", "who")
    assert len(workplace.segments()) == 3
    run(workplace, "--document", "d0")
    assert len(workplace.segments()) == 2
    assert len(json.loads(next(workplace.cache.glob("jobs/*.json")).read_text())["labels"]) == 2
    run(workplace)
    assert workplace.segments() == []
    assert not list(workplace.cache.glob("jobs/*.json"))


# ---- no row goes unasked


def smaller(place: Workplace) -> None:
    """Make the job cover fewer documents and fewer queries than its result."""
    place.run()
    del place.documents["d1"], place.queries[2]
    place.save()


def test_a_job_that_covers_less_removes_rows_only_if_asked(workplace: Workplace) -> None:
    smaller(workplace)
    before = {file: file.read_bytes() for file in workplace.folder.rglob("*") if file.is_file()}
    refused = error_of(invoke("run", workplace.job_file))
    assert (
        "does not ask for 5 of its rows any more, 3 of the document 'd1' and 2 of the query 'who'; --prune" in refused
    )
    planned = invoke("plan", workplace.job_file)
    assert (planned.exit_code, planned.stderr) == (2, f"error: {refused}\n")
    assert "removes    5 rows: 3 of the document 'd1' and 2 of the query 'who'\n" in planned.stdout
    assert {file: file.read_bytes() for file in workplace.folder.rglob("*") if file.is_file()} == before
    assert invoke("plan", workplace.job_file, "--prune").exit_code == 0
    assert run(workplace, "--query", "what")["rows_beside"] == 7
    assert len(pairs(workplace)) == 9
    assert run(workplace, "--prune")["rows_kept"] == 4
    assert pairs(workplace) == ["d0 what", "d0 when", "d2 what", "d2 when"]


def test_a_trial_with_a_limit_in_the_job_deletes_nothing(workplace: Workplace) -> None:
    workplace.run()
    before = workplace.output.read_bytes()
    result = invoke("run", workplace.job_file, "--set", "documents.limit=1")
    assert "6 of the documents 'd1', 'd2'; --prune removes them" in error_of(result)
    assert workplace.output.read_bytes() == before


def test_rows_that_were_committed_and_not_finished_count_too(workplace: Workplace) -> None:
    workplace.run(observer=Interrupting(row=4))
    assert not workplace.output.exists()
    del workplace.documents["d0"]
    workplace.save()
    assert "any more, 3 of the document 'd0'" in error_of(invoke("run", workplace.job_file))
    run(workplace, "--document", "d2")
    assert {pair[0] for pair in workplace.rows()} >= {"d0", "d2"}


def test_on_a_terminal_one_is_asked(workplace: Workplace) -> None:
    smaller(workplace)
    shown = in_terminal(200, "run", workplace.job_file, typed="n\n", code=2)
    assert shown[-1].startswith("Remove these rows and go on? [y/N]: ")
    assert len(workplace.rows()) == 9
    in_terminal(200, "run", workplace.job_file, typed="y\n")
    assert len(workplace.rows()) == 4


def test_merged_shards_remove_rows_only_if_asked(workplace: Workplace) -> None:
    smaller(workplace)
    assert invoke("run", workplace.job_file, "--quiet", "--shard", "1/1").exit_code == 0
    assert "does not ask for 5 of its rows" in error_of(invoke("merge", workplace.job_file))
    assert len(pairs(workplace)) == 9
    assert invoke("merge", workplace.job_file, "--prune", "--quiet").exit_code == 0
    assert len(pairs(workplace)) == 4


# ---- any order of any parts


PARTS = st.tuples(
    st.sets(st.sampled_from(DOCUMENTS), min_size=1),
    st.sets(st.sampled_from(QUERIES), min_size=1),
    st.none() | st.integers(1, 3),
)


@pytest.fixture
def whole(workplace: Workplace) -> Callable[[], bytes]:
    """The result of one whole run, which is removed."""
    workplace.run()
    content = workplace.output.read_bytes()
    return lambda: content


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_any_parts_in_any_order_give_the_whole_and_lose_no_row(
    workplace: Workplace, whole: Callable[[], bytes], parts: list[tuple[set[str], set[str], int | None]]
) -> None:
    shutil.rmtree(workplace.output.parent)
    before: dict[tuple[str, str], Any] = {}
    for documents, queries, limit in parts:
        options = [word for name in documents for word in ("--document", name)]
        options += [word for name in queries for word in ("--query", name)]
        run(workplace, *options, *([] if limit is None else ["--limit", str(limit)]))
        after = workplace.rows()
        assert {pair: after.get(pair) for pair in before} == before
        chosen = sorted(documents)[:limit]
        assert set(after) == set(before) | {(document, query) for document in chosen for query in queries}
        assert list(after) == [
            (document, query) for document in DOCUMENTS for query in QUERIES if (document, query) in after
        ]
        before = after
    assert run(workplace)["rows_kept"] == len(before)
    assert workplace.output.read_bytes() == whole()


def asked(document_ids: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    return [(document_id, QUERIES[:2]) for document_id in sorted(document_ids)]


@settings(max_examples=30)
@given(st.lists(st.sets(st.sampled_from("abcde"), min_size=1), min_size=1, max_size=5))
def test_a_result_without_a_model_keeps_all_rows_in_order(tmp_path_factory: Any, batches: list[set[str]]) -> None:
    output = Path(tmp_path_factory.mktemp("results")) / "a.parquet"
    seen: set[str] = set()
    for batch in batches:
        with Results(output) as results:
            for document_id in batch:
                results.commit({document_id: [Row(document_id, query, "ok", "0") for query in QUERIES[:2]]})
            seen |= batch
            count = results.finish(asked(batch & set("abc")), asked("abc"))
        with Results(output, read_only=True) as results:
            found = list(results.pairs())
        assert count == 2 * len(found)
        ids = [document_id for document_id, _ in found]
        assert sorted(ids) == sorted(seen)
        assert [name for name in ids if name in "abc"] == sorted(seen & set("abc"))
