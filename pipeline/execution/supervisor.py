"""The supervisor starts the model's process, shows its progress, and starts it again if it dies.

A model that needs more memory than there is does not raise an exception: its process is killed, or aborts. This side
never imports MLX and needs little memory, so it survives. What happens to the documents in hand is decided by
quarantine.py.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Event, Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.execution.context import RunOptions
from pipeline.execution.display import RunDisplay
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.messages import (
    DocumentsDone,
    DocumentsStarted,
    Failed,
    Finished,
    PrefillAdvanced,
    RestoreAdvanced,
    RunRequest,
    RunStarted,
    receive,
)
from pipeline.execution.processes import SPAWN, cause_of_death
from pipeline.execution.quarantine import Quarantine, Verdict, name_documents, quarantine_error
from pipeline.execution.worker import run_in_process
from pipeline.job.shards import Shard
from pipeline.models.ranks import RESUME_HINT
from pipeline.output.run_file import mark_ended
from pipeline.progress import Pace
from pipeline.report import Report
from pipeline.signals import stops_handled, stops_held_back

if TYPE_CHECKING:
    from pipeline.job.job import Job

_MAIN_MODULE = Lock()  # held while it is hidden: of two threads, the second would put back what the first had hidden
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """A Python program that runs a job. on_progress: receives the run's numbers. stop: set to interrupt the run."""

    on_progress: Callable[[Pace], None] | None = None
    stop: Event | None = None


def supervise(
    job: Job,
    quiet: bool = False,
    options: RunOptions | None = None,
    metrics: Path | None = None,
    shard: Shard | None = None,
    caller: Caller | None = None,
) -> Report:
    """Run a job, or resume it, in a process of its own, and show its progress unless ``quiet``.

    metrics: a file that is kept current with the run's numbers. shard: the share that the job was loaded for.
    Returns and raises what `Runner.run` does; also KeyboardInterrupt if the user stopped the run at once, and
    PipelineError if the process keeps dying and no document is to blame. In another thread than the main one, signals
    do not interrupt the run. caller: None for the command line.
    """
    name = f"{job.name} {shard}" if shard else job.name
    display = RunDisplay(name, quiet, metrics, caller.on_progress if caller else None)
    return _Supervisor(job, display, options or RunOptions(), shard, caller).run()


