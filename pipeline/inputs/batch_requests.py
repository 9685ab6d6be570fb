"""Batch files of the OpenAI API: their requests become documents and queries.

Requests that share a long beginning are queries of one document, which is read once. In a prompt, a blank line stands
between the document and the query, so a request is cut at its last blank line that all requests of the document share.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from turboquant.io.json_file import parse_json

_URL = "/v1/chat/completions"
_BETWEEN = "\n\n"  # the document and the query in a prompt
_SHARED = 0.5  # of the shorter one of two requests, for both to be queries of one document
_SETTINGS = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "response_format")
_WITHOUT_EFFECT = (
    "model",
    "messages",
    "stream",
    "user",
    "metadata",
    "store",
    "service_tier",
    "logprobs",
    "top_logprobs",
)


@dataclass(frozen=True)
class Request:
    """A request: its id, the system text if there is one, the user's text, and the settings of a query."""

    id: str
    system: str | None
    text: str
    settings: Mapping[str, Any]


@dataclass
class Imported:
    """What requests become.

    documents: rows with id, text and system. queries: rows with document_id, id, text and settings. left_out: how many
    requests have a key that is not taken over, by key. changed: how many requests have other white space than a blank
    line between document and query.
    """

    documents: list[dict[str, Any]] = field(default_factory=list)
    queries: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    changed: int = 0


def import_requests(path: Path) -> Imported:
    """Read a batch file. Raises InputError, which names the line, if a request is not one question of a user."""
    imported = Imported()
    requests = list(_requests(path, imported.left_out))
    if not requests:
        raise InputError(f"{path}: there are no requests")
    position = {request.id: number for number, request in enumerate(requests)}
    groups = sorted(_groups(requests), key=lambda group: min(position[request.id] for request in group))
    for number, group in enumerate(groups, start=1):
        name, group = f"document-{number}", sorted(group, key=lambda request: position[request.id])
        end, start = _cut([request.text for request in group])
        text = group[0].text[:end]
        imported.documents.append({"id": name, "text": text, "system": group[0].system})
        for request in group:
            query = request.text[start:]
            if not text.strip() or not query.strip():
                raise InputError(f"{path}: request '{request.id}' has no document and question behind it")
            imported.changed += f"{text}{_BETWEEN}{query}" != request.text
            imported.queries.append({"document_id": name, "id": request.id, "text": query, **request.settings})
    return imported


def _requests(path: Path, left_out: Counter[str]) -> Iterator[Request]:
    """Yield the requests. left_out: counts the keys that are not taken over."""
    seen: set[str] = set()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        request = _request(parse_json(line), left_out)
                        if request.id in seen:
                            raise ValueError(f"the custom_id '{request.id}' is given twice")
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{path}: line {number}: {error}") from None
                    seen.add(request.id)
                    yield request
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _request(line: Any, left_out: Counter[str]) -> Request:
    """Return a request. Raises ValueError if it is not one question of a user."""
    if not isinstance(line, dict) or not isinstance(body := line.get("body"), dict):
        raise ValueError("is no request: it has no `body`")
    if line.get("url", _URL) != _URL:
        raise ValueError(f"is a request to {line['url']}; those to {_URL} can be imported")
    name, messages = line.get("custom_id"), body.get("messages")
    if not isinstance(name, str) or not name:
        raise ValueError("has no custom_id")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("has no messages")
    roles = [message.get("role") for message in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        raise ValueError(
            f"has messages of {', '.join(map(str, roles))}; expected one of the user, perhaps behind a system's"
        )
    texts = [_text(message.get("content")) for message in messages]
    for key, value in body.items():
        if key not in (*_WITHOUT_EFFECT, *_SETTINGS) and value and (key, value) != ("n", 1):
            left_out[key] += 1
    return Request(name, texts[0] if len(texts) == 2 else None, texts[-1], _settings(body))


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed") if body.get(name) is not None
    }
    if body.get("max_completion_tokens") is not None:
        settings["max_tokens"] = body["max_completion_tokens"]
    if stop := body.get("stop"):
        settings["stop"] = [stop] if isinstance(stop, str) else stop
    response_format = body.get("response_format") or {}
    kind = response_format.get("type", "text") if isinstance(response_format, dict) else response_format
    if kind == "json_object":
        settings["json_schema"] = json.dumps({"type": "object"})
    elif kind == "json_schema":
        described = response_format.get("json_schema") if isinstance(response_format, dict) else None
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise ValueError("has the response_format json_schema without a JSON schema in json_schema.schema")
        settings["json_schema"] = json.dumps(schema)
    elif kind != "text":
        raise ValueError(f"has the response_format {kind}, which is not known here")
    return settings


def _text(content: Any) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise ValueError("has a message that is not text alone")


def _groups(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Yield the requests that share a system text and a long beginning."""
    in_order = sorted(requests, key=lambda request: (request.system or "", request.system is None, request.text))
    group = in_order[:1]
    for one, other in pairwise(in_order):
        shared = _shared_length(group[0].text, other.text)
        if one.system != other.system or shared < _SHARED * min(len(group[0].text), len(other.text)):
            yield group
            group = []
        group.append(other)
    yield group


def _cut(texts: Sequence[str]) -> tuple[int, int]:
    """Return where the document ends, and where the queries begin behind the white space that follows it."""
    first, last = min(texts), max(texts)  # what these two share, all share
    shared = first[: _shared_length(first, last)]
    if len(texts) == 1 or shared in texts:  # the last words are the query's
        shared = shared.rstrip()
    for between in (_BETWEEN, "\n", " "):
        if (end := shared.rstrip(between).rfind(between) if len(texts) == 1 else shared.rfind(between)) > 0:
            return end, end + len(between)
    return 0, 0


def _shared_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
