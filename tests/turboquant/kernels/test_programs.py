"""CUDA kernels are compiled once a machine: with an emulated compiler and loader, and with NVRTC where it is there."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import ROOT
from turboquant import CacheCodec
from turboquant.attention import dispatch
from turboquant.attention import gpu as attention_gpu
from turboquant.kernels import (
    compiled_files,
    encoding_gpu,
    launch,
    nvrtc,
    programs,
    query_stats_gpu,
    trellis_search,
    trials,
)
from turboquant.kernels.compiled_files import CompiledFiles
from turboquant.kernels.kernel_text import Beginning, Launch
from turboquant.kernels.programs import Variant, hash_of

DOUBLE = Launch("double", (), ("x",), (("y", (3,), mx.float32),), (1, 1, 1), 32, strided=True)


class Machine:
    """A machine with a GPU and a compiler: counts what is compiled, and loads what it is handed."""

    def __init__(self, folder: Path) -> None:
        self.compiled: list[str] = []
        self.launched: list[dict[str, Any]] = []
        self.files = CompiledFiles(folder / "cache")
        self.own = folder / "own"
        self.own.mkdir()

    def compile(self, text: str, architecture: str) -> bytes:
        self.compiled.append(text)
        return f"code for {architecture}: {text}".encode()

    def run(self, **call: Any) -> list[mx.array]:
        """As MLX: a file of the right name in the folder wins over the bytes that are handed over."""
        name, given = call["name"], call["compiled_source"]
        path = self.own / f"{name}_{hash_of(given):x}.ptx"
        code = path.read_bytes() if path.exists() else given
        if not code.startswith(b"code for sm_90a"):
            raise RuntimeError(f"Failed to load compiled {name} kernel")
        if path.exists():
            assert path.with_suffix(".txt").read_text() == f"{name}\t{name}\n"
        self.launched.append(call)
        return [call["inputs"][0] * 2]

    def restart(self) -> None:
        """A new process on it."""
        programs._programs.clear()
        DOUBLE.programs.clear()
        for path in self.own.iterdir():
            path.unlink()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine(tmp_path)
    monkeypatch.setattr(programs, "compiled_files", lambda: found.files)
    monkeypatch.setattr(programs, "own_folder", lambda: found.own)
    monkeypatch.setattr(programs, "_architecture", lambda: "sm_90a")
    monkeypatch.setattr(programs, "text", lambda name: "y[0] = 2 * x[x_strides[0]];" if name == "double.h" else "")
    monkeypatch.setattr(programs, "_is_read_from_folder", lambda: True)
    monkeypatch.setattr(nvrtc, "compile_cubin", found.compile)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", found.run)
    programs._used.cache_clear()
    found.restart()
    yield found
    found.restart()
    programs._used.cache_clear()


def test_a_kernel_is_compiled_by_the_first_process_alone(machine: Machine) -> None:
    x = mx.array([1.0, 2.0, 3.0])
    for _ in range(3):
        machine.restart()
        for _ in range(2):
            assert programs.launch(DOUBLE, [x])[0].tolist() == [2, 4, 6]  # type: ignore[index]
    assert len(machine.compiled) == 1
    assert [program.origin for program in programs.in_use()] == ["cache"]
    assert {len(call["compiled_source"]) < 100 for call in machine.launched} == {True}


@pytest.mark.parametrize("content", [b"", b"code for sm_90a: of a stranger", None])
def test_a_damaged_or_foreign_file_is_compiled_anew(machine: Machine, content: bytes | None) -> None:
    programs.launch(DOUBLE, [mx.array([1.0])])
    (path,) = machine.files.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if content is None else content)
    machine.restart()
    assert programs.launch(DOUBLE, [mx.array([1.0])]) is not None
    assert len(machine.compiled) == 2
    assert path.read_bytes().partition(b"\n")[2] == whole.partition(b"\n")[2]


def test_a_hopper_gpu_is_one_after_work_on_the_cpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of a trial is computed with the CPU as the default device."""
    programs._compiles_for_hopper.cache_clear()
    monkeypatch.setattr(programs, "on_cpu", lambda: True)
    assert not programs.is_hopper()
    monkeypatch.setattr(programs, "on_cpu", lambda: False)
    assert programs.is_hopper()
    programs._compiles_for_hopper.cache_clear()


