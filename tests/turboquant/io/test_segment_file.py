"""A segment on disk is read exactly as it was written, or refused with a SegmentError."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from turboquant import CacheCodec, EncodedLayer
from turboquant.caches.prefix import Segment, join
from turboquant.io.identity import FORMAT_VERSION, Identity
from turboquant.io.json_file import seal
from turboquant.io.segment_file import MANIFEST, TENSORS, SegmentError, read_manifest, read_segment, write_segment
from turboquant.kernels.encoding import encode_layer
from turboquant.runtime.versions import computing_versions

CODEC = CacheCodec(3, 4, window=8)
IDENTITY = Identity(weights="w", tokenizer="t", codec=CODEC.identity, prefill="exact")
KEY = IDENTITY.key([1, 2, 3])
TOKENS = 70


def make_segment(dtype: mx.Dtype = mx.float32, seed: int = 0) -> Segment:
    """Return a segment with all kinds of layers, whose length is not a multiple of any block."""
    mx.random.seed(seed)

    def kv(count: int) -> tuple[mx.array, mx.array]:
        keys, values = (mx.random.normal((1, 2, count, 32)).astype(dtype) for _ in range(2))
        return keys, values

    keys, values = kv(TOKENS)
    encoded = encode_layer(keys[0], values[0], CODEC)
    plain, rotating, arrays = KVCache(), RotatingKVCache(max_size=16, keep=2), ArraysCache(3)
    plain.update_and_fetch(*kv(TOKENS))
    rotating.update_and_fetch(*kv(TOKENS - 2))
    for _ in range(2):
        rotating.update_and_fetch(*kv(1))
    arrays[0], arrays[2] = mx.random.normal((1, 4, 8)), mx.random.normal((1, 2)).astype(dtype)
    return Segment((encoded, plain, rotating, arrays, encoded), 0, TOKENS)


def contents(prefix: Segment) -> list[tuple[str, Any]]:
    """Return everything that a prefix holds in a form that is compared bit by bit."""
    flat: list[tuple[str, Any]] = [("tokens", prefix.tokens)]
    for index, layer in enumerate(prefix.layers):
        state = layer.tensors() if isinstance(layer, EncodedLayer) else layer.state
        leaves: Any = tree_flatten(state)
        for name, leaf in leaves:
            if isinstance(leaf, mx.array):
                leaf = (leaf.dtype, leaf.shape, bytes(np.array(leaf.view(mx.uint8)) if leaf.size else b""))
            flat.append((f"{index}.{type(layer).__name__}.{name}", leaf))
    return flat


@pytest.fixture(scope="module")
def prefix() -> Segment:
    return make_segment()


@pytest.fixture(scope="module")
def written(prefix: Segment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_segment(folder, KEY, prefix, IDENTITY, about={"label": "minutes of May"})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Return a good segment that a test damages."""
    return Path(shutil.copytree(written, tmp_path / "segment"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and its checksum, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_checksum"]
    change(manifest)
    seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "manifest_checksum": seal}))


def assert_refused(folder: Path, match: str = ".") -> None:
    with pytest.raises(SegmentError, match=match) as caught:
        read_segment(folder, KEY, CODEC)
    assert str(caught.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_read_is_what_was_written(dtype: mx.Dtype, tmp_path: Path) -> None:
    prefix = make_segment(dtype)
    size = write_segment(tmp_path / "new" / "folder", KEY, prefix, IDENTITY)
    again = read_segment(tmp_path / "new" / "folder", KEY, CODEC)
    assert contents(again) == contents(prefix)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in prefix.layers]
    files = list((tmp_path / "new" / "folder").iterdir())
    assert sorted(file.name for file in files) == [MANIFEST, TENSORS]
    assert size == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 300])
def test_short_contexts_are_read_as_they_were_written(tokens: int, tmp_path: Path) -> None:
    keys, values = (mx.random.normal((2, tokens, 80)) for _ in range(2))
    layer = encode_layer(keys, values, CacheCodec())
    prefix = Segment((layer,), 0, tokens)
    write_segment(tmp_path, KEY, prefix, IDENTITY)
    assert contents(read_segment(tmp_path, KEY, CacheCodec())) == contents(prefix)


