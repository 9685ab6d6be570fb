"""Replacing attention changes nothing for stock caches and other models, and it is always undone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import make_prompt_cache

from turboquant import enabled
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.internals import ATTENTION

STOCK = base.scaled_dot_product_attention
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_next", "phi", "deepseek_v2", "deepseek_v3"]
Build = Callable[[str], Any]


def attention_of(family: str) -> Any:
    module: ModuleType = sys.modules[f"mlx_lm.models.{family}"]
    return getattr(module, ATTENTION)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_stock_caches_are_bit_identical(
    family: str, build_model: Build, random_tokens: Callable[[int, int], list[int]]
) -> None:
    model = build_model(family)
    chunks = [mx.array(random_tokens(40, 0))[None], mx.array([[5]]), mx.array(random_tokens(7, 1))[None]]

    def logits() -> list[mx.array]:
        caches = make_prompt_cache(model)
        out = [model(chunk, cache=caches) for chunk in chunks] + [model(chunks[0])]
        mx.eval(out)
        return out

    before = logits()
    with enabled(model):
        assert attention_of(family) is not STOCK
        inside = logits()
    after = logits()
    for a, b, c in zip(before, inside, after, strict=True):
        assert mx.array_equal(a, b)
        assert mx.array_equal(a, c)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exit_restores_mlx_lm_s_function(family: str, build_model: Build) -> None:
    model = build_model(family)
    with enabled(model):
        pass
    assert attention_of(family) is STOCK
    assert base.scaled_dot_product_attention is STOCK


def test_an_exception_restores_mlx_lm_s_function(build_model: Build) -> None:
    model = build_model("llama")
    with pytest.raises(KeyboardInterrupt), enabled(model):
        raise KeyboardInterrupt
    assert attention_of("llama") is STOCK


def test_nested_blocks_last_until_the_outermost_exit(build_model: Build) -> None:
    model = build_model("llama")
    with enabled(model):
        ours = attention_of("llama")
        with enabled(model):
            assert attention_of("llama") is ours
        assert attention_of("llama") is ours
        with pytest.raises(RuntimeError), enabled(model):
            raise RuntimeError
        assert attention_of("llama") is ours
    assert attention_of("llama") is STOCK


def test_models_of_other_files_are_not_touched(build_model: Build) -> None:
    build_model("qwen3")
    with enabled(build_model("llama")):
        assert attention_of("qwen3") is STOCK


def test_a_cache_s_own_attention_is_called_with_everything(build_model: Build) -> None:
    model, calls = build_model("gpt_oss"), []
    caches = make_prompt_cache(model)

    def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any, sinks: Any) -> mx.array:
        calls.append((queries.shape, keys.shape, scale, sinks))
        return mx.zeros_like(queries)

    caches[1].attend = attend
    with enabled(model):
        model(mx.array([[1, 2, 3]]), cache=caches)
    ((queries, keys, scale, sinks),) = calls
    assert queries == (1, 4, 3, 64)
    assert keys == (1, 2, 3, 64)
    assert scale == pytest.approx(0.125)
    assert sinks.shape == (4,)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [True, True]),
        ("qwen3", [True, True]),
        ("gemma3_text", [False, True, False, True]),
        ("gpt_oss", [False, True]),
        ("qwen3_next", [False, True]),
        ("deepseek_v3", [False, False]),
    ],
)
def test_only_plain_layers_of_known_models_are_compressed(
    family: str, expected: list[bool], build_model: Build
) -> None:
    assert list(explain(build_model(family)).layers) == expected
