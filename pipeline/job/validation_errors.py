"""What pydantic found wrong with a job or a row, as one line that names the key, the value and what to write.

Knows pydantic's errors and models; not what a job is.
"""

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
_LONGEST = 100  # characters of a value that is shown
_MOST_BITS = 256  # of a number that is


def explain_job(
    errors: Sequence[ErrorDetails], job: Any, tags: Mapping[str, Any], path: str, overrides: Sequence[str]
) -> str:
    """One line about the error that is most likely the cause of the others.

    job: the model that was validated. tags: the models of its unions by what stands for them in an error's location.
    path: of the file, which is named unless an override gave the value.
    """
    # A misspelt required key is both unknown and missing; the unknown one says what to change.
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    key = " ".join(".".join(str(part) for part in error["loc"] if part not in tags).split())
    origin = _origin(key, path, overrides)
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{key}'{_nearest_key(error['loc'], job, tags)}"
    return f"{origin}: {explain(error, key)}"


def explain(error: ErrorDetails, key: str) -> str:
    """What is wrong with the value of a key."""
    if error["type"] == "missing":
        return f"the required key '{key}' is missing"
    if error["type"] == "value_error":
        return f"{key + ' ' if key else ''}{error['ctx']['error']}"
    known = _EXPECTED.get(error["type"])
    expected = known.format(**error.get("ctx", {})) if known else error["msg"]
    return f"{key}: expected {expected}, got {describe(error['input'])}{_text_hint(error)}"


def describe(value: Any) -> str:
    """A value as a message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list, tuple)):
        return "a mapping of keys" if isinstance(value, dict) else ("a list" if value else "an empty list")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length():,} bits"  # which Python refuses to write out
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _origin(key: str, path: str, overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        name = override.partition("=")[0].strip()
        if key == name or key.startswith(f"{name}."):
            return f"--set {override}"
    return path


def _nearest_key(location: tuple[int | str, ...], job: Any, tags: Mapping[str, Any]) -> str:
    """The end of the message about an unknown key: the key most like it in the same section."""
    section = job
    for part in location[:-1]:
        if part in tags:
            section = tags[str(part)]
        elif isinstance(part, str):
            section = section.model_fields[part].annotation
    return suggestion(str(location[-1]), set(section.model_fields))


def _text_hint(error: ErrorDetails) -> str:
    """YAML turns `id: no` and `id: 2024-01-01` into other things than text."""
    is_scalar = not isinstance(error["input"], (dict, list, type(None)))
    return "; put it in quotes" if error["type"] == "string_type" and is_scalar else ""
