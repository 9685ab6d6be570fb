"""The ranks of one model: processes that hold it between them, as mlx.launch starts them, and their messages.

The first rank leads: it reads documents, decides the next step and writes rows. The others are rank workers
(distributed/rank_worker.py). Every step that runs the model is taken by all ranks at once, and all of them send their
messages in the same order; otherwise a rank would wait for a message that never comes.

The messages go through MLX's collective operations. What a step does is the engine's and the rank worker's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from zlib import crc32

from pipeline.errors import Interrupted, JobError, PipelineError, RowError, one_line
from turboquant.runtime.versions import package_versions

if TYPE_CHECKING:
    import mlx.core as mx

    from pipeline.job.job import Job
    from turboquant.io.identity import Identity

RESUME_HINT = "what was committed is kept, and the same command resumes"
_RANK_LOST = "another rank is lost"


def is_rank_worker(job: Job, command: str) -> bool:
    """Return whether this process is a rank of the job's model, but not the first one.

    command: the command that has started this process, which an error repeats. Raises JobError if the job and the way
    in which this process was started do not agree.
    """
    count, rank = job.scale.ranks, os.environ.get("MLX_RANK")
    if count == 1 and rank is not None:
        raise JobError(
            "scale.ranks: mlx.launch has started this process, but the job's model is for one process; set "
            "scale.ranks to the number of processes that shall hold it together, or let each process answer a share "
            "of the documents with --shard, without mlx.launch"
        )
    if count > 1 and rank is None:
        raise JobError(
            f"scale.ranks: {count} processes are to hold the model between them, and this one is alone; start them "
            f"together: mlx.launch -n {count} -- {command} (on several machines with --hostfile FILE before the --)"
        )
    return count > 1 and rank != "0"


@contextmanager
def leading_ranks(job: Job) -> Iterator[RankGroup]:
    """Yield the group of ranks that this process leads; at the end of the block, tell the others that the run is over.

    The others are told nothing if the block was left in the middle of a step: then mlx.launch ends them.
    """
    ranks = join_ranks(job.scale.ranks)  # as early as possible: a rank gives up after half a minute without the others
    try:
        yield ranks
    finally:
        if not ranks.in_step:
            with suppress(PipelineError):
                ranks.broadcast(None)


def common_values(identity: Identity) -> dict[str, str]:
    """Return the values that must be equal on all ranks, or their results would differ."""
    import mlx.core as mx

    return {**asdict(identity), **package_versions(), "device": str(mx.default_device())}


def join_ranks(count: int) -> RankGroup:
    """Join the group of `count` processes that hold the model between them.

    A process calls this once, when it starts, and passes the group on: all ranks number their messages alike, so a
    second group of the same process would not agree with the others' numbers.

    Raises PipelineError if the processes do not meet, JobError if mlx.launch has started another number of them.
    """
    if count == 1:
        return SINGLE
    import mlx.core as mx

    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise PipelineError(f"scale.ranks: the {count} processes do not meet: {one_line(error)}") from error
    if group.size() != count:
        raise JobError(f"scale.ranks: {count}, but mlx.launch has started {group.size()}; let them be equal")
    return RankGroup(count, group.rank(), group)


class RankGroup:
    """This process's membership in a group of ranks. In a group of one, no method sends anything.

    count: the number of ranks. rank: this process's number, from 0. group: MLX's group; None stands for its default.
    in_step: whether the ranks are in the middle of a step; it stays True if the step failed.
    """

    def __init__(self, count: int, rank: int = 0, group: mx.distributed.Group | None = None) -> None:
        self.count, self.rank, self.group = count, rank, group
        self.in_step = False
        self._sums_taken = 0

    def broadcast(self, message: Any = None) -> Any:
        """Return the first rank's message, which JSON can express, on all ranks.

        Raises PipelineError if a rank is lost.
        """
        if self.count == 1:
            return message
        import mlx.core as mx
        import numpy as np

        sent = json.dumps(message).encode() if self.rank == 0 else b""
        with self.failing_together():
            length, checksum = self._verified_sums(len(sent), crc32(sent))
            content = mx.array(np.frombuffer(sent, np.uint8)) if sent else mx.zeros(length, mx.uint8)
            received = np.asarray(self._sum(content)).tobytes()
            if crc32(received) != checksum:
                raise RuntimeError(_RANK_LOST)
            return json.loads(received)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise PipelineError, which ends the run on all ranks, for any failure in the block.

        The ranks cannot go on, because after a failure none knows how far the others are. In a group of one, errors
        pass unchanged.
        """
        try:
            yield
        except (RowError, RuntimeError, ValueError, MemoryError) as error:
            if self.count == 1:
                raise
            raise PipelineError(
                f"rank {self.rank}: {one_line(error)}; none of the {self.count} ranks can go on without the others; "
                f"{RESUME_HINT}"
            ) from error

    @contextmanager
    def step(self, name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Take a step on all ranks: the first one runs the block, the others receive the name and the arguments."""
        self.in_step = True
        self.broadcast([name, arguments])
        try:
            with self.failing_together():
                yield
        except Interrupted:  # all ranks are interrupted at the same point
            self.in_step = False
            raise
        self.in_step = False

    def all_true(self, value: bool) -> bool:
        """Return whether the value is True on all ranks. Raises RuntimeError if a rank is lost."""
        return value if self.count == 1 else self._verified_sums(int(value)) == [self.count]

    def synchronize(self, stream: Any) -> None:
        """Wait until a stream has no unfinished messages. Raises RuntimeError if a rank was lost meanwhile."""
        if self.count > 1:
            import mlx.core as mx

            mx.synchronize(stream)
            self.all_true(True)

    def check_interrupted(self, check: Callable[[], None]) -> None:
        """Raise Interrupted on all ranks if `check` raises it on one of them."""
        try:
            check()
        except Interrupted:
            self.all_true(False)
            raise
        if not self.all_true(True):
            raise Interrupted("interrupted")

    def first_ranks_sampler(self, sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """Return a sampler that gives the first rank's tokens on all ranks: machines of two kinds round differently."""
        if self.count == 1:
            return sampler
        # Every rank samples, and all but the first multiply by 0: so the sum comes after the model's own messages.
        return lambda logprobs: self._sum(sampler(logprobs) * int(self.rank == 0))

    def _verified_sums(self, *numbers: int) -> list[int]:
        """Return each number's sum over all ranks. Raises RuntimeError if a rank is lost.

        MLX may then return any values instead of raising; so every rank adds a number that depends on its rank and on
        how many sums it has taken, whose total all of them know.
        """
        import mlx.core as mx
        import numpy as np

        self._sums_taken += 1
        given = mx.array([self._sums_taken * (self.rank + 1), *numbers], mx.int64)
        total: list[int] = np.asarray(self._sum(given)).tolist()
        if total[0] != self._sums_taken * self.count * (self.count + 1) // 2:
            raise RuntimeError(_RANK_LOST)
        return total[1:]

    def _sum(self, x: mx.array) -> mx.array:
        import mlx.core as mx

        return mx.distributed.all_sum(x, group=self.group)


SINGLE = RankGroup(1)
