"""Processes that have imported everything when they start: a server imports it once, and forks for each of them.

The processes of a run import for three seconds, and a tiny model answers in half of one. A process that is started here
has what a new one has after its imports: nothing is built, and nothing of another test is in it. What it starts with
multiprocessing is such a process too.

The server's grandchild becomes a child of the process that asks for it, as Linux lets a process adopt orphans. So it is
waited for and killed like any other. Tests of the start itself start Python, and a script that replaces a function
replaces it in the module that uses it, which has imported it already.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any, NoReturn

from tests import ROOT

MODULES = (  # what the processes of a run import, except for what is run by its name
    "mlx_lm.models.llama",
    "transformers.models.llama",
    "pyarrow.parquet",
    "pipeline.commands.evaluate",
    "pipeline.commands.summary",
    "pipeline.commands.tune",
    "pipeline.execution.engine",
    "pipeline.execution.lease_worker",
    "pipeline.execution.pool_executor",
    "pipeline.execution.runner",
    "pipeline.execution.supervisor",
    "pipeline.job.job_file",
    "pipeline.models.batch_trial",
    "pipeline.models.constraints",
)
CAN_FORK = sys.platform == "linux"  # Metal does not survive it
LARGEST_MESSAGE, SPARE_NUMBER, ADOPT_ORPHANS = 1 << 17, 512, 36  # the last one from linux/prctl.h


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` for `[sys.executable, SCRIPT or "-m", ...]`, in a session of its own."""

    def __init__(self, arguments: Sequence[object], **options: Any) -> None:
        options["start_new_session"] = True
        super().__init__([str(argument) for argument in arguments], **options)

    def _execute_child(self, arguments: list[str], *given: Any) -> None:
        if not CAN_FORK:
            super()._execute_child(arguments, *given)  # type: ignore[misc]
            return
        cwd, env, pipes = given[4], given[5], given[9:15]
        standard = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        environment = dict(env or os.environ) | {"PYTHONPATH": str(ROOT)}
        self.pid = _server().fork(arguments[1:], os.fspath(cwd or os.getcwd()), environment, standard, range(3), True)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(
    arguments: Sequence[object], *, check: bool = False, capture_output: bool = True, text: bool = True, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`, with everything imported; stdout and stderr are kept as texts."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, text=text, **options) as process:
        out, error = process.communicate()
    done = subprocess.CompletedProcess(process.args, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


@contextmanager
def children_of_this_process() -> Iterator[None]:
    """In the block, what this process starts with multiprocessing has imported everything."""
    real = multiprocessing.util.spawnv_passfds
    if CAN_FORK:
        multiprocessing.util.spawnv_passfds = lambda *given: _spawn(_server(), real, *given)
    try:
        yield
    finally:
        multiprocessing.util.spawnv_passfds = real


def _spawn(server: _Server, real: Callable[..., int], program: Any, arguments: list[Any], numbers: list[int]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`."""
    if "--multiprocessing-fork" not in arguments:
        return real(program, arguments, numbers)
    descriptors = [0, 1, 2, *numbers]
    arguments = arguments[arguments.index("-c") :]
    return server.fork(arguments, os.getcwd(), dict(os.environ), descriptors, descriptors, False)


class _Server:
    """Where a process asks for children."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests, self._lock = requests, threading.Lock()

    def fork(
        self,
        arguments: list[str],
        cwd: str,
        env: dict[str, str],
        descriptors: Sequence[int],
        numbers: Sequence[int],
        is_session: bool,
    ) -> int:
        """Start a process that does what `python ARGUMENTS` does with descriptors of these numbers; its id."""
        prctl = ctypes.CDLL(None).prctl
        blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        scheduling = os.sched_getscheduler(0), sorted(os.sched_getaffinity(0))
        message = json.dumps([arguments, cwd, env, list(numbers), is_session, blocked, *scheduling]).encode()
        with self._lock:
            prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
            socket.send_fds(self._requests, [message], descriptors)
            process = int(self._requests.recv(99))
            prctl(ADOPT_ORPHANS, 0, 0, 0, 0)
        return process


@cache
def _server() -> _Server:
    """Start the server, which ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environment)
    atexit.register(server.wait)
    atexit.register(ours.close)
    return _Server(ours)


# ---- in the server


def import_everything() -> None:
    """Import what a run imports, and build nothing."""
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    for name in MODULES:
        importlib.import_module(name)


def serve(requests: socket.socket) -> NoReturn:
    """Fork for each request, until the process that asks has ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the other processes of its group
    while True:
        content, given, *_ = socket.recv_fds(requests, LARGEST_MESSAGE, 32)
        if not content:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            process = os.fork()
            if process == 0:
                for descriptor in (told, tell, requests.detach()):
                    os.close(descriptor)
                _leave(lambda given=given, content=content: _begin(given, *json.loads(content)))
            os.write(tell, str(process).encode())
            os._exit(0)
        os.waitpid(between, 0)  # now its child is an orphan
        requests.send(os.read(told, 99))
        for descriptor in (told, tell, *given):
            os.close(descriptor)


def _begin(
    given: list[int],
    arguments: list[str],
    cwd: str,
    env: dict[str, str],
    numbers: list[int],
    session: bool,
    blocked: Any,
    policy: int,
    cores: list[int],
) -> None:
    """Do what `python ARGUMENTS` does."""
    os.sched_setscheduler(0, policy, os.sched_param(0))
    os.sched_setaffinity(0, cores)
    # First to numbers that no process expects, or one descriptor might be put where another one is.
    descriptors = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, SPARE_NUMBER) for descriptor in given]
    for descriptor in given:
        os.close(descriptor)
    for descriptor, number in zip(descriptors, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _open_standard_streams()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:  # before anything is run
        ours.close()
        serve(theirs)
    theirs.close()
    own, real = _Server(ours), multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = lambda *given: _spawn(own, real, *given)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    sys.modules["__main__"] = ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def _open_standard_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)


def _leave(task: Callable[[], None]) -> NoReturn:
    """Do something and end as Python does, but for what libraries do at the end: they wait for the server's threads."""
    code: Any = 1
    try:
        task()
        code = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    import_everything()
    # Python 3.12 warns of other threads. Those of libraries wait for work here, and no lock is held.
    warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
    gc.collect()
    gc.freeze()  # so that no collection copies the pages of what is imported
    serve(socket.socket(fileno=int(sys.argv[1])))
