"""The store alone: loading, saving, logging and recovery. Runs with a damaged store are in test_runner.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from pipeline.cache import store as store_module
from pipeline.cache.index import Index
from pipeline.cache.store import Store
from pipeline.errors import DiskFull, JobError, StoreError
from turboquant import CacheCodec, Prefix
from turboquant.caches.prefix import Segment
from turboquant.io.identity import Identity
from turboquant.io.segment_file import SegmentError

TOKENS = list(range(300))
CODEC = CacheCodec()
IDENTITY = Identity("w1", "t1", CODEC.identity, "exact 512")
KEY = IDENTITY.key(TOKENS)


def make_segment(seed: int = 0) -> Segment:
    mx.random.seed(seed)
    cache = KVCache()
    cache.update_and_fetch(mx.random.normal((1, 1, 300, 64)), mx.random.normal((1, 1, 300, 64)))
    return Segment(Prefix.encode([cache], 300, CODEC).layers, 0, 300)


def tensors(segment: Segment) -> dict[str, bytes]:
    return {name: bytes(memoryview(x)) for name, x in segment.layers[0].tensors().items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_a_prefix_comes_back_bit_by_bit(store: Store, tmp_path: Path) -> None:
    segment = make_segment()
    assert not store.contains(KEY)
    size = store.save(KEY, segment, IDENTITY, None, {"label": "label", "whole": True})
    assert store.contains(KEY)
    assert store.used_bytes() == size
    assert segment.nbytes < size < segment.nbytes + 5000
    restored = store.load(KEY, 0, CODEC, IDENTITY, "label")
    assert restored is not None
    assert restored.tokens == 300
    assert tensors(restored) == tensors(segment)
    assert [path.name for path in (tmp_path / "cache" / KEY[:2]).iterdir()] == [KEY]


def test_only_contexts_of_the_same_identity_are_listed(store: Store, tmp_path: Path) -> None:
    assert list(store.contexts(IDENTITY)) == []
    other = replace(IDENTITY, weights="w2")
    for identity, label in (IDENTITY, "a"), (other, "b"), (IDENTITY, ""), (replace(IDENTITY, tokenizer="t2"), "c"):
        store.save(identity.key(TOKENS, label), make_segment(), identity, None, {"label": label, "whole": True})
    assert list(store.contexts(IDENTITY)) == [("a", 300)]
    assert list(store.contexts(other)) == [("b", 300)]
    manifest = tmp_path / "cache" / (key := other.key(TOKENS, "b"))[:2] / key / "segment.json"
    manifest.write_text("broken")
    assert list(store.contexts(other)) == []


def test_reading_makes_no_folder(store: Store, tmp_path: Path) -> None:
    assert store.load(KEY, 0, CODEC, IDENTITY, "label") is None
    assert store.used_bytes() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": "w2"}, "other weights"),
        ({"tokenizer": "t2"}, "another tokenizer or chat template"),
        ({"codec": "c2"}, f"codec was '{CODEC.identity}', now 'c2'"),
        ({"prefill": "exact 256"}, "prefill was 'exact 512', now 'exact 256'"),
        ({}, "the queries have changed"),
    ],
)
def test_a_miss_names_what_changed(
    store: Store, caplog: pytest.LogCaptureFixture, change: dict[str, str], reason: str
) -> None:
    store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    identity = replace(IDENTITY, **change)
    with caplog.at_level(logging.DEBUG, "pipeline"):
        assert store.load(identity.key(TOKENS[:-1]), 0, CODEC, identity, "label") is None
        assert store.load(identity.key(TOKENS[:-1]), 0, CODEC, identity, "another text") is None
    first, second = caplog.messages
    assert reason in first
    assert second.endswith("absent")


def test_a_broken_manifest_does_not_stop_the_log_of_a_miss(store: Store, tmp_path: Path) -> None:
    store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    (tmp_path / "cache" / KEY[:2] / KEY / "segment.json").write_text("[]")
    assert store.load(IDENTITY.key(TOKENS[:-1]), 0, CODEC, IDENTITY, "label") is None


def test_rejected_segments_of_one_key_are_numbered(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
        (tmp_path / "cache" / KEY[:2] / KEY / "segment.safetensors").write_bytes(b"x")
        assert store.load(KEY, 0, CODEC, IDENTITY, "label") is None
        assert not store.contains(KEY)
    assert sorted(path.name for path in (tmp_path / "cache" / "rejected").iterdir()) == [f"{KEY}-0", f"{KEY}-1"]


def test_leftovers_of_a_killed_run_are_removed(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / KEY[:2] / KEY
    folder.mkdir(parents=True)
    (folder / ".half.safetensors").write_bytes(b"half")
    (folder / "segment.safetensors").write_bytes(b"without a manifest")
    assert store.load(KEY, 0, CODEC, IDENTITY, "label") is None
    store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    assert sorted(path.name for path in folder.iterdir()) == ["segment.json", "segment.safetensors"]
    assert store.load(KEY, 0, CODEC, IDENTITY, "label") is not None


def test_a_segment_that_cannot_be_stored_is_a_store_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="QuantizedKVCache, which cannot be stored"):
        store.save(KEY, Segment((QuantizedKVCache(),), 0, 300), IDENTITY, None, {"label": "label", "whole": True})
    assert not store.contains(KEY)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / KEY[:2]).write_text("in the way")
    with pytest.raises(StoreError, match="cannot be stored"):
        store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    assert store.load(KEY, 0, CODEC, IDENTITY, "label") is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[write] Unable to write 8 bytes to file."), StoreError),
        (OSError(30, "Read-only file system"), StoreError),
        (OSError(28, "No space left on device"), DiskFull),
    ],
)
def test_a_write_that_fails_leaves_no_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[StoreError]
) -> None:
    def write_half(file: Any, *_: object) -> None:
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", write_half)
        with pytest.raises(StoreError) as raised:
            store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    assert type(raised.value) is kind
    assert list((tmp_path / "cache").glob("??/*/*")) == []
    store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})


@pytest.mark.parametrize(
    ("place", "errors"),
    [
        *(
            ("turboquant.io.segment_file.load_tensors", [error])
            for error in (OSError(5, "Input/output error"), OSError(24, "Too many open files"), MemoryError())
        ),
        *(  # it looks bad, and cannot be read again
            ("pipeline.cache.store.read_segment", [SegmentError("it looks bad"), error])
            for error in (OSError(5, "Input/output error"), RuntimeError("no memory"), MemoryError())
        ),
    ],
)
def test_a_segment_that_cannot_be_read_now_is_not_set_aside(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    errors: list[Exception],
) -> None:
    store.save(KEY, make_segment(), IDENTITY, None, {"label": "label", "whole": True})
    with monkeypatch.context() as patch:
        patch.setattr(place, mock.Mock(side_effect=errors))
        assert store.load(KEY, 0, CODEC, IDENTITY, "label") is None
    assert "cannot be read now" in caplog.text
    assert not (tmp_path / "cache" / "rejected").exists()
    assert store.load(KEY, 0, CODEC, IDENTITY, "label") is not None


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match=r"cache.dir: .*file is a file; name a folder"):
        Store(tmp_path / "file")


def test_a_document_costs_no_look_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    keys, segment, syncs = [IDENTITY.key([number]) for number in range(3)], make_segment(), list[bool]()
    sync = Index.sync

    def counted(index: Index, thorough: bool = False) -> None:
        syncs.append(thorough)
        sync(index, thorough)
        clock.now += 1  # it takes a second, so the next one is due twenty seconds later

    monkeypatch.setattr(Index, "sync", counted)
    one, other = Store(tmp_path / "cache", 1 << 30), Store(tmp_path / "cache", 1 << 30)
    one.make_room(1)
    other.make_room(1)
    assert len(syncs) == 2
    for number in range(3):
        one.save(keys[number], segment, IDENTITY, None, {"label": str(number), "whole": True, "output": "job"})
        # Another run knows at once what this one has saved.
        assert [entry.key for entry in other.ends_of_contexts(str(number))] == [keys[number]]
        one.remove_built("job", [keys[number]])
        assert not other.ends_of_contexts(str(number))
    assert len(syncs) == 2
    clock.now += 21
    one.make_room(1)
    assert len(syncs) == 3
