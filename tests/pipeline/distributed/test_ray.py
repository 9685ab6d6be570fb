"""Jobs on a Ray cluster of two nodes on this machine: the same bytes, whoever is killed meanwhile.

What all pools of workers do alike (chained queries, failed rows, segments that are dropped) is in test_processes.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, warm
from tests.pipeline.command_line import PROGRAM, error_of, invoke
from tests.pipeline.workplace import Workplace

pytest.importorskip("ray", reason="ray is not installed")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # with it, a child of Ray's proxy crashes now and then

import ray
from ray.cluster_utils import Cluster

from pipeline.errors import PipelineError
from pipeline.execution.fingerprint import job_identity
from pipeline.execution.lease_worker import LeaseWorker
from pipeline.job.job import Job
from pipeline.job.job_file import load_job
from turboquant.runtime.versions import package_versions

# Ray's own warnings; and the client servers of two clusters on one machine want the same port.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ray")]
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
ONE_WORKER = {"workers": 1, "num_cpus": 1}  # where two would do the same: each imports for a second


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {**NODE, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.client = f"ray://127.0.0.1:{port}"
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def place(workplace: Workplace, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace of eight documents, each of which is a lease."""
    workplace.documents |= {f"e{number}": f"Paper {number} says {number * 7}. " * 20 for number in range(5)}
    workplace.save()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return workplace


def on_ray(place: Workplace, *options: str, code: int = 0) -> Any:
    result = invoke("run", place.save(), "--on", "ray", *options)
    assert result.exit_code == code, result.output
    return result


_written_alone: dict[str, bytes] = {}


def alone(place: Workplace) -> bytes:
    """What a run of the job on one machine writes. Each job is run once for all tests, without its ``scale``."""
    tree = {name: section for name, section in place.tree.items() if name != "scale"}
    job = json.dumps([place.documents, place.queries, tree])
    if job not in _written_alone:
        other = Workplace(place.folder / "alone", place.model)
        other.documents, other.queries, other.tree = place.documents, place.queries, tree
        other.run()
        _written_alone[job] = other.output.read_bytes()
    return _written_alone[job]


def dying(folder: Path, deaths: dict[str, int], seconds: float) -> type[LeaseWorker]:
    """A worker that is killed a moment after it has begun with a document, so many times."""

    class Dying(LeaseWorker):
        def _answer(self, prepared: Any) -> Any:
            for each in prepared:
                file = folder / f"deaths-{each.task.document_id}"
                before = len(file.read_text()) if file.exists() else 0
                if before < deaths.get(each.task.document_id, 0):
                    file.write_text("x" * (before + 1))
                    time.sleep(seconds)
                    os.kill(os.getpid(), signal.SIGKILL)
            return super()._answer(prepared)

    return Dying


def waiting(folder: Path) -> type[LeaseWorker]:
    """A worker that says when it is about to answer, and waits until it may."""

    class Waiting(LeaseWorker):
        def _answer(self, prepared: Any) -> Any:
            (folder / f"at-{os.getpid()}").write_text(prepared[0].task.document_id)
            while not (folder / "go").exists():
                time.sleep(0.05)
                self._check_stop()
            return super()._answer(prepared)

    return Waiting


def waiting_in_prefill(folder: Path) -> type[LeaseWorker]:
    """A worker that waits in the middle of each prefill until it may go on."""

    class Waiting(LeaseWorker):
        def _start(self, *arguments: Any) -> Any:
            from pipeline.execution import prefixes

            prefixes.CPU_CHUNK, real = 16, prefixes.PrefixProvider._chunk_done

            def chunk_done(self: Any, tokens: int) -> None:
                real(self, tokens)
                while not (folder / "go").exists():
                    time.sleep(0.05)

            prefixes.PrefixProvider._chunk_done = chunk_done
            return super()._start(*arguments)

    return Waiting


