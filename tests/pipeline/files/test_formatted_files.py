"""PDF, DOCX, HTML and EPUB files as documents, by the command line."""

from __future__ import annotations

import gzip
import random
import sys
from contextlib import suppress
from typing import Any

import pytest

from pipeline.files.encoding import NotText
from pipeline.files.extraction import NoText, extracted_text
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.files.formatted import SCAN, docx, epub, paragraph, pdf, zipped
from tests.pipeline.workplace import Workplace

for package in ("mammoth", "pypdfium2", "resiliparse"):
    pytest.importorskip(package, reason="the extra `documents` is not installed")
pytestmark = pytest.mark.usefixtures("here")

FIRST, SECOND = "The board met on the third of May.", "The lease ends in June."
HTML = f"<!doctype html><title>Minutes</title><style>p {{}}</style><p>{FIRST}</p><p>The <b>lease</b> ends\nin June.</p>"
TWO = f"{FIRST}\n\n{SECOND}"
FILES: dict[str, tuple[bytes, str]] = {
    "a.pdf": (pdf(FIRST, SECOND), f"{FIRST}\f{SECOND}\f"),
    "A.PDF": (pdf(FIRST, SECOND), f"{FIRST}\f{SECOND}\f"),
    "a.docx": (docx(paragraph(FIRST) + paragraph(SECOND)), TWO),
    "a.html": (HTML.encode(), TWO),
    "a.htm": (HTML.encode("utf-16"), TWO),
    "a.xhtml": (f"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'>{HTML}</html>".encode(), TWO),
    "a.epub": (epub(f"<p>{FIRST}</p>", f"<p>{SECOND}</p>"), TWO),
    "a.html.gz": (gzip.compress(HTML.encode()), TWO),
    "a.pdf.gz": (gzip.compress(pdf(FIRST, SECOND)), f"{FIRST}\f{SECOND}\f"),
    "report": (pdf(FIRST, SECOND), f"{FIRST}\f{SECOND}\f"),
}


def put(workplace: Workplace, files: dict[str, bytes], **documents: Any) -> None:
    """Make a folder of files the documents of the job."""
    for name, content in files.items():
        path = workplace.folder / "docs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    workplace.save(documents={"path": "docs"} | documents)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_format_is_answered_as_its_text_would_be(workplace: Workplace, name: str) -> None:
    content, text = FILES[name]
    workplace.documents = {name: text}
    workplace.run()
    expected = workplace.rows()
    put(workplace, {name: content}, path=f"docs/{name}")
    result = invoke("run", workplace.job_file)
    assert "0 answered, 3 kept" in result.stdout, result.output
    assert workplace.rows() == expected


def test_files_of_these_formats_may_be_in_one_folder_and_be_selected_as_text_files_are(workplace: Workplace) -> None:
    put(workplace, {name: FILES[name][0] for name in ("a.pdf", "a.docx", "a.htm", "a.epub")}, where="'June' in text")
    assert invoke("run", workplace.job_file, "--quiet", "--document", "*.[de]*").exit_code == 0
    assert {document_id for document_id, _ in workplace.rows()} == {"a.docx", "a.epub"}
    assert invoke("run", workplace.job_file, "--set", "documents.limit=3", "--json").exit_code == 0
    assert {document_id for document_id, _ in workplace.rows()} == {"a.docx", "a.epub", "a.htm"}
    (workplace.folder / "docs" / "a.txt").write_text("The board met.")
    assert "holds 4 PDF, DOCX, HTML or EPUB files and 1 text file; name" in error_of(invoke("plan", workplace.job_file))


PAGES = [f"Part {number}. " + " ".join(f"w{number}x{word}" for word in range(9)) for number in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "content"), [("a.pdf", pdf(*PAGES)), ("a.txt", "".join(f"{page}\f" for page in PAGES).encode())]
)
def test_evidence_names_the_page(workplace: Workplace, name: str, content: bytes) -> None:
    for query in workplace.queries:
        query["evidence"] = 3
    put(workplace, {name: content})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    quotations = [quotation for row in workplace.rows().values() for quotation in row["evidence"] or []]
    assert all(each["quote"].partition("\f")[0].strip() in PAGES[each["page"] - 1] for each in quotations)
    assert len({each["page"] for each in quotations}) > 1


