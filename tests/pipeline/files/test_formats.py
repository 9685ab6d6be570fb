"""Which files are read, which are not, and what is said about those, by the command line."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

ROWS = [{"id": "a", "text": "The board met."}, {"id": "b", "text": "The lease ends."}]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)


def zipped(name: str, content: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


OTHERS = {
    "d.zip": zipped("d.jsonl", LINES),
    "d.pdf": b"%PDF-1.7\n",
    "d.html": b"<p>The board met.</p>",
    "d.doc": b"\xd0\xcf\x11\xe0",
    "d.docx": zipped("word/document.xml", "<w:document/>"),
    "d.xlsx": zipped("xl/workbook.xml", "<workbook/>"),
    "d.rtf": b"{\\rtf1 The board met.}",
}


@pytest.mark.parametrize(
    ("section", "name"),
    [("queries", name) for name in OTHERS] + [("documents", name) for name in ("d.zip", "d.xlsx", "d.rtf", "d.doc")],
)
def test_a_file_of_another_format_is_named_with_the_command_that_converts_it(
    workplace: Workplace, section: str, name: str
) -> None:
    (workplace.folder / name).write_bytes(OTHERS[name])
    workplace.table = {"path": name} if section == "queries" else None
    workplace.save(documents={"path": name if section == "documents" else "docs.parquet"})
    message = error_of(invoke("plan", workplace.job_file))
    assert message.startswith(
        f"{section}.path: the formats of files are Parquet (*.parquet), JSON Lines (*.jsonl, *.ndjson), "
    )
    assert f"{workplace.folder / name} is " in message
    command = message.partition("convert it, for example by: ")[2]
    assert shlex.quote(str(workplace.folder / name)) in command


@pytest.mark.parametrize("name", ["d.zip"])
def test_the_command_works_as_printed(tmp_path: Path, workplace: Workplace, name: str) -> None:
    folder = tmp_path / "it's [v2]"
    folder.mkdir()
    (folder / name).write_bytes(OTHERS[name])
    workplace.save(documents={"path": f"{folder.name}/{name}"})
    message = error_of(invoke("plan", workplace.job_file))
    before = set(folder.iterdir())
    finished = subprocess.run(message.partition("by: ")[2], shell=True, capture_output=True)
    if finished.returncode == 127:
        pytest.skip("the program is not installed")
    assert finished.returncode == 0, finished.stderr
    (made,) = set(folder.iterdir()) - before
    (workplace.folder / "job.yaml").unlink()
    workplace.save(documents={"path": f"{folder.name}/{made.name}"})
    assert invoke("plan", workplace.job_file).stdout.startswith("documents  2 (")


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.txt"])
@pytest.mark.parametrize("content", [gzip.compress(b"x"), OTHERS["d.zip"], OTHERS["d.pdf"], lzma.compress(b"x")])
def test_content_counts_more_than_a_suffix_that_lies(workplace: Workplace, name: str, content: bytes) -> None:
    (workplace.folder / name).write_bytes(content)
    workplace.save(documents={"path": name})
    if name != "d.txt":
        assert "; convert it, for example by: " in error_of(invoke("run", workplace.job_file))
        return
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 3
    row = workplace.rows()["d.txt", "what"]
    assert row["error_type"] == "UnreadableText"
    assert "; convert it, for example by: " in row["error"]


@pytest.mark.parametrize("name", ["d.pq", "part-00000", "d.dat"])
def test_parquet_is_known_by_its_content(workplace: Workplace, name: str) -> None:
    (workplace.folder / name).write_bytes(as_parquet())
    workplace.save(documents={"path": name})
    assert invoke("plan", workplace.job_file).stdout.startswith("documents  2 (")


def test_parquet_that_was_cut_off_is_not_another_format(workplace: Workplace) -> None:
    (workplace.folder / "d.parquet").write_bytes(as_parquet()[:-9])
    workplace.save(documents={"path": "d.parquet"})
    file = workplace.folder / "d.parquet"
    assert error_of(invoke("plan", workplace.job_file)).startswith(f"{file}: cannot be read as Parquet: ")


@pytest.mark.parametrize("name", ["notes", "d.log", "d.xyz"])
def test_what_has_no_known_format_is_told(workplace: Workplace, name: str) -> None:
    (workplace.folder / name).write_bytes(b"The board met.")
    workplace.save(documents={"path": name})
    assert f"{name} has none of them, by its name and by its content" in error_of(invoke("plan", workplace.job_file))


# ---- folders and globs


def test_what_is_passed_over_in_a_folder_is_counted_in_a_line(
    workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = workplace.folder / "papers"
    for name in ("a.txt", "b.png", "c.png", "d.yaml", "2024/e.txt", "2025/f.txt", ".hidden/g.txt", ".h.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("The board met.")
    workplace.save(documents={"path": "papers"})
    for command in ("plan", "run", "status"):
        caplog.clear()
        assert invoke(command, workplace.job_file).exit_code == 0
        assert [message for message in caplog.messages if "passed over" in message] == [
            f"{folder}: passed over: 2 subfolders and 3 files of other types (*.png, *.yaml); {folder}/**/*.txt names "
            "the files in subfolders too"
        ]
    caplog.clear()
    workplace.save(documents={"path": "papers/**/*.txt"})
    assert invoke("plan", workplace.job_file).stdout.startswith("documents  3 (")
    assert "passed over" not in caplog.text


def texts(folder: Path) -> None:
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("The board met.")


def lines(folder: Path) -> None:
    (folder / "docs").mkdir()
    (folder / "docs" / "a.jsonl").write_text('{"id": "docs/a.txt", "text": "The board met."}')


PATHS: list[tuple[str, Callable[[Path], None]]] = [
    ("docs/*.txt", texts),
    ("docs", texts),
    ("docs/a.txt", texts),
    ("*/*.txt", texts),
    ("**/*.txt", texts),
    ("docs/[ab].txt", texts),
    ("docs/?.jsonl", lines),
]
NAMES = ["proj [v2]", "what?", "a*b", "[ab]", "[[]", "{x}"]


# The folder's name is escaped before the path is looked at, so each path is tried in one folder and each name with one.
@pytest.mark.parametrize(
    ("name", "path", "make"), [(NAMES[0], *each) for each in PATHS] + [(name, *PATHS[4]) for name in NAMES[1:]]
)
def test_wildcards_in_the_name_of_the_jobs_own_folder_are_characters(
    workplace: Workplace, name: str, path: str, make: Callable[[Path], None]
) -> None:
    place = Workplace(workplace.folder / name, workplace.model)
    make(place.folder)
    (place.folder / "queries [1]").mkdir()
    (place.folder / "queries [1]" / "q.jsonl").write_text('{"id": "what", "text": "What?", "json_schema": null}')
    (place.folder / "docs.parquet").unlink()
    place.tree |= {"documents": {"path": path}, "queries": {"path": "queries [1]/q.jsonl"}}
    place.tree["output"] = {"path": "out [1]/a.parquet"}
    place.job_file.write_text(json.dumps(place.tree))
    result = invoke("run", place.job_file, "--quiet")
    assert result.exit_code == 0, result.output
    assert (place.folder / "out [1]" / "a.parquet").is_file()
    assert invoke("plan", place.job_file).stdout.startswith("documents  1 (")


def test_a_model_is_found_in_such_a_folder(workplace: Workplace) -> None:
    folder = workplace.folder / "proj [v2]"
    shutil.copytree(workplace.model, folder / "model?")
    place = Workplace(folder, workplace.model)
    place.save(model="model?")
    assert invoke("run", place.job_file, "--quiet").exit_code == 0
    assert len(place.rows()) == 9


def test_the_current_folders_name_is_no_glob_in_an_override(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workplace.folder / "my [docs]"
    folder.mkdir()
    texts(folder)
    monkeypatch.chdir(folder)
    shown = invoke("plan", workplace.job_file, "--set", "documents.path=docs/*.txt").stdout
    assert shown.startswith("documents  1 (")
    message = error_of(invoke("plan", workplace.job_file, "--set", "documents.path=docs/*.md"))
    assert message == f"documents.path: no file matches {folder}/docs/*.md"


@pytest.mark.parametrize("job_file", ["job.yaml", "data[1]/job.yaml"])
@pytest.mark.parametrize(("path", "problem"), [("docs/*.txt", "no file matches {}"), ("one.txt", "{} does not exist")])
def test_a_folder_whose_name_the_jobs_folder_matches_is_not_read(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, job_file: str, path: str, problem: str
) -> None:
    place = Workplace(workplace.folder / "data[1]", workplace.model)
    for name in ("docs/x.txt", "one.txt"):
        file = workplace.folder / "data1" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("a text of another folder")
    place.save(documents={"path": path})
    monkeypatch.chdir(place.folder if job_file == "job.yaml" else workplace.folder)
    message = error_of(invoke("plan", job_file))
    assert message.startswith(f"documents.path: {problem.format(place.folder / path)}")


def test_a_result_among_its_own_inputs_is_found_in_such_a_folder(workplace: Workplace) -> None:
    place = Workplace(workplace.folder / "proj [v2]", workplace.model)
    for path in ("out/*.parquet", "**/*.parquet", "out"):
        (place.folder / "out").mkdir(exist_ok=True)
        place.save(documents={"path": path})
        assert "would be read as documents by the next run" in error_of(invoke("plan", place.job_file))