def with_stores_of_their_own(meeting: Path) -> type[LeaseWorker]:
    """Workers whose nodes have a store each, and which begin when both are there."""
    meeting.mkdir()

    class NodeLocal(LeaseWorker):
        def __init__(self, job: Any, log_level: int) -> None:
            import ray

            own = job.cache.dir.with_name(f"store-{ray.get_runtime_context().get_node_id()}")
            super().__init__(job.model_copy(update={"cache": job.cache.model_copy(update={"dir": own})}), log_level)

        def _start(self, *arguments: Any) -> Any:
            ready = super()._start(*arguments)
            (meeting / str(os.getpid())).touch()
            while len(list(meeting.iterdir())) < 2:
                time.sleep(0.01)
            return ready

        def _answer(self, prepared: Any) -> Any:
            time.sleep(0.2)
            return super()._answer(prepared)

    return NodeLocal


# ---- what a run gives


def test_the_same_bytes_as_on_one_machine(place: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    result = on_ray(place, "--debug")
    # What workers log is in the log with their names.
    built = [re.fullmatch(r"(\S+): prefix \w+ is built: .*", line) for line in caplog.messages]
    assert {found[1] for found in built if found} <= set(place.report()["workers"])
    assert sum(bool(found) for found in built) == 8
    assert place.output.read_bytes() == alone(place)
    assert "24 answered, 0 kept, 0 failed of 24 (8 documents)" in result.stdout
    assert re.search("workers   [12] on 1 machine, 0 of them lost", result.stdout)  # one may be slow to start
    told = place.report()
    assert (told["state"], told["prefixes_built"], told["documents_done"]) == ("finished", 8, 8)
    assert told["prefilled_tokens"] == told["context_tokens"] > 1000
    assert 4 < told["effective_bits"] < 8
    workers = told["workers"].values()
    assert sum(worker["documents"] for worker in workers) == 8
    assert sum(worker["answers"] for worker in workers) == 24
    assert all(worker["prefill_tokens_per_second"] > 0 for worker in workers if worker["documents"])
    for worker in workers:
        assert "worker" in Path(worker["log"]).name
        assert Path(worker["log"]).exists()
    again = on_ray(place, "--json")
    assert json.loads(again.stdout)["rows_kept"] == 24
    assert json.loads(again.stdout)["workers"] == {}


def test_a_driver_that_is_elsewhere(place: Workplace, cluster: Cluster) -> None:
    place.tree["scale"] = ONE_WORKER
    result = invoke("run", place.save(), "--on", cluster.client)
    assert result.exit_code == 0, result.output
    assert place.output.read_bytes() == alone(place)


def test_shards_on_ray_are_merged_to_the_same_bytes(place: Workplace) -> None:
    place.tree["scale"] = ONE_WORKER
    for shard in ("1/2", "2/2"):
        on_ray(place, "--shard", shard)
    assert invoke("merge", place.job_file).exit_code == 0
    assert place.output.read_bytes() == alone(place)


def test_documents_go_to_the_machine_that_has_their_prefixes(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.execution.leases.PATIENCE", 60.0)
    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", with_stores_of_their_own(place.folder / "first"))
    on_ray(place)
    expected = place.output.read_bytes()
    stored = sorted(place.folder.glob("store-*/??/*/segment.json"))
    assert len(stored) == 8
    assert len({file.parents[2] for file in stored}) == 2
    place.output.unlink()
    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", with_stores_of_their_own(place.folder / "second"))
    on_ray(place)
    assert (place.report()["prefixes_built"], place.report()["prefixes_restored"]) == (0, 8)
    assert place.output.read_bytes() == expected


def test_scale_is_no_part_of_a_row(place: Workplace) -> None:
    place.run()
    place.tree["scale"] = ONE_WORKER
    report = json.loads(on_ray(place, "--json").stdout)
    assert report["rows_kept"] == 24
    place.output.unlink()
    report = json.loads(on_ray(place, "--json").stdout)
    assert (len(report["workers"]), report["prefixes_restored"]) == (1, 8)


# ---- who dies


@pytest.mark.parametrize("seconds", [0.0, 0.5])  # at once, what was answered just before may be lost too
def test_a_worker_that_is_killed_costs_nothing_but_documents_that_kill_two(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    deaths = {"d1": 99, "e2": 1}
    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", dying(place.folder, deaths, seconds))
    on_ray(place, code=3)
    assert "with document 'd1' in hand; its leases go to others" in caplog.text
    told = place.report()
    assert told["restarts"] in ((3,) if seconds else (3, 4))  # at once, a death may be taken for another document's
    assert sum(worker["lost"] for worker in told["workers"].values()) == told["restarts"]
    failed = {pair: row for pair, row in place.rows().items() if row["status"] == "error"}
    assert list(failed) == [("d1", query["id"]) for query in place.queries]
    assert {row["error_type"] for row in failed.values()} == {"ModelProcessDied"}
    assert all("twice, while this document was prefilled or answered" in row["error"] for row in failed.values())
    monkeypatch.undo()
    place.run()
    assert place.output.read_bytes() == alone(place)


def test_a_node_that_is_removed_costs_nothing(
    place: Workplace, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", waiting(place.folder))
    node = cluster.add_node(**NODE)

    def remove() -> None:
        while len(list(place.folder.glob("at-*"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(node)
        (place.folder / "go").touch()

    remover = threading.Thread(target=remove)
    remover.start()
    on_ray(place)
    remover.join()
    assert "was lost with its machine" in caplog.text
    assert place.output.read_bytes() == alone(place)


def test_the_run_file_moves_while_workers_prefill(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", waiting_in_prefill(place.folder))
    monkeypatch.setattr("pipeline.distributed.ray_pool.RayPool.seconds_between_counts", 0.5)
    monkeypatch.setattr("pipeline.output.run_file.SECONDS_BETWEEN_WRITES", 0.01)
    paces: list[dict[str, Any]] = []

    def watch() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (paces and paces[-1]["prefilled_tokens"]):
            time.sleep(0.05)
            if Path(f"{place.output}.run.json").exists() and (pace := place.report()["pace"]):
                paces.append(pace)
        (place.folder / "go").touch()

    place.tree["scale"] = ONE_WORKER
    watcher = threading.Thread(target=watch)
    watcher.start()
    on_ray(place)
    watcher.join()
    assert (paces[-1]["documents_done"], paces[-1]["prefilled_tokens"] % 16) == (0, 0)
    assert paces[-1]["prefilled_tokens"] > 0


def start(place: Workplace) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.save()), "--on", "ray"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_a_part(place: Workplace, process: subprocess.Popen[str]) -> None:
    """Wait until a document more is done."""
    parts = Path(f"{place.output}.parts")
    before = set(parts.glob("*/[!.]*.parquet"))
    while process.poll() is None and not set(parts.glob("*/[!.]*.parquet")) - before:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_a_driver_that_is_killed_or_interrupted_goes_on_where_it_was(place: Workplace) -> None:
    place.documents |= {f"f{number}": f"Page {number} of {number * 3}. " * 40 for number in range(14)}
    place.tree["scale"] = ONE_WORKER
    process = start(place)
    wait_for_a_part(place, process)
    process.kill()
    process.communicate()
    time.sleep(1.0)  # for its workers to end

    def created() -> dict[Path, str]:
        return {path: json.loads((path / "segment.json").read_text())["created"] for path in place.segments()}

    stored = created()
    process = start(place)
    wait_for_a_part(place, process)
    process.send_signal(signal.SIGINT)  # what is in hand is finished
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == f"interrupted; to resume: {PROGRAM} run {place.job_file} --on ray"
    interrupted = place.report()
    assert interrupted["state"] == "interrupted"
    assert interrupted["rows_kept"] >= 3
    assert interrupted["rows_answered"] >= 3
    assert interrupted["rows_failed"] == 0

    stored_by_both = created()
    report = json.loads(on_ray(place, "--json").stdout)
    assert report["rows_kept"] == interrupted["rows_kept"] + interrupted["rows_answered"]
    assert report["rows_kept"] + report["rows_answered"] == 22 * 3
    after = created()
    for before in (stored, stored_by_both):
        assert before == {path: after[path] for path in before}
    assert place.output.read_bytes() == alone(place)


# ---- what is wrong


def test_other_versions_are_refused(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = dict(package_versions())
    monkeypatch.setattr("pipeline.distributed.ray_pool.package_versions", lambda: versions | {"mlx": "9.9"})
    place.tree["scale"] = ONE_WORKER
    error = error_of(invoke("run", place.save(), "--on", "ray", "--quiet"))
    assert error.startswith("worker ")
    assert f"mlx is {versions['mlx']} here and 9.9 where the run was started" in error


def refusal(worker: LeaseWorker, job: Job, **versions: str) -> str:
    """What a worker on another machine finds wrong before it starts, where a run of the job was started."""
    failed = worker.start(job_identity(job), dict(package_versions()) | versions, ()).failed
    assert failed is not None
    with pytest.raises(PipelineError) as error:
        failed.reraise()
    return str(error.value)


@pytest.mark.parametrize("package", ["mlx", "mlx-lm", "turboquant-pipeline"])
def test_a_worker_compares_the_versions_of_packages(workplace: Workplace, package: str) -> None:
    job = load_job(workplace.save())
    found = refusal(LeaseWorker(job, logging.INFO, logs_to_stderr=False), job, **{package: "9.9"})
    assert found.startswith(f"{package} is {package_versions()[package]} here and 9.9 where the run was started")


def test_a_worker_compares_the_weights(workplace: Workplace, write_model: Any) -> None:
    job, other = load_job(workplace.save()), str(write_model(workplace.folder / "other"))
    worker = LeaseWorker(job.model_copy(update={"model": other}), logging.INFO, logs_to_stderr=False)
    assert "its weights here and where the run was started are not the same" in refusal(worker, job)


def test_a_machine_without_the_model_is_told(workplace: Workplace) -> None:
    job = load_job(workplace.save())
    worker = LeaseWorker(job.model_copy(update={"model": "/nowhere/model"}), logging.INFO, logs_to_stderr=False)
    assert "model /nowhere/model: there is no such folder" in refusal(worker, job)


def test_a_worker_that_cannot_start_ends_the_run(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stillborn(LeaseWorker):
        def _start(self, *arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("pipeline.distributed.ray_pool.LeaseWorker", Stillborn)
    place.tree["scale"] = ONE_WORKER
    result = invoke("run", place.save(), "--on", "ray", "--quiet")
    assert result.exit_code == 1
    assert "twice, before a document was in hand, most likely while the model was loaded" in result.stderr


def test_more_than_any_machine_has_is_refused(place: Workplace) -> None:
    place.tree["scale"] = {"resources": {"mac": 1}}
    error = error_of(invoke("run", place.save(), "--on", "ray", "--quiet"))
    assert error == "scale: none of the cluster's 2 machines has what a worker asks for"


def test_without_ray_it_says_what_to_install(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = error_of(invoke("run", workplace.job_file, "--on", "ray"))
    assert "pip install 'turboquant-pipeline[ray]'" in error


@pytest.mark.parametrize("address", ["rays", "ray://", "ray://head", "ray://head:port", "http://head:1"])
def test_addresses_that_are_none(workplace: Workplace, address: str) -> None:
    error = error_of(invoke("run", workplace.job_file, "--on", address))
    assert error.startswith(f"--on {address}: expected ray, or ray://HOST:PORT")


@pytest.mark.parametrize(("address", "at"), [("ray://127.0.0.1:9", "ray://127.0.0.1:9"), ("ray", "127.0.0.1:9")])
def test_a_head_that_is_not_there(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, address: str, at: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    result = invoke("run", workplace.job_file, "--on", address)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --on {address}: nothing answers at {at} within 10 s")
    assert not workplace.output.parent.exists()


@pytest.mark.parametrize(("crashes", "code"), [(1, 0), (2, 1)])
def test_a_head_whose_child_crashed_is_asked_once_more(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, crashes: int, code: int
) -> None:
    real, tries = ray.init, []

    def crashing(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) <= crashes:
            raise ConnectionAbortedError("Initialization failure from server: Starting Ray client server failed. See x")
        return real(*arguments, **options)

    monkeypatch.setattr(ray, "init", crashing)
    place.tree["scale"] = ONE_WORKER
    said = on_ray(place, code=code).stderr
    assert len(tries) == 2
    assert ("error: --on ray: no connection to Ray at " in said) == bool(code)


def test_a_cluster_of_this_machine_alone(workplace: Workplace) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "pipeline.cli", "run", str(workplace.job_file), "--on", "ray", "--quiet"]
    command += ["--set", "scale.workers=1"]
    done = warm.run(command, check=True, env=environment)
    told = [line for line in done.stderr.splitlines() if not line.startswith("no worker is ready: ")]  # a slow machine
    assert (done.stdout, told) == ("", [])
    assert len(workplace.rows()) == 9
