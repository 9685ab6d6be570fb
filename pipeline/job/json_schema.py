"""A query's JSON schema, however a job file gives it, as text. Knows JSON and files, not what a schema means."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

from pipeline.errors import one_line


def schema_text(value: Any) -> str | None:
    """A JSON schema, given as such, as its text or as {file: path}, as its text; keys stay in their order."""
    origin = ""
    if isinstance(value, dict) and value.keys() == {"file"}:
        origin, value = f" in {value['file']}", _content(Path(str(value["file"])))
    try:
        schema = json.loads(value) if isinstance(value, str | bytes) else value
        text = json.dumps(schema, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"has what JSON has not ({one_line(error)}); put dates and the like in quotes") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON{origin} ({one_line(error)})") from None
    if not isinstance(schema, dict | NoneType):
        raise ValueError(f"is no JSON schema{origin}, which is a mapping of keys")
    return None if schema is None else text


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read from {file}: {error.strerror}") from None
