"""A rank that holds a part of a model and repeats the steps of the first rank with its part.

It has its own store of its part's prefixes. It reads no documents and writes no rows.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline.cache.pins import Pins
from pipeline.cache.store import open_store
from pipeline.errors import Interrupted, JobError
from pipeline.execution.context import RunContext
from pipeline.execution.decode import Request, generate_answers
from pipeline.execution.fingerprint import context_label, job_identity, load_identified
from pipeline.execution.prefixes import PrefixProvider
from pipeline.inputs.prompts import Renderer
from pipeline.job.job import Job, Settings
from pipeline.models.output_parser import OutputParser
from pipeline.models.quotations import Passages
from pipeline.models.ranks import RankGroup, common_values, join_ranks
from turboquant import Prefix
from turboquant.caches.prefix import make_resident


def follow_first_rank(job: Job) -> None:
    """Repeat the first rank's steps until it says that the run is over.

    Raises JobError if this rank's job or model differs from the first rank's, PipelineError if any rank fails.
    """
    _exit_at_second_interrupt()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # mlx.launch sends it, and MLX may wait for a rank that is gone
    ranks = join_ranks(job.scale.ranks)
    worker: RankWorker | None = None
    while (message := ranks.broadcast()) is not None:
        step, arguments = message
        with ranks.failing_together(), suppress(Interrupted):  # all ranks are interrupted at the same point
            if worker is None:
                worker = RankWorker(job, ranks, **arguments)
            elif step == "build":
                worker.build(**arguments)
            else:
                worker.answer(**arguments)


class RankWorker:
    """This rank's part of a job's model, and its store.

    common: values that must equal the first rank's. schemas: the JSON schemas that answers may have to follow.
    """

    def __init__(self, job: Job, ranks: RankGroup, common: Mapping[str, str], schemas: Collection[str]) -> None:
        identity = job_identity(job)
        for name, value in common_values(identity).items():
            if common[name] != value:
                raise JobError(
                    f"rank {ranks.rank}: its {name} is not the first rank's; give all the same job, model and versions"
                )
        own_identity = replace(identity, prefill=f"{identity.prefill} rank={ranks.rank}")
        self._context = RunContext(job, own_identity, schemas, ranks=ranks)
        self._model = load_identified(job, identity, ranks)
        self._parser = OutputParser(self._model.tokenizer, schemas)
        store = open_store(job.cache, Pins(job.cache.dir).is_pinned)
        shared = Renderer(job.prompt, job.documents).shared
        self._prefixes = PrefixProvider(self._context, self._model, store, context_label(shared) if shared else "")
        self._waiting: dict[str, list[Prefix]] = {}  # prefixes that are still to be used, by key

    def build(self, key: str, document: str, context: Sequence[int], shared: int, label: str) -> None:
        """Restore or build this rank's part of a prefix. ``key`` is the first rank's name for it."""
        pieces = self._prefixes.cut(document, context, shared, label)
        self._waiting.setdefault(key, []).append(self._prefixes.get(pieces))

    def answer(self, prefixes: Sequence[str], requests: Sequence[Sequence[Any]]) -> None:
        """Decode as the first rank does. A request is (index into ``prefixes``, tokens, settings, name, passages)."""
        job = self._context.job
        ready = make_resident([self._take(key) for key in prefixes], job.cache.resident)
        decoded = [
            Request(ready[number], tokens, _settings(settings), name, passages and _passages(**passages))
            for number, tokens, settings, name, passages in requests
        ]
        batch_size = job.generation.batch_size
        generate_answers(self._model, decoded, self._parser, batch_size, ranks=self._context.ranks)

    def _take(self, key: str) -> Prefix:
        """Return a prefix that was built for this step. The same key may have been built several times."""
        first, *others = self._waiting.pop(key)
        if others:
            self._waiting[key] = others
        return first


def _settings(values: Mapping[str, Any]) -> Settings:
    return Settings(**{**values, "stop": tuple(values["stop"]), "choices": tuple(values["choices"])})


def _passages(texts: Sequence[str], whole: bool) -> Passages:
    return Passages(tuple(texts), whole)


def _exit_at_second_interrupt() -> None:
    """Ignore the first Ctrl-C, since the first rank stops at it and says so. A second one ends this process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        for _ in range(2):
            signal.sigwait({signal.SIGINT})
        os._exit(130)

    threading.Thread(target=wait, name="wait for Ctrl-C", daemon=True).start()