@pytest.mark.parametrize(("name", "page"), [("a.pdf", 1), ("a.docx", None), ("a.html", None)])
def test_a_single_page_is_a_page_and_other_formats_have_none(workplace: Workplace, name: str, page: int | None) -> None:
    for query in workplace.queries:
        query["evidence"] = 3
    put(workplace, {name: pdf(FIRST) if name == "a.pdf" else FILES[name][0]})
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert {each["page"] for row in workplace.rows().values() for each in row["evidence"] or []} == {page}


# ---- files without text

DAMAGED = pdf(FIRST, SECOND).replace(b"/Pages", b"/Pagxs")
WITHOUT_TEXT: dict[str, tuple[bytes, str]] = {
    "empty.pdf": (b"", "is an empty file"),
    "empty.docx": (b"", "is an empty file"),
    "encrypted.pdf": (pdf(FIRST, is_encrypted=True), "is encrypted; save it without its password"),
    "damaged.pdf": (DAMAGED, "cannot be read as PDF: it is damaged or has no pages"),
    "cut off.pdf": (pdf(FIRST)[:99], "cannot be read as PDF: it is damaged or has no pages"),
    "page.pdf": (HTML.encode(), "is not PDF: it begins with b'<!doctype html>"),
    "scan.pdf": (
        pdf(SCAN, SCAN),
        "has no text on its 2 pages, which may be scanned; convert it, for example by: ocrmypdf ",
    ),
    "no pages.pdf": (pdf(), "cannot be read as PDF: it is damaged or has no pages"),
    "encrypted.docx": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(999), "is encrypted, or of Word before 2007"),
    "damaged.docx": (docx(paragraph(FIRST))[:-50], "cannot be read as DOCX, so it may be damaged: "),
    "other.docx": (zipped({"xl/workbook.xml": "<workbook/>"}), "cannot be read as DOCX, so it may be damaged: "),
    "xml.docx": (docx("<w:p>"), "cannot be read as DOCX, so it may be damaged: "),
    "deep.docx": (docx("<w:sdt><w:sdtContent>" * 5000 + "</w:sdtContent></w:sdt>" * 5000), "cannot be read as DOCX"),
    "bomb.docx": (docx(" " * (129 << 20)), "has 129 MB of text when it is unpacked, of at most 128 MB"),
    "blank.docx": (docx(paragraph(" ")), "has no text"),
    "blank.html": (b"<title>Minutes</title><img src=scan.png>", "has no text"),
    "cp1252.html": (
        "<p>Café</p>".encode("cp1252"),
        "is not text in UTF-8: the byte 0xe9 at offset 6 does not decode; ",
    ),
    "nul.html": (b"<p>a\0b</p>", "has a NUL byte at offset 4"),
    "drm.epub": (epub("x", is_encrypted=True), "is encrypted, as books with DRM are"),
    "damaged.epub": (zipped({"mimetype": "application/epub+zip"}), "cannot be read as EPUB, so it may be damaged: "),
    "entities.epub": (
        zipped({"META-INF/container.xml": "<!DOCTYPE a [<!ENTITY a 'x'><!ENTITY b '&a;&a;'>]><a>&b;</a>"}),
        "cannot be read as EPUB",
    ),
}


def test_a_file_without_text_is_an_error_row_that_says_why(workplace: Workplace) -> None:
    put(workplace, {name: content for name, (content, _) in WITHOUT_TEXT.items()} | {"fine.pdf": FILES["a.pdf"][0]})
    workplace.queries = workplace.queries[:1]
    workplace.save()
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 3, result.output
    rows = {document_id: row for (document_id, _), row in workplace.rows().items()}
    assert rows.pop("fine.pdf")["status"] == "ok"
    assert set(rows) == set(WITHOUT_TEXT)
    for name, (_, reason) in WITHOUT_TEXT.items():
        assert rows[name]["error_type"] == "UnreadableText"
        assert rows[name]["error"].startswith(f"{workplace.folder / 'docs' / name} "), rows[name]["error"]
        assert reason in rows[name]["error"]