def test_what_is_read_does_not_depend_on_the_file_any_more(folder: Path, prefix: Segment) -> None:
    again = read_segment(folder, KEY, CODEC)
    (folder / TENSORS).write_bytes(b"\0" * (folder / TENSORS).stat().st_size)
    shutil.rmtree(folder)
    assert contents(again) == contents(prefix)


def test_a_restored_segment_of_all_kinds_continues_like_the_original(folder: Path, prefix: Segment) -> None:
    new = [mx.random.normal((1, 2, 1, 32)) for _ in range(2)]
    restored = read_segment(folder, KEY, CODEC)
    for a, b in zip(join([prefix]).fork()[1:3], join([restored]).fork()[1:3], strict=True):
        for _ in range(3):
            for x, y in zip(a.update_and_fetch(*new), b.update_and_fetch(*new), strict=True):
                assert mx.array_equal(x, y)


def test_the_manifest_tells_what_the_segment_is(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.key == KEY
    assert manifest.tokens == TOKENS
    assert manifest.about == {"label": "minutes of May"}
    assert manifest.identity == IDENTITY
    assert manifest.versions == computing_versions()


def test_layers_that_cannot_be_restored_are_not_written(tmp_path: Path, prefix: Segment) -> None:
    for layer in (prefix.layers[0].dense(mx.float32), object(), type("KVCache", (KVCache,), {})()):
        with pytest.raises(TypeError, match="cannot be stored"):
            write_segment(tmp_path, KEY, Segment((layer,), 0, TOKENS), IDENTITY)
    assert list(tmp_path.iterdir()) == []


# --- damage


def test_every_flipped_bit_of_the_manifest_is_noticed(folder: Path) -> None:
    path = folder / MANIFEST
    good = path.read_bytes()
    for position in range(0, len(good), 3):
        bad = bytearray(good)
        bad[position] ^= 1 << (position // 3 % 8)
        path.write_bytes(bad)
        assert_refused(folder)


def test_every_flipped_bit_of_the_tensors_is_noticed(folder: Path) -> None:
    path = folder / TENSORS
    good = path.read_bytes()
    for position in [*range(0, len(good), 311), len(good) - 1]:
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        assert_refused(folder, "^checksum$|^the tensors cannot be read: ")


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_every_truncation_is_noticed(name: str, folder: Path) -> None:
    path = folder / name
    good = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(0, len(good) - 1, max(1, len(good) // 60)), len(good) - 1]:
        path.write_bytes(good[:length])
        assert_refused(folder)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_bytes_too_many_are_noticed(name: str, folder: Path) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"{}")
    assert_refused(folder)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_another_segment_s_file_is_noticed(name: str, folder: Path, tmp_path: Path) -> None:
    other = IDENTITY.key([4])
    write_segment(tmp_path / "other", other, make_segment(seed=1), IDENTITY)
    shutil.copy(tmp_path / "other" / name, folder / name)
    assert_refused(folder)


def test_a_segment_under_another_key_is_refused(folder: Path) -> None:
    with pytest.raises(SegmentError, match="another segment's key"):
        read_segment(folder, IDENTITY.key([4]), CODEC)


def test_a_segment_of_another_codec_is_refused(folder: Path) -> None:
    with pytest.raises(SegmentError, match="don't fit together"):
        read_segment(folder, KEY, CacheCodec(4, 4))


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert_refused(folder, {MANIFEST: "^absent$", TENSORS: "^the tensors are missing$"}[name])


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_folder_in_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_refused(folder)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, -1, "1", None, [1]])
def test_another_format_version_is_named_in_the_error(version: Any, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": version}))
    assert_refused(folder, "^format version")


# --- forgery


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "1",
        '"segment"',
        "{}",
        "{",
        '{"identity": []}',
        "\0",
        "[" * 100_000,
        '{"identity": {"a": ' + "[" * 900 + "]" * 900 + "}}",
        '{"identity": {}, "format_version": ' + "9" * 5000 + "}",
        '{"identity": {}, "format_version": NaN}',
        '{"identity": {}, "format_version": 1}',
        '{"identity": {}, "format_version": 1, "format_version": 1}',
        " " * ((16 << 20) + 1),
    ],
    ids=lambda text: f"{text[:24]}...{len(text)}",
)
def test_a_text_that_is_not_a_manifest_is_refused(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    assert_refused(folder)


def test_a_manifest_that_is_not_utf_8_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b'{"identity": "\xff\xfe"}')
    assert_refused(folder)


