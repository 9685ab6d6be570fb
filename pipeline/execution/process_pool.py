"""The pool of workers on this machine: processes with a model each, which share the cores of a CPU.

A matrix product of a small model is over before two cores have shared it out, so each core computes other documents.
Where memory does not hold a model for each core, a worker has several cores.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from pipeline.errors import PipelineError, one_line
from pipeline.execution.context import RunContext
from pipeline.execution.executor import Executor, LocalExecutor
from pipeline.execution.finished_documents import FinishedDocuments
from pipeline.execution.lease_worker import LeaseWorker
from pipeline.execution.pool_executor import PoolExecutor
from pipeline.execution.processes import SPAWN, cause_of_death, end_with_parent
from pipeline.execution.quarantine import MOST_DEATHS
from pipeline.execution.worker_pool import CALLS_AT_ONCE, NEVER_STARTED, Death, WorkerHandle, WorkerLost, WorkerPool
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.models.loading import model_folder, read_config, weights_bytes
from pipeline.report import WorkerReport
from pipeline.signals import STOP_SIGNALS, stops_held_back
from turboquant.runtime.machine import usable_memory
from turboquant.runtime.versions import computing_versions

SMALLEST_MODEL = 4 << 20  # bytes of weights; a smaller model has answered before a second process has started
_ROOM = 1 << 30  # bytes that a process needs besides the weights, for prefixes, activations and packages
_log = logging.getLogger(__name__)


def local_executor(context: RunContext, inputs: Inputs, finished: FinishedDocuments) -> Executor:
    """Return the executor of a run on this machine: this process answers, or several share the cores of a CPU."""
    processes, threads = processes_and_threads(context.job, inputs)
    if processes == 1:
        return LocalExecutor(context, inputs, finished)
    _log.info("%d processes with a model each; threads of each: %d", processes, threads)
    return PoolExecutor(context, inputs, finished, ProcessPool(context.job, processes, threads))


def processes_and_threads(job: Job, inputs: Inputs) -> tuple[int, int]:
    """Return how many processes answer the job on this machine, and how many threads each of them has."""
    from turboquant.runtime.blas import blas_in_use
    from turboquant.runtime.device import on_cpu

    return share_cores(job, inputs, blas_in_use().threads, on_cpu())


def share_cores(job: Job, inputs: Inputs, cores: int, on_cpu: bool) -> tuple[int, int]:
    """Return how many processes answer the job, and how many of the cores each of them has as threads of the BLAS.

    If the job leaves it open, there is one process on a GPU, and on a CPU as many as there are cores, as groups of
    documents, and as models fit in half of the memory. All of this is the same when a run is resumed.
    """
    wanted = job.scale.processes
    if wanted is None:
        wanted = cores if on_cpu and job.scale.ranks == 1 else 1
        if wanted > 1:
            folder = model_folder(job)
            weights = weights_bytes(folder, read_config(folder))
            fitting = usable_memory() // 2 // (weights + _ROOM)
            wanted = 1 if weights < SMALLEST_MODEL else max(1, min(wanted, fitting))
    if wanted > 1:
        wanted = max(1, sum(1 for _ in islice(inputs.groups(), wanted)))
    return wanted, max(1, cores // wanted)


@dataclass(eq=False, kw_only=True)
class ProcessHandle(WorkerHandle):
    """A worker in a process. connection: to it. started: by ``time.monotonic``. calls: those without a reply."""

    process: SpawnProcess
    connection: Connection
    started: float = field(default_factory=time.monotonic)
    calls: dict[int, Future[Any]] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_lost: bool = False

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Send a call to the process."""
        number, future = next(self.numbers), Future[Any]()
        with self.lock:
            if self.is_lost:
                future.set_exception(WorkerLost())
                return future
            self.calls[number] = future
        with suppress(OSError):  # the process has ended; the thread that receives fails all calls
            self.connection.send((number, method, arguments))
        return future

    def result(self, future: Future[Any]) -> Any:
        """Return what a call returned."""
        try:
            return future.result()
        except (WorkerLost, PipelineError):
            raise
        except Exception as error:
            raise PipelineError(f"{self.name}: {one_line(error)}") from error

    def receive(self) -> None:
        """Receive replies until the process has ended."""
        with suppress(EOFError, OSError):
            while True:
                number, value, error = self.connection.recv()
                future = self.calls.pop(number)
                future.set_result(value) if error is None else future.set_exception(error)
        with self.lock:
            self.is_lost = True
        for future in list(self.calls.values()):
            future.set_exception(WorkerLost())


