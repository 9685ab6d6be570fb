"""PDF, DOCX, HTML and EPUB files, written by hand."""

from __future__ import annotations

import io
import zipfile

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
SCAN = None  # a page that is a picture


def pdf(*pages: str | None, is_encrypted: bool = False) -> bytes:
    """Return a PDF. Each line of a page is a line; a page that is SCAN has a picture and no text."""
    kids = " ".join(f"{5 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        _stream(
            "<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8", "x"
        ),
    ]
    for page in pages:
        lines = "".join(f"({line}) Tj 0 -20 Td " for line in (page or "").splitlines())
        content = "q 500 0 0 700 0 0 cm /I Do Q" if page is SCAN else f"BT /F 12 Tf 50 700 Td {lines}ET"
        resources = "<< /Font << /F 3 0 R >> /XObject << /I 4 0 R >> >>"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources {resources} "
            f"/Contents {len(objects) + 2} 0 R >>",
            _stream("<<", content),
        ]
    text, offsets = "%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        offsets.append(len(text))
        text += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    security = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'a1' * 32}> /U <{'b2' * 32}> >> /ID [<01> <01>]"
    text += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    text += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {security * is_encrypted} >>\n"
    return f"{text}startxref\n{text.index('xref')}\n%%EOF\n".encode()


def docx(body: str, notes: str = "") -> bytes:
    """Return a DOCX file. body, notes: the XML inside of its body and of its footnotes."""
    parts = {
        "[Content_Types].xml": "<Types xmlns='http://schemas.openxmlformats.org/package/2006/content-types'/>",
        "_rels/.rels": _relation("officeDocument", "word/document.xml"),
        "word/_rels/document.xml.rels": _relation("footnotes", "footnotes.xml"),
        "word/document.xml": f"<w:document xmlns:w='{_WORD}'><w:body>{body}</w:body></w:document>",
        "word/footnotes.xml": f"<w:footnotes xmlns:w='{_WORD}'>{notes}</w:footnotes>",
    }
    return zipped(parts)


def paragraph(text: str) -> str:
    """Return the XML of a paragraph of a DOCX file."""
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def epub(*chapters: str, is_encrypted: bool = False) -> bytes:
    """Return an EPUB file. chapters: HTML, in the order in which they are read."""
    numbers = range(len(chapters))
    items = "".join(f"<item id='i{number}' href='text/chapter%20{number}.xhtml'/>" for number in reversed(numbers))
    spine = "".join(f"<itemref idref='i{number}'/>" for number in numbers)
    parts = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": "<container xmlns='urn:oasis:names:tc:opendocument:xmlns:container'><rootfiles>"
        "<rootfile full-path='book/book.opf'/></rootfiles></container>",
        "book/book.opf": f"<package xmlns='http://www.idpf.org/2007/opf'><manifest>{items}</manifest>"
        f"<spine>{spine}</spine></package>",
        **{f"book/text/chapter {number}.xhtml": chapters[number] for number in numbers},
    }
    if is_encrypted:
        reference = "<e:CipherReference URI='book/text/chapter%200.xhtml'/>"
        parts["META-INF/encryption.xml"] = f"<x xmlns:e='http://www.w3.org/2001/04/xmlenc#'>{reference}</x>"
    return zipped(parts)


def zipped(parts: dict[str, str]) -> bytes:
    """Return a ZIP archive of texts by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def _stream(beginning: str, content: str) -> str:
    return f"{beginning} /Length {len(content)} >>\nstream\n{content}\nendstream"


def _relation(kind: str, target: str) -> str:
    relation = f"<Relationship Id='r1' Type='{_OFFICE}/{kind}' Target='{target}'/>"
    return f"<Relationships xmlns='{_PACKAGE}'>{relation}</Relationships>"
