"""The texts of PDF, DOCX, HTML and EPUB files, which the packages of the extra `documents` take out.

In the text of a PDF each page ends with a form feed, as pdftotext writes it. The other formats have no pages.
"""

from __future__ import annotations

import codecs
import io
import logging
import posixpath
import re
import threading
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

from pipeline.errors import InputError, one_line
from pipeline.files.conversions import how_to_convert
from pipeline.files.encoding import NotText, decode

_PACKAGES = ("mammoth", "pypdfium2", "resiliparse")
_PDF_MARK_WITHIN = 1024  # bytes of the beginning: mail programs write lines before it
_HYPHEN = "\ufffe"  # PDFium's mark where a line ends with a hyphen, be it part of the word or not
_OLE = b"\xd0\xcf\x11\xe0"  # the first bytes of encrypted DOCX files, and of Word's files of before 2007
_MOST_BYTES = 128 << 20  # of all texts in a ZIP archive, which can be a thousand times as large as the archive
_TEXTS = (".xml", ".rels", ".html", ".htm", ".xhtml", ".opf")
_DECLARATION = re.compile(rb"""<(?:\?xml|meta)\b[^>]*?\b(?:encoding|charset)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_DECLARED_WITHIN = 4096  # bytes of the beginning
_BREAKS = "br[type='page'] => br\nbr[type='column'] => br"  # otherwise the words around them become one
_CELL = re.compile(r"(<t[dh]\b[^>]*>)<p>((?:(?!</?p>).)*)</p>(?=</t[dh]>)", re.DOTALL)
_pdfium = threading.Lock()  # PDFium may be used by one thread at a time
_log = logging.getLogger(__name__)


class NoText(ValueError):
    """No text can be taken out of a file. The message begins with a verb."""


def require_packages(file: object) -> None:
    """Raise InputError with the command that installs the extra if one of its packages is missing."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise InputError(
            f"{file}: it takes the extra `documents` to read it, and {', '.join(missing)} "
            f"{'are' if missing[1:] else 'is'} not installed; install it by: "
            "pip install 'turboquant-pipeline[documents]'"
        )


def extracted_text(path: str, content: bytes, encoding: str | None) -> str:
    """Return the text of a file, which is never blank.

    path: without the suffix of a compression. A file that has none of the suffixes is PDF. encoding: of HTML that does
    not declare its own; None for UTF-8. Raises NoText, and NotText if HTML does not decode.
    """
    suffix = PurePath(path).suffix.lower()
    if not content:
        raise NoText("is an empty file")
    if suffix in (".html", ".htm", ".xhtml"):
        text = _html_text(decode(content, _declared_encoding(content) or encoding))
    elif suffix in (".docx", ".epub"):
        text = _zipped_text(path, content)
    else:
        text = _pdf_text(path, content)
    if not text.strip():
        raise NoText("has no text")
    return text


# ---- PDF


def _pdf_text(path: str, content: bytes) -> str:
    import pypdfium2

    if b"%PDF-" not in content[:_PDF_MARK_WITHIN]:
        raise NoText(f"is not PDF: it begins with {content[:16]!r}")
    with _pdfium:
        try:
            pdf = pypdfium2.PdfDocument(content)
            try:
                pages = [_page_text(pdf, number) for number in range(len(pdf))]
            finally:
                pdf.close()
        except pypdfium2.PdfiumError as error:
            # Of a file without pages, PDFium gives the error of the file before.
            if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD and b"/Encrypt" in content:
                raise NoText("is encrypted; save it without its password") from None
            raise NoText("cannot be read as PDF: it is damaged or has no pages") from None
    if not any(text.strip() for text, _ in pages):
        how = how_to_convert(path, "ocrmypdf {source} {stem}.ocr.pdf")
        raise NoText(f"has no text on its {len(pages)} page{'s' * (len(pages) > 1)}, which may be scanned; {how}")
    if pictures := [str(number) for number, (_, has_picture) in enumerate(pages, start=1) if has_picture]:
        _warn_once(
            f"{path}: {len(pictures)} of {len(pages)} pages have pictures and no text, as scanned pages have: "
            + ", ".join(pictures)
        )
    return "".join(f"{text}\f" for text, _ in pages)


