"""Text that may be shown: what documents, models and files say comes from anywhere. Knows characters alone."""

from __future__ import annotations

import re

# What moves a cursor, rings, colours or turns the reading direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with what a terminal would obey made visible.

    >>> ascii(printable("a\\x1b[2Jb"))
    "'a\\\\ufffd[2Jb'"
    """
    return _CONTROLS.sub("\ufffd", text)