def test_another_compiler_compiles_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.launch(DOUBLE, [mx.array([1.0])])
    machine.restart()
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    programs.launch(DOUBLE, [mx.array([1.0])])
    assert len(machine.compiled) == 2


def test_a_process_tells_where_its_kernels_came_from(machine: Machine) -> None:
    assert programs.summary() is None
    programs.launch(DOUBLE, [mx.array([1.0])])
    assert (programs.summary() or "").startswith("1 compiled, the slowest in 0.0 s")
    machine.restart()
    programs.launch(DOUBLE, [mx.array([1.0])])
    programs.launch(DOUBLE, [mx.array([[1.0]])])
    assert (programs.summary() or "").startswith("1 from the cache, 1 compiled")


def test_kernels_that_were_begun_are_waited_for(machine: Machine) -> None:
    programs.compile_ahead([programs.variant_of(DOUBLE, [(mx.float32, dimensions)]) for dimensions in (1, 2)])
    assert len(programs.finish()) == len(machine.compiled) == 2
    assert all(program.created for program in programs.finish())


def test_other_dtypes_and_dimensions_are_other_kernels(machine: Machine) -> None:
    for x in (mx.array([1.0]), mx.array([1.0]).astype(mx.float16), mx.array([[1.0]])):
        programs.launch(DOUBLE, [x])
    assert len(machine.compiled) == 3
    assert programs.launch(DOUBLE, [mx.array([1], mx.int64)]) is None  # MLX's own compiler may know it


def test_strides_and_shapes_are_arguments(machine: Machine) -> None:
    whole = mx.zeros((2, 3, 10, 5))
    programs.launch(DOUBLE, [Beginning(whole, 4)])
    assert machine.launched[-1]["scalars"] == [150, 50, 5, 1]
    assert machine.launched[-1]["inputs"][0] is whole
    assert machine.launched[-1]["ensure_row_contiguous"]
    assert Beginning(whole, 4).shape == (2, 3, 4, 5) == Beginning(whole, 4).slice().shape


def test_without_a_compiler_mlx_compiles(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str, architecture: str) -> bytes:
        raise nvrtc.CannotCompile("no such instruction")

    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    assert programs.launch(DOUBLE, [mx.array([1.0])]) is None
    assert programs.in_use() == []


