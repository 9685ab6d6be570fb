"""Processes that hold one model between them, as mlx.launch starts them: how they come together, and what they say.

The first of them leads: it reads documents, decides what is done next, and writes rows. The others follow: see
rank_worker.py. Whatever runs the model is done by all at once, and all talk in the same order, or each would wait for
what another never says.

Knows messages and MLX's collective operations; nothing of what is done.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any
from zlib import crc32

from pipeline.errors import Interrupted, JobError, PipelineError, RowError, one_line

if TYPE_CHECKING:
    import mlx.core as mx

    from pipeline.job.job import Job
    from turboquant.io.identity import Identity

RESUMES = "what was committed is kept, and the same command resumes"
_LOST = "another rank is lost"


def follows(job: Job) -> bool:
    """Whether this process is to follow another. Raises JobError where the job and who started it disagree."""
    count, rank = job.scale.ranks, os.environ.get("MLX_RANK")
    if count == 1 and rank is not None:
        raise JobError(
            "scale.ranks: mlx.launch has started this process, and the job's model is to be in one alone; set "
            "scale.ranks to how many shall hold it between them, or have each answer a share by --shard, without "
            "mlx.launch"
        )
    if count > 1 and rank is None:
        raise JobError(
            f"scale.ranks: {count} processes are to hold the model between them, and this one is alone; start them "
            f"together: mlx.launch -n {count} -- pipeline run JOB, on several machines with --hostfile FILE"
        )
    return count > 1 and rank != "0"


@contextmanager
def leading(job: Job) -> Iterator[None]:
    """While the block runs, this process leads the others, if the job has any; where it ends, so do they.

    Unless it is left amid what all do: then mlx.launch ends them.
    """
    ranks = meet(job.scale.ranks)  # at once: who meets nobody gives up after half a minute
    try:
        yield
    finally:
        if not ranks.amid:
            with suppress(PipelineError):
                ranks.share(None)


def common_ground(identity: Identity) -> dict[str, str]:
    """What must be the same on all ranks, or they would not do the same."""
    import mlx.core as mx

    versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}
    return {**asdict(identity), **versions, "device": str(mx.default_device())}


def join_ranks(count: int) -> RankGroup:
    """Join the group of `count` processes that hold the model between them.

    A process calls this once, when it starts, and passes the group on: all ranks number their messages alike, so a
    second group of the same process would not agree with the others' numbers.

    Raises PipelineError if the processes do not meet, JobError if mlx.launch has started another number of them.
    """
    return RankGroup(count) if count > 1 else SINGLE


meet = functools.cache(join_ranks)


class RankGroup:
    """So many processes, of which this is number ``rank``; ``group`` is MLX's. One alone says nothing to anybody.

    amid: whether they are at work together, or were when that failed. To be had from `join_ranks`. Raises
    PipelineError where they don't meet, JobError where they are not so many.
    """

    def __init__(self, count: int) -> None:
        self.count, self.rank, self.amid, self._times = count, 0, False, 0
        self.group: mx.distributed.Group | None = None
        if count == 1:
            return
        import mlx.core as mx

        try:
            self.group = mx.distributed.init(strict=True)
        except RuntimeError as error:
            raise PipelineError(f"scale.ranks: the {count} processes don't meet: {one_line(error)}") from error
        self.rank = self.group.rank()
        if self.group.size() != count:
            raise JobError(f"scale.ranks: {count}, but mlx.launch has started {self.group.size()}; let them be equal")

    def share(self, message: Any = None) -> Any:
        """What the first rank says, on all of them: what JSON can say. Raises PipelineError where one is lost."""
        if self.count == 1:
            return message
        import mlx.core as mx
        import numpy as np

        said = json.dumps(message).encode() if self.rank == 0 else b""
        with self.together():
            length, checksum = self._sums(len(said), crc32(said))
            content = mx.array(np.frombuffer(said, np.uint8)) if said else mx.zeros(length, mx.uint8)
            heard = np.asarray(self._sum(content)).tobytes()
            if crc32(heard) != checksum:
                raise RuntimeError(_LOST)
            return json.loads(heard)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in the block ends all ranks: how far the others are is not known. Raises PipelineError."""
        try:
            yield
        except (RowError, RuntimeError, ValueError, MemoryError) as error:
            if self.count == 1:
                raise
            told = f"rank {self.rank}: {one_line(error)}; of the {self.count} none goes on without the others"
            raise PipelineError(f"{told}; {RESUMES}") from error

    @contextmanager
    def doing(self, what: str, **told: Any) -> Iterator[None]:
        """All ranks do something together, the first in the block, the others as they are told."""
        self.amid = True
        self.share([what, told])
        try:
            with self.together():
                yield
        except Interrupted:  # on all of them
            self.amid = False
            raise
        self.amid = False

    def everywhere(self, fine: bool) -> bool:
        """Whether it is on all ranks, of which each says what is on it. Raises RuntimeError where one is lost."""
        return fine if self.count == 1 else self._sums(int(fine)) == [self.count]

    def settle(self, stream: Any) -> None:
        """Wait until nothing is being said in a stream. Raises RuntimeError where a rank was lost meanwhile."""
        if self.count > 1:
            import mlx.core as mx

            mx.synchronize(stream)
            self.everywhere(True)

    def check(self, check: Callable[[], None]) -> None:
        """Raise Interrupted on all ranks where ``check`` raises it on one."""
        try:
            check()
        except Interrupted:
            self.everywhere(False)
            raise
        if not self.everywhere(True):
            raise Interrupted("interrupted")

    def agreeing(self, sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """A sampler whose tokens are the first rank's on all: machines of different kinds round differently."""
        if self.count == 1:
            return sampler
        # Times 0, so that the sum comes behind all that the model says on every rank.
        return lambda logprobs: self._sum(sampler(logprobs) * int(self.rank == 0))

    def _sums(self, *numbers: int) -> list[int]:
        """Each number's sum over all ranks, which is none if one is lost: MLX may then give anything, and not raise."""
        import mlx.core as mx
        import numpy as np

        self._times += 1
        given = mx.array([self._times * (self.rank + 1), *numbers], mx.int64)
        total: list[int] = np.asarray(self._sum(given)).tolist()
        if total[0] != self._times * self.count * (self.count + 1) // 2:
            raise RuntimeError(_LOST)
        return total[1:]

    def _sum(self, x: mx.array) -> mx.array:
        import mlx.core as mx

        return mx.distributed.all_sum(x, group=self.group)


SINGLE = RankGroup(1)
