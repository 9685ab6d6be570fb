"""``pipeline cache``: segments are listed, verified and removed."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.cache.pins import Pins
from tests.pipeline import command_line
from tests.pipeline.workplace import Workplace


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = command_line.invoke("cache", *arguments)
    return result.exit_code, result.stdout, result.stderr


def report_of(*arguments: object) -> Any:
    code, out, error = invoke(*arguments, "--json")
    assert code == 0, error
    return json.loads(out)


def listed(where: Path) -> dict[str, Any]:
    return {entry["document"]: entry for entry in report_of("ls", where)}


def age(workplace: Workplace, document: str, days: float) -> None:
    """Set the last use of a document's segment to so many days ago."""
    for folder in workplace.segments():
        manifest = folder / "segment.json"
        if json.loads(manifest.read_bytes())["about"]["document"] == document:
            os.utime(manifest, (time.time() - days * 86400,) * 2)


def test_an_empty_store(tmp_path: Path) -> None:
    assert invoke("ls", tmp_path) == (0, f"0 segments, 0 B in {tmp_path}\n", "")
    assert report_of("verify", tmp_path) == {"good": 0, "bytes": 0, "bad": {}}
    assert report_of("gc", tmp_path)["removed"] == 0


def test_every_segment_is_listed_with_its_size_and_age(workplace: Workplace) -> None:
    workplace.run()
    age(workplace, "d1", 3)
    found = listed(workplace.job_file)
    assert found == listed(workplace.cache) | {d: found[d] for d in found}
    assert set(found) == {"d0", "d1", "d2"}
    tokens = {row["document_id"]: row["context_tokens"] for row in workplace.rows().values()}
    assert {name: entry["tokens"] for name, entry in found.items()} == tokens
    sizes = {folder.name: sum(f.stat().st_size for f in folder.iterdir()) for folder in workplace.segments()}
    assert {entry["key"]: entry["bytes"] for entry in found.values()} == sizes
    assert {entry["model"] for entry in found.values()} == {str(workplace.model)}
    assert found["d1"]["unused_for"] == pytest.approx(3 * 86400, abs=600)
    assert found["d0"]["unused_for"] < 600
    assert not any(entry["needed"] or entry["problem"] for entry in found.values())
    code, out, _ = invoke("ls", workplace.cache)
    assert code == 0
    assert "3 d" in next(line for line in out.splitlines() if line.endswith("d1"))


def test_verification_sets_bad_segments_aside(workplace: Workplace) -> None:
    workplace.run()
    assert invoke("verify", workplace.cache)[0] == 0
    first, second, _ = workplace.segments()
    content = bytearray((first / "segment.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "segment.safetensors").write_bytes(content)
    (second / "segment.json").write_text("{}")
    code, out, _ = invoke("verify", workplace.job_file)
    assert code == 1
    assert f"{first.name[:12]}  checksum" in out
    assert f"{second.name[:12]}  the manifest cannot be read: the checksum is wrong" in out
    assert len(workplace.segments()) == 1
    assert report_of("verify", workplace.cache)["good"] == 1  # and set aside they are bad no more
    workplace.output.unlink()
    assert workplace.run().prefixes_built == 2


@pytest.mark.parametrize("command", ["verify", "gc", "ls"])
def test_a_segment_that_is_being_written_is_not_set_aside(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The command begins while the run is in the middle of a segment, and has time to end there."""
    commands: list[threading.Thread] = []
    codes: list[int] = []

    def during(file: Any, tensors: Any) -> None:
        commands.append(threading.Thread(target=lambda: codes.append(invoke(command, workplace.cache)[0])))
        commands[-1].start()
        commands[-1].join(0.5)
        real(file, tensors)

    real = mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", during)
    workplace.run()
    for thread in commands:
        thread.join()
    assert codes == [0, 0, 0]
    assert len(workplace.segments()) == 3
    assert not (workplace.cache / "rejected").exists()


def test_segments_that_cannot_be_used_are_removed(workplace: Workplace) -> None:
    workplace.run()
    first, second, third = workplace.segments()
    (first / "segment.json").unlink()
    (second / "segment.json").write_text("{}")
    own = workplace.cache / "ab" / "notes.txt"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    files = {path for path in workplace.cache.rglob("*") if path.is_file()}
    would = report_of("gc", workplace.cache, "--dry-run")
    assert {path for path in workplace.cache.rglob("*") if path.is_file()} == files
    assert would == report_of("gc", workplace.cache)
    assert (would["removed"], would["reasons"]) == (2, {"of no use": 2})
    assert workplace.segments() == [third]
    assert own.read_text() == "mine"


def test_segments_that_were_not_used_for_long_are_removed(workplace: Workplace) -> None:
    workplace.run()
    age(workplace, "d1", 5)
    assert report_of("gc", workplace.cache, "--unused-for", "6")["removed"] == 0
    assert report_of("gc", workplace.cache, "--unused-for", "4")["reasons"] == {"not used for long": 1}
    assert set(listed(workplace.cache)) == {"d0", "d2"}


def test_the_store_is_shrunk_to_a_budget(workplace: Workplace) -> None:
    workplace.run()
    age(workplace, "d2", 2)
    age(workplace, "d0", 1)
    size = sum(path.stat().st_size for path in workplace.cache.rglob("*") if path.is_file())
    found = report_of("gc", workplace.cache, "--budget", size - 1)
    assert (found["removed"], found["reasons"]) == (1, {"over the budget": 1})
    assert set(listed(workplace.cache)) == {"d0", "d1"}
    workplace.tree["cache"] = {"dir": "cache", "budget": found["left_bytes"] - 1}
    workplace.save()
    assert report_of("gc", workplace.job_file)["removed"] == 1  # the job's own budget
    assert set(listed(workplace.cache)) == {"d1"}


def test_segments_that_an_unfinished_job_needs_stay(workplace: Workplace) -> None:
    workplace.run()
    labels = {m["about"]["document"]: m["about"]["label"] for m in map(_manifest, workplace.segments())}
    Pins(workplace.cache, Path("/another/job")).pin([labels["d1"]])
    assert listed(workplace.cache)["d1"]["needed"]
    assert report_of("gc", workplace.cache, "--budget", "1")["removed"] == 2
    assert report_of("gc", workplace.cache, "--unused-for", "0")["removed"] == 0
    assert set(listed(workplace.cache)) == {"d1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "nowhere"), "nowhere: neither a job file (.yaml) nor a folder"),
        (("gc", "no.yaml"), "no.yaml: no such job file"),
        (("gc", ".", "--budget", "much"), "--budget: expected a size such as 20GB, 500MiB or 10%, got 'much'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, error = invoke(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1


def _manifest(folder: Path) -> Any:
    return json.loads((folder / "segment.json").read_bytes())


def test_a_segment_that_cannot_be_removed_is_an_error(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    workplace.run()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.cache.store.remove_entry", refuse)
    code, _, error = invoke("gc", workplace.cache, "--budget", "1kB")
    assert code == 1
    assert "cannot be shrunk: " in error
    assert "Permission denied" in error


def test_an_age_that_is_no_date_is_shown_as_unknown(workplace: Workplace) -> None:
    workplace.run()
    for folder in workplace.segments():
        manifest = json.loads((folder / "segment.json").read_text())
        (folder / "segment.json").write_text(json.dumps(manifest | {"created": "long ago"}))
    code, shown, _ = invoke("ls", workplace.cache)
    assert code == 0
    assert shown.count(" - ") >= 3, shown