def _page_text(pdf: Any, number: int) -> tuple[str, bool]:
    """Return the text of a page, counted from 0, and whether it has a picture and no text."""
    from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE

    page = pdf[number]
    try:
        textpage = page.get_textpage()
        try:
            text = textpage.get_text_range().replace(_HYPHEN, "-\n").replace("\r\n", "\n")
        finally:
            textpage.close()
        text = text.replace("\r", " ").replace("\f", " ").strip()
        return text, not text and any(page.get_objects([FPDF_PAGEOBJ_IMAGE], max_depth=3))
    finally:
        page.close()


@lru_cache(maxsize=1 << 16)
def _warn_once(message: str) -> None:
    """Log a warning the first time it is given: a run reads each document several times."""
    _log.warning("%s", message)


# ---- HTML, and what is made of it


def _html_text(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, alt_texts=False))


def _declared_encoding(content: bytes) -> str | None:
    """Return the encoding that HTML or XML declares for itself, by the name that browsers take it for, or None."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    if declared := _DECLARATION.search(content[:_DECLARED_WITHIN]):
        name = declared[1].decode("ascii", errors="replace")
        try:
            codecs.lookup(name)
        except LookupError:
            return None
        # What was read as ASCII is not UTF-16, whatever it says.
        return None if (found := str(map_encoding_to_html5(name))).startswith("utf-16") else found
    return None


def _zipped_text(path: str, content: bytes) -> str:
    """Return the text of a DOCX or EPUB file."""
    kind = PurePath(path).suffix[1:].upper()
    if content.startswith(_OLE):
        raise NoText("is encrypted, or of Word before 2007; save it as DOCX without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = archive.infolist()
            if any(file.flag_bits & 1 for file in files):
                raise NoText("is encrypted; save it without its password")
            if (size := sum(file.file_size for file in files if file.filename.lower().endswith(_TEXTS))) > _MOST_BYTES:
                raise NoText(f"has {size >> 20:,} MB of text when it is unpacked, of at most {_MOST_BYTES >> 20} MB")
            return _docx_text(path, content) if kind == "DOCX" else _epub_text(archive)
    except (NoText, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise NoText(f"cannot be read as {kind}, so it may be damaged: {one_line(error)}") from None


def _docx_text(path: str, content: bytes) -> str:
    import mammoth

    without_pictures = mammoth.images.img_element(lambda image: {})
    result = mammoth.convert_to_html(io.BytesIO(content), style_map=_BREAKS, convert_image=without_pictures)
    if any(message.message.endswith("}oMath") for message in result.messages):
        _warn_once(f"{path}: has equations, which are left out of its text")
    return _html_text(_CELL.sub(r"\1\2", result.value))  # a row is a line if its cells have no paragraphs


def _epub_text(archive: zipfile.ZipFile) -> str:
    """Return the texts of a book's chapters, in the order of its spine."""
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    package_path = next(each.attrib["full-path"] for each in container.iterfind(".//{*}rootfile"))
    package = ElementTree.fromstring(archive.read(package_path))
    hrefs = {
        item.attrib["id"]: item.attrib["href"]
        for item in package.iterfind(".//{*}item")
        if not item.get("media-type", "").startswith("image/")
    }
    chapters = [
        hrefs[each.attrib["idref"]] for each in package.iterfind(".//{*}itemref") if each.attrib["idref"] in hrefs
    ]
    paths = [posixpath.normpath(posixpath.join(posixpath.dirname(package_path), unquote(href))) for href in chapters]
    if "META-INF/encryption.xml" in archive.namelist():
        encryption = ElementTree.fromstring(archive.read("META-INF/encryption.xml"))
        if {unquote(each.get("URI", "")) for each in encryption.iterfind(".//{*}CipherReference")}.intersection(paths):
            raise NoText("is encrypted, as books with DRM are")
    texts = []
    for path in paths:
        chapter = archive.read(path)
        try:
            texts.append(_html_text(decode(chapter, _declared_encoding(chapter))))
        except NotText as error:
            raise NoText(f"has {path}, which {error}") from None
    return "\n\n".join(texts)
