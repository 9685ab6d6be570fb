"""The formats of results, told by the suffix of a file's name."""

from __future__ import annotations

from pathlib import PurePosixPath

_PARQUET = (".parquet", ".pq", "")  # a name without a suffix promises no other format
_JSON_LINES = (".jsonl", ".ndjson")


def check_suffix(path: str) -> None:
    """Raise ValueError if the suffix of a path names no format that tables are written in."""
    suffix = _suffix(path)
    if suffix not in (*_PARQUET, ".csv", *_JSON_LINES):
        raise ValueError(
            f"ends in {suffix}; results are written as Parquet (*.parquet), CSV (*.csv) and JSON Lines (*.jsonl)"
        )


def is_parquet(path: str) -> bool:
    """Return whether a path names a Parquet file."""
    return _suffix(path) in _PARQUET


def is_json_lines(path: str) -> bool:
    """Return whether a path names a file of JSON Lines."""
    return _suffix(path) in _JSON_LINES


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()
