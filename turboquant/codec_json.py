"""A codec as JSON, for files and the states of caches, and back from what may be a stranger's."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from turboquant.codec import CacheCodec


def dump_codec(codec: CacheCodec) -> str:
    """A codec as JSON.

    >>> parse_codec(json.loads(dump_codec(CacheCodec(3, 4)))) == CacheCodec(3, 4)
    True
    """
    return json.dumps(asdict(codec))


def parse_codec(content: Any) -> CacheCodec:
    """The codec that ``dump_codec`` wrote as JSON. Raises ValueError where it wrote no such thing."""
    default = CacheCodec()
    names = {field.name for field in fields(default)}
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"a codec's fields are {sorted(names)}")
    values = {name: _tuples(value) for name, value in content.items()}
    for name, value in values.items():
        kind = type(getattr(default, name))
        if type(value) not in ((int, float) if kind is float else (kind,)) or (type(value) is int and value < 0):
            raise ValueError(f"the codec's {name} cannot be {value!r}")
    try:
        return CacheCodec(**values)
    except TypeError as error:
        raise ValueError(f"no codec: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