def test_a_kernel_that_needs_more_memory_than_mlx_gives_is_not_handed_to_mlx(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = dataclasses.replace(DOUBLE, shared_bytes=65536)
    monkeypatch.setattr(launch, "gpu", lambda: "cuda")
    launch.launch(large, [mx.array([1.0])])
    assert machine.launched[-1]["shared_memory"] == 65536

    def refuse(text: str, architecture: str) -> bytes:
        raise nvrtc.CannotCompile("no such instruction")

    machine.restart()
    for path in machine.files.folder.iterdir():
        path.unlink()
    monkeypatch.setattr(nvrtc, "compile_cubin", refuse)
    with pytest.raises(RuntimeError, match="NVRTC cannot compile the kernel double"):
        launch.launch(dataclasses.replace(large), [mx.array([1.0])])


def test_files_that_were_tidied_away_before_the_first_launch_are_written_again(machine: Machine) -> None:
    x = mx.array([1.0])
    variant = programs.variant_of(DOUBLE, [(x.dtype, x.ndim)])
    programs.compile_ahead([variant])
    assert programs._program(variant).result() is not None  # type: ignore[arg-type]
    machine.own.rmdir()
    assert programs.launch(DOUBLE, [x])[0].tolist() == [2]  # type: ignore[index]
    assert len(machine.launched[-1]["compiled_source"]) < 100


def test_where_the_folder_cannot_be_written_mlx_is_handed_the_code(machine: Machine) -> None:
    machine.own.rmdir()
    machine.own.write_text("in the way")
    assert programs.launch(DOUBLE, [mx.array([1.0])])[0].tolist() == [2]  # type: ignore[index]
    assert machine.launched[-1]["compiled_source"].startswith(b"code for sm_90a")
    machine.own.unlink()
    machine.own.mkdir()


def test_where_mlx_does_not_look_into_the_folder_it_is_handed_the_code(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_is_read_from_folder", lambda: False)
    programs.launch(DOUBLE, [mx.array([1.0])])
    assert machine.launched[-1]["compiled_source"].startswith(b"code for sm_90a")


@pytest.mark.parametrize(
    ("data", "expected"),  # of the GNU C++ library on a machine of 64 bits
    [
        ("", 0x553E93901E462A6E),
        ("a", 0x454DDEE488C1ED6B),
        ("abcdefg", 0xDEEE6830A3AF82AF),
        ("abcdefgh", 0x783DB3E38DB898BB),
        ("turboquant 0123456789abcdef", 0x3DE73E0B5BE1CCE5),
    ],
)
def test_the_hash_is_c_plus_plus_s(data: str, expected: int) -> None:
    assert hash_of(data.encode()) == expected


def all_variants(codec: CacheCodec, dim: int, dtype: mx.Dtype) -> list[Variant]:
    found = [*attention_gpu.variants(codec, dim, dtype), *encoding_gpu.variants(codec, dim, dtype)]
    found += [*trellis_search.variants(codec, dim, dtype), *query_stats_gpu.variants()]
    return [variant for variant in found if variant is not None]


@pytest.mark.parametrize("hopper", [False, True])
def test_what_is_compiled_ahead_is_what_is_launched(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded launches of an encoding and of steps, on a GPU that is not there."""
    seen: list[Variant | None] = []

    def record(what: Launch, inputs: list[Any]) -> list[mx.array]:
        arrays = [x.whole if isinstance(x, Beginning) else x for x in inputs]
        seen.append(programs.variant_of(what, [(x.dtype, x.ndim) for x in arrays]))
        return [mx.ones(shape, dtype) for _, shape, dtype in what.outputs]

    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: hopper)
    monkeypatch.setattr(attention_gpu, "FEW_TOKENS", 100)
    attention_gpu._plan.cache_clear()
    codec, trellis_codec = CacheCodec(), CacheCodec(2, 4, coding="trellis")
    random = np.random.default_rng(0)
    keys, values = (mx.array(random.normal(size=(2, 300, 64)).astype(np.float32)) for _ in range(2))
    layers = [encoding_gpu_layer(keys, values, each) for each in (codec, trellis_codec)]
    for module in (attention_gpu, encoding_gpu, query_stats_gpu, trellis_search):
        monkeypatch.setattr(module, "launch", record)
    dtype = mx.bfloat16
    for layer, rows in itertools.product(layers, (1, 3, 9, 17)):
        queries = mx.zeros((rows, 4, 1, 64), dtype)
        own = [Beginning(mx.zeros((rows, 2, 256, 64), dtype), 9) for _ in range(2)]
        for mask in (None, mx.ones((rows, 1, 1, 9), mx.bool_)):
            attention_gpu.attend_step(queries, layer, *own, 0.1, mask)
        attention_gpu._attend(queries, layer, 0.1)
    for own_codec, in_metric in ((codec.keys(64), True), (codec.values(64), False), (codec.fine.keys(64), True)):
        metric = own_codec.rounding_metric(np.eye(64)[None].repeat(2, 0)) if in_metric else None
        order = mx.zeros((2, 5), mx.int32)
        encoding_gpu.encode(keys.astype(dtype), order, mx.zeros((2, 64)), own_codec, metric)
    encoding_gpu.feedback(mx.zeros((2, 64, 64)))
    query_stats_gpu.squared_attention(mx.zeros((2, 6, 300)), (100, 200, 299), None, 4)
    monkeypatch.setattr(trellis_search, "gpu", lambda: "cuda")
    for own in (trellis_codec.keys(64), trellis_codec.values(64)):
        metric = own.rounding_metric(np.eye(64)[None].repeat(2, 0)) if own.of == "keys" else None
        order = mx.zeros((2, 128), mx.int32)
        trellis_search.encode(keys.astype(dtype), order, mx.zeros((2, 64)), own, metric, mx.ones((2, 300)))
    attention_gpu._plan.cache_clear()
    assert set(seen) <= {*all_variants(codec, 64, dtype), *all_variants(trellis_codec, 64, dtype)}
    assert hopper == ("attend_many" in {variant.name for variant in seen if variant is not None})


def encoding_gpu_layer(keys: mx.array, values: mx.array, codec: CacheCodec) -> Any:
    from turboquant.kernels.encoding import encode_layer

    return encode_layer(keys, values, codec)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_texts_are_whole_programs(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by NVRTC, which needs no GPU, where it is installed; else as far as names go."""
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(trellis_search, "gpu", lambda: "cuda")
    variants = all_variants(CacheCodec(), dim, mx.bfloat16)
    variants += trellis_search.variants(CacheCodec(coding="trellis"), dim, mx.bfloat16)
    in_trellis = attention_gpu.variants(CacheCodec(4, 3, coding="trellis"), dim, mx.bfloat16)
    assert bool(in_trellis) == (dim <= 128)
    names = {"attend", "merge", "encode", "feedback", "sample_sums", "sample_squares", "search", "units"}
    assert {variant.name for variant in variants} == names | ({"attend_many"} if dim <= 128 else set())
    for variant in variants:
        whole, scalars = programs.source(variant, "a_kernel")
        assert whole.count("a_kernel(") == 1
        assert "#include" not in whole
        assert (variant.name in ("encode", "merge", "units")) >= bool(scalars)
    try:
        nvrtc.version()
    except nvrtc.CannotCompile:
        return
    some = [variants[0], *(variant for variant in variants if variant.name in ("feedback", "attend_many", "search"))]
    for variant in (*some[:5], *filter(None, in_trellis[:2])):
        assert nvrtc.compile_cubin(programs.source(variant, "a_kernel")[0], "sm_90a").startswith(b"\x7fELF")
    with pytest.raises(nvrtc.CannotCompile, match="no_such_type"):
        nvrtc.compile_cubin("no_such_type x;", "sm_90a")


def test_trials_are_remembered_where_they_went_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "on_cpu", lambda: False)
    monkeypatch.setattr(trials, "compiled_files", lambda: CompiledFiles(tmp_path))
    assert not trials.remembered("kernels", CacheCodec(), 0.01)
    trials.remember("kernels", CacheCodec(), 0.001)
    assert trials.remembered("kernels", CacheCodec(), 0.01)
    assert trials.found()["kernels, 4/4 bits"] == 0.001  # as doctor prints it
    assert not trials.remembered("kernels", CacheCodec(), 0.0001)  # not good enough any more
    assert not trials.remembered("kernels", CacheCodec(3, 3), 0.01)
    monkeypatch.setattr(trials, "_sources", lambda: "other kernels")
    assert not trials.remembered("kernels", CacheCodec(), 0.01)


@pytest.mark.parametrize("file", ["kernels/encoding_gpu.py", "kernels/text/encode.h", "quant/rounding.py"])
def test_trials_are_those_of_the_code_they_compared(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "turboquant"
    shutil.copytree(ROOT / "turboquant", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(resources, "files", lambda name: tmp_path / name)
    before = trials._sources.__wrapped__()
    (package / file).write_text((package / file).read_text() + "\n")
    assert trials._sources.__wrapped__() != before


def test_nothing_is_remembered_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "compiled_files", lambda: pytest.fail("the user's folder is not for emulators"))
    trials.remember("kernels", CacheCodec(), 0.0)
    assert not trials.remembered("kernels", CacheCodec(), 1.0)
    assert compiled_files.compiled_files().folder.name == "kernels"


@pytest.mark.parametrize("codec", [CacheCodec(), CacheCodec(2, 3, coding="trellis"), CacheCodec(16, 16)])
def test_kernels_are_compiled_ahead_for_every_codec(codec: CacheCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that compresses nothing has no kernels: a job with 16 bits failed on CUDA."""
    compiled: list[Any] = []
    monkeypatch.setattr(dispatch, "on_cpu", lambda: False)
    for module in (dispatch, attention_gpu, encoding_gpu, trellis_search):
        monkeypatch.setattr(module, "gpu", lambda: "cuda")
    monkeypatch.setattr(dispatch, "compile_ahead", compiled.extend)
    dispatch.prepare_kernels(codec, 64, mx.float16)
    assert bool(compiled) != codec.is_uncompressed
