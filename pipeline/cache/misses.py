"""Why a segment is not in the store, said once for each reason. Knows identities and manifests; changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.cache.entries import Entry
from turboquant.io.identity import Identity

_ABSENT = "absent"
_log = logging.getLogger(__name__)


class MissLog:
    """What is told of segments that were looked for in vain; ``entries`` is asked once, when the first is."""

    def __init__(self, entries: Callable[[], Iterable[Entry]]) -> None:
        self._entries = entries
        self._labels: dict[str, list[Mapping[str, Any]]] | None = None
        self._told: set[str] = set()

    def tell(self, key: str, identity: Identity, label: str, whole: bool) -> None:
        """Log why a key is absent: a reason is worth a line once, and that something is not there yet is worth none.

        label: its context's. whole: whether the context ends with it.
        """
        reason = self._explain(identity, label, whole)
        told = reason in self._told or reason == _ABSENT
        _log.log(logging.DEBUG if told else logging.INFO, "prefix %.12s not in the store: %s", key, reason)
        self._told.add(reason)

    def _explain(self, identity: Identity, label: str, whole: bool) -> str:
        """Why a key is absent: the first thing in which a context of the same text differs."""
        if self._labels is None:
            self._labels = {}
            for entry in self._entries():
                if entry.manifest is not None and entry.about.get("whole"):
                    self._labels.setdefault(entry.label, []).append(entry.manifest["identity"])
        wanted = asdict(identity)
        for stored in self._labels.get(label, []):
            differing = [name for name, value in wanted.items() if stored.get(name) != value]
            if differing:
                name = differing[0]
                known = {"weights": "other weights", "tokenizer": "another tokenizer or chat template"}
                return known.get(name, f"{name} was '{stored.get(name)}', now '{wanted[name]}'")
        if whole and label in self._labels:
            return "the context of this text ends elsewhere: the queries have changed"
        return _ABSENT
