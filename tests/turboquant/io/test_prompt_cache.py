"""Prompt caches are made, compressed, saved and loaded; a loaded cache continues like the saved one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from benches.fuzz_files import fuzz
from tests.turboquant.running import answer, assert_same, continue_on, cosine
from turboquant import (
    CacheCodec,
    EncodedLayer,
    Fork,
    PromptCacheError,
    TurboQuantKVCache,
    compress,
    load_prompt_cache,
    make_prompt_cache,
    prefill,
    save_prompt_cache,
)
from turboquant.io.json_file import seal
from turboquant.io.prompt_cache import MANIFEST
from turboquant.io.safetensors import digest_tensors
from turboquant.kernels.encoding import encode_layer

Build = Callable[[str], Any]
Tokens = Callable[[int, int], list[int]]
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "deepseek_v3"]
EIGHT = CacheCodec(8, 8, sinks=4)


def bits(cache: TurboQuantKVCache) -> tuple[int, int]:
    return cache.codec.key_bits, cache.codec.value_bits


# --- making one


def test_a_cache_is_made_of_what_can_be_compressed(build_model: Build) -> None:
    caches = make_prompt_cache(build_model("gemma3_text"), CacheCodec(3, 2, layer_bits=((1, 8, 6),)))
    assert [type(c) for c in caches] == [RotatingKVCache, TurboQuantKVCache] * 2
    assert [bits(c) for c in caches[1::2]] == [(8, 6), (3, 2)]
    assert [type(c) for c in make_prompt_cache(build_model("deepseek_v3"))] == [KVCache, KVCache]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_cache_answers_like_the_model_s_own(
    family: str, build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    """The cache is fed alone, in chunks and in a batch, and is partly compressed by then."""
    model, prompt = build_model(family), random_tokens(420, 0)
    ours, stock = make_prompt_cache(model, EIGHT), fill(model, prompt)
    for start in range(0, 420, 140):
        continue_on(model, ours, prompt[start : start + 140])
    assert any(isinstance(getattr(c, "layer", None), EncodedLayer) for c in ours) is (family != "deepseek_v3")
    batched = [copy.deepcopy(ours), copy.deepcopy(ours)]
    assert cosine(continue_on(model, ours, [1, 2, 3]), continue_on(model, stock, [1, 2, 3])) > 0.999
    if family == "deepseek_v3":  # mlx-lm cannot batch two caches of this one with history
        return
    suffixes, lengths = [[1, 2, 3], [4]], [4, 4]
    alone = [answer(model, [copy.deepcopy(b)], [s], [4], 1)[0][0] for b, s in zip(batched, suffixes, strict=True)]
    assert_same(answer(model, batched, suffixes, lengths, 2)[0], alone)


# --- compressing a filled one


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filled_cache_is_compressed_and_continues(
    family: str, build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    model, prompt, query = build_model(family), random_tokens(400, 0), random_tokens(200, 1)
    filled, stock = fill(model, prompt), fill(model, prompt)
    caches = compress(filled, EIGHT, model)
    assert [type(c) for c in caches] == [type(c) for c in make_prompt_cache(model)]
    for old, new in zip(filled, caches, strict=True):
        if isinstance(new, TurboQuantKVCache):
            assert old.empty()  # what was held in full precision is released
            assert isinstance(new.layer, EncodedLayer)
            assert (new.layer.tokens, new.suffix.offset) == (272, 128)
        else:
            assert new is old
    assert cosine(continue_on(model, caches, query), continue_on(model, stock, query)) > 0.999
    assert cosine(continue_on(model, caches, [1]), continue_on(model, stock, [1])) > 0.999
    assert all(c.layer.tokens == 272 + 128 for c in caches if isinstance(c, TurboQuantKVCache))  # it grows on


@pytest.mark.parametrize("tokens", [0, 1, 259, 260])
def test_a_short_cache_is_compressed_once_it_has_grown(
    tokens: int, build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    model = build_model("llama")
    filled = fill(model, random_tokens(tokens, 0)) if tokens else [KVCache(), KVCache()]
    caches = compress(filled, EIGHT)
    assert [c.offset for c in caches] == [tokens] * 2
    assert all((c.layer is None) is (tokens < 4 + 128 + 128) for c in caches)
    continue_on(model, caches, random_tokens(260, 1))
    continue_on(model, caches, [1])
    assert all(c.layer is not None for c in caches)
    assert [c.offset for c in caches] == [tokens + 261] * 2


def test_several_rows_are_refused_and_left_alone(build_model: Build) -> None:
    model = build_model("llama")
    two_rows = mlx_lm_cache.make_prompt_cache(model)
    model(mx.zeros((2, 30), mx.int32), cache=two_rows)
    with pytest.raises(ValueError, match="layer 0 holds 2 rows"):
        compress(two_rows, EIGHT)
    assert [c.offset for c in two_rows] == [30, 30]


@pytest.mark.parametrize(
    ("codec", "damage"),
    [
        (CacheCodec(8, 8, coding="trellis"), 0.0),
        (CacheCodec(8, 8, layer_bits=((2, 4, 4),)), 0.0),
        (EIGHT, float("nan")),
        (EIGHT, float("inf")),
    ],
)
def test_a_cache_that_cannot_be_compressed_is_left_alone(
    codec: CacheCodec, damage: float, build_model: Build, fill: Any, random_tokens: Tokens
) -> None:
    filled = fill(build_model("llama"), random_tokens(300, 0))
    filled[1].values[:, 1, 7, 3] += damage
    with pytest.raises(ValueError, match=r"scalar codes|layer_bits names layer 2|not finite"):
        compress(filled, codec)
    assert [cache.offset for cache in filled] == [300, 300]
    assert not any(cache.empty() for cache in filled)


def test_layers_of_16_bits_have_mlx_lm_s_own_cache(build_model: Build, fill: Any, random_tokens: Tokens) -> None:
    model, prompt, codec = build_model("llama"), random_tokens(300, 0), CacheCodec(8, 8, layer_bits=((1, 16, 16),))
    filled, stock = fill(model, prompt), fill(model, prompt)
    compressed, made = compress(filled, codec), make_prompt_cache(model, codec)
    continue_on(model, made, prompt)
    assert compressed[1] is filled[1]
    for caches in (compressed, made):
        assert [type(cache) for cache in caches] == [TurboQuantKVCache, KVCache]
        assert cosine(continue_on(model, caches, [1]), continue_on(model, copy.deepcopy(stock), [1])) > 0.999


# --- files


def caches_of_all_kinds(model: Any, prefix: Any, fill: Any, tokens: list[int]) -> dict[str, list[Any]]:
    """Return a cache of each kind for a model, after about the same tokens."""
    streaming = make_prompt_cache(model, CacheCodec(3, 4, sinks=4))
    for start in range(0, len(tokens), 149):
        continue_on(model, streaming, tokens[start : start + 149])
    forks = prefix.fork()
    continue_on(model, forks, tokens[:5])
    short = make_prompt_cache(model)
    continue_on(model, short, tokens[:7])
    compressed = compress(fill(model, tokens), CacheCodec(4, 2, sinks=4), model)
    return {
        "streaming": streaming,
        "forks": forks,
        "forks that know their queries": prefill(model, tokens, CacheCodec(3, 4, window=0)).fork(),
        "new forks": prefix.fork(),
        "short": short,
        "empty": make_prompt_cache(model),
        "compressed": compressed,
        "stock": fill(model, tokens),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
def test_a_loaded_cache_continues_exactly_like_the_saved_one(
    family: str, build_model: Build, build_prefix: Any, fill: Any, random_tokens: Tokens, tmp_path: Path
) -> None:
    model, tokens = build_model(family), random_tokens(413, 0)
    prefix = build_prefix(model, tokens, CacheCodec(4, 3))
    more = [random_tokens(n, n) for n in (3, 300, 1)]
    for name, caches in caches_of_all_kinds(model, prefix, fill, tokens).items():
        save_prompt_cache(tmp_path / name, caches)
        loaded = load_prompt_cache(tmp_path / name)
        assert [type(c) for c in loaded] == [type(c) for c in caches], name
        for some in more:
            assert mx.array_equal(continue_on(model, loaded, some), continue_on(model, caches, some)), name
        for ours, theirs in zip(loaded, caches, strict=True):
            if isinstance(ours, TurboQuantKVCache):
                assert ours.codec == theirs.codec
                assert ours.layer is not None
                for x, y in zip(ours.layer.tensors().values(), theirs.layer.tensors().values(), strict=True):
                    assert mx.array_equal(x, y)


def test_forks_of_uncompressed_layers_are_saved_and_loaded(tmp_path: Path) -> None:
    codec, keys = CacheCodec(16, 16), mx.random.normal((2, 300, 64))
    first = encode_layer(keys[:, :200], keys[:, :200], codec)
    joined = EncodedLayer.join([first, encode_layer(keys[:, 200:], keys[:, 200:], codec, parent=first)])
    rebuilt = EncodedLayer.from_tensors(first.tensors(), codec)
    save_prompt_cache(tmp_path / "cache", [Fork(joined), Fork(rebuilt)])
    for fork, tokens in zip(load_prompt_cache(tmp_path / "cache"), (300, 200), strict=True):
        assert fork.offset == tokens
        assert mx.array_equal(fork.layer.sink_keys, keys[:, :tokens])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_suffix_keeps_its_dtype(dtype: mx.Dtype, tmp_path: Path) -> None:
    keys = mx.random.normal((1, 2, 300, 64)).astype(dtype)
    tq = TurboQuantKVCache()
    for some in (keys, keys[:, :, :1]):
        tq.update_and_fetch(some, some)
    save_prompt_cache(tmp_path / "cache", [tq])
    (loaded,) = load_prompt_cache(tmp_path / "cache")
    for x, y in zip(loaded.suffix.keys_and_values(), tq.suffix.keys_and_values(), strict=True):
        assert x.dtype == dtype
        assert mx.array_equal(x, y)
    assert loaded.nbytes == tq.nbytes


def test_metadata_comes_back_and_the_name_is_kept(tmp_path: Path) -> None:
    metadata = {"model": "a/b", "with.dots": 'quotes " and \n lines', "0": "digits", "ß": "\u2028 \U0001f600"}
    for name in ("cache.safetensors", "cache", "cache.bin"):
        save_prompt_cache(str(tmp_path / name), [KVCache()], metadata)
        (loaded,), again = load_prompt_cache(str(tmp_path / name), return_metadata=True)
        assert again == metadata
        assert loaded.empty()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "cache.bin", "cache.safetensors"]


def test_what_cannot_be_restored_is_not_saved(tmp_path: Path, random_layer: Any) -> None:
    dense = Fork(random_layer(50, CacheCodec()).dense(mx.float32))
    batch = TurboQuantKVCache.merge([TurboQuantKVCache()])
    for cache in (dense, Fork(None), batch, object(), type("KVCache", (KVCache,), {})()):
        with pytest.raises(TypeError, match=r"layer 1 is a .* cannot be stored"):
            save_prompt_cache(tmp_path / "cache", [KVCache(), cache])
    with pytest.raises(TypeError, match="maps text to text"):
        save_prompt_cache(tmp_path / "cache", [KVCache()], {"tokens": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_mlx_lm_s_error_names_the_package_of_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [TurboQuantKVCache(), KVCache()], {"model": "m"})
    with pytest.raises(ValueError, match=r"turboquant\.load_prompt_cache"):
        mlx_lm_cache.load_prompt_cache(path)


def test_a_file_of_mlx_lm_s_is_named_in_the_error(build_model: Build, fill: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    mlx_lm_cache.save_prompt_cache(path, fill(build_model("llama"), [1, 2, 3]), {"model": "m"})
    with pytest.raises(PromptCacheError, match=r"cache.safetensors: .*mlx_lm\.models\.cache\.load_prompt_cache"):
        load_prompt_cache(path)


def test_a_loaded_cache_does_not_depend_on_its_file(tmp_path: Path) -> None:
    arrays, path = ArraysCache(2), tmp_path / "cache"
    arrays[0] = mx.arange(100_000)
    save_prompt_cache(path, [arrays])
    (loaded,) = load_prompt_cache(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert mx.array_equal(loaded[0], mx.arange(100_000))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    save_prompt_cache(path, [KVCache()], {"which": "old"})

    def fail(*_: Any, **__: int) -> None:
        raise OSError("disk full")

    for name in ("os.fsync", "os.replace", "mlx.core.save_safetensors"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(OSError, match="disk full"):
                save_prompt_cache(path, [KVCache()], {"which": "new"})
        assert load_prompt_cache(path, return_metadata=True)[1] == {"which": "old"}
        assert list(tmp_path.iterdir()) == [path]


# --- hostile files


HOSTILE_CODEC = CacheCodec(3, 4, window=8)


class Forgery:
    """A prompt cache's file taken apart: its tensors' header, its manifest, its metadata for mlx-lm, its data."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.header = json.loads(content[8 : 8 + length])
        self.texts = self.header.pop("__metadata__")
        self.manifest = json.loads(self.texts.pop(MANIFEST))
        self.data = content[8 + length :]

    def bytes(self) -> bytes:
        return file_of(json.dumps(self.header | {"__metadata__": self.texts | {MANIFEST: self.text()}}), self.data)

    def text(self) -> str:
        return json.dumps(self.manifest)

    def seal(self) -> None:
        self.manifest["manifest_checksum"] = seal(self.manifest, "manifest_checksum")


