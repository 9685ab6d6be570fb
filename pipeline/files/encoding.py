"""Decode the bytes of files into text. What is not text is never replaced: the reason names the first wrong byte."""

from __future__ import annotations

import codecs
import io
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.errors import suggestion

LONGEST_MARK = 4  # bytes
# The marks of UTF-32 come first, because one of them begins with a mark of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_NOT_OF_FILES = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "unicode-escape")
_COMMON = (
    "utf-8",
    "utf-16-le",
    "utf-16-be",
    "utf-32-le",
    "cp1252",
    "latin-1",
    "cp1251",
    "shift_jis",
    "gb18030",
    "big5",
)
_CHUNK_BYTES = 1 << 16
_STAND_IN = "\udcff"  # for bytes that do not decode


class NotText(ValueError):
    """Bytes are not text in an encoding. The message begins with a verb, and names the byte."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that is not text. reason: begins with a verb, and names the byte or the character."""

    reason: str


def checked_encoding(name: str) -> str:
    """Return the name of an encoding. Raises ValueError if there is none of this name for the text of files."""
    try:
        if codecs.lookup(name).name in _NOT_OF_FILES:
            raise LookupError
        "A".encode(name)
    except (LookupError, ValueError):
        raise ValueError(f"is '{name}', which is no encoding of text{suggestion(name, _COMMON)}") from None
    return name


def find_encoding(beginning: bytes, encoding: str | None) -> tuple[str, int]:
    """Return the encoding of a file, and how many bytes its byte-order mark has.

    beginning: the first `LONGEST_MARK` bytes of the file. encoding: of files without a mark; None for UTF-8.
    """
    for mark, name in _MARKS.items():
        if beginning.startswith(mark):
            return name, len(mark)
    name = codecs.lookup(encoding or "utf-8").name
    return _WITHOUT_MARK.get(name, name), 0


def decode(content: bytes, encoding: str | None = None) -> str:
    """Return the text of a whole file without its byte-order mark.

    encoding: of files without a mark; None for UTF-8. Raises NotText if it does not decode or holds NUL bytes.
    """
    name, mark = find_encoding(content[:LONGEST_MARK], encoding)
    try:
        text, reason = content[mark:].decode(name), None
    except UnicodeDecodeError as error:
        text, reason = content[mark : mark + error.start].decode(name), describe(error, name, mark)
    if (at := text.find("\0")) >= 0:
        offset = mark + len(text[:at].encode(name))
        reason = f"is not text in {name.upper()}: it has a NUL byte at offset {offset}"
    if reason is not None:
        raise NotText(reason)
    return text


def describe(error: UnicodeDecodeError, name: str, offset: int) -> str:
    """Return the reason why bytes do not decode. offset: bytes of the file before those that were decoded."""
    byte = error.object[error.start]
    return f"is not text in {name.upper()}: the byte 0x{byte:02x} at offset {offset + error.start} does not decode"


class _Decoder:
    """Decodes the bytes of a file, part by part. A half character stands for bytes that do not decode.

    offset: bytes of the file before the first part. reasons: why they do not decode, one for each that stands for some.
    """

    def __init__(self, encoding: str, offset: int) -> None:
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._encoding, self._end = encoding, offset
        self.reasons: deque[str] = deque()

    def decode(self, content: bytes) -> str:
        """Return the text of the next part; b"" is the end of the file."""
        self._end += len(content)
        pieces, is_end = list[str](), not content
        while True:
            _, state = self._decoder.getstate()
            try:
                pieces.append(self._decoder.decode(content, is_end))
                return "".join(pieces)
            except UnicodeDecodeError as error:
                whole = error.object  # with what the decoder held back of the last part
                self._decoder.setstate((b"", state))
                pieces += [self._decoder.decode(whole[: error.start]), _STAND_IN]
                self.reasons.append(describe(error, self._encoding, self._end - len(whole)))
                content = whole[error.end :]


def decode_line(line: bytes, encoding: str, offset: int) -> tuple[str, str]:
    """Return a line, in which a half character stands for bytes that do not decode, and the reason for the first or "".

    offset: bytes of the file before the line.
    """
    with suppress(UnicodeDecodeError):
        return line.decode(encoding), ""
    decoder = _Decoder(encoding, offset)
    return decoder.decode(line) + decoder.decode(b""), decoder.reasons[0]


class OpenedText(io.TextIOWrapper):
    """A file as text with its line ends, in which a half character stands for bytes that do not decode.

    content: the file. offset: how many of its bytes were read.
    """

    def __init__(self, content: BinaryIO, encoding: str, offset: int) -> None:
        self._source = _Decoder(encoding, offset)
        recoded = io.BufferedReader(_Recoded(content, self._source), _CHUNK_BYTES)
        super().__init__(recoded, "utf-8", "surrogatepass", newline="")

    def undecoded(self, *parts: str) -> str:
        """Return why the first bytes in parts of the text do not decode, or "". Every part is given once, in order."""
        reasons = self._source.reasons
        count = sum(part.count(_STAND_IN) for part in parts) if reasons else 0
        told = [reasons.popleft() for _ in range(min(count, len(reasons)))]
        return told[0] if told else ""


class _Recoded(io.RawIOBase):
    """A file in UTF-8 in place of its own encoding."""

    def __init__(self, content: BinaryIO, decoder: _Decoder) -> None:
        self._content, self._decoder = content, decoder
        self._left, self._is_whole = b"", False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer, and return the number of bytes; 0 at the end."""
        while not self._left and not self._is_whole:
            read = self._content.read(_CHUNK_BYTES)
            self._is_whole = not read
            self._left = self._decoder.decode(read).encode("utf-8", "surrogatepass")
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def split_lines(content: BinaryIO, newline: bytes) -> Iterator[bytes]:
    """Yield the lines of a file with their ends. newline: the bytes of a line feed; a code unit of UTF-16 has two."""
    if newline == b"\n":
        yield from content
        return
    pending, start = b"", 0
    while chunk := content.read(_CHUNK_BYTES):
        pending, start, at = pending[start:] + chunk, 0, 0
        while (at := pending.find(newline, at)) >= 0:
            if (at - start) % len(newline):
                at += 1
                continue
            at += len(newline)
            yield pending[start:at]
            start = at
    if start < len(pending):
        yield pending[start:]


def wrong_character(value: Any, undecoded: str = "") -> str | None:
    """Return the reason why a value is not text, or None; of lists and mappings, of the first wrong text in them.

    undecoded: the reason if the value has half characters because bytes did not decode.
    """
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        return next((reason for child in children if (reason := wrong_character(child, undecoded))), None)
    if not isinstance(value, str):
        return None
    if (at := value.find("\0")) >= 0:
        return f"has a NUL byte, at character {at} of the value"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        return undecoded or f"has half a character, {half}, at character {error.start} of the value"
    return None
