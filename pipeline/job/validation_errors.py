"""Explain pydantic's errors in one line that names the key, the value and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from pipeline.errors import suggestion

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "a mapping of keys",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "a finite number",
    "too_short": "at least one",
    "invalid_key": "text as a key",
    "string_too_short": "at least {min_length} character",
}
_MAX_CHARACTERS = 100  # of a value in a message
_MAX_BITS = 256  # of a number in a message


def explain_job(
    errors: Sequence[ErrorDetails], job: Any, tags: Mapping[str, Any], path: str, overrides: Sequence[str]
) -> str:
    """Return one line about the error that is most likely the cause of the others.

    job: the pydantic model that was validated. tags: the models of its unions, by their names in an error's location.
    path: of the job file, which is named unless an override gave the value.
    """
    # A required key with a spelling mistake is both unknown and missing; the unknown key says what to change.
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    key = " ".join(".".join(str(part) for part in error["loc"] if part not in tags).split())
    names = ((override.partition("=")[0].strip(), override) for override in reversed(overrides))
    is_from = (f"--set {override}" for name, override in names if key == name or key.startswith(f"{name}."))
    origin = next(is_from, path)
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{key}'{_nearest_key(error['loc'], job, tags)}"
    return f"{origin}: {explain(error, key)}"


def explain(error: ErrorDetails, key: str) -> str:
    """Return a message about the value of a key."""
    if error["type"] == "missing":
        return f"the required key '{key}' is missing"
    if error["type"] == "value_error":
        return f"{key + ' ' if key else ''}{error['ctx']['error']}"
    words = _EXPECTED.get(error["type"])
    expected = words.format(**error.get("ctx", {})) if words else error["msg"]
    is_scalar = not isinstance(error["input"], (dict, list, type(None)))
    # YAML reads `id: no` and `id: 2024-01-01` as other values than text.
    hint = "; put it in quotes" if error["type"] == "string_type" and is_scalar else ""
    return f"{key}: expected {expected}, got {describe(error['input'])}{hint}"


def describe(value: Any) -> str:
    """Return a value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list, tuple)):
        return "a mapping of keys" if isinstance(value, dict) else ("a list" if value else "an empty list")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"a number of {value.bit_length():,} bits"  # Python refuses to write it out
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def _nearest_key(location: tuple[int | str, ...], job: Any, tags: Mapping[str, Any]) -> str:
    """Return the end of the message about an unknown key, which suggests the most similar key of the same section."""
    section = job
    for part in location[:-1]:
        if part in tags:
            section = tags[str(part)]
        elif isinstance(part, str):
            section = section.model_fields[part].annotation
    return suggestion(str(location[-1]), set(section.model_fields))