class ProcessPool(WorkerPool):
    """Workers in processes of this machine. count: how many. threads: of the BLAS, for each. worker: their class."""

    seconds_between_counts = 1.0

    def __init__(self, job: Job, count: int, threads: int, worker: type[LeaseWorker] = LeaseWorker) -> None:
        super().__init__()
        self._job, self._count, self._threads, self._worker = job, count, threads, worker
        self.processes = count
        self._started = self._failed_starts = 0

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of packages and the device, which are the same for all."""
        return computing_versions()

    def start_missing(self) -> list[WorkerHandle]:
        """Start as many workers as there are to be, unless the last ones died before they were ready."""
        if self._failed_starts >= MOST_DEATHS:
            if not self.workers:
                raise PipelineError(f"the model's process died, {NEVER_STARTED}")
            return []  # others may still load the model, or have loaded it
        return [self._start() for _ in range(self._count - len(self.workers))]

    def note_ready(self, worker: WorkerHandle) -> None:
        """Note that a worker is ready."""
        self._failed_starts = 0

    def remove(self, worker: WorkerHandle, error: WorkerLost) -> Death:
        """Remove a worker that was lost. If memory was short, go on with one fewer."""
        assert isinstance(worker, ProcessHandle)
        self.workers.pop(worker.name)
        cause = cause_of_death(worker.process, worker.started)
        self._failed_starts = self._failed_starts + 1 if worker.store is None else 0
        if worker.process.exitcode == -signal.SIGKILL and self._count > 1:
            self._count -= 1
            _log.warning("going on with %d of the processes, because memory may be short", self._count)
        return Death(cause)

    def reports(self, worker: WorkerHandle) -> dict[str, WorkerReport]:
        """Return nothing: the processes of one machine are not told apart."""
        return {}

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            assert isinstance(worker, ProcessHandle)
            worker.process.kill()
            worker.process.join()
        self.workers.clear()

    def _start(self) -> ProcessHandle:
        self._started += 1
        name = f"process {self._started}"
        ours, theirs = SPAWN.Pipe()
        level = logging.getLogger("pipeline").getEffectiveLevel()
        arguments = theirs, self._worker, self._job, level, self._threads
        process = SPAWN.Process(target=_serve, args=arguments, name=name, daemon=True)
        with theirs, stops_held_back():
            process.start()
        worker = ProcessHandle(name, process=process, connection=ours)
        self.workers[name] = worker
        threading.Thread(target=worker.receive, name=f"receive from {name}", daemon=True).start()
        return worker


def _serve(connection: Connection, worker_class: type[LeaseWorker], job: Job, level: int, threads: int) -> None:
    """Answer calls until the connection ends; the entry of a worker's process."""
    os.setsid()  # only the parent hears Ctrl-C; it tells its workers to stop
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # read when NumPy and MLX are imported
        os.environ[variable] = str(threads)
    worker, lock = worker_class(job, level, logs_to_stderr=False), threading.Lock()

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        value, failure = None, None
        try:
            value = getattr(worker, method)(*arguments)
        except Exception as error:
            failure = RuntimeError(f"{type(error).__name__}: {one_line(error)}")
        with lock, suppress(OSError):  # the parent may be gone
            connection.send((number, value, failure))

    with ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="calls") as calls, suppress(EOFError, OSError):
        while True:
            calls.submit(answer, *connection.recv())
