"""The prefix of a context: its segments are restored as far as the store has them, the others are built and stored.

Where a context is cut into segments depends on the job alone. So a prefix has the same bytes wherever an earlier run
was interrupted and whatever was in the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from pipeline.cache.codec import job_codec
from pipeline.cache.pins import output_digest
from pipeline.cache.store import Store
from pipeline.errors import BudgetTooSmall, DiskFull, GenerationFailed, StoreError, one_line
from pipeline.execution.context import RunContext
from pipeline.models.loading import LoadedModel, prefix_bytes
from pipeline.report import WorkStats
from turboquant import Prefix
from turboquant.caches.prefix import Segment, join, prefill_segment
from turboquant.runtime.device import on_cpu
from turboquant.runtime.versions import computing_versions, describe_difference

# Tokens a prefill step. A GPU needs a few thousand to be busy. On a CPU a step takes seconds, and Ctrl-C waits for it.
CPU_CHUNK, GPU_CHUNK = 512, 2048
_SPARE_BYTES = 256 << 20  # for states of layers that do not grow with the tokens

_log = logging.getLogger(__name__)


def segment_ends(tokens: int, shared: int, length: int | None) -> list[int]:
    """Return the ends of the segments of a context of ``tokens`` tokens.

    shared: tokens at the start that all documents have; they are segments of their own. length: the most tokens of a
    segment, or None for no limit.

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
    """The tokens of one segment of a context.

    start: tokens before them. key, parent: keys of the segment and of the one before it. about: what the store notes.
    """

    tokens: Sequence[int]
    start: int
    key: str
    parent: str | None
    about: Mapping[str, str | bool]


@dataclass(frozen=True)
class Restored:
    """The first segments of a context that were read ahead, and how long that took."""

    segments: Sequence[Segment] = ()
    seconds: float = 0.0


