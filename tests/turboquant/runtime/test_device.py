"""What the host reads of a GPU's arrays while the GPU goes on."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from turboquant.io.safetensors import save_tensors
from turboquant.runtime import device


def tensors() -> dict[str, mx.array]:
    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1], np.uint32)  # not a number, minus infinity and zero, tiny
    return {
        "codes": mx.arange(7, dtype=mx.uint32),
        "scales": mx.array(odd).view(mx.float32),
        "means": mx.ones((2, 3), mx.bfloat16),
        "none": mx.zeros((0, 4)),
        "flags": mx.array([True, False]),
    }


def address(x: mx.array) -> int:
    return int(np.asarray(x.reshape(-1).view(mx.uint8)).ctypes.data)


@pytest.mark.parametrize("cuda", [True, False])
def test_on_cuda_the_host_reads_copies(cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    mx.eval(given)
    with (tmp_path / "as they are.safetensors").open("wb") as file:
        save_tensors(file, given)
    monkeypatch.setattr(device, "on_cpu", lambda: not cuda)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    found = device.host_copies(given)
    assert found.keys() == given.keys()
    for name, x in given.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        if x.size:
            assert (address(found[name]) == address(x)) != cuda
            assert mx.array_equal(found[name].view(mx.uint8), x.view(mx.uint8))
    with (tmp_path / "copied.safetensors").open("wb") as file:
        save_tensors(file, given)
    assert (tmp_path / "copied.safetensors").read_bytes() == (tmp_path / "as they are.safetensors").read_bytes()