def file_of(header: str, data: bytes = b"") -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A streaming cache, a short one, a fork and a stock cache, in one file."""
    mx.random.seed(0)
    path = tmp_path_factory.mktemp("good") / "cache"
    keys = mx.random.normal((1, 2, 300, 64))
    past = encode_layer(keys[0], keys[0], HOSTILE_CODEC)
    caches = [TurboQuantKVCache(HOSTILE_CODEC), TurboQuantKVCache(HOSTILE_CODEC), Fork(past), KVCache()]
    for index, (cache, tokens) in enumerate(zip(caches, (299, 3, 3, 7), strict=True)):
        cache.update_and_fetch(keys[:, :, :tokens] + index, keys[:, :, :tokens] - index)
    caches[0].update_and_fetch(keys[:, :, 299:], keys[:, :, 299:])
    save_prompt_cache(path, caches, {"model": "m"})
    return path.read_bytes()


def assert_refused(content: bytes, folder: Path, match: str = ".") -> None:
    (folder / "cache").write_bytes(content)
    with pytest.raises(PromptCacheError, match=match) as caught:
        load_prompt_cache(folder / "cache")
    assert str(caught.value).startswith(str(folder / "cache"))


def test_the_forger_s_tools_work(good: bytes, tmp_path: Path) -> None:
    forgery = Forgery(good)
    forgery.manifest["metadata"] = {"model": "n"}
    assert_refused(forgery.bytes(), tmp_path, "manifest's checksum is wrong")
    forgery.seal()
    (tmp_path / "cache").write_bytes(forgery.bytes())
    assert load_prompt_cache(tmp_path / "cache", return_metadata=True)[1] == {"model": "n"}
    (tmp_path / "cache").write_bytes(with_tensors(good, tmp_path, lambda tensors: None))
    assert len(load_prompt_cache(tmp_path / "cache")) == 4


def test_every_flipped_bit_that_counts_is_noticed(good: bytes, tmp_path: Path) -> None:
    for position in [*range(0, len(good), 211), len(good) - 1]:
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        assert_refused(bad, tmp_path)


def test_every_truncation_is_noticed(good: bytes, tmp_path: Path) -> None:
    for length in [*range(10), *range(10, len(good), len(good) // 50), len(good) - 1]:
        assert_refused(good[:length], tmp_path)


DEEP = "[" * 100_000
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no bytes": lambda _: b"",
    "zeros": lambda good: bytes(len(good)),
    "a zip archive": lambda _: b"PK\x03\x04 and more",
    "a NumPy file": lambda _: b"\x93NUMPY\x01\x00",
    "text": lambda _: b'{"a": "prompt cache"}',
    "a byte more": lambda good: good + b"\0",
    "a file twice": lambda good: good + good,
    "a header of no bytes": lambda good: bytes(8) + good[8:],
    "a header of -1 bytes": lambda good: b"\xff" * 8 + good[8:],
    "a header of a terabyte": lambda good: (1 << 40).to_bytes(8, "little") + good[8:],
    "a header longer than the file": lambda good: len(good).to_bytes(8, "little") + good[8:],
    "a header that is no JSON": lambda _: file_of("{"),
    "a header that is a list": lambda _: file_of("[]"),
    "a header that is null": lambda _: file_of("null"),
    "a header too deep": lambda _: file_of(DEEP),
    "a header in no encoding": lambda _: (4).to_bytes(8, "little") + b'"\xff\xfe"',
    "a header with a number of a million digits": lambda _: file_of('{"x": ' + "9" * 1_000_000 + "}"),
    "a header with nothing in it": lambda _: file_of("{}"),
    "metadata that is a list": lambda _: file_of('{"__metadata__": []}'),
    "metadata that is a number": lambda _: file_of(json.dumps({"__metadata__": {MANIFEST: 1}})),
    "a manifest that is no JSON": lambda _: file_of(json.dumps({"__metadata__": {MANIFEST: "{"}})),
    "a manifest that is a list": lambda _: file_of(json.dumps({"__metadata__": {MANIFEST: "[]"}})),
    "a manifest too deep": lambda _: file_of(json.dumps({"__metadata__": {MANIFEST: DEEP}})),
    "a manifest with nothing in it": lambda _: file_of(json.dumps({"__metadata__": {MANIFEST: "{}"}})),
    "a tensor twice": lambda good: good[:8] + good[8:].replace(b'"3.state.1"', b'"3.state.0"'),
    "a manifest's key twice": lambda good: good.replace(b'\\"format_version\\": 1,', b'\\"layers\\":         1,'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_files_are_refused(damage: Callable[[bytes], bytes], good: bytes, tmp_path: Path) -> None:
    assert damage(good) != good
    assert_refused(damage(good), tmp_path)


@pytest.mark.parametrize("version", [0, 2, -1, 1 << 70, "1", 1.0, True, None, [1]])
def test_another_format_version_is_said_to_be_one(version: Any, good: bytes, tmp_path: Path) -> None:
    forgery = Forgery(good)
    forgery.manifest["format_version"] = version
    forgery.seal()
    assert_refused(forgery.bytes(), tmp_path, "format version")


def set_header(**changes: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.header["3.state.0"].update(changes)


def swap(mapping: Any, a: Any, b: Any) -> None:
    mapping[a], mapping[b] = mapping[b], mapping[a]


HEADERS: dict[str, Callable[[Forgery], Any]] = {
    "a tensor missing": lambda f: f.header.pop("3.state.0"),
    "a tensor of another name": lambda f: f.header.update({"x": f.header.pop("3.state.0")}),
    "a tensor too many": lambda f: f.header.update(x={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "two tensors swapped": lambda f: swap(f.header, "3.state.0", "1.suffix.0"),
    "two tensors of one shape swapped": lambda f: swap(f.header, "1.suffix.0", "2.suffix.0"),
    "another dtype of the same size": set_header(dtype="I32"),
    "a dtype that does not exist": set_header(dtype="X9"),
    "a dtype that is a list": set_header(dtype=["F32"]),
    "a shape of another order": set_header(shape=[1, 7, 2, 64]),
    "a shape that is too large": set_header(shape=[1 << 40]),
    "a shape whose size overflows": set_header(shape=[1 << 32, 1 << 32]),
    "a shape with a negative length": set_header(shape=[-1, -2, -7, -64]),
    "a shape that is a number": set_header(shape=896),
    "a shape of fractions": set_header(shape=[1, 2, 7, 64.0]),
    "a shape of a million ones": set_header(shape=[1] * 1_000_000),
    "a place beyond the end": set_header(data_offsets=[0, 1 << 50]),
    "a place before the beginning": set_header(data_offsets=[-3584, 0]),
    "a place that ends before it begins": set_header(data_offsets=[3584, 0]),
    "a place shared with another tensor": lambda f: f.header["3.state.0"].update(
        data_offsets=f.header["3.state.1"]["data_offsets"]
    ),
    "no place": lambda f: f.header["3.state.0"].pop("data_offsets"),
    "a tensor that is a number": lambda f: f.header.update({"3.state.0": 1}),
    "a gap in the data": lambda f: setattr(f, "data", f.data + bytes(16)),
    "numbers changed, of the right size": lambda f: setattr(f, "data", f.data[:-9] + b"\x01" + f.data[-8:]),
    "another text for mlx-lm": lambda f: f.texts.update({"2.1.1": "string"}),
    "a text too many": lambda f: f.texts.update({"0.more": "x"}),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_forged_headers_are_refused(change: Callable[[Forgery], Any], good: bytes, tmp_path: Path) -> None:
    forgery = Forgery(good)
    change(forgery)
    assert_refused(forgery.bytes(), tmp_path)


def set_layer(index: int, **changes: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.manifest["layers"][index].update(changes)


def set_codec(**changes: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.manifest["layers"][0]["codec"].update(changes)


def set_item(layer: int, item: int, value: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.manifest["layers"][layer]["suffix"]["items"].__setitem__(item, value)


MANIFESTS: dict[str, Callable[[Forgery], Any]] = {
    "a class of mlx-lm's that is not on the list": set_layer(3, kind="QuantizedKVCache"),
    "a function of mlx-lm's": set_layer(3, kind="load_prompt_cache"),
    "a class by its path": set_layer(3, kind="subprocess.Popen"),
    "a kind that is null": set_layer(3, kind=None),
    "a kind that is a list": set_layer(3, kind=["KVCache"]),
    "a kind that is another": set_layer(3, kind="RotatingKVCache"),
    "a fork that says it is a streaming cache": set_layer(2, kind="turboquant"),
    "a short cache that says it is a fork": set_layer(1, kind="fork"),
    "layers swapped": lambda f: swap(f.manifest["layers"], 0, 3),
    "layers of one kind swapped": lambda f: swap(f.manifest["layers"], 0, 1),
    "a layer missing": lambda f: f.manifest["layers"].pop(),
    "a layer twice": lambda f: f.manifest["layers"].append(f.manifest["layers"][3]),
    "a layer that is null": lambda f: f.manifest["layers"].__setitem__(0, None),
    "layers that are a mapping": lambda f: f.manifest.update(layers={"kind": "KVCache"}),
    "layers that are null": lambda f: f.manifest.update(layers=None),
    "no layers": lambda f: f.manifest.pop("layers"),
    "bits that the codes are not of": set_codec(key_bits=4),
    "bits that are not supported": set_codec(key_bits=7),
    "bits that are text": set_codec(key_bits="3"),
    "bits that are true": set_codec(key_bits=True),
    "fewer sinks than there are": set_codec(sinks=2),
    "a negative window": set_codec(window=-1),
    "a negative seed": set_codec(seed=-1),
    "layers' bits that are numbers": set_codec(layer_bits=[1, 2]),
    "a field that codecs don't have": set_codec(colour="red"),
    "a field missing": lambda f: f.manifest["layers"][0]["codec"].pop("seed"),
    "a codec that is null": set_layer(0, codec=None),
    "a token more": set_layer(0, tokens=301),
    "negative tokens": set_layer(0, tokens=-300),
    "tokens that are text": set_layer(0, tokens="300"),
    "no suffix": lambda f: f.manifest["layers"][0].pop("suffix"),
    "a suffix of more tokens than it holds": set_item(0, 2, {"value": 1 << 60}),
    "a suffix of a negative number of tokens": set_item(0, 2, {"value": -1}),
    "a suffix of as many tokens as it likes": set_item(0, 2, {"value": float("inf")}),
    "another layer's tensor": set_item(0, 0, {"tensor": "1.suffix.0"}),
    "a past's tensor in the suffix": set_item(0, 0, {"tensor": "0.past.key_scales"}),
    "a tensor that is not there": set_item(0, 0, {"tensor": "0.suffix.9"}),
    "one tensor for both": set_item(0, 0, {"tensor": "0.suffix.1"}),
    "a number for a tensor": set_item(0, 0, {"value": 7}),
    "a state without end": lambda f: set_layer(3, state=nested(450))(f),
    "metadata that is a number": lambda f: f.manifest.update(metadata=3),
    "metadata with a number in it": lambda f: f.manifest.update(metadata={"model": 3}),
    "no metadata": lambda f: f.manifest.pop("metadata"),
    "another checksum": lambda f: f.manifest.update(checksum="0" * 64),
    "a checksum that is null": lambda f: f.manifest.update(checksum=None),
}


def nested(levels: int) -> Any:
    state: Any = {"value": 1}
    for _ in range(levels):
        state = {"items": [state]}
    return state


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_forged_manifests_are_refused(change: Callable[[Forgery], Any], good: bytes, tmp_path: Path) -> None:
    forgery = Forgery(good)
    change(forgery)
    forgery.seal()
    assert_refused(forgery.bytes(), tmp_path)


def with_tensors(good: bytes, folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> bytes:
    """A file with other tensors, and all its checksums right."""
    (folder / "old.safetensors").write_bytes(good)
    tensors: Any = mx.load(str(folder / "old.safetensors"))
    mx.eval(tensors)
    change(tensors)
    forgery = Forgery(good)
    forgery.manifest["checksum"] = digest_tensors(tensors)
    forgery.seal()
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, forgery.texts | {MANIFEST: forgery.text()})
    return (folder / "new.safetensors").read_bytes()


def set_tensor(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.update({name: mx.contiguous(change(tensors[name]))})


TENSORS: dict[str, Callable[[dict[str, mx.array]], Any]] = {
    "scales that are no numbers": set_tensor("0.past.key_scales", lambda x: x * float("nan")),
    "a scale without end": set_tensor("2.past.value_scales", lambda x: x + float("inf")),
    "a mean that is no number": set_tensor("0.past.key_mean", lambda x: x / 0),
    "scales of another dtype": set_tensor("0.past.key_scales", lambda x: x.astype(mx.float32)),
    "codes of another dtype": set_tensor("0.past.key_codes", lambda x: x.astype(mx.int32)),
    "codes a token short": set_tensor("0.past.key_codes", lambda x: x[:, 1:]),
    "codes of one head": set_tensor("0.past.key_codes", lambda x: x[:1]),
    "codes a word short": set_tensor("0.past.key_codes", lambda x: x[..., 1:]),
    "a mean of another head_dim": set_tensor("0.past.value_mean", lambda x: x[..., 1:]),
    "a mean of one dimension": set_tensor("0.past.value_mean", lambda x: x.reshape(-1)),
    "sinks of another length": set_tensor("0.past.sink_keys", lambda x: x[:, 1:]),
    "finer tokens in a streaming past": lambda tensors: tensors.update(
        {name.replace("2.past.fine", "0.past.fine"): x for name, x in tensors.items() if name.startswith("2.past.fine")}
    ),
    "a suffix of another head_dim": set_tensor("0.suffix.0", lambda x: x[..., :32]),
    "a suffix of one head": lambda tensors: [
        tensors.update({name: mx.contiguous(tensors[name][:, :1])}) for name in ("0.suffix.0", "0.suffix.1")
    ],
    "a suffix of two rows": lambda tensors: [
        tensors.update({name: mx.concatenate([tensors[name]] * 2)}) for name in ("1.suffix.0", "1.suffix.1")
    ],
    "a suffix of keys and values that differ": set_tensor("1.suffix.0", lambda x: x[:, :, :1]),
    "a suffix of integers": lambda tensors: [
        tensors.update({name: tensors[name].astype(mx.int32)}) for name in ("1.suffix.0", "1.suffix.1")
    ],
    "a suffix of five dimensions": set_tensor("1.suffix.1", lambda x: x[..., None]),
    "a past without its means": lambda tensors: tensors.pop("0.past.key_mean"),
    "no past": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("0.past.")],
    "a past in a layer that has none": lambda tensors: tensors.update(
        {name.replace("0.past.", "1.past."): x for name, x in tensors.items() if name.startswith("0.past.")}
    ),
    "another version": set_tensor("version", lambda x: x + 1),
    "no version": lambda tensors: tensors.pop("version"),
    "a tensor of no layer": lambda tensors: tensors.update({"9.past.key_mean": mx.zeros(3)}),
    "a tensor of a layer that has no use for it": lambda tensors: tensors.update({"3.more": mx.zeros(3)}),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS.keys())
def test_forged_tensors_are_refused(change: Callable[[dict[str, mx.array]], Any], good: bytes, tmp_path: Path) -> None:
    assert_refused(with_tensors(good, tmp_path, change), tmp_path)


def test_a_hostile_header_takes_no_memory(good: bytes, tmp_path: Path) -> None:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for name in ("a shape that is too large", "a place beyond the end"):
        forgery = Forgery(good)
        HEADERS[name](forgery)
        assert_refused(forgery.bytes(), tmp_path)
    assert mx.get_peak_memory() - before < 1 << 20


def test_spoilt_files_are_refused_or_make_no_difference(tmp_path: Path) -> None:
    """This reads a few of the many files of benches/fuzz_files.py."""
    counts = fuzz(300, seed=1, folder=tmp_path)
    assert counts["loaded wrong"] == counts["crashed"] == 0
    assert counts["refused"] > 150
