"""Shards of a job as a user runs and merges them: the same bytes as without, and what is wrong is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.job.shards import Shard
from pipeline.progress import RunObserver
from tests import warm
from tests.pipeline.command_line import ROOT, error_of, in_terminal, invoke
from tests.pipeline.workplace import Workplace

FEW = {"max_tokens": 3, "batch_size": 8}  # three documents of three queries share a batch


def with_more_documents(place: Workplace) -> Workplace:
    place.documents |= {f"e{number}": f"Paper {number} says {number * 7}. " * 6 for number in range(8)}
    place.save(generation=FEW)
    return place


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    return with_more_documents(workplace)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a job whose three shards are done."""
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    done = with_more_documents(Workplace(tmp_path_factory.mktemp("shards"), tiny_model))
    for number in (1, 2, 3):
        shard = Shard(number, 3)
        Runner(load_job(done.job_file, (), shard), RunObserver(), shard=shard).run()
    return done.folder


def test_three_machines_over_ssh(place: Workplace, tmp_path: Path) -> None:
    """As docs/scaling.md writes it, with an ssh that runs the command here."""
    expected = whole(place)
    (programs := tmp_path / "programs").mkdir()
    for name, body in (
        ("ssh", 'shift 2; exec sh -c "$*"'),
        ("pipeline", f'exec {sys.executable} -m pipeline.cli "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    (block,) = re.findall(
        r"^```sh\n(n=0; .*?)^```$", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", block], cwd=place.folder, env=environment, check=True, timeout=300)
    assert place.output.read_bytes() == expected


def shards(place: Workplace) -> Path:
    return Path(f"{place.output}.shards")


def run_shards(place: Workplace, count: int, *options: str) -> list[int]:
    """Run each; the exit codes."""
    numbers = range(1, count + 1)
    return [invoke("run", place.job_file, "--quiet", "--shard", f"{n}/{count}", *options).exit_code for n in numbers]


def whole(place: Workplace) -> bytes:
    """What a run without shards writes, which is removed."""
    place.run()
    content = place.output.read_bytes()
    place.output.unlink()
    return content


def document_ids(file: Path) -> list[str]:
    return list(dict.fromkeys(pq.read_table(file)["document_id"].to_pylist()))


# ---- which documents are in a shard


def test_shards_are_even_and_have_nothing_to_do_with_order() -> None:
    ids = [f"document-{number}" for number in range(16_000)]
    sizes = Counter(Shard.of(name, 16) for name in ids)
    assert set(sizes) == {Shard(number, 16) for number in range(1, 17)}
    assert all(850 < size < 1150 for size in sizes.values())
    # As it was when the first results were written: another rule would have shards that are half done begun anew.
    assert [Shard.of(name, 1000).number for name in ids[:4]] == [696, 674, 887, 294]


@pytest.mark.usefixtures("here")
def test_documents_that_share_no_batch_are_in_the_same_shard_in_any_order(place: Workplace) -> None:
    place.save(generation={"max_tokens": 1, "batch_size": 3})
    run_shards(place, 2)
    before = document_ids(shards(place) / "1-of-2.parquet")
    place.documents = dict(reversed(place.documents.items()))
    place.save()
    run_shards(place, 2)
    assert document_ids(shards(place) / "1-of-2.parquet") == before[::-1]
    assert 0 < len(before) < 11


# ---- run and merge


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("count", [1, 16])  # three of them as over ssh
def test_merged_shards_are_what_a_run_without_writes(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("pipeline.inputs.batching.GROUP_CHARACTERS", 700)  # some batches end before they are full
    expected = whole(place)
    assert run_shards(place, count) == [0] * count
    found = [document_ids(shards(place) / f"{number}-of-{count}.parquet") for number in range(1, count + 1)]
    assert sorted(name for each in found for name in each) == sorted(place.documents)
    assert [] in found or count < 16
    assert not place.output.exists()
    merged = invoke("merge", place.job_file)
    assert merged.exit_code == 0, merged.output
    assert "0 answered, 33 kept, 0 failed of 33 (11 documents)" in merged.stdout
    assert place.output.read_bytes() == expected
    assert place.report()["state"] == "finished"
    assert place.run().rows_kept == 33


@pytest.mark.usefixtures("here")
def test_batches_are_those_of_a_run_without_shards(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.execution.engine

    batches: list[set[str]] = []
    real = pipeline.execution.engine.generate_answers

    def watching(loaded: Any, requests: Any, *rest: Any) -> Any:
        batches.append({request.name for request in requests})
        return real(loaded, requests, *rest)

    monkeypatch.setattr("pipeline.execution.engine.generate_answers", watching)
    place.run()
    without = list(batches)
    batches.clear()
    run_shards(place, 3)
    assert len(without) == 4
    assert sorted(map(sorted, batches)) == sorted(map(sorted, without))


@pytest.mark.usefixtures("here")
def test_failed_rows_are_merged_as_they_are(place: Workplace) -> None:
    place.documents["blank"] = " "
    place.save()
    expected = whole(place)
    assert sorted(run_shards(place, 3)) == [0, 0, 3]
    merged = invoke("merge", place.job_file)
    assert merged.exit_code == 3
    assert "3 EmptyDocument, first document 'blank', query 'what'" in merged.stdout
    assert place.output.read_bytes() == expected


@pytest.mark.usefixtures("here")
def test_documents_with_queries_of_their_own(place: Workplace) -> None:
    asked = [{"document": name, "id": "a", "text": "Why?"} for name in place.documents if name != "d1"]
    asked += [{"document": "d2", "id": number, "text": "Who?"} for number in "bc"]
    (place.folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    place.table = {"path": "asked.jsonl", "document_id": "document"}
    place.save(generation={"max_tokens": 2, "batch_size": 2})
    expected = whole(place)
    run_shards(place, 3)
    assert invoke("merge", place.job_file, "--quiet").output == ""
    assert place.output.read_bytes() == expected


@pytest.mark.usefixtures("here")
def test_a_shard_keeps_what_is_answered_and_the_merge_wants_what_is_new(place: Workplace) -> None:
    place.save(generation={"max_tokens": 3, "batch_size": 9})  # three documents share a batch, also with a query more
    run_shards(place, 2)
    invoke("merge", place.job_file)
    merged = place.output.read_bytes()
    place.queries.append({"id": "why", "text": "Why?"})
    place.save()
    line = error_of(invoke("merge", place.job_file))
    assert (
        ".parquet: has no row of document 'd0' and query 'why' as the job is now; to put that right: pipeline run "
        in line
    )
    assert place.output.read_bytes() == merged
    assert place.report()["state"] == "failed"
    again = [json.loads(invoke("run", place.job_file, "--json", "--shard", f"{number}/2").stdout) for number in (1, 2)]
    assert [sum(report[name] for report in again) for name in ("rows_kept", "rows_answered")] == [33, 11]
    assert json.loads(invoke("merge", place.job_file, "--json").stdout)["rows_kept"] == 44


# ---- as processes


def start(place: Workplace, shard: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.job_file), "--quiet", "--shard", shard, *options]
    return warm.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_killed_shard_resumes(place: Workplace) -> None:
    place.documents |= {f"f{number}": f"Paper {number}. " * 20 for number in range(16)}
    place.save()
    expected = whole(place)
    process, parts = start(place, "1/2"), shards(place) / "1-of-2.parquet.parts"
    while len(list(parts.glob("??/*.parquet"))) < 3 and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    report = json.loads(invoke("run", place.job_file, "--json", "--shard", "1/2").stdout)
    assert report["rows_kept"] >= 9
    assert report["rows_answered"] == report["rows"] - report["rows_kept"] > 0
    assert start(place, "2/2").wait() == 0
    assert invoke("merge", place.job_file).exit_code == 0
    assert place.output.read_bytes() == expected


def test_shards_at_once_on_one_store(place: Workplace) -> None:
    expected = whole(place)
    shutil.rmtree(place.cache)
    metrics = [str(place.folder / f"{number}.prom") for number in (1, 2, 3)]
    running = [start(place, f"{number}/3", "--metrics", file) for number, file in enumerate(metrics, start=1)]
    assert [process.wait() for process in running] == [0, 0, 0]
    for number, file in enumerate(metrics, start=1):  # samples of the same name and labels would be refused
        assert f'pipeline_running{{job="job {number}/3"}} 0' in Path(file).read_text()
    reports = [json.loads(file.read_text()) for file in shards(place).glob("*.run.json")]
    assert sum(report["prefixes_built"] for report in reports) == len(place.segments()) == 11
    assert invoke("cache", "verify", place.job_file).exit_code == 0
    assert invoke("merge", place.job_file).exit_code == 0
    assert place.output.read_bytes() == expected


# ---- looked at


@pytest.mark.usefixtures("here")
def test_plan_status_and_show_of_a_shard(place: Workplace) -> None:
    counts = [json.loads(invoke("status", place.job_file, "--json", "--shard", f"{n}/2").stdout) for n in (1, 2)]
    assert sum(count["documents"] for count in counts) == 11
    assert all(0 < count["left"] == count["rows"] < 33 for count in counts)
    planned = json.loads(invoke("plan", place.job_file, "--json", "--shard", "2/2").stdout)
    assert planned["misses"] == planned["status"]["documents"] == counts[1]["documents"]
    invoke("run", place.job_file, "--quiet", "--shard", "2/2")
    assert json.loads(invoke("status", place.job_file, "--json", "--shard", "2/2").stdout)["left"] == 0
    shown = invoke("show", place.job_file, "--shard", "2/2").stdout.splitlines()
    assert list(dict.fromkeys(line.split("\t")[0] for line in shown)) == document_ids(shards(place) / "2-of-2.parquet")
    assert invoke("show", place.job_file, "--shard", "1/2").exit_code == 1
    assert invoke("show", place.job_file).stderr.endswith(
        f"no answers yet; pipeline merge {place.job_file} takes them from the shards\n"
    )
    invoke("run", place.job_file, "--quiet", "--shard", "9999/9999")
    assert in_terminal(80, "show", place.job_file, "--shard", "9999/9999")
    assert invoke("plan", place.job_file, "--shard", "9999/9999").exit_code == 0


@pytest.mark.usefixtures("here")
def test_status_counts_the_rows_of_shards(place: Workplace) -> None:
    place.documents["blank"] = ""
    place.save()
    run_shards(place, 3)
    lines = invoke("status", place.job_file).stdout.splitlines()
    assert lines[1:4] == ["rows       36: 0 done, 0 failed, 36 left", "", lines[3]]
    assert lines[3].split() == ["shard", "state", "rows", "done", "failed", "left", "updated"]
    cells = [line.split() for line in lines[4:]]
    assert [line[:2] for line in cells] == [[f"{number}/3", "finished"] for number in (1, 2, 3)]
    assert [sum(int(line[column]) for line in cells) for column in (2, 3, 4, 5)] == [36, 33, 3, 0]
    told = json.loads(invoke("status", place.job_file, "--json").stdout)["shards"]
    assert [[each["shard"], each["state"]] for each in told] == [line[:2] for line in cells]


@pytest.mark.usefixtures("here")
def test_what_a_shard_says_to_do_next_is_of_the_shard(place: Workplace) -> None:
    place.documents = {"blank": "", **place.documents}
    result = invoke("run", place.save(), "--fail-fast", "--shard", "1/1")
    assert result.exit_code == 1
    assert f"to see them: pipeline show {place.job_file} --shard 1/1 --failed" in result.stdout
    assert result.stderr.splitlines()[-1].endswith(f"to resume: pipeline run {place.job_file} --shard 1/1 --fail-fast")


# ---- what is wrong


@pytest.mark.parametrize("command", ["run", "plan", "status", "show"])
@pytest.mark.parametrize("shard", ["3", "0/3", "4/3", "1/3/5", "a/b", "1/10001", "١/٣", ""])
def test_no_shard_is_written_like_that(workplace: Workplace, command: str, shard: str) -> None:
    line = error_of(invoke(command, workplace.job_file, "--shard", shard))
    assert line == f"--shard {shard}: expected K/N, with K from 1 to N and N up to 10,000, such as 3/16"


def test_shards_are_no_documents(workplace: Workplace) -> None:
    job = workplace.save(documents={"path": "*/*.parquet"}, output={"path": "a.parquet"})
    assert "would be read as documents by the next run" in error_of(invoke("run", job, "--shard", "1/2"))


def _remove(place: Workplace) -> None:
    (shards(place) / "2-of-3.parquet").unlink()


def _remove_all(place: Workplace) -> None:
    shutil.rmtree(shards(place))


def _leave_half_done(place: Workplace) -> None:
    (shards(place) / "3-of-3.parquet.parts").mkdir()


def _copy(place: Workplace) -> None:
    shutil.copy(shards(place) / "2-of-3.parquet", shards(place) / "2-of-3-again.parquet")


def _rename_a_copy(place: Workplace) -> None:
    shutil.copy(shards(place) / "2-of-3.parquet", shards(place) / "1-of-3.parquet")


def _run_of_another_count(place: Workplace) -> None:
    invoke("run", place.job_file, "--quiet", "--shard", "2/4")


def _bring_the_whole(place: Workplace) -> None:
    place.run()
    place.output.rename(shards(place) / "whole.parquet")


def _spoil(place: Workplace) -> None:
    (shards(place) / "1-of-3.parquet").write_bytes(b"PAR1")


def _run_with_another_codec(place: Workplace) -> None:
    invoke("run", place.job_file, "--quiet", "--shard", "1/3", "--set", "cache.key_bits=3")


def _run_with_another_query(place: Workplace) -> None:
    invoke("run", place.job_file, "--quiet", "--shard", "1/3", "--set", "queries.1.text=Where?")


def _move_a_document(place: Workplace) -> None:
    """Batches are others, so the first documents of some too."""
    place.documents = {"e7": place.documents.pop("e7"), **place.documents}
    place.save()
    invoke("run", place.job_file, "--quiet", "--shard", "1/3")
    invoke("run", place.job_file, "--quiet", "--shard", "2/3")


def _share_no_batches(place: Workplace) -> None:
    """No fingerprint covers that, but documents belong to other shards."""
    place.save(generation=FEW | {"batch_size": 1})


def _change_a_text(place: Workplace) -> None:
    place.documents["e5"] += "In all."
    place.save()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove, "1 of 3 shards are not done: 2/3; to put that right: pipeline run "),
        (_remove_all, "no shard is done; to do the first of two: pipeline run "),
        (_leave_half_done, "1 of 3 shards are not done: 3/3; "),
        (_copy, "2-of-3.parquet: is shard 2/3, and so is 2-of-3-again.parquet; remove the one that is not meant"),
        (_rename_a_copy, "2-of-3.parquet: is shard 2/3, and so is 1-of-3.parquet; "),
        (_run_of_another_count, "there are shards of 3 (1-of-3.parquet) and of 4 (2-of-4.parquet); remove those that"),
        (_bring_the_whole, "whole.parquet: is not the result of a shard; move it away"),
        (_spoil, "1-of-3.parquet: is not a result that can be read ("),
        (_run_with_another_codec, "1-of-3.parquet: is of another job: it has another codec than this one; "),
        (_run_with_another_query, "1-of-3.parquet: has no row of document "),
        (_change_a_text, "-of-3.parquet: has no row of document 'e5' and query 'what' as the job is now; "),
        (_share_no_batches, "1-of-3.parquet: has no row of document 'e2' and query 'what' as the job is now; "),
        (_move_a_document, "the job changed between them; to put that right: pipeline run "),
    ],
)
def test_shards_that_are_not_all_of_the_job(
    place: Workplace, three_shards: Path, spoil: Callable[[Workplace], None], words: str
) -> None:
    shutil.copytree(three_shards, place.folder, dirs_exist_ok=True)
    spoil(place)
    assert words in error_of(invoke("merge", place.job_file))
    assert not place.output.exists()