def test_pages_that_may_be_scanned_between_others_are_told_once(
    workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    put(workplace, {"a.pdf": pdf(FIRST, SCAN, "", SECOND, SCAN)})
    assert invoke("run", workplace.job_file).exit_code == 0
    assert [message for message in caplog.messages if "scanned" in message] == [
        f"{workplace.folder}/docs/a.pdf: 2 of 5 pages have pictures and no text, as scanned pages have: 2, 5"
    ]


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("missing", ["mammoth", "pypdfium2"])
def test_without_the_extra_the_command_that_installs_it_is_told(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, command: str, missing: str
) -> None:
    put(workplace, {"a.pdf": FILES["a.pdf"][0]})
    monkeypatch.setitem(sys.modules, missing, None)
    assert error_of(invoke(command, workplace.job_file)) == (
        f"{workplace.folder}/docs/a.pdf: it takes the extra `documents` to read it, and {missing} is not installed; "
        "install it by: pip install 'turboquant-pipeline[documents]'"
    )


def test_no_change_of_a_file_raises_anything_else() -> None:
    chance = random.Random(0)
    for name in ("a.pdf", "a.docx", "a.epub", "a.html"):
        for _ in range(100):
            content = bytearray(FILES[name][0])
            for _ in range(chance.randint(1, 9)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            with suppress(NoText, NotText):
                assert extracted_text(name, bytes(content), None).strip()


# ---- what is kept


def text_of(name: str, content: bytes) -> str:
    return extracted_text(name, content, None)


def test_of_pdf_a_hyphen_at_the_end_of_a_line_stays() -> None:
    assert (
        text_of("a.pdf", pdf("A well-\nknown and non-\nexclusive right."))
        == "A well-\nknown and non-\nexclusive right.\f"
    )


def test_of_docx_notes_tables_content_controls_and_insertions_are_kept_and_deletions_are_not() -> None:
    note = "<w:footnote w:id='1'><w:p><w:r><w:t>By law.</w:t></w:r></w:p></w:footnote>"
    cells = "".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in ("Rent", "900"))
    body = (
        "<w:p><w:r><w:t xml:space='preserve'>The lease </w:t></w:r>"
        "<w:ins><w:r><w:t>ends</w:t></w:r></w:ins><w:del><w:r><w:delText>begins</w:delText></w:r></w:del>"
        "<w:r><w:br w:type='page'/><w:t>soon.</w:t></w:r><w:r><w:footnoteReference w:id='1'/></w:r></w:p>"
        f"<w:sdt><w:sdtContent>{paragraph('Field')}</w:sdtContent></w:sdt>"
        f"<w:tbl><w:tr>{cells}</w:tr><w:tr>{cells}</w:tr></w:tbl>"
    )
    text = text_of("a.docx", docx(body, note))
    assert text.split() == [
        "The",
        "lease",
        "ends",
        "soon.[1]",
        "Field",
        "Rent",
        "900",
        "Rent",
        "900",
        "1.",
        "By",
        "law.",
        "↑",
    ]
    assert text.count("Rent\t\t900\n") == 2


def test_equations_of_docx_are_told_to_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    math = "<m:oMath xmlns:m='http://schemas.openxmlformats.org/officeDocument/2006/math'><m:r><m:t>x</m:t></m:r></m:oMath>"
    text_of("equations.docx", docx(f"<w:p>{math}<w:r><w:t>is given.</w:t></w:r></w:p>"))
    assert caplog.messages == ["equations.docx: has equations, which are left out of its text"]


@pytest.mark.parametrize(
    ("declaration", "encoding"),
    [
        ("<meta charset=windows-1252>", "cp1252"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">', "cp1252"),
        ("<?xml version='1.0' encoding='Shift_JIS'?>", "shift_jis"),
        ("<meta charset=utf-16>", "utf-8"),
        ("<meta charset=unknown>", "utf-8"),
        ("", "utf-8"),
    ],
)
def test_html_is_read_in_the_encoding_that_it_declares(declaration: str, encoding: str) -> None:
    word = "東京" if encoding == "shift_jis" else "“Café”"
    assert text_of("a.html", f"{declaration}<p>{word}</p>".encode(encoding)) == word


def test_html_that_declares_no_encoding_has_that_of_the_job(workplace: Workplace) -> None:
    put(workplace, {"a.html": f"<p>Café. {FIRST}</p>".encode("cp1252")}, encoding="cp1252")
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 0
    assert "Café" in invoke("plan", workplace.job_file, "--prompt").stdout
