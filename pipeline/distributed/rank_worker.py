"""A process that holds a part of a model, and does with it what the first rank does with its own.

It has a store of its own part's prefixes. It reads no documents, decides nothing, and writes no rows.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pipeline.cache.pins import Pins, output_digest
from pipeline.cache.store import open_store
from pipeline.errors import Interrupted, JobError
from pipeline.inputs.prompts import Renderer
from pipeline.job.job import Job, Settings
from pipeline.models.loading import load_model
from pipeline.models.output_parser import OutputParser
from pipeline.models.ranks import RankGroup, common_values, meet
from pipeline.progress import Progress
from pipeline.report import Report
from pipeline.run.decode import Request, answer
from pipeline.run.fingerprint import context_label, job_identity
from pipeline.run.prefixes import Prefixes
from turboquant import Prefix
from turboquant.caches.prefix import make_resident


def follow(job: Job) -> None:
    """Do what the first rank says until it says that the run is over.

    Raises JobError where this rank's job or model is another, PipelineError where it fails, or another rank.
    """
    _heed_the_second_sigint()
    ranks = meet(job.scale.ranks)
    follower: Follower | None = None
    while (said := ranks.broadcast()) is not None:
        what, told = said
        with ranks.failing_together(), suppress(Interrupted):  # as the first rank is then
            if follower is None:
                follower = Follower(job, ranks, **told)
            elif what == "build":
                follower.build(**told)
            else:
                follower.answer(**told)


class Follower:
    """A rank's part of a job's model, with its store.

    ground: the first rank's, which must be this one's too. schemas: those that answers may follow.
    """

    def __init__(self, job: Job, ranks: RankGroup, ground: Mapping[str, str], schemas: Collection[str]) -> None:
        own = job_identity(job)
        for name, value in common_values(own).items():
            if ground[name] != value:
                raise JobError(
                    f"rank {ranks.rank}: its {name} is not the first rank's; give all the same job, model and versions"
                )
        self._job, self._ranks = job, ranks
        self._loaded = load_model(job.model, job.revision, trust_remote_code=job.trust_remote_code, ranks=ranks)
        self._reader = OutputParser(self._loaded.tokenizer, schemas)
        shared = Renderer(job.prompt).shared
        self._prefixes = Prefixes(
            job,
            replace(own, prefill=f"{own.prefill} rank={ranks.rank}"),
            self._loaded,
            open_store(job.cache, Pins(job.cache.dir).is_pinned),
            {"model": job.model, "output": output_digest(job.result_file)},
            Progress(0, quiet=True),
            Report(),
            lambda: None,
            context_label(shared) if shared else "",
            ranks,
        )
        self._held: dict[str, list[Prefix]] = {}  # for answers to come

    def build(self, key: str, document: str, context: Sequence[int], shared: int, label: str) -> None:
        """Restore or build this rank's part of a prefix, which the first rank calls by its ``key``."""
        pieces = self._prefixes.cut(document, context, shared, label)
        self._held.setdefault(key, []).append(self._prefixes.prefix(pieces))

    def answer(self, prefixes: Sequence[str], requests: Sequence[Sequence[Any]]) -> None:
        """Generate answers as the first rank does; each request says by number which of the prefixes it has."""
        held = make_resident([self._take(key) for key in prefixes], self._job.cache.resident)
        asked = [
            Request(held[number], tokens, Settings(**settings | {"stop": tuple(settings["stop"])}), name)
            for number, tokens, settings, name in requests
        ]
        answer(self._loaded, asked, self._reader, self._job.generation.batch_size, ranks=self._ranks)

    def _take(self, key: str) -> Prefix:
        held = self._held.pop(key)
        if held[1:]:
            self._held[key] = held[1:]
        return held[0]


def _heed_the_second_sigint() -> None:
    """The first rank stops at Ctrl-C, and says so; a second one ends this process, whatever it waits for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        for _ in range(2):
            signal.sigwait({signal.SIGINT})
        os._exit(130)

    threading.Thread(target=wait, name="wait for Ctrl-C", daemon=True).start()
