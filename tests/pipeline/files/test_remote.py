"""Documents, queries and results on a server that speaks S3, on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.backends import get_backend
from moto.server import ThreadedMotoServer

from pipeline.errors import OutputError, RemoteError
from pipeline.files import remote
from pipeline.inputs.documents import check_documents, stream_documents
from pipeline.job.job import Documents
from pipeline.output.results import Results, Row
from tests import warm
from tests.pipeline.command_line import ROOT, error_of, invoke
from tests.pipeline.files.formatted import pdf
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

URL = "s3://bucket/out/a.parquet"


class Server:
    """What it holds outlives a stop."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, self._port = self._server.get_host_and_port()
        self.url = f"http://{host}:{self._port}"

    def stop(self) -> None:
        with suppress(OSError):  # which not all systems do at once; the rest takes half a second
            self._server._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.stop()

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", port=self._port, verbose=False)
        self._server.start()

    def drop_the_bucket(self) -> None:
        """At once, with all that is in it."""
        get_backend("s3").reset()

    @property
    def files(self) -> Any:
        """The server's files, as they are now."""
        s3fs.S3FileSystem.clear_instance_cache()
        return s3fs.S3FileSystem()

    def upload(self, folder: Path, name: str) -> str:
        self.files.put(str(folder), f"bucket/{name}", recursive=True)
        return f"s3://bucket/{name}"


