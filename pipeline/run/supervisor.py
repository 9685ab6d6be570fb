"""A run whose model lives in a process of its own, which may die without taking the run along.

A model that needs more memory than there is does not raise: its process is killed, or aborts. So this side, which
needs no memory to speak of and never imports MLX, shows the progress and starts the process again. A document in whose
hands it dies twice gets error rows, and the run goes on behind it.

Knows processes, signals and whose turn it was; nothing of how a run is done.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import errors
from pipeline.errors import PipelineError
from pipeline.job.shards import Shard
from pipeline.models.ranks import RESUME_HINT
from pipeline.output.run_file import mark_ended
from pipeline.report import Report
from pipeline.retry import DEATHS, OnFailure, named, twice_died
from pipeline.run.display import RunDisplay
from pipeline.run.worker import DocumentsDone, DocumentsStarted, Failed, Finished, Message, RunStarted, Task, work
from pipeline.signals import stops_handled, stops_held_back

if TYPE_CHECKING:
    from pipeline.job.job import Job

_SECONDS_OF_PATIENCE = 1.0
SPAWN = multiprocessing.get_context("spawn")  # not fork, which neither Metal nor CUDA survives
_MEMORY_SIGNALS = (signal.SIGKILL, signal.SIGABRT)  # the kernel's way and Metal's
_log = logging.getLogger(__name__)


def supervise(
    job: Job,
    quiet: bool = False,
    on_failure: OnFailure | None = None,
    metrics: Path | None = None,
    shard: Shard | None = None,
) -> Report:
    """Run a job, or resume it, in a process of its own, with bars and lines unless ``quiet``.

    ``shard``: whose the job is when it was loaded for one. ``metrics`` is a file that is to hold the run's numbers
    while it goes on. Returns and raises what `Runner.run` does, and KeyboardInterrupt where the user had the run
    stopped at once. Raises PipelineError where the process keeps dying and no document is to blame. To be called from
    the main thread.
    """
    name = f"{job.name} {shard}" if shard else job.name
    return _Supervisor(job, RunDisplay(name, quiet, metrics), on_failure or OnFailure(), shard).run()


class _Supervisor:
    def __init__(self, job: Job, view: RunDisplay, on_failure: OnFailure, shard: Shard | None) -> None:
        self._job, self._on_failure, self._shard = job, on_failure, shard
        self._started = time.monotonic()
        self._report = Report()  # as of the last documents that are done
        self._deaths: Counter[tuple[str, ...]] = Counter()  # by the documents in hand
        self._condemned: dict[str, str] = {}
        self._alone: set[str] = set()  # documents that share no batch any more
        self._in_hand: tuple[str, ...] = ()  # the documents the process has begun on
        self._view = view
        self._begun = False  # whether the result is this run's
        self._pid: int | None = None
        self._stops_asked = 0
        self._deserted = False  # by the other ranks of the job, if it has any

    def run(self) -> Report:
        with self._view, self._passing_signals_on():
            try:
                return self._run_to_the_end()
            except (PipelineError, KeyboardInterrupt) as error:
                if self._begun:  # else the file may be another run's
                    mark_ended(self._job, error)
                raise

    def _run_to_the_end(self) -> Report:
        while True:
            outcome = self._run_process()
            if isinstance(outcome, Finished):
                return outcome.report
            if isinstance(outcome, Failed):
                reraise(outcome)
            if self._deserted:
                raise PipelineError(
                    "stopped by SIGTERM, as mlx.launch does when another of the processes that hold the model ends; "
                    f"{RESUME_HINT}"
                )
            if self._stops_asked:
                raise KeyboardInterrupt
            self._bury(cause_of_death(outcome))

    def _run_process(self) -> Finished | Failed | int:
        """Start the process and listen until it ends: its last message, or its exit code where there is none."""
        self._in_hand = ()
        with self._process() as (process, connection):
            while (message := receive(connection, self._view.refresh)) is not None:
                self._view.show(message)
                if isinstance(message, Finished | Failed):
                    return message
                if isinstance(message, RunStarted):
                    self._begun = True
                elif isinstance(message, DocumentsStarted):
                    self._in_hand = message.document_ids
                elif isinstance(message, DocumentsDone):
                    self._report = message.report
                    self._deaths.pop((), None)
                    if set(self._in_hand) <= set(message.document_ids):
                        self._in_hand = ()
            process.join()
            assert process.exitcode is not None
            return process.exitcode

    @contextmanager
    def _process(self) -> Iterator[tuple[SpawnProcess, Connection]]:
        """The process, started; gone when the block is left."""
        report = replace(self._report, seconds=time.monotonic() - self._started)
        level = logging.getLogger("pipeline").getEffectiveLevel()
        receiver, sender = SPAWN.Pipe(duplex=False)
        task = Task(self._job, report, self._condemned, self._alone, self._on_failure, self._shard, level)
        process = SPAWN.Process(target=work, args=(sender, task), name="model")
        with receiver:
            with sender, stops_held_back():  # also from the new process, which lets them in when it is ready
                if self._stops_asked:
                    raise KeyboardInterrupt
                process.start()
                self._pid = process.pid
            try:
                yield process, receiver
            except BaseException:
                process.kill()
                raise
            finally:
                process.join()
                self._pid = None

    def _bury(self, cause: str) -> None:
        """Decide what becomes of the document in hand; raises PipelineError where going on is no use."""
        self._view.forget_rows_in_hand()
        self._report = replace(self._report, restarts=self._report.restarts + 1)
        documents = self._in_hand
        self._deaths[documents] += 1
        where = f"with {named(documents)} in hand" if documents else self._stage()
        if self._job.scale.ranks > 1:
            raise PipelineError(f"the model's process {cause}, {where}; the others can't go on without; {RESUME_HINT}")
        if self._deaths[documents] < DEATHS:
            _log.warning("the model's process %s, %s; starting it again", cause, where)
        elif not documents:
            raise PipelineError(f"the model's process {cause}, twice, {where}; {RESUME_HINT}")
        elif len(documents) > 1:
            _log.warning("the model's process %s, %s again; each is tried by itself", cause, where)
            self._alone.update(documents)
        else:
            _log.warning("the model's process %s, %s again; its rows become errors", cause, where)
            self._condemned[documents[0]] = twice_died(cause)

    def _stage(self) -> str:
        report = self._report
        if report.documents and report.documents_done == report.documents:
            return "while the result was written"
        return "before a document was in hand, most likely while the model was loaded"

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        """While the block runs, what asks this process to stop asks the other; the third time it is killed.

        At once where it is a rank that waits for others, of which mlx.launch says by SIGTERM that one has ended.
        """

        def pass_on(number: int, frame: Any) -> None:
            self._stops_asked += 1
            self._deserted |= number == signal.SIGTERM and self._job.scale.ranks > 1
            if self._pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL if self._deserted or self._stops_asked >= 3 else number)

        if self._job.scale.ranks > 1:  # it may come yet when the run has ended by itself, before that is told
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stops_handled(pass_on):
            yield


def receive(connection: Connection, meanwhile: Callable[[], None] = lambda: None) -> Message | None:
    """The next message; None when there will be none. While there is none yet, ``meanwhile`` is called now and then."""
    try:
        while not connection.poll(_SECONDS_OF_PATIENCE):
            meanwhile()
        message: Message = connection.recv()
    except (EOFError, OSError):  # OSError: amid a message
        return None
    return message


def cause_of_death(exit_code: int) -> str:
    """What a process's exit code says, to follow the process's name."""
    if exit_code >= 0:
        return f"ended with exit status {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    guess = ", probably out of memory" if number in _MEMORY_SIGNALS else ""
    return f"was killed by signal {number} ({name}){guess}"


def reraise(failed: Failed) -> NoReturn:
    """Raise here what was raised in the process."""
    error: PipelineError = getattr(errors, failed.error)(failed.message)
    raise error from _InTheProcess(f"\n{failed.trace}")


class _InTheProcess(Exception):
    """The traceback of what was raised in the model's process, to be shown above this process's own."""
