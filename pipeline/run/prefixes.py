"""The prefix of a context: its segments restored as far as the store has them, the others built and stored.

Knows where a context is cut into segments and in which order things are tried; how a segment is prefilled, stored or
attended to is others' work. The cuts depend on the job alone, so a prefix has the same bytes wherever a run was cut
off and whatever was in the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from threading import Lock

from pipeline.cache.store import Store
from pipeline.errors import BudgetTooSmall, DiskFull, GenerationFailed, StoreError, one_line
from pipeline.job.job import Job
from pipeline.models.loading import LoadedModel, prefix_bytes
from pipeline.models.ranks import SINGLE, RankGroup
from pipeline.progress import RunObserver
from pipeline.report import Report
from pipeline.run.fingerprint import cache_codec
from pipeline.run.prefill import prefill
from turboquant import Prefix
from turboquant.caches.prefix import Segment, join
from turboquant.io.identity import Identity

_log = logging.getLogger(__name__)


def segment_ends(tokens: int, shared: int, length: int | None) -> list[int]:
    """Where the segments of a context end: ``shared`` tokens are apart; ``length`` cuts what is longer, if not None.

    >>> segment_ends(10_000, 0, None)
    [10000]
    >>> segment_ends(10_000, 1500, 4096)
    [1500, 5596, 9692, 10000]
    """
    ends = []
    for start, stop in pairwise([0, shared, tokens] if 0 < shared < tokens else [0, tokens]):
        ends += [*range(start + length, stop, length), stop] if length else [stop]
    return ends


@dataclass(frozen=True)
class Piece:
    """The tokens of one segment, ``start`` others before them; its key and its parent's; what the store is told."""

    tokens: Sequence[int]
    start: int
    key: str
    parent: str | None
    about: Mapping[str, str | bool]


