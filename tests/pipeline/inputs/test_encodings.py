"""Texts in other encodings than UTF-8, and bytes that are no text, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.documents import Document, check_documents, stream_documents
from pipeline.job.job import Documents
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

MARKED = ("utf-8-sig", "utf-16", "utf-32")
NAMED = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-be", "cp1252", "latin-1", "koi8-r", "shift_jis", "gb18030", "big5")
TEXTS = {"cp1252": "Für € 5", "latin-1": "décidé", "koi8-r": "Срок", "shift_jis": "契約ソ", "gb18030": "合同😀"}
MINUTES = "The board met, café, and 契約 was decided."


def text_in(encoding: str) -> str:
    return TEXTS.get(encoding, "合同" if encoding == "big5" else MINUTES)


def errors(workplace: Workplace) -> dict[str, str | None]:
    """The error of each document's first row."""
    return {document: row["error"] for (document, query), row in workplace.rows().items() if query == "what"}


@pytest.fixture
def papers(workplace: Workplace) -> Path:
    """An empty folder that the job reads."""
    folder = workplace.folder / "papers"
    folder.mkdir()
    workplace.save(documents={"path": "papers"})
    return folder


@pytest.mark.parametrize("encoding", [*MARKED, *NAMED])
def test_a_text_is_answered_as_in_utf8(workplace: Workplace, papers: Path, encoding: str) -> None:
    text = text_in(encoding)
    (papers / "a.txt").write_text(text, encoding="utf-8")
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    named = [] if encoding in MARKED else ["--set", f"documents.encoding={encoding}"]
    (papers / "a.txt").write_text(text, encoding=encoding)
    assert json.loads(invoke("run", workplace.job_file, "--json", *named).stdout)["rows_kept"] == 3
    (papers / "a.txt").unlink()
    lines = [json.dumps({"id": "a.txt", "text": text}, ensure_ascii=False), '{"id": "b", "text": "x"}']
    (papers / "a.jsonl").write_text("\n".join(lines), encoding=encoding)
    report = json.loads(invoke("run", workplace.job_file, "--json", *named).stdout)
    assert (report["rows_kept"], report["rows_answered"], report["rows_failed"]) == (3, 3, 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "Le café".encode("cp1252"),
            "is not text in UTF-8: the byte 0xe9 at offset 6 does not decode; save it as UTF-8, ",
        ),
        (
            "The board".encode("utf-16-le"),
            "is not text in UTF-8: it has a NUL byte at offset 1; save it as UTF-8, or set",
        ),
        (b"\xff\xfeT\0h", "is not text in UTF-16-LE: the byte 0x68 at offset 4 does not decode"),
        (b"\xff\xfe\x00\xd8T\0", "is not text in UTF-16-LE: the byte 0x00 at offset 2 does not decode"),
        (b"\xef\xbb\xbfabc\xff", "is not text in UTF-8: the byte 0xff at offset 6 does not decode"),
        (b"\xff\xfea\0\0\0", "is not text in UTF-16-LE: it has a NUL byte at offset 4"),
    ],
)
def test_what_is_no_text_is_an_error_row_that_names_the_byte(
    workplace: Workplace, papers: Path, content: bytes, words: str
) -> None:
    (papers / "a.txt").write_bytes(content)
    (papers / "b.txt").write_text("The board met.")
    assert "1 blank or not fit for the prompt" in invoke("plan", workplace.job_file).stdout
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 3
    assert "3 UnreadableText" in result.stdout
    found = errors(workplace)
    assert found["b.txt"] is None
    assert str(found["a.txt"]).startswith(f"{papers / 'a.txt'} is not text in UTF-")
    assert words in str(found["a.txt"])
    (papers / "a.txt").write_text("Le café")
    report = json.loads(invoke("run", workplace.job_file, "--json").stdout)
    assert (report["rows_kept"], report["rows_answered"]) == (3, 3)


def test_one_line_that_does_not_decode_costs_one_row(workplace: Workplace, papers: Path) -> None:
    lines = [b'{"id": "a", "text": "x", "tags": ["y"]}', b'{"id": "b", "text": "caf\xe9", "tags": []}']
    lines += [b'{"id": "c", "text": "x", "tags": [{"z": "\xe9"}]}', b'{"id": "d", "text": "x", "tags": "\\udc00"}']
    (papers / "a.jsonl").write_bytes(b"\n".join(lines))
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 3
    offset = len(lines[0]) + 1 + lines[1].index(b"\xe9")
    byte = f"is not text in UTF-8: the byte 0xe9 at offset {offset} does not decode; save it as UTF-8, or set "
    assert str(errors(workplace)["b"]).startswith(f"the column 'text' in line 2 of {papers / 'a.jsonl'} {byte}")
    assert [name for name, error in errors(workplace).items() if error] == ["b"]
    used = ["--set", "prompt.context='{{ tags }} {{ text }}'"]
    assert invoke("run", workplace.job_file, "--quiet", *used).exit_code == 3
    found = errors(workplace)
    assert [name for name, error in found.items() if error] == ["b", "c", "d"]
    assert "the column 'tags' in line 3 of " in str(found["c"])
    assert "has half a character, \\udc00, at character 0 of the value" in str(found["d"])


