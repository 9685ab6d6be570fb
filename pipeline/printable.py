"""Make text safe to show: texts of documents, models and files may hold characters that control a terminal."""

from __future__ import annotations

import re

# Characters that move the cursor, ring the bell, change colours or change the direction of the text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return the text with every control character replaced by U+FFFD, so that a terminal does not obey it.

    >>> ascii(printable("a\\x1b[2Jb"))
    "'a\\\\ufffd[2Jb'"
    """
    return _CONTROLS.sub("\ufffd", text)