class _Supervisor:
    def __init__(
        self, job: Job, display: RunDisplay, options: RunOptions, shard: Shard | None, caller: Caller | None
    ) -> None:
        self._job, self._options, self._shard, self._display, self._caller = job, options, shard, display, caller
        self._started = time.monotonic()
        self._report, self._finished = Report(), FinishedDocuments()  # the documents that the report counts
        self._quarantine = Quarantine()
        self._quarantined: dict[str, str] = {}  # documents that become errors, with the reason
        self._separated: set[str] = set()  # documents that share no batch any more
        self._in_hand: tuple[str, ...] = ()  # the documents that the process works on; () if workers of its own do
        self._has_begun = False  # whether the process, or a worker of its own, has worked on documents
        self._has_lock = False  # whether the result is locked by this run
        self._pid: int | None = None
        self._stops_asked = 0
        self._rank_lost = False

    def run(self) -> Report:
        with self._display, self._signals_passed_on():
            try:
                while True:
                    outcome = self._run_process()
                    if isinstance(outcome, Finished):
                        return outcome.report
                    if isinstance(outcome, Failed):
                        outcome.reraise()
                    if self._rank_lost:
                        raise PipelineError(
                            "stopped by SIGTERM, as mlx.launch does when another of the processes that hold the model "
                            f"ends; {RESUME_HINT}"
                        )
                    if self._stops_asked:
                        raise KeyboardInterrupt
                    self._handle_death(outcome)
            except BaseException as error:  # one of the caller's `on_progress` too
                if self._has_lock:  # otherwise the run file may be another run's
                    mark_ended(self._job, error)
                raise

    def _run_process(self) -> Finished | Failed | str:
        """Start the process and receive its messages. Return the last one, or the cause of death if there is none."""
        self._in_hand, self._has_begun, started = (), False, time.monotonic()
        with self._process() as (process, connection):
            while (message := receive(connection, self._wait)) is not None:
                self._has_lock |= isinstance(message, RunStarted)
                self._display.show(message)
                self._stop_if_asked()
                if isinstance(message, Finished | Failed):
                    return message
                if isinstance(message, PrefillAdvanced | RestoreAdvanced):
                    self._has_begun = True
                elif isinstance(message, DocumentsStarted):
                    self._in_hand, self._has_begun = message.document_ids, True
                elif isinstance(message, DocumentsDone):
                    self._report = message.report
                    self._finished.add(message.document_ids)
                    self._quarantine.forget(())  # the model was loaded, so deaths before the first document are over
                    if set(self._in_hand) <= set(message.document_ids):
                        self._in_hand = ()
            return cause_of_death(process, started)

    @contextmanager
    def _process(self) -> Iterator[tuple[SpawnProcess, Connection]]:
        """Start the process; it is gone when the block is left."""
        report = replace(self._report, seconds=time.monotonic() - self._started)
        level = logging.getLogger("pipeline").getEffectiveLevel()
        request = RunRequest(
            self._job,
            report,
            self._finished,
            self._quarantined,
            self._separated,
            self._options,
            self._shard,
            level,
        )
        receiver, sender = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=run_in_process, args=(sender, request), name="model")
        with receiver:
            with sender, stops_held_back():  # also in the new process, which unblocks the signals when it is ready
                if self._stops_asked:
                    raise KeyboardInterrupt
                with _main_module_hidden() if self._caller else nullcontext():
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

    def _wait(self) -> None:
        self._display.refresh()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Interrupt the process, as Ctrl-C does, if the caller asks for that."""
        stop = self._caller.stop if self._caller else None
        if stop is not None and stop.is_set() and not self._stops_asked and self._pid is not None:
            self._stops_asked += 1
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGINT)

    def _handle_death(self, cause: str) -> None:
        """Decide what happens to the documents in hand. Raises PipelineError if starting again is of no use."""
        self._display.forget_rows_in_hand()
        self._report = replace(self._report, restarts=self._report.restarts + 1)
        documents, report = self._in_hand, self._report
        if documents:
            where = f"with {name_documents(documents)} in hand"
        elif report.documents and report.documents_done == report.documents:
            where = "while the result was written"
        elif self._has_begun:
            where = "after work on documents had begun"
        else:
            where = "before a document was in hand, most likely while the model was loaded"
        if self._job.scale.ranks > 1:
            raise PipelineError(f"the model's process {cause}, {where}; the others can't go on without; {RESUME_HINT}")
        verdict = self._quarantine.record_death(documents)
        if verdict is Verdict.RETRY:
            _log.warning("the model's process %s, %s; starting it again", cause, where)
        elif not documents:
            raise PipelineError(f"the model's process {cause}, twice, {where}; {RESUME_HINT}")
        elif verdict is Verdict.SEPARATE:
            _log.warning("the model's process %s, %s again; each is tried by itself", cause, where)
            self._separated.update(documents)
        else:
            _log.warning("the model's process %s, %s again; its rows become errors", cause, where)
            self._quarantined[documents[0]] = quarantine_error(cause)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Pass STOP_SIGNALS on to the process while the block runs. The third signal kills it.

        In a run with several ranks, SIGTERM kills it at once: mlx.launch sends it when another rank has ended, and this
        rank would wait for that one forever.
        """

        def pass_on(number: int, frame: Any) -> None:
            self._stops_asked += 1
            self._rank_lost |= number == signal.SIGTERM and self._job.scale.ranks > 1
            if self._pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL if self._rank_lost or self._stops_asked >= 3 else number)

        if self._job.scale.ranks > 1:  # the signal may still come after this run has ended by itself
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stops_handled(pass_on):
            yield


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keep a new process from importing the main module: a user's script without a guard would run once more."""
    with _MAIN_MODULE:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
