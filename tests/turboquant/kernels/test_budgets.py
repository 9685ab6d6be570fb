"""What thread-groups need, counted from the texts: on Apple's GPUs 32 KiB of memory and 1,024 threads at most, and on
NVIDIA's Hopper a half of 227 KiB.
"""

from __future__ import annotations

import math
import re

import mlx.core as mx
import pytest

from turboquant import CacheCodec
from turboquant.attention import gpu as attention_gpu
from turboquant.kernels import encoding_gpu, query_stats_gpu, trellis_search
from turboquant.kernels.kernel_text import Launch, text
from turboquant.quant.trellis import TrellisCodec

LARGEST_GROUP, MOST_THREADS = 32768, 1024
HOPPER_CORE, HOPPER_RESERVED = 228 << 10, 1024  # of a core, and of it for each thread-group
DECLARED = re.compile(r"^SHARED (?:ALIGNED )?(?:u32|float) (.*);", flags=re.MULTILINE)
ARRAY = re.compile(r"\w+((?:\[[^]]+\])+)")


def group_bytes(what: Launch) -> int:
    """Bytes of all arrays that a thread-group of a kernel shares; each number takes four."""
    constants = dict(what.constants)

    def value(expression: str) -> int:
        chosen = re.sub(r"(\w+) \? (\w+) : (\w+)", r"(\2 if \1 else \3)", expression)
        return int(eval(chosen, {}, constants))

    body = text(f"{what.name}.h")
    if not constants.get("SUFFIX", 1):
        body = body.partition("#if SUFFIX")[0]
    sizes = [
        math.prod(value(length) for length in re.findall(r"\[([^]]+)\]", lengths))
        for line in DECLARED.findall(body)
        for lengths in ARRAY.findall(line)
    ]
    assert len(sizes) >= body.count("SHARED ")
    return 4 * sum(sizes)


def launches(codec: CacheCodec, dim: int) -> list[Launch]:
    found = [
        attention_gpu._attend_launch(attention_gpu._kernel_bits(codec), dim, kind, (1, 1, 1), 1)
        for kind in attention_gpu._kinds(codec, dim)
    ]
    for suffix in ((), attention_gpu.OWN):
        found.append(attention_gpu._merge((1, 1, 1, dim), 1, mx.float16, suffix))
    for own in (codec.keys(dim), codec.values(dim), codec.fine.keys(dim)):
        found += [encoding_gpu._encode_launch(own, in_metric, 1, 1) for in_metric in (True, False)]
    found.append(encoding_gpu._feedback_launch(1, dim))
    for bits in (2, 3, 4):
        keys, values = TrellisCodec(dim, bits, of="keys"), TrellisCodec(dim, bits, of="values")
        for own, in_metric in ((keys, True), (keys, False), (values, False)):
            found += [
                trellis_search._search_launch(own, in_metric, 1, 128),
                trellis_search._units_launch(own, True, 1, 1),
            ]
    return [*found, query_stats_gpu._sums_launch(1, 1), query_stats_gpu._squares_launch(1, 1, 1)]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (3, 4), (2, 6), (5, 8), (8, 4)])
def test_thread_groups_fit_on_apple_s_gpus(bits: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "metal")
    monkeypatch.setattr(trellis_search, "gpu", lambda: "metal")
    for what in launches(CacheCodec(*bits), dim):
        assert 0 <= group_bytes(what) <= LARGEST_GROUP, what.name
        assert what.threads <= MOST_THREADS
        assert what.threads % 32 == 0


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (3, 4), (2, 6), (5, 8), (8, 4)])
def test_two_thread_groups_fit_on_a_hopper_core(
    bits: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    bits_of_kernel = attention_gpu._kernel_bits(CacheCodec(*bits))
    kinds = [kind for kind in attention_gpu._kinds(CacheCodec(*bits), dim) if kind.held or not kind.tiles]
    assert len(kinds) == 2
    for kind in kinds:
        what = attention_gpu._attend_launch(bits_of_kernel, dim, kind, (1, 1, 1), 1)
        declared = 4 * (kind.warps * 8 * 3 + 2 * 8 + 8 * dim // 2) if kind.tiles else 0
        assert 2 * (what.shared_bytes + declared + HOPPER_RESERVED) <= HOPPER_CORE
        assert kind.groups == 2 * 132


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_eight_searches_of_keys_fit_on_a_hopper_core(bits: int) -> None:
    """So a layer of 8 heads and 32,768 tokens is searched at once on 132 of them."""
    for dim in (64, 128, 256):
        what = trellis_search._search_launch(TrellisCodec(dim, bits), True, 1, 128)
        assert 8 * (group_bytes(what) + HOPPER_RESERVED) <= HOPPER_CORE


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [(2, 2), (4, 4), (3, 4)])
def test_a_thread_group_for_trellis_codes_fits_on_a_hopper_core(
    bits: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "is_hopper", lambda: True)
    monkeypatch.setattr(attention_gpu, "gpu", lambda: "cuda")
    codec = CacheCodec(*bits, coding="trellis")
    for kind in attention_gpu._kinds(codec, dim):
        what = attention_gpu._attend_launch(attention_gpu._kernel_bits(codec), dim, kind, (1, 1, 1), 1)
        declared = 4 * (kind.warps * 8 * 3 + 2 * 8 + 8 * dim // 2) if kind.tiles else 0
        assert what.shared_bytes + declared + HOPPER_RESERVED <= HOPPER_CORE
        assert kind.groups == 132