LINES = '{"id": "a", "text": "x"}\n{"id": "b", "text": "caf~"}\n{"id": "c", "text": "x"}\n'
TABLES = {"jsonl": LINES, "csv": "id,text\na,x\nb,caf~\nc,x\n", "json": f"[{LINES.strip().replace(chr(10), ',')}]"}
BROKEN = {"utf-8": b"\xff", "utf-16-le": b"\x00\xd8", "utf-32-le": b"\xff\xff\xff\xff", "shift_jis": b"\xff"}


@pytest.mark.parametrize("encoding", BROKEN)
@pytest.mark.parametrize("suffix", TABLES)
def test_bytes_that_do_not_decode_cost_one_row_of_a_table(papers: Path, suffix: str, encoding: str) -> None:
    before, after = (part.encode(encoding) for part in TABLES[suffix].split("~"))
    (papers / f"a.{suffix}").write_bytes(before + BROKEN[encoding] + after)
    first, broken, last = read(papers / f"a.{suffix}", encoding)
    assert (first.id, first.text, last.id, last.text) == ("a", "x", "c", "x")
    place = "object 1 (from 0)" if suffix == "json" else "line 3" if suffix == "csv" else "line 2"
    byte = f"the byte 0x{BROKEN[encoding][0]:02x} at offset {len(before)} does not decode; save it as UTF-8"
    words = f"the column 'text' in {place} of {papers / f'a.{suffix}'} is not text in {encoding.upper()}: {byte}"
    assert broken.unreadable.startswith(words)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", TABLES)
def test_a_table_that_ends_amid_a_character_is_an_error_that_names_the_byte(
    workplace: Workplace, papers: Path, suffix: str, encoding: str
) -> None:
    content = TABLES[suffix].encode(encoding)
    (papers / f"a.{suffix}").write_bytes(content + b"x")
    message = error_of(invoke("plan", workplace.job_file))
    assert f"{papers / f'a.{suffix}'} is not text in {encoding.upper()}-LE: the byte 0x78 at offset" in message
    assert f" at offset {len(content)} does not decode; save it as UTF-8, or set documents.encoding" in message


def test_the_offset_of_a_byte_is_that_in_a_long_file(papers: Path) -> None:
    rows = [f"{number},{'é' * 900}".encode() for number in range(300)]
    rows[3] += b"\xc3"  # which the line end behind it shows to be wrong
    rows[200] = rows[200][:-700] + b"\xe9\xe9" + rows[200][-700:]
    content = b"\r\n".join([b"id,text", *rows])
    (papers / "a.csv").write_bytes(content)
    wrong = [document for document in read(papers / "a.csv") if document.unreadable]
    assert [document.id for document in wrong] == ["3", "200"]
    for document, offset in zip(wrong, (content.index(b"\xc3\r"), content.index(b"\xe9\xe9")), strict=True):
        assert f"at offset {offset} does not decode" in document.unreadable


def test_parquet_that_holds_no_text_costs_its_rows(workplace: Workplace, papers: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a\xffb", b"c", b"d\0"], pa.binary()).buffers())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": broken}), papers / "a.parquet")
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 3
    found = errors(workplace)
    assert "the byte 0xff at offset 1 does not decode, counted from the beginning of the value" in str(found["a"])
    assert found["b"] is None
    assert str(found["c"]).endswith("has a NUL byte, at character 1 of the value")


def test_a_text_that_does_not_decode_is_an_error_row_under_a_condition(workplace: Workplace, papers: Path) -> None:
    (papers / "a.jsonl").write_bytes(b'{"id": "a", "text": "caf\xe9", "lang": "en"}\n{"id": "b", "text": "long one"}')
    where = ["--set", "documents.where='text | length > 5'"]
    assert invoke("run", workplace.job_file, "--quiet", *where).exit_code == 3
    assert [name for name, error in errors(workplace).items() if error] == ["a"]
    (papers / "a.jsonl").write_bytes(b'{"id": "a", "text": "x", "lang": "\xe9"}')
    line = error_of(invoke("run", workplace.job_file, "--set", "documents.where=\"lang == 'en'\""))
    assert "documents.where: lang == 'en': the column 'lang' in line 1 of " in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"id": "caf\xe9", "text": "x"}', "documents.id: the column 'id' in line 1 of "),
        (
            '{"id": "a", "text": "x"}'.encode("utf-16-le"),
            "it has NUL bytes; save it as UTF-8, or set documents.encoding",
        ),
        (b'\xff\xfe{\0"', "is not text in UTF-16-LE: the byte 0x22 at offset 4 does not decode"),
    ],
)
def test_lines_without_an_id_that_can_be_read(workplace: Workplace, papers: Path, content: bytes, words: str) -> None:
    (papers / "a.jsonl").write_bytes(content)
    for command in ("run", "plan", "status"):
        assert words in error_of(invoke(command, workplace.job_file))


