"""Values that every part of a run shares."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.job.job import Job
from pipeline.job.selection import Selection
from pipeline.models.ranks import SINGLE, RankGroup
from pipeline.progress import RunObserver

if TYPE_CHECKING:
    from turboquant.io.identity import Identity


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that the command line gives besides the job.

    selection: the part of the job that is answered; all other rows stay as they are. keep_failed: rows that failed in
    an earlier run are not tried again. stop_at_failure: the run ends at the first new failed row. prune: a run of the
    whole job removes the rows that the job does not ask for any more. command: see `RunFile`.
    """

    selection: Selection = field(default_factory=Selection)
    keep_failed: bool = False
    stop_at_failure: bool = False
    prune: bool = False
    command: str | None = None


@dataclass(frozen=True)
class RunContext:
    """The values that every part of a run needs.

    identity: of the segments and rows of this job. schemas: the JSON schemas that answers may have to follow.
    check: raises Interrupted if the user asked to stop. ranks: the processes that hold the model together.
    """

    job: Job
    identity: Identity
    schemas: Collection[str] = ()
    observer: RunObserver = field(default_factory=RunObserver)
    check: Callable[[], None] = lambda: None
    ranks: RankGroup = SINGLE
