"""The emulator notices what a GPU may not: reading and writing outside of arrays, and waiting for ever."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from tests.turboquant.kernels import emulator
from tests.turboquant.kernels.emulator import emulated_launch
from turboquant.kernels.kernel_text import Beginning, Launch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
WHAT = Launch("body", (), ("x",), (("y", (4,), mx.float32),), (1, 1, 1), 32, strided=True)


@pytest.mark.parametrize(
    ("body", "at_end", "complaint"),
    [
        ("if (THREAD_INDEX < 4) y[THREAD_INDEX] = x[THREAD_INDEX];", True, ""),
        ("if (THREAD_INDEX < 4) y[THREAD_INDEX] = x[THREAD_INDEX];", False, ""),
        ("if (THREAD_INDEX < 5) y[3] = x[THREAD_INDEX];", True, r"outside of \['x'\]"),
        ("if (THREAD_INDEX < 4) y[3] = x[THREAD_INDEX - 1];", False, r"outside of \['x'\]"),
        ("y[4] = 1;", True, r"outside of \['y'\]"),
        ("y[3] = x[1 << 28];", True, "outside of all arrays"),
        ("if (THREAD_INDEX) { BARRIER; }", True, "that never come"),
    ],
)
def test_outside_of_arrays(
    body: str, at_end: bool, complaint: str, compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator, "text", lambda _: body)
    inputs = [mx.array([1.0, 2, 3, 4])]
    if not complaint:
        assert emulated_launch(compiled_kernels, "cuda", WHAT, inputs, at_end)[0].tolist() == [1, 2, 3, 4]
        return
    with pytest.raises(AssertionError, match=complaint):
        emulated_launch(compiled_kernels, "cuda", WHAT, inputs, at_end)


def test_a_slice_is_read_where_it_lies_and_no_further(compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between its parts is no number, and what lies behind them may not be read."""
    body = "int i = THREAD_INDEX; if (i < 4) y[i] = x[i / 2 * x_strides[1] + i % 2 * x_strides[2]];"
    monkeypatch.setattr(emulator, "text", lambda _: body)
    whole = mx.arange(40, dtype=mx.float32).reshape(1, 4, 10)[:, :2, None].swapaxes(2, 3)
    found = emulated_launch(compiled_kernels, "cuda", WHAT, [Beginning(whole, 2)])
    assert found[0].tolist() == [0, 1, 10, 11]
    monkeypatch.setattr(emulator, "text", lambda _: body.replace("i < 4", "i < 6"))
    with pytest.raises(AssertionError, match="outside"):
        emulated_launch(compiled_kernels, "cuda", WHAT, [Beginning(whole, 2)])
