"""The speeds that were measured on this machine with a model, kept beside the store in ``speeds.json``.

They are for estimates only: a file that does not verify is ignored, and one that cannot be written is left out.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from pipeline.report import Report
from turboquant.io.atomic import open_folder, open_regular, remove_leftovers
from turboquant.io.identity import Identity
from turboquant.io.json_file import read_json, sealed

SPEEDS = "speeds.json"
_CHECKSUM = "checksum"
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of each part of the work; None where nothing was measured.

    answer: of all rows of a batch together. answer_length: mean tokens of an answer. load: seconds that loading the
    model takes.
    """

    prefill: _Positive | None = None
    restore: _Positive | None = None
    answer: _Positive | None = None
    answer_length: _Positive | None = None
    load: _Positive | None = None

    @classmethod
    def of(cls, report: Report) -> Speeds:
        """Return the speeds of a run."""

        def ratio(count: int, by: float) -> float | None:
            return count / by if count > 0 and by > 0 else None

        together = report.processes  # the seconds of stages are sums over the processes
        return cls(
            ratio(report.prefilled_tokens * together, report.prefill_seconds),
            ratio((report.context_tokens - report.prefilled_tokens) * together, report.restore_seconds),
            ratio(report.answer_tokens * together, report.answer_seconds),
            ratio(report.answer_tokens, report.rows_answered),
            report.load_seconds or None,
        )

    def seconds(self, prefill: int, restore: int, answer: float) -> float | None:
        """Return how long so many tokens take, or None if a speed that is needed is not known.

        Restoring is seldom what a run waits for, so it counts only where its speed is known.
        """
        if (prefill and self.prefill is None) or (answer and self.answer is None):
            return None
        parts = (prefill, self.prefill), (restore, self.restore), (answer, self.answer)
        return sum(tokens / speed for tokens, speed in parts if speed)


@dataclass(frozen=True)
class _SpeedsFile:
    format: Literal[1]
    speeds: dict[str, Speeds]


_SCHEMA = TypeAdapter(_SpeedsFile)


def read_speeds(folder: Path, identity: Identity) -> Speeds:
    """Return the speeds of this machine with a model and a codec. folder: of the store."""
    return _read(folder).get(_key(identity), Speeds())


def remember_speeds(folder: Path, identity: Identity, speeds: Speeds) -> None:
    """Keep speeds in place of those that were measured before. A speed that is None leaves the earlier one."""
    new = {name: value for name, value in asdict(speeds).items() if value is not None}
    with suppress(OSError):
        remove_leftovers(folder / SPEEDS)  # also of a run that writes them now, which then only fails to remember
        if not new:
            return
        known, key = _read(folder), _key(identity)
        known[key] = replace(known.get(key, Speeds()), **new)
        content = {"format": 1, "speeds": {name: asdict(value) for name, value in known.items()}}
        with open_folder(folder, make=True) as opened, opened.replacing(SPEEDS) as file:
            file.write(json.dumps(sealed(content, _CHECKSUM), indent=1).encode())


def _read(folder: Path) -> dict[str, Speeds]:
    try:
        with open_regular(folder / SPEEDS) as file:
            return dict(read_json(file, _SCHEMA, _CHECKSUM).speeds)
    except (OSError, ValueError):
        return {}


def _key(identity: Identity) -> str:
    """Return the model, the codec, and the machine with its device; a store may be on a disk of several machines."""
    import mlx.core as mx  # a run with nothing to do does not need it

    device = f"{mx.default_device()} {mx.device_info().get('device_name', '')}"
    return f"{identity.weights} {identity.codec} {socket.gethostname()} {device}"