@pytest.fixture(scope="module")
def only_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def server(only_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty bucket, and an environment that leads to it."""
    environment = {
        "AWS_ENDPOINT_URL": only_server.url,
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_MAX_ATTEMPTS": "1",  # or it would be patient itself
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    only_server.drop_the_bucket()
    only_server.files.mkdir("bucket")
    return only_server


@pytest.fixture
def texts(tmp_path: Path, workplace: Workplace) -> Path:
    """A folder of twelve documents, of which the run of `workplace` makes one part each."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"Paper {number}. The board met on the third of May. " * 9)
    (folder / "more" / "7.txt").write_text("Below.")
    workplace.save(documents={"path": str(folder)})
    return folder


@pytest.fixture
def at_first_part(workplace: Workplace) -> Iterator[Callable[[Callable[[], None]], None]]:
    """`at_first_part(act)` acts when a run that is about to begin has committed its first document."""
    ended, threads = threading.Event(), []

    def wait_and(act: Callable[[], None]) -> None:
        while not list(workplace.folder.glob("**/*.parts/??/[!.]*")) and not ended.is_set():
            time.sleep(0.002)
        act()

    def begin(act: Callable[[], None]) -> None:
        threads.append(threading.Thread(target=wait_and, args=(act,)))
        threads[-1].start()

    yield begin
    ended.set()
    for thread in threads:
        thread.join()


def staged(workplace: Workplace) -> Path:
    """Where the result is before it is uploaded."""
    (folder,) = (workplace.cache / "outputs").iterdir()
    return folder / "a.parquet"


def local_bytes(workplace: Workplace) -> bytes:
    """What the job's result is on this machine."""
    other = workplace.folder / "local"
    result = invoke(
        "run",
        workplace.job_file,
        "--set",
        f"output.path={other / 'a.parquet'}",
        "--set",
        f"cache.dir={other / 'cache'}",
    )
    assert result.exit_code == 0, result.output
    return (other / "a.parquet").read_bytes()


def test_documents_queries_and_result_at_urls(workplace: Workplace, server: Server) -> None:
    (queries := workplace.folder / "q").mkdir()
    (queries / "q.jsonl").write_text("".join(json.dumps(query) + "\n" for query in workplace.queries))
    (documents := workplace.folder / "d").mkdir()
    (workplace.folder / "docs.parquet").rename(documents / "docs.parquet")
    workplace.table = {"path": str(queries)}
    workplace.save(documents={"path": str(documents)})
    expected = local_bytes(workplace)
    workplace.table = {"path": f"{server.upload(queries, 'q')}/*.jsonl"}
    workplace.save(documents={"path": server.upload(documents, "d")}, output={"path": URL})

    result = invoke("run", workplace.job_file)
    assert result.exit_code == 0, result.output
    assert f"result    {URL}" in result.stdout
    assert sorted(server.files.ls("bucket/out")) == ["bucket/out/a.parquet", "bucket/out/a.parquet.run.json"]
    assert server.files.cat(URL) == expected
    assert json.loads(server.files.cat(f"{URL}.run.json"))["state"] == "finished"
    assert not (workplace.cache / "outputs").exists()

    assert "9: 9 done, 0 failed, 0 left" in invoke("status", workplace.job_file).stdout
    assert len(invoke("show", workplace.job_file).stdout.splitlines()) == 9
    assert "0 answered, 9 kept" in invoke("run", workplace.job_file).stdout
    elsewhere = workplace.folder / "elsewhere"
    result = invoke("run", workplace.job_file, "--set", f"cache.dir={elsewhere}", "--set", "generation.batch_size=2")
    assert "0 answered, 9 kept" in result.stdout
    assert server.files.cat(URL) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_result_in_another_format_at_a_url(workplace: Workplace, server: Server, name: str) -> None:
    here, there = workplace.folder / "out" / name, f"s3://bucket/out/{name}"
    workplace.save(output={"path": str(here)})
    assert invoke("run", workplace.job_file).exit_code == 0
    workplace.save(output={"path": there})
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 0, result.output
    assert server.files.cat(there) == here.read_bytes()
    for options in ([], ["--set", f"cache.dir={workplace.folder / 'elsewhere'}"]):
        assert "0 answered, 9 kept" in invoke("run", workplace.job_file, *options).stdout
    assert len(invoke("show", workplace.job_file).stdout.splitlines()) == 9
    assert server.files.cat(there) == here.read_bytes()


@pytest.mark.parametrize("kill", [False, True])
def test_an_interrupted_run_is_resumed_from_what_is_here(
    workplace: Workplace, server: Server, texts: Path, kill: bool
) -> None:
    expected = local_bytes(workplace)
    workplace.save(documents={"path": server.upload(texts, "texts")}, output={"path": URL})
    process = warm.Popen(
        [sys.executable, "-m", "pipeline.cli", "run", workplace.job_file],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    while not list(workplace.folder.glob("cache/outputs/*/a.parquet.parts/??/[!.]*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
    process.communicate()
    assert process.returncode == (-signal.SIGKILL if kill else 130)
    assert server.files.ls("bucket/out") == ["bucket/out/a.parquet.run.json"]
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 0, result.output
    assert " 0 kept" not in result.stdout
    assert server.files.cat(URL) == expected


def test_the_network_goes_while_documents_are_read(
    workplace: Workplace,
    server: Server,
    texts: Path,
    at_first_part: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0.01)
    expected = local_bytes(workplace)
    workplace.save(documents={"path": f"{server.upload(texts, 'texts')}/*.txt"}, output={"path": "other/a.parquet"})
    at_first_part(server.stop)
    try:
        result = invoke("run", workplace.job_file)
    finally:
        server.start()
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: s3://bucket/texts/")
    assert "cannot be reached: " in error
    assert error.endswith("when the network is back, the same command goes on")
    assert "trying again in 0.04 s" in caplog.text
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 0, result.output
    assert " 0 kept" not in result.stdout
    assert (workplace.folder / "other" / "a.parquet").read_bytes() == expected


def test_a_result_that_cannot_be_uploaded(
    workplace: Workplace, server: Server, texts: Path, at_first_part: Callable[[Callable[[], None]], None]
) -> None:
    workplace.save(output={"path": URL})
    at_first_part(server.drop_the_bucket)
    result = invoke("run", workplace.job_file)
    assert result.exit_code == 1, result.output
    told = f"error: {URL}: cannot be written: there is no such bucket; make it, or set another path; "
    assert result.stderr.splitlines()[-1] == f"{told}until then the result is at {staged(workplace)}"
    assert "36: 36 done" in invoke("status", workplace.job_file).stdout
    server.files.mkdir("bucket")
    assert "0 answered, 36 kept" in invoke("run", workplace.job_file).stdout
    assert server.files.cat(URL) == local_bytes(workplace)


def test_results_of_shards_stay_whether_or_not_they_can_be_merged(workplace: Workplace, server: Server) -> None:
    workplace.save(output={"path": URL})
    for shard in ("1/2", "2/2"):
        assert invoke("run", workplace.job_file, "--shard", shard).exit_code == 0
    shards = {path: path.read_bytes() for path in (workplace.cache / "outputs").glob("*/a.parquet.shards/*.parquet")}
    assert len(shards) == 2
    server.drop_the_bucket()
    assert invoke("merge", workplace.job_file).exit_code == 2
    server.files.mkdir("bucket")
    assert invoke("merge", workplace.job_file).exit_code == 0
    assert server.files.cat(URL) == local_bytes(workplace)
    assert {path: path.read_bytes() for path in shards} == shards
    assert sorted(path.name for path in (workplace.cache / "outputs").glob("*/*")) == ["a.parquet.shards"]


def test_the_network_goes_while_a_result_is_uploaded(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0.01)
    rows = [Row("d", "q", "ok", "f", answer="Yes.")]
    server.stop()
    try:
        with pytest.raises(RemoteError), Results(tmp_path / "a.parquet", url=URL):
            pass
    finally:
        server.start()
    with Results(tmp_path / "a.parquet", url=URL) as results:
        results.commit({"d": rows})
        server.stop()
        try:
            with pytest.raises(OutputError, match="until then the result is at"):
                results.finish([("d", ["q"])])
        finally:
            server.start()
    assert not server.files.exists(URL)
    with Results(tmp_path / "a.parquet", url=URL) as results:
        assert results.rows("d") == {"q": rows[0]}
        results.finish([("d", ["q"])])
    with Results(tmp_path / "b.parquet", url=URL, read_only=True) as results:
        assert results.rows("d") == {"q": rows[0]}


def test_the_network_comes_back(
    server: Server, texts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0.3)
    documents = stream_documents(Documents(path=server.upload(texts, "texts")))
    next(documents)
    server.stop()
    timer = threading.Timer(0.2, server.start)
    timer.start()
    assert len(list(documents)) == 11
    timer.join()
    assert "trying again in 0.3 s" in caplog.text


@pytest.mark.parametrize("path", ["", "/*.txt", "/**/*.txt", "/03.txt"])
def test_texts_have_the_ids_that_they_have_here(server: Server, texts: Path, path: str) -> None:
    (texts / ".hidden.txt").write_text("no")
    url = server.upload(texts, "texts")
    here, there = Documents(path=f"{texts}{path}"), Documents(path=f"{url}{path}")
    assert check_documents(there) == check_documents(here)
    assert list(stream_documents(there)) == list(stream_documents(here))


def test_a_pdf_at_a_url_is_read_as_here(server: Server, texts: Path) -> None:
    pytest.importorskip("pypdfium2", reason="the extra `documents` is not installed")
    (texts / "a.pdf").write_bytes(pdf("The board met.", "The lease ends."))
    url = server.upload(texts, "texts")
    (document,) = stream_documents(Documents(path=f"{url}/*.pdf"))
    assert (document.id, document.text) == ("a.pdf", "The board met.\fThe lease ends.\f")


def test_of_parquet_only_the_ranges_that_are_needed_are_read(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    texts = [noise.integers(32, 127, 1 << 18, dtype=np.uint8).tobytes().decode() for _ in range(24)]
    table = pa.table({"id": [str(number) for number in range(24)], "text": texts})
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "a.parquet", write_batch_size=1)
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1 << 16)
    read: list[int] = []
    real = remote._RemoteFile.readinto

    def counting(self: Any, buffer: Any) -> int:
        read.append(real(self, buffer))
        return read[-1]

    monkeypatch.setattr(remote._RemoteFile, "readinto", counting)
    source = Documents(path=server.upload(tmp_path / "d", "d"))
    assert check_documents(source) == 24
    assert sum(read) < 1 << 18
    assert [document.text for document in stream_documents(source)] == texts


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("documents.path=s3://bucket/no.parquet", "documents.path: s3://bucket/no.parquet does not exist: there is no"),
        ("documents.path=s3://no/no.parquet", "documents.path: s3://no/no.parquet does not exist: there is no such"),
        ("documents.path=s3://bucket/*.md", "documents.path: no file matches s3://bucket/*.md"),
        ("documents.path=gs://bucket/a.md", "gs:// needs a package that is not installed: install this project with"),
        ("documents.path=nix://bucket/a.md", "nix://bucket/a.md: cannot be used: Protocol not known: nix"),
        ("queries={path: 's3://bucket/no.jsonl'}", "queries.path: s3://bucket/no.jsonl does not exist: there is no"),
        ("output.path=s3://no/a.parquet", "there is no such bucket; make it, or set another path"),
        ("output.path=gs://bucket/a.parquet", "gs:// needs a package that is not installed: install this project with"),
        (
            "output.path=hf://a/b/c.parquet",
            "results can be written to this machine, s3:// and gs://, but not to hf://a/b/c.parquet",
        ),
        ("output.path=s3://bucket", "output.path: s3://bucket must name a file, as s3://bucket/answers.parquet does"),
    ],
)
def test_what_is_wrong_with_a_url_is_told_before_a_model_is_loaded(
    workplace: Workplace, server: Server, override: str, words: str
) -> None:
    assert words in error_of(invoke("run", workplace.job_file, "--set", override))
    assert not workplace.segments()


def test_credentials_are_missing(workplace: Workplace, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()  # which keeps credentials; a run is a process of its own
    for override in "documents.path=s3://bucket/a.parquet", f"output.path={URL}":
        error = error_of(invoke("run", workplace.job_file, "--set", override))
        assert "access is refused: Unable to locate credentials; set credentials" in error


def test_a_first_job_file_for_documents_at_a_url(workplace: Workplace, server: Server, texts: Path) -> None:
    url, job_file = server.upload(texts, "texts"), workplace.folder / "first.yaml"
    result = invoke("init", url, job_file, "--model", workplace.model)
    assert result.exit_code == 0, result.output
    assert f"path: {url} " in job_file.read_text()


def test_a_server_that_pauses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            time.sleep(0.5)
            super().do_HEAD()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "docs.jsonl").write_text('{"id": "a", "text": "b"}')
    monkeypatch.setattr(remote, "SECONDS_UNTIL_TOLD", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/docs.jsonl"
        assert remote.find(url)[2] == [url]
        server.shutdown()
    assert f"{url}: no answer for 0.1 s; waiting for it" in caplog.text
    assert caplog.text.count("waiting for it") <= 2
