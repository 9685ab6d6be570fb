"""Models of Hugging Face: snapshots of which files are missing, with a hub and without one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.command_line import Result, hub_settings, invoke
from tests.pipeline.workplace import Workplace

COMMIT = "c" * 40
INDEX = "model.safetensors.index.json"


class Hub(ThreadingHTTPServer):
    """A hub with one repo, whose files are those of a folder. fetched: the names of the files that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, set[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                body = self.answer()
                self.wfile.write(body)

            def answer(self) -> bytes:
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/owner/name/revision/"):
                    body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()
                elif path.startswith("/api/models/owner/name/tree/"):
                    body = json.dumps(hub.tree()).encode()
                else:
                    name = path.rpartition("/")[2]
                    body = (hub.folder / name).read_bytes()
                    hub.fetched.add(name)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{abs(hash(body)):040x}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                return body

            def log_message(self, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{number:040x}"}
            for number, file in enumerate(sorted(self.folder.iterdir()))
        ]


@pytest.fixture
def hub(workplace: Workplace) -> Iterator[Hub]:
    """A hub with the tiny model in two shards."""
    import mlx.core as mx

    folder = shutil.copytree(workplace.model, workplace.folder / "repo")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, held in shards.items():
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in held}, {"format": "mlx"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def cache(workplace: Workplace, hub: Hub, *without: str) -> Path:
    """Make a cache with a snapshot that lacks files, as another program leaves it that needs only the others."""
    repo = workplace.folder / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(hub.folder, snapshot, ignore=lambda _, names: [name for name in names if name in without])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def plan(workplace: Workplace, hub: Hub, offline: bool) -> Result:
    job = workplace.save(model="owner/name")
    address, cache = f"http://127.0.0.1:{hub.server_port}", str(workplace.folder / "hub")
    settings = {"HF_ENDPOINT": address, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": str(int(offline))}
    with hub_settings(**settings, HF_HUB_DISABLE_XET="1"):
        return invoke("plan", job, "--prompt")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("without", "lacks"),
    [
        ((*SHARDS, INDEX), "model*.safetensors"),
        (SHARDS[:1], SHARDS[0]),
        (SHARDS, ", ".join(SHARDS)),
        (("tokenizer.json", "config.json"), "config.json, tokenizer.json"),
    ],
)
def test_what_a_snapshot_lacks_is_named_without_a_hub_and_fetched_with_one(
    workplace: Workplace, hub: Hub, without: tuple[str, ...], lacks: str
) -> None:
    snapshot = cache(workplace, hub, *without)
    refused = plan(workplace, hub, offline=True)
    assert refused.exit_code == 2
    assert f"error: model owner/name: its snapshot {snapshot} lacks {lacks}, and Hugging Face gives" in refused.stderr
    fetched = plan(workplace, hub, offline=False)
    assert fetched.exit_code == 0, fetched.stderr
    assert hub.fetched == set(without)
    assert plan(workplace, hub, offline=True).stdout == fetched.stdout


def test_a_chat_template_that_was_not_fetched_is_fetched_or_told(
    workplace: Workplace, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    cache(workplace, hub, "chat_template.jinja")
    plain = plan(workplace, hub, offline=True)
    assert plain.exit_code == 0, plain.stderr
    assert "its snapshot has no chat template, and Hugging Face cannot be asked now" in caplog.text
    chat = plan(workplace, hub, offline=False)
    assert hub.fetched == {"chat_template.jinja"}
    assert chat.stdout.startswith("<|bos|><|system|>")
    assert plan(workplace, hub, offline=True).stdout == chat.stdout != plain.stdout


def test_a_model_without_a_chat_template_is_asked_about_once(
    workplace: Workplace, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    (hub.folder / "chat_template.jinja").unlink()
    cache(workplace, hub)
    shown = plan(workplace, hub, offline=False)
    again = plan(workplace, hub, offline=True)
    assert (again.stdout, again.stderr, caplog.messages) == (shown.stdout, "", [])
    assert not hub.fetched


def test_a_complete_snapshot_needs_no_hub(workplace: Workplace, hub: Hub) -> None:
    cache(workplace, hub)
    assert plan(workplace, hub, offline=True).exit_code == 0


def test_weights_whose_link_leads_nowhere_are_missing(workplace: Workplace, hub: Hub) -> None:
    snapshot = cache(workplace, hub, SHARDS[1])
    (snapshot / SHARDS[1]).symlink_to(workplace.folder / "blob")
    assert f"lacks {SHARDS[1]}, and" in plan(workplace, hub, offline=True).stderr