def test_tables_of_queries_have_an_encoding_too(workplace: Workplace) -> None:
    table = workplace.folder / "asked.jsonl"
    text = '{"id": "a", "text": "Wann endet das Geschäft?"}\n'
    workplace.table = {"path": "asked.jsonl"}
    table.write_bytes(text.encode())
    workplace.save()
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    table.write_bytes(text.encode("cp1252"))
    line = error_of(invoke("plan", workplace.job_file))
    assert line.startswith(f"queries: the column 'text' in line 1 of {table} is not text in UTF-8: the byte 0xe4 at ")
    assert "set queries.encoding" in line
    named = ["--set", "queries.encoding=cp1252"]
    assert json.loads(invoke("run", workplace.job_file, "--json", *named).stdout)["rows_kept"] == 3
    table.write_text(text, encoding="utf-16")
    assert json.loads(invoke("run", workplace.job_file, "--json").stdout)["rows_kept"] == 3
    table.write_text('{"id": "a", "text": "What is \\ud83d?"}')
    assert "has half a character, \\ud83d, at character 8" in error_of(invoke("plan", workplace.job_file))


def test_job_files_in_other_encodings(workplace: Workplace) -> None:
    workplace.queries[0]["text"] = "Wann endet das Geschäft?"
    text = json.dumps({**workplace.tree, "queries": workplace.queries}, ensure_ascii=False)
    file = workplace.job_file
    assert json.loads(invoke("status", file, "--json").stdout)["left"] == 9
    for encoding in MARKED:
        file.write_text(text, encoding=encoding)
        assert json.loads(invoke("status", file, "--json").stdout)["left"] == 9
    file.write_bytes(text.encode("cp1252"))
    byte = f"is not text in UTF-8: the byte 0xe4 at offset {text.index('ä')} does not decode; save it as UTF-8"
    assert error_of(invoke("plan", file)) == f"{file}: {byte}"
    file.write_bytes(text.encode("utf-16-le"))
    assert error_of(invoke("plan", file)).startswith(f"{file}: is not text in UTF-8: it has a NUL byte at offset 1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("utf-88", "documents.encoding is 'utf-88', which is no encoding of text; did you mean 'utf-8'?"),
        ("rot13", "documents.encoding is 'rot13', which is no encoding of text"),
        ("idna", "documents.encoding is 'idna', which is no encoding of text"),
        ("8", "documents.encoding: expected text, got 8"),
    ],
)
def test_an_unknown_encoding_is_an_error(workplace: Workplace, name: str, words: str) -> None:
    assert words in error_of(invoke("plan", workplace.job_file, "--set", f"documents.encoding={name}"))


def test_init_reads_first_rows_that_are_no_text(workplace: Workplace, papers: Path) -> None:
    (papers / "a.jsonl").write_bytes(b'{"key": "a", "body": "caf\xe9 and more"}\n')
    job = workplace.folder / "first.yaml"
    options = ["--model", workplace.model, "--query", "Who?"]
    assert invoke("init", papers, job, *options).exit_code == 0
    assert "text: body" in job.read_text()


def read(path: Path, encoding: str | None = None) -> list[Document]:
    source = Documents(path=str(path), encoding=encoding)
    assert check_documents(source)
    return list(stream_documents(source))


@settings(deadline=None)
@given(data=st.data(), encoding=st.sampled_from([*MARKED, *NAMED]))
def test_any_text_is_read_in_any_encoding(tmp_path_factory: pytest.TempPathFactory, data: Any, encoding: str) -> None:
    drawn = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
    # The first letter makes sure that the text does not begin as a byte-order mark does.
    text = f"A{drawn}{text_in(encoding)}".encode(encoding, "ignore").decode(encoding)
    folder = tmp_path_factory.mktemp("texts")
    named = None if encoding in MARKED else encoding
    (folder / "a.txt").write_bytes(text.encode(encoding))
    assert [document.text for document in read(folder / "a.txt", named)] == [text]
    line = json.dumps({"id": "a", "text": text}, ensure_ascii=False) + "\n\n"
    (folder / "a.jsonl").write_bytes((line + line.replace('"a"', '"b"', 1)).encode(encoding))
    assert [document.text for document in read(folder / "a.jsonl", named)] == [text, text]


@settings(deadline=None)
@given(content=st.binary(min_size=1, max_size=40) | st.text(max_size=20).map(str.encode))
def test_bytes_are_the_text_that_they_are_or_unreadable(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "a.txt"
    path.write_bytes(content)
    (document,) = read(path)
    if document.unreadable:
        assert str(path) in document.unreadable
        assert " offset " in document.unreadable or "; convert it, " in document.unreadable  # gzip, PDF and the like
    elif document.text and not content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\0\0\xfe\xff")):
        assert document.text.encode() == content
    assert (
        "\ufffd" not in document.text or b"\xef\xbf\xbd" in content or b"\xff\xfd" in content or b"\xfd\xff" in content
    )
