"""benches/metal_report.py, with kernels run in the emulator."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from benches import metal_report
from benches.metal_report import Case, cases, error_of
from tests.turboquant.kernels.emulator import emulated_launch
from turboquant.attention import gpu as attention_gpu


def test_every_pair_of_bits_is_checked_with_every_head_dim() -> None:
    found = cases()
    assert len(found) == 45
    for field in ("head_dim", "bits", "tokens", "rows", "dtype"):
        assert len({getattr(case, field) for case in found}) == {"bits": 9}.get(field, 3)
    assert set(cases(quick=True)) < set(found)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_a_combination_is_checked(dtype: mx.Dtype, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_gpu._plan.cache_clear()
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "metal")
    monkeypatch.setattr(attention_gpu, "launch", functools.partial(emulated_launch, compiled_kernels, "metal"))
    case = Case(64, (4, 3), 200, 3, dtype)
    assert 0 < error_of(case) < metal_report.LARGEST_ERROR
    monkeypatch.setattr(attention_gpu, "launch", lambda what, _: [mx.ones(x, dtype) for _, x, dtype in what.outputs])
    assert error_of(case) > metal_report.LARGEST_ERROR
    attention_gpu._plan.cache_clear()


def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case) -> float:
        if case.head_dim == 64:
            raise RuntimeError("no such instruction")
        return 0.5 if case.head_dim == 256 else 1e-4

    monkeypatch.setattr(metal_report, "error_of", fail)
    lines = list(metal_report._checks(quick=False))
    assert sum(line.startswith("FAILED") for line in lines) == 9
    assert sum(line.startswith("WRONG") for line in lines) == 18
    assert lines[-1].startswith("attention: 27 of 45 combinations right")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["metal_report"])
    with pytest.raises(SystemExit, match="no GPU"):
        metal_report.main()
