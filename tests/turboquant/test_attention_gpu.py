"""The GPU kernels' text, compiled as C++ and run thread by thread, against attention.py on the same layers."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant import CacheCodec, EncodedLayer, attention
from turboquant.kernels import attention_gpu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
SCALE = 0.125
TYPES = {mx.float32: "float", mx.float16: "half", mx.uint32: "u32", mx.int32: "int"}
EMULATOR = (Path(__file__).parent / "emulate.h").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled, once each."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["cuda", "metal"])
def emulated(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in the emulator, with lanes as one of the backends has them."""
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "_backend", lambda: request.param)
    monkeypatch.setattr(attention_gpu, "launch", functools.partial(launch, folder, request.param))


def launch(folder: Path, backend: str, what: attention_gpu.Launch, inputs: list[mx.array]) -> list[mx.array]:
    types = {name: f"const {TYPES[x.dtype]}*" for name, x in zip(what.inputs, inputs, strict=True)}
    types |= {name: "float*" for name, _ in what.outputs}
    source = attention_gpu.defines(what.constants)
    source += ("#define METAL_LANES\n" if backend == "metal" else "") + EMULATOR
    source += attention_gpu.text("codes.h") if what.name == "attend" else ""
    source += "".join(f"static {kind} {key};\n" for key, kind in types.items())
    source += "static void body() {\n" + attention_gpu.text(f"{what.name}.h") + "}\n"
    source += 'extern "C" bool run(int x, int y, int z, int threads, void** arrays) {\n'
    source += "".join(f"{key} = ({kind})arrays[{i}];\n" for i, (key, kind) in enumerate(types.items()))
    source += "return run_groups(x, y, z, threads);\n}\n"
    library = compiled(folder, source)
    arrays = [np.ascontiguousarray(np.array(x)) for x in inputs]
    arrays += [np.full(shape, np.nan, np.float32) for _, shape in what.outputs]
    pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    assert library.run(*what.groups, what.threads, pointers), "threads wait for others that never come"
    return [mx.array(array) for array in arrays[len(inputs) :]]


def compiled(folder: Path, source: str) -> Any:
    """The library of a source, which is compiled the first time it is asked for."""
    file = folder / f"{abs(hash(source)):x}.cpp"
    library = file.with_suffix(".so")
    if not library.exists():
        file.write_text(source)
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", library, file]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr[:4000]
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_bool
    return loaded


def assert_equal(queries: mx.array, layer: EncodedLayer, tolerance: float = 1e-3) -> None:
    part = attention_gpu._attend(queries, layer, SCALE)
    expected = attention.attend_layer(queries, layer, SCALE)
    assert part.output.shape == expected.output.shape
    found, wanted = np.array(part.output), np.array(expected.output)
    assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)
    np.testing.assert_allclose(np.array(part.logsumexp), np.array(expected.logsumexp), rtol=3e-4, atol=5e-3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bits", [(4, 4), (4, 3), (3, 2), (2, 6), (5, 8), (8, 4)])
def test_all_bits(bits: tuple[int, int], random_layer: Callable[..., EncodedLayer]) -> None:
    layer = random_layer(150, CacheCodec(*bits, extra_bits=1.0))
    assert layer.keys.tokens
    assert layer.fine_keys.tokens
    assert_equal(mx.random.normal((1, 4, 1, 64)) * 2, layer)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 2, 1), (3, 4, 2), (2, 2, 9)])
def test_head_dims_and_any_number_of_rows(
    dim: int, batch: int, heads: int, length: int, random_layer: Callable[..., EncodedLayer]
) -> None:
    layer = random_layer(100, CacheCodec(), key_dim=dim)
    assert_equal(mx.random.normal((batch, heads, length, dim)) * 2, layer)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [1, 16, 17, 31, 130, 700])
@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(sinks=0, window=0, extra_bits=0.0), CacheCodec(sinks=40)])
def test_any_number_of_tokens_of_each_kind(
    tokens: int, codec: CacheCodec, random_layer: Callable[..., EncodedLayer]
) -> None:
    assert_equal(mx.random.normal((1, 2, 1, 64)), random_layer(tokens, codec))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("groups", [1, 2, 64, 4096])
def test_any_number_of_splits(
    groups: int, monkeypatch: pytest.MonkeyPatch, random_layer: Callable[..., EncodedLayer]
) -> None:
    """Also more than there are tokens for: some then find nothing."""
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "GROUPS", groups)
    monkeypatch.setattr(attention_gpu, "WARPS", 2)
    assert_equal(mx.random.normal((1, 4, 1, 64)), random_layer(900, CacheCodec()))


@pytest.mark.usefixtures("emulated")
def test_sharp_attention(random_layer: Callable[..., EncodedLayer]) -> None:
    """What rounding queries to halves costs grows with the scores, which decide between a few tokens here."""
    layer = random_layer(300, CacheCodec())
    assert_equal(mx.random.normal((1, 4, 1, 64)) * 40, layer, 1e-2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_values_of_any_size(size: float) -> None:
    keys, values = mx.random.normal((2, 200, 64)), mx.random.normal((2, 200, 64)) * size
    assert_equal(mx.random.normal((1, 4, 1, 64)), EncodedLayer.encode(keys, values, CacheCodec()))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [mx.float16])
def test_queries_in_half_precision(dtype: mx.Dtype, random_layer: Callable[..., EncodedLayer]) -> None:
    assert_equal(mx.random.normal((1, 4, 1, 64)).astype(dtype), random_layer(100, CacheCodec()))


def test_other_layers_take_the_reference_s_way(random_layer: Callable[..., EncodedLayer]) -> None:
    """No launch is patched here, and there is no GPU: a kernel would raise."""
    for layer in (
        random_layer(50, CacheCodec(), key_dim=80),
        random_layer(50, CacheCodec(), key_dim=64, value_dim=128),
    ):
        queries = mx.random.normal((1, 2, 1, layer.key_mean.shape[-1]))
        part = attention_gpu.attend_layer(queries, layer, SCALE)
        assert mx.array_equal(part.output, attention.attend_layer(queries, layer, SCALE).output)


@pytest.mark.usefixtures("emulated")
def test_kernels_that_run_are_usable(caplog: pytest.LogCaptureFixture) -> None:
    attention_gpu.usable.cache_clear()
    assert attention_gpu.usable(CacheCodec(), 64)
    assert not caplog.records


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_kernels_that_fail_are_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launched(what: attention_gpu.Launch, inputs: list[mx.array]) -> list[mx.array]:
        if fault == "raises":
            raise RuntimeError("no such instruction")
        return [mx.zeros(shape) for _, shape in what.outputs]

    monkeypatch.setattr(attention_gpu, "launch", launched)
    attention_gpu.usable.cache_clear()
    assert not attention_gpu.usable(CacheCodec(), 64)
    attention_gpu.usable.cache_clear()
    assert "MLX's operations are used" in caplog.text
