"""The model's process: it runs a whole job and sends its parent messages about the run.

The parent imports this module too, so heavy imports are inside the functions that run in the process.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from multiprocessing import active_children
from multiprocessing.connection import Connection
from typing import Any

from pipeline.execution.messages import Failed, Finished, MessageLogHandler, MessageObserver, Outbox, RunRequest
from pipeline.execution.processes import end_with_parent, keep_pandas_out
from pipeline.signals import STOP_SIGNALS


def run_in_process(connection: Connection, request: RunRequest) -> None:
    """Run a job from start to end; the entry of the process. The last message says how the run ended.

    There is no last message if the run was stopped at once: the parent knows that it asked for this. STOP_SIGNALS are
    blocked when the process starts, so that none is lost before there is a handler.
    """
    os.setsid()  # a session of its own, so that Ctrl-C reaches only the parent, which passes it on
    end_with_parent()
    outbox = Outbox(connection)
    logging.getLogger().addHandler(MessageLogHandler(outbox.send))
    logging.getLogger("pipeline").setLevel(request.log_level)
    try:
        _handle_stop_signals(_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        outcome = _run(outbox, request)
        _handle_stop_signals(signal.SIG_IGN)
        outbox.send(outcome)
    except KeyboardInterrupt:
        return
    finally:
        # Python would send workers SIGTERM, which they ignore, and wait for them forever.
        for worker in active_children():
            worker.kill()


def _run(outbox: Outbox, request: RunRequest) -> Finished | Failed:
    try:
        from turboquant.runtime.blas import load_tuned_blas

        load_tuned_blas()
        keep_pandas_out()

        from pipeline.execution.process_pool import local_executor
        from pipeline.execution.runner import Runner
        from pipeline.models.ranks import leading_ranks

        with leading_ranks(request.job) as ranks:
            runner = Runner(
                request.job,
                MessageObserver(outbox.send),
                report=request.report,
                finished=request.finished,
                quarantined=request.quarantined,
                separated=request.separated,
                options=request.options,
                shard=request.shard,
                ranks=ranks,
                executor=local_executor,
            )
            return Finished(runner.run())
    except Exception as error:
        return Failed.of(error)


def _stop(number: int, frame: Any) -> None:
    _handle_stop_signals(signal.SIG_IGN)  # a second signal would interrupt the clean-up
    raise KeyboardInterrupt


def _handle_stop_signals(handler: Callable[[int, Any], None] | signal.Handlers) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