class PrefixProvider:
    """Provides the prefixes of a job, one at a time, while the next one may be restored by another thread.

    A segment that was built is stored by a thread of its own while the model goes on. ``stats`` counts the work.
    shared_label: label of the text that all contexts start with. With several ranks, each rank has the prefixes of its
    part of the model, and a segment is restored only if every rank has it.
    """

    def __init__(self, context: RunContext, model: LoadedModel, store: Store, shared_label: str = "") -> None:
        job = context.job
        self._context, self._model, self._store = context, model, store
        self.shared_label, self.stats = shared_label, WorkStats()
        self._codec = job_codec(job.cache)
        self._segment_length = job.cache.segment if job.cache.prefill == "streaming" else None
        self._about = {"model": job.model, "output": output_digest(job.result_file)}
        self._warned_of_store, self._redoes = False, job.versions == "redo"
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="segments")
        self._saving: Future[None] | None = None

    def cut(self, document_id: str, context: Sequence[int], shared: int, label: str) -> list[Piece]:
        """Cut a context into pieces. ``shared``: how many of its first tokens all documents have."""
        pieces: list[Piece] = []
        key = ""
        for start, stop in pairwise([0, *segment_ends(len(context), shared, self._segment_length)]):
            parent, key = key, self._context.identity.key(context[start:stop], parent=key)
            about: dict[str, str | bool] = {
                **self._about,
                "label": label if start >= shared else self.shared_label,
                "document": document_id,
                "whole": stop == len(context),
            }
            pieces.append(Piece(context[start:stop], start, key, parent or None, about))
        return pieces

    def restore(self, pieces: Sequence[Piece]) -> Restored:
        """Load the first segments of a context, as far as the store has them. May be called by any thread."""
        started, segments = time.monotonic(), []
        for piece in pieces:
            segment = self._load(piece) if self._store.contains(piece.key) else None
            if segment is None:
                break
            segments.append(segment)
        return Restored(segments, time.monotonic() - started)

    def get(self, pieces: Sequence[Piece], restored: Restored | None = None) -> Prefix:
        """Return the prefix of a context.

        restored: the first segments, if they were read ahead. Raises GenerationFailed if the model fails, DiskFull if
        there is no room on the disk.
        """
        restored = restored or Restored()
        self.stats.add_seconds("restore", restored.seconds)
        self._store.protect([piece.key for piece in pieces])
        prefix: Prefix | None = None
        was_built = False
        for piece, segment in zip_longest(pieces, restored.segments):
            extended = self._extend_from_store(piece, prefix, segment)
            if not self._context.ranks.all_true(extended is not None):
                extended, this_was_built = self._extend_by_building(piece, prefix)
                was_built |= this_was_built
            prefix = extended
        assert prefix is not None
        self.stats.context_tokens += sum(len(piece.tokens) for piece in pieces)
        self.stats.prefixes_built += was_built
        self.stats.prefixes_restored += not was_built
        self.stats.prefix_bytes += prefix.nbytes
        self.stats.prefix_bits += prefix.effective_bits
        return prefix

    def wait_until_stored(self) -> None:
        """Wait until the segment that was built last is stored. Raises DiskFull."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _load(self, piece: Piece) -> Segment | None:
        label, whole = str(piece.about["label"]), bool(piece.about["whole"])
        estimate = prefix_bytes(self._codec, self._model.config, len(piece.tokens))
        # More than all layers take uncompressed, so that a forged file cannot ask for any amount of memory.
        most_bytes = 64 * estimate + _SPARE_BYTES if estimate else None
        identity = self._context.identity
        segment = self._store.load(piece.key, piece.start, self._codec, identity, label, whole, most_bytes)
        if segment is not None and self._redoes and _of_other_versions(segment):
            return None
        if segment is not None:
            self._context.observer.restore_advanced(len(piece.tokens))
        return segment

    def _extend_from_store(self, piece: Piece, prefix: Prefix | None, segment: Segment | None = None) -> Prefix | None:
        """Return the prefix with a piece that is in the store or was read ahead; None if it is not there."""
        if segment is None:
            self.wait_until_stored()
            with self.stats.timed("restore"):
                segment = self._load(piece)
        try:
            if segment is None:
                return None
            extended = _extend(prefix, segment)
            if difference := _of_other_versions(segment):
                self.stats.segments_of_other_versions += 1
                self.stats.other_versions = difference
            return extended
        except ValueError as error:  # the segment of another parent, though its checksums are right
            self._store.reject(piece.key, one_line(error))
            return None

    def _extend_by_building(self, piece: Piece, prefix: Prefix | None) -> tuple[Prefix, bool]:
        """Return the prefix with a piece that the store did not have, and whether it was built here.

        While it is built and stored, no other run builds it. If another run has built it meanwhile, it is loaded.
        """
        context, key = self._context, piece.key
        with ExitStack() as claim:  # moves on to the thread that stores the segment
            if context.ranks.count == 1:  # with several ranks, two runs could wait for each other, so all build
                claim.enter_context(self._store.build_lock(key, context.check))
                if self._store.contains(key) and (extended := self._extend_from_store(piece, prefix)) is not None:
                    return extended, False
            context.ranks.check_interrupted(context.check)
            needed = prefix_bytes(self._codec, self._model.config, len(piece.tokens)) // context.ranks.count
            can_store = self._try_to_store(lambda: self._store.make_room(needed))
            _log.debug("prefix %.12s is built: %d tokens behind %d", key, len(piece.tokens), piece.start)
            context.observer.prefill_started(str(piece.about["document"]), len(piece.tokens))
            try:
                with self.stats.timed("prefill"):
                    chunk = CPU_CHUNK if on_cpu() else GPU_CHUNK
                    model = self._model.model
                    segment = prefill_segment(model, piece.tokens, self._codec, prefix, chunk, self._chunk_done)
            except (RuntimeError, ValueError, MemoryError) as error:
                may_pass = not isinstance(error, ValueError)
                raise GenerationFailed(f"the prefill failed: {one_line(error)}", may_pass) from error
            finally:
                context.observer.prefill_ended()
            self.stats.prefilled_tokens += len(piece.tokens)
            if can_store:
                self._saving = self._saver.submit(self._save, claim.pop_all(), piece, segment)
            return _extend(prefix, segment), True

    def _chunk_done(self, tokens: int) -> None:
        self._context.observer.prefill_advanced(tokens)
        self._context.ranks.check_interrupted(self._context.check)

    def _save(self, claim: ExitStack, piece: Piece, segment: Segment) -> None:
        identity = self._context.identity
        with claim:
            self._try_to_store(lambda: self._store.save(piece.key, segment, identity, piece.parent, piece.about))

    def _try_to_store(self, action: Callable[[], object]) -> bool:
        """Return whether the store allowed the action. If it did not, the job goes on without storing.

        Raises DiskFull, which ends the job: results need room too.
        """
        try:
            action()
        except DiskFull:
            raise
        except StoreError as error:
            if not self._warned_of_store:
                reason = "the budget has no room" if isinstance(error, BudgetTooSmall) else "that fails"
                _log.warning("%s; the job goes on without storing prefixes where %s", error, reason)
            self._warned_of_store = True
            return False
        return True


def _of_other_versions(segment: Segment) -> str:
    return describe_difference(segment.versions, computing_versions())


def _extend(prefix: Prefix | None, segment: Segment) -> Prefix:
    before = [] if prefix is None else [Segment(prefix.layers, 0, prefix.tokens)]
    return join([*before, segment])
