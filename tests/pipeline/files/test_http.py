"""Files at HTTP URLs: servers that fail, and secrets in URLs, which are shown nowhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")
SECRETS = ("Geheim", "xyz987")


class Server(ThreadingHTTPServer):
    """Serves a folder. failures: how many requests it answers with `status` from now on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), self._handler(folder))
        self.failures, self.status = 0, 503

    def _handler(self, folder: Path) -> Any:
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, directory=str(folder), **options)

            def send_head(self) -> Any:
                if server.failures > 0:
                    server.failures -= 1
                    self.send_error(server.status)
                    return None
                return super().send_head()

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@pytest.fixture
def server(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0.01)
    fsspec.filesystem("http").clear_instance_cache()
    (workplace.folder / "served").mkdir()
    (workplace.folder / "docs.parquet").rename(workplace.folder / "served" / "docs.parquet")
    server = Server(workplace.folder / "served")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(server: Server) -> str:
    """The URL of the documents, with a password and a key in it."""
    return f"http://ada:Geheim@127.0.0.1:{server.server_port}/docs.parquet?api_key=xyz987&part=1#.parquet"


def run(workplace: Workplace, path: str, *options: str) -> Any:
    workplace.tree["documents"] = {"path": path}
    workplace.save()
    return invoke("run", workplace.job_file, *options)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_server_that_fails_for_a_while_is_asked_again(
    workplace: Workplace, server: Server, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    server.failures, server.status = 5, status
    result = run(workplace, url(server))
    assert result.exit_code == 0, result.output
    assert f"the server fails with HTTP status {status}" in caplog.text
    assert len(workplace.rows()) == 9


def test_a_server_that_fails_is_told_as_what_it_is(workplace: Workplace, server: Server) -> None:
    server.failures = 1000
    result = run(workplace, url(server))
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    told = f"error: http://***@127.0.0.1:{server.server_port}/docs.parquet?api_key=***&part=1#.parquet: "
    assert line == told + "the server fails with HTTP status 503; when it works again, the same command goes on"


def test_what_is_not_there_is_not_there(workplace: Workplace, server: Server) -> None:
    (workplace.folder / "served" / "docs.parquet").unlink()
    plain = f"http://127.0.0.1:{server.server_port}/docs.parquet"
    assert f"{plain} does not exist: there is no such file" in error_of(run(workplace, plain))


def test_a_server_that_is_not_there_cannot_be_reached(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.retry.FIRST_WAIT", 0.01)
    result = run(workplace, "http://127.0.0.1:9/docs.parquet")
    assert result.exit_code == 1
    assert "http://127.0.0.1:9/docs.parquet: cannot be reached: " in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"], ["--log-format", "json"]])
@pytest.mark.parametrize("failures", [0, 3, 1000])
def test_secrets_of_urls_are_shown_and_written_nowhere(
    workplace: Workplace, server: Server, caplog: pytest.LogCaptureFixture, options: list[str], failures: int
) -> None:
    server.failures = failures
    shown = run(workplace, url(server), *options).output
    shown += invoke("status", workplace.job_file).output
    page = workplace.folder / "page.html"
    shown += invoke("show", workplace.job_file, "--html", page).output
    files = [path for path in workplace.folder.rglob("*") if path.is_file() and path != workplace.job_file]
    written = b"".join(path.read_bytes() for path in files)
    for secret in SECRETS:
        assert secret not in shown + caplog.text
        assert secret.encode() not in written
