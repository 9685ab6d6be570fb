"""Read JSON that may be damaged or forged: its size, its depth, its checksum and its schema are checked.

This module imports neither MLX nor NumPy, so that a caller who checks files only does not wait for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn, TypeVar

import xxhash
from pydantic import TypeAdapter, ValidationError

LARGEST_JSON = 64 << 20
DEEPEST_JSON = 64
_Content = TypeVar("_Content")


def parse_json(text: bytes) -> Any:
    """Parse untrusted JSON.

    Raises ValueError if it is invalid, has a key twice, holds NaN or an infinite number, or is nested too deeply.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise ValueError("a mapping has a key twice")
        return parsed

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits} is too large for a number")
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=mapping, parse_float=number, parse_constant=refuse)
        _check_depth(content)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    return content


def read_json(file: BinaryIO, schema: TypeAdapter[_Content], checksum: str | None = None) -> _Content:
    """Return the content of an open file of JSON as its schema describes it. Values that the schema lacks are ignored.

    checksum: the name of the value that holds the checksum of all others, as ``sealed`` adds it. Raises ValueError with
    a short reason if the file is too large, is not JSON, was changed, or does not fit the schema; and OSError.
    """
    text = read_bounded(file)
    if checksum is not None:
        check_seal(parse_json(text), checksum)
    return check_json(text, schema)


def read_bounded(file: BinaryIO) -> bytes:
    """Return the content of an open file. Raises ValueError if it is too large for JSON, and OSError."""
    text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON:,} bytes")
    return text


def check_seal(content: Any, checksum: str) -> None:
    """Raise ValueError unless the content is a mapping with the right checksum under the name ``checksum``."""
    if not isinstance(content, dict) or content.get(checksum) != seal(content, checksum):
        raise ValueError("the checksum is wrong")


def check_json(text: bytes, schema: TypeAdapter[_Content]) -> _Content:
    """Return the content of JSON as its schema describes it. Raises ValueError, which names the value that is wrong."""
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def sealed(content: Mapping[str, Any], checksum: str) -> dict[str, Any]:
    """Return a mapping with its checksum, which has the name ``checksum``."""
    return {**content, checksum: seal(content, checksum)}


def seal(content: Mapping[str, Any], checksum: str) -> str:
    """Return the checksum of a mapping, over everything in it except the value of the name ``checksum``.

    XXH3 finds accidental damage. It does not stop an attacker, who could compute any checksum.
    """
    rest = {name: value for name, value in content.items() if name != checksum}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError("the JSON is nested too deeply")
