"""Parse the arguments that the commands of measurements share, as types of argparse's."""

from __future__ import annotations

import argparse

from turboquant.quant import SUPPORTED_BITS


def count(text: str, least: int = 1) -> int:
    """Parse a whole number of at least ``least``."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least {least}")
    return int(text)


def bits(text: str) -> tuple[int, int]:
    """Parse bits of keys and values: ``4`` for both, or ``4/3``."""
    pair = text.split("/")
    if len(pair) > 2 or any(part not in map(str, SUPPORTED_BITS) for part in pair):
        raise argparse.ArgumentTypeError(f"{text!r}: give bits of {SUPPORTED_BITS}, for keys and values or key/value")
    return int(pair[0]), int(pair[-1])