def set_kind(kind: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["layers"][1].update(kind=kind)


def set_state(layer: int, state: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["layers"][layer].update(state=state)


def set_item(layer: int, item: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["layers"][layer]["state"]["items"].__setitem__(item, value)


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a class that is not on the list": set_kind("QuantizedKVCache"),
    "a function of the same module": set_kind("load_prompt_cache"),
    "a class by its path": set_kind("subprocess.Popen"),
    "a kind that is a number": set_kind(3),
    "a kind that is a list": set_kind(["KVCache"]),
    "a kind that is null": set_kind(None),
    "layers swapped": lambda m: m["layers"].insert(0, m["layers"].pop(1)),
    "another class on the list": set_kind("RotatingKVCache"),
    "encoded where it is not": set_kind("encoded"),
    "a layer that is a string": lambda m: m["layers"].__setitem__(0, "encoded"),
    "a layer that is null": lambda m: m["layers"].__setitem__(0, None),
    "a layer without a kind": lambda m: m["layers"][0].pop("kind"),
    "a layer without a state": lambda m: m["layers"][1].pop("state"),
    "layers that are null": lambda m: m.update(layers=None),
    "layers that are a number": lambda m: m.update(layers=5),
    "layers that are text": lambda m: m.update(layers="encoded"),
    "layers that are a mapping": lambda m: m.update(layers={"kind": "encoded"}),
    "no layers": lambda m: m.pop("layers"),
    "a layer too many": lambda m: m["layers"].append({"kind": "encoded"}),
    "one token more": lambda m: m.update(tokens=TOKENS + 1),
    "tokens that are text": lambda m: m.update(tokens=str(TOKENS)),
    "tokens that are a fraction": lambda m: m.update(tokens=TOKENS + 0.5),
    "tokens without end": lambda m: m.update(tokens=float("inf")),
    "tokens that are no number": lambda m: m.update(tokens=float("nan")),
    "tokens that are null": lambda m: m.update(tokens=None),
    "tokens that are true": lambda m: m.update(tokens=True),
    "no tokens": lambda m: m.pop("tokens"),
    "bytes that are text": lambda m: m.update(bytes=str(m["bytes"])),
    "no bytes": lambda m: m.pop("bytes"),
    "no checksum": lambda m: m.pop("checksum"),
    "a checksum that is a number": lambda m: m.update(checksum=7),
    "another key": lambda m: m.update(key="0" * 64),
    "a key that is a list": lambda m: m.update(key=[KEY]),
    "no identity": lambda m: m.pop("identity"),
    "an identity that is a list": lambda m: m.update(identity=[1]),
    "a state that is null": set_state(1, None),
    "a state that is a number": set_state(1, 4),
    "a state that is a list": set_state(1, []),
    "a state without items": set_state(1, {"items": []}),
    "a state with items that are a number": set_state(1, {"items": 3}),
    "a tensor that is not there": set_item(1, 0, {"tensor": "9.state.0"}),
    "a tensor named by a list": set_item(1, 0, {"tensor": ["1.state.0"]}),
    "a tensor that is a number": set_item(1, 0, {"value": 5}),
    "an offset that is not the tokens": set_item(1, 2, {"value": TOKENS - 1}),
    "an offset that is text": set_item(1, 2, {"value": "70"}),
    "a sliding layer's offset moved": set_item(2, 2, {"value": TOKENS + 1}),
    "a sliding layer that keeps more than it holds": set_item(2, 3, {"value": 16}),
    "a sliding layer of no size": set_item(2, 4, {"value": 0}),
    "a sliding layer larger than its tensors": set_item(2, 4, {"value": 1 << 40}),
    "a sliding layer that goes on behind its end": set_item(2, 5, {"value": 1 << 40}),
    "a sliding layer that goes on before its beginning": set_item(2, 5, {"value": -1}),
    "one tensor for keys and values": set_item(1, 1, {"tensor": "1.state.0"}),
    "another layer's tensor": set_item(1, 0, {"tensor": "2.state.0"}),
    "an item without content": set_item(2, 3, {}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_forged_manifests_are_refused(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    reseal(folder, lambda manifest: None)
    read_segment(folder, KEY, CODEC)  # the forger's checksum is right
    reseal(folder, change)
    assert_refused(folder)


@pytest.mark.parametrize("levels", [1, 100, 200, 300, 400, 450, 480, 490, 2000, 100_000])
def test_a_state_too_deep_is_refused(levels: int, folder: Path) -> None:
    reseal(folder, set_state(1, "deep"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_checksum"]
    nested = '{"items": [' * levels + '{"value": 1}' + "]}" * levels
    text = json.dumps(manifest, sort_keys=True).replace('"deep"', nested)
    seal = xxhash.xxh3_128_hexdigest(text.encode())
    (folder / MANIFEST).write_text(f'{text[:-1]}, "manifest_checksum": "{seal}"}}')
    assert_refused(folder)


def replace_tensors(folder: Path, content: bytes) -> None:
    (folder / TENSORS).write_bytes(content)
    digest = xxhash.xxh3_128_hexdigest(content)
    reseal(folder, lambda manifest: manifest.update(bytes=len(content), checksum=digest))


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\xff" * 8,
        b"\xff" * 4096,
        (1 << 40).to_bytes(8, "little") + b"{}",
        safetensors("{"),
        safetensors("[]"),
        safetensors("null"),
        safetensors({}),
        safetensors("[" * 20_000),
        safetensors({"0.key_codes": 1}),
        safetensors({"0.key_codes": {"dtype": "U32"}}),
        safetensors({"0.key_codes": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors({"0.key_codes": {"dtype": "U32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"1234"),
        safetensors({"0.key_codes": {"dtype": "U32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors({"0.key_codes": {"dtype": "U32", "shape": [2], "data_offsets": [0, 1 << 50]}}, b"1234"),
        safetensors({"0.key_codes": {"dtype": "U32", "shape": [1], "data_offsets": [9, 13]}}, b"1234"),
        safetensors({"0.key_codes": {"dtype": "U32", "shape": [1], "data_offsets": [0, 4]}}, b"1234 and a gap"),
        safetensors('{"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "x": 1}'),
        b"PK\x03\x04 a zip archive",
        b"\x93NUMPY\x01\x00",
    ],
    ids=lambda content: f"{content[:20]!r}...{len(content)}",
)
def test_forged_tensors_are_refused(content: bytes, folder: Path) -> None:
    replace_tensors(folder, content)
    assert_refused(folder)


def set_tensor(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.update({name: mx.contiguous(change(tensors[name]))})


OTHER_TENSORS: dict[str, Callable[[dict[str, mx.array]], Any]] = {
    **{
        f"no {name}": lambda tensors, name=name: tensors.pop(name)  # type: ignore[misc]
        for name in ("0.sink_keys", "0.key_codes", "0.value_mean", "1.state.0", "2.state.1", "3.state.0.0")
    },
    "a tensor of no layer": lambda tensors: tensors.update({"5.key_mean": mx.zeros(3)}),
    "a tensor that its layer has no use for": lambda tensors: tensors.update({"0.more": mx.zeros(3)}),
    "a scale that is no number": set_tensor("0.key_scales", lambda x: x * float("nan")),
    "a mean without end": set_tensor("4.value_mean", lambda x: x + float("inf")),
    "codes of another dtype": set_tensor("0.key_codes", lambda x: x.astype(mx.int32)),
    "codes a token short": set_tensor("0.key_codes", lambda x: x[:, 1:]),
    "two layers' codes of other lengths": set_tensor("4.value_scales", lambda x: x[:, 1:]),
    "keys of five dimensions": set_tensor("1.state.0", lambda x: x[..., None]),
    "values of five dimensions": set_tensor("1.state.1", lambda x: x[..., None]),
    "keys of integers": set_tensor("1.state.0", lambda x: x.astype(mx.int32)),
    "keys of more heads than values": set_tensor("2.state.0", lambda x: mx.concatenate([x, x], axis=1)),
    "keys of fewer tokens than there are": set_tensor("1.state.0", lambda x: x[:, :, 1:]),
}


@pytest.mark.parametrize("change", OTHER_TENSORS.values(), ids=OTHER_TENSORS.keys())
def test_other_tensors_are_noticed(change: Callable[[dict[str, mx.array]], Any], folder: Path) -> None:
    tensors = mx.load(str(folder / TENSORS))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(folder / "new.safetensors"), tensors)
    replace_tensors(folder, (folder / "new.safetensors").read_bytes())
    assert_refused(folder)


def test_a_file_swapped_after_its_check_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes loaded are those of the file that was verified, though another may be renamed into its place."""
    write_segment(folder.parent / "other", KEY, make_segment(seed=9), IDENTITY)
    expected = contents(read_segment(folder, KEY, CODEC))

    def swap_then_load(file: Any, **options: Any) -> Any:
        os.replace(folder.parent / "other" / TENSORS, folder / TENSORS)
        return load(file, **options)

    load = mx.load
    monkeypatch.setattr(mx, "load", swap_then_load)
    assert contents(read_segment(folder, KEY, CODEC)) == expected


# --- crashes


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("where", "call"),
    [("save", 1), *(("os.fsync", n) for n in (1, 2, 3, 4)), *(("os.replace", n) for n in (1, 2))],
)
def test_a_failure_at_any_step_leaves_nothing_half(
    where: str,
    call: int,
    existing: bool,
    error: BaseException,
    prefix: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if existing:  # a bad segment that is being replaced
        write_segment(tmp_path, KEY, make_segment(seed=5), IDENTITY)
    name = "mlx.core.save_safetensors" if where == "save" else where
    real: Any = {"save": mx.save_safetensors, "os.fsync": os.fsync, "os.replace": os.replace}[where]
    calls: list[Any] = []

    def fail(*args: Any, **folders: int) -> Any:
        calls.append(args)
        if len(calls) < call:
            return real(*args, **folders)
        if where == "save":
            args[0].write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(type(error)):
            write_segment(tmp_path, KEY, prefix, IDENTITY)
    assert len(calls) == call
    assert {file.name for file in tmp_path.iterdir()} <= {MANIFEST, TENSORS}
    assert_absent_or_whole(tmp_path, [contents(prefix)] + [contents(make_segment(seed=5))] * existing)
    write_segment(tmp_path, KEY, prefix, IDENTITY)  # and the next attempt heals it
    assert contents(read_segment(tmp_path, KEY, CODEC)) == contents(prefix)


def assert_absent_or_whole(folder: Path, valid: list[Any]) -> bool:
    try:
        assert contents(read_segment(folder, KEY, CODEC)) in valid
    except SegmentError:
        return False
    return True


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_at_any_instant_leaves_nothing_half(
    existing: bool, prefix: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run reads the folder as it is before and after each important system call."""
    folder = tmp_path / "segment"
    snapshots: list[Path] = []
    old = make_segment(seed=5)
    if existing:
        write_segment(folder, KEY, old, IDENTITY)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **folders: int) -> Any:
            for moment in ("before", "after"):
                if moment == "after":
                    result = function(*args, **folders)
                snapshots.append(Path(shutil.copytree(folder, tmp_path / f"{len(snapshots)}")))
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", watched(mx.save_safetensors))
        patch.setattr(os, "fsync", watched(os.fsync))
        patch.setattr(os, "replace", watched(os.replace))
        write_segment(folder, KEY, prefix, IDENTITY)
    whole = [assert_absent_or_whole(s, [contents(prefix)] + [contents(old)] * existing) for s in snapshots]
    assert len(snapshots) == 14
    assert whole[0] == existing
    assert whole[-1]


def test_data_reaches_the_disk_before_its_name_does(
    prefix: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def record_replace(source: Any, target: Any, **folders: int) -> None:
        events.append(Path(target).name)
        replace(source, target, **folders)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_segment(tmp_path, KEY, prefix, IDENTITY)
    if os.path.isdir("/proc/self/fd"):
        assert events == ["file", TENSORS, "folder", "file", MANIFEST, "folder"]


def test_two_writers_of_one_segment_end_with_a_good_one(prefix: Segment, tmp_path: Path) -> None:
    """The store has a lock; if the lock fails, writers must still not mix their temporary files."""
    for _ in range(3):
        threads = [threading.Thread(target=write_segment, args=(tmp_path, KEY, prefix, IDENTITY)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert contents(read_segment(tmp_path, KEY, CODEC)) == contents(prefix)
        assert {file.name for file in tmp_path.iterdir()} == {MANIFEST, TENSORS}


# --- the key


def test_every_field_every_token_and_the_parent_change_the_key() -> None:
    base = Identity("w", "t", "c", "p")
    keys = [
        base.key([1, 2]),
        *(dataclasses.replace(base, **{field.name: "x"}).key([1, 2]) for field in dataclasses.fields(base)),
        base.key([1, 3]),
        base.key([2, 2]),
        base.key([2, 1]),
        base.key([1, 2, 0]),
        base.key([1]),
        base.key([]),
        base.key([1, 2], parent="q"),
        base.key([1, 2 + (1 << 16)]),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


@settings(deadline=None)
@given(
    a=st.tuples(*[st.text(max_size=3)] * 5, st.lists(st.integers(0, 2**32 - 1), max_size=3)),
    b=st.tuples(*[st.text(max_size=3)] * 5, st.lists(st.integers(0, 2**32 - 1), max_size=3)),
)
def test_different_segments_have_different_keys(a: Any, b: Any) -> None:
    key = [Identity(*x[:4]).key(x[5], parent=x[4]) for x in (a, b)]
    assert (key[0] == key[1]) == (a == b)


@given(text=st.text("ab\0", min_size=2, max_size=6), cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_no_field_runs_into_the_next(text: str, cuts: tuple[int, int]) -> None:
    a, b = (Identity(text[:cut], text[cut:], "c", "p") for cut in cuts)
    assert (a.key([1]) == b.key([1])) == (a == b)


def test_the_key_is_pinned_since_stores_depend_on_it() -> None:
    assert (
        Identity("w", "t", "c", "p").key([1, 2, 3], parent="q")
        == "2c9a6e5b48892980bef9f88f86c4334bb9faeeed8502e217ee9ae97aca6bdef0"
    )


def test_lists_tuples_and_arrays_of_tokens_have_the_same_key() -> None:
    base = Identity("w", "t", "c", "p")
    assert base.key([1, 2]) == base.key((1, 2)) == base.key(np.array([1, 2]))  # type: ignore[arg-type]


def paired_prefix() -> Segment:
    """Return caches like falcon_h1's: each layer is a list of a recurrent state, and keys and values."""
    plain, arrays = KVCache(), ArraysCache(2)
    plain.update_and_fetch(mx.random.normal((1, 2, TOKENS, 32)), mx.random.normal((1, 2, TOKENS, 32)))
    arrays[0] = mx.random.normal((1, 4, 8))
    return Segment((CacheList(arrays, plain),), 0, TOKENS)


def test_lists_of_caches_are_restored(tmp_path: Path) -> None:
    prefix = paired_prefix()
    write_segment(tmp_path, KEY, prefix, IDENTITY)
    restored = read_segment(tmp_path, KEY, CODEC)
    assert [type(cache) for cache in restored.layers[0].caches] == [ArraysCache, KVCache]
    assert contents(restored) == contents(prefix)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state["items"][1]["items"].__setitem__(1, {"value": "subprocess"}), "subprocess"),
        (lambda state: state["items"][1]["items"].__setitem__(1, {"value": "CacheList"}), "fit together"),
        (lambda state: state["items"].pop(), "has no use for"),
        (lambda state: state["items"][1]["items"][0]["items"].__setitem__(2, {"value": 3}), r"holds \{3\} tokens"),
    ],
)
def test_lists_of_other_things_are_refused(change: Callable[[Any], Any], reason: str, tmp_path: Path) -> None:
    write_segment(tmp_path, KEY, paired_prefix(), IDENTITY)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    change(manifest["layers"][0]["state"])
    manifest["manifest_checksum"] = seal(manifest, "manifest_checksum")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SegmentError, match=reason):
        read_segment(tmp_path, KEY, CODEC)