class Prefixes:
    """Gives a job's prefixes, one at a time; what the store has of the next may be read meanwhile.

    A segment that was built is stored while the model goes on; ``settle`` waits until that is done.

    about: what is to be told in the store of every segment. check: raises Interrupted where the user asked to stop.
    shared_label: of what all documents have in common. ranks: those that hold the model between them, each of which has
    the prefixes of its part, and restores one or builds it where all do.
    """

    def __init__(
        self,
        job: Job,
        identity: Identity,
        loaded: LoadedModel,
        store: Store,
        about: Mapping[str, str],
        progress: RunObserver,
        report: Report,
        check: Callable[[], None],
        shared_label: str = "",
        ranks: RankGroup = SINGLE,
    ) -> None:
        self._identity, self._loaded, self._store = identity, loaded, store
        self.shared_label, self._ranks = shared_label, ranks
        self._codec = cache_codec(job.cache)
        self._length = job.cache.segment if job.cache.prefill == "streaming" else None
        self._about, self._progress, self._report, self._check = about, progress, report, check
        self._can_store = True
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="segments")
        self._saving: Future[None] | None = None
        self._timing = Lock()

    def cut(self, document_id: str, context: Sequence[int], shared: int, label: str) -> list[Piece]:
        """The segments of a context whose first ``shared`` tokens all documents have."""
        pieces: list[Piece] = []
        key = ""
        for start, stop in pairwise([0, *segment_ends(len(context), shared, self._length)]):
            parent, key = key, self._identity.key(context[start:stop], parent=key)
            about: dict[str, str | bool] = {
                **self._about,
                "label": label if start >= shared else self.shared_label,
                "document": document_id,
                "whole": stop == len(context),
            }
            pieces.append(Piece(context[start:stop], start, key, parent or None, about))
        return pieces

    def restore(self, pieces: Sequence[Piece]) -> list[Segment]:
        """The first segments of a context, as far as the store has them; from any thread."""
        restored: list[Segment] = []
        for piece in pieces:
            segment = self._load(piece) if self._store.contains(piece.key) else None
            if segment is None:
                break
            restored.append(segment)
        return restored

    def prefix(self, pieces: Sequence[Piece], restored: Sequence[Segment] = ()) -> Prefix:
        """The prefix of a context, cut into pieces of which the first may be restored already.

        Raises GenerationFailed where the model fails, DiskFull where there is no room to store it.
        """
        self._store.protect([piece.key for piece in pieces])
        prefix: Prefix | None = None
        built = False
        for piece, ready in zip_longest(pieces, restored):
            stored = self._stored(piece, prefix, ready)
            if self._ranks.all_true(stored is not None):
                prefix = stored
            else:
                prefix, was_stored = self._built(piece, prefix)
                built |= not was_stored
        assert prefix is not None
        self._report.context_tokens += sum(len(piece.tokens) for piece in pieces)
        self._count(prefix, built)
        return prefix

    def settle(self) -> None:
        """Wait until what was built is stored. Raises DiskFull where there is no room for it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _stored(self, piece: Piece, before: Prefix | None, ready: Segment | None = None) -> Prefix | None:
        """The prefix with a piece that the store has, which may be loaded already."""
        if ready is None:
            self.settle()
            ready = self._load(piece)
        try:
            return None if ready is None else _extended(before, ready)
        except ValueError as error:  # another parent's, though all its checksums are right
            self._store.reject(piece.key, one_line(error))
            return None

    def _built(self, piece: Piece, before: Prefix | None) -> tuple[Prefix, bool]:
        """The prefix with a piece that the store did not have, and whether it has it by now."""
        with ExitStack() as claim:
            if self._ranks.count == 1:  # two runs could wait for each other on two ranks, so there all build
                claim.enter_context(self._store.build_lock(piece.key, self._check))
                # Another run may have built it meanwhile, and be done with it before there was anything to wait for.
                if self._store.contains(piece.key) and (stored := self._stored(piece, before)) is not None:
                    return stored, True
            return _extended(before, self._build(piece, before, claim)), False

    def _save(self, claim: ExitStack, piece: Piece, segment: Segment) -> None:
        with claim:
            self._lets(lambda: self._store.save(piece.key, segment, self._identity, piece.parent, piece.about))

    def _load(self, piece: Piece) -> Segment | None:
        label, whole = str(piece.about["label"]), bool(piece.about["whole"])
        with self._timed("restore_seconds"):
            return self._store.load(piece.key, piece.start, self._codec, self._identity, label, whole)

    def _build(self, piece: Piece, before: Prefix | None, claim: ExitStack) -> Segment:
        """Prefill a segment, and begin to store it where that is possible; ``claim`` ends when it is."""
        self._ranks.check_interrupted(self._check)
        needed = prefix_bytes(self._codec, self._loaded.config, len(piece.tokens)) // self._ranks.count
        can_store = self._lets(lambda: self._store.make_room(needed))
        _log.debug("prefix %.12s is built: %d tokens behind %d", piece.key, len(piece.tokens), piece.start)
        self._progress.start_prefill(str(piece.about["document"]), len(piece.tokens))
        try:
            with self._timed("prefill_seconds"):
                segment = prefill(self._loaded.model, piece.tokens, self._codec, before, self._prefilled)
        except (RuntimeError, ValueError, MemoryError) as error:
            may_pass = not isinstance(error, ValueError)
            raise GenerationFailed(f"the prefill failed: {one_line(error)}", may_pass) from error
        finally:
            self._progress.end_prefill()
        self._report.prefilled_tokens += len(piece.tokens)
        if can_store:
            self._saving = self._saver.submit(self._save, claim.pop_all(), piece, segment)
        return segment

    def _lets(self, store: Callable[[], object]) -> bool:
        """Whether the folder lets something be done to it; where it refuses, the job goes on without storing.

        Raises DiskFull: a full disk stops the job, for results need room too.
        """
        try:
            store()
        except DiskFull:
            raise
        except StoreError as error:
            if self._can_store:
                kind = "the budget has no room" if isinstance(error, BudgetTooSmall) else "that fails"
                _log.warning("%s; the job goes on without storing prefixes where %s", error, kind)
            self._can_store = False
            return False
        return True

    def _prefilled(self, tokens: int) -> None:
        self._ranks.check_interrupted(self._check)
        self._progress.prefilled(tokens)

    def _count(self, prefix: Prefix, built: bool) -> None:
        report = self._report
        report.prefixes_built += built
        report.prefixes_restored += not built
        report.prefix_bytes += prefix.nbytes
        prefixes = report.prefixes_built + report.prefixes_restored
        report.effective_bits += (prefix.effective_bits - report.effective_bits) / prefixes

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            with self._timing:
                setattr(self._report, name, getattr(self._report, name) + time.monotonic() - started)


def _extended(prefix: Prefix | None, segment: Segment) -> Prefix:
    before = [] if prefix is None else [Segment(prefix.layers, 0, prefix.tokens)]
    return join([*before, segment])
