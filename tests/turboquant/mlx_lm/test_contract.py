"""Each assumption of turboquant about how mlx-lm works inside, in words.

If one of these tests fails after an update of mlx-lm, its message names the assumption and the code that depends on it.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from turboquant.mlx_lm.internals import LOADERS, MODELS, STOCK_CACHES, command_modules

FORK = "turboquant/caches/fork.py"
STREAMING = "turboquant/caches/streaming.py"
PREFIX = "turboquant/caches/prefix.py"
INTERNALS = "turboquant/mlx_lm/internals.py"
PATCH = "turboquant/mlx_lm/patch.py"
FILES = "turboquant/io/prompt_cache.py"
COMMANDS = "turboquant/mlx_lm_commands.py"


def filled(cache: Any, tokens: int = 3) -> Any:
    cache.update_and_fetch(mx.ones((1, 2, tokens, 8)), mx.ones((1, 2, tokens, 8)))
    return cache


def make(kind: str) -> Any:
    caches = {
        "KVCache": lambda: filled(KVCache()),
        "QuantizedKVCache": lambda: KVCache().to_quantized(group_size=64, bits=4),
        "BatchKVCache": lambda: BatchKVCache.merge([filled(KVCache()), filled(KVCache(), 5)]),
        "RotatingKVCache": lambda: filled(RotatingKVCache(max_size=8, keep=2)),
        "ChunkedKVCache": lambda: filled(ChunkedKVCache(8)),
        "ArraysCache": lambda: ArraysCache(2),
        "CacheList": lambda: CacheList(filled(KVCache())),
    }
    return caches[kind]()


# (class, names, the code that uses them and for which purpose)
USED = [
    ("KVCache", "keys values offset", f"{INTERNALS} uses to empty a cache and {FILES} to read a suffix"),
    ("KVCache", "step", f"{INTERNALS} sets so that a prefill allocates its buffers only once"),
    ("KVCache", "update_and_fetch make_mask state nbytes empty size trim keys_and_values", f"{FORK} uses for a suffix"),
    ("KVCache", "to_quantized", "turboquant/eval/baselines.py uses to make mlx-lm's own quantised cache"),
    ("QuantizedKVCache", "keys_and_values update_and_fetch", "turboquant/eval/baselines.py uses to count its bytes"),
    ("BatchKVCache", "_idx left_padding offset keys values", f"{INTERNALS} uses in drop_oldest, for {STREAMING}"),
    (
        "BatchKVCache",
        "update_and_fetch make_mask prepare finalize filter extend extract state nbytes empty size trim",
        f"{FORK} uses for the suffixes of a batch",
    ),
    ("RotatingKVCache", "max_size keep _idx offset", f"{INTERNALS} checks when a cache is read from a file"),
    ("ChunkedKVCache", "start_position offset", f"{INTERNALS} checks when a cache is read from a file"),
    ("ArraysCache", "cache left_padding lengths", f"{INTERNALS} checks when a cache is read from a file"),
    ("CacheList", "caches", f"{INTERNALS} uses to count the tokens of several caches in one layer"),
]


@pytest.mark.parametrize(
    ("kind", "name", "use"), [(kind, name, use) for kind, names, use in USED for name in names.split()]
)
def test_caches_have_the_attributes_that_turboquant_uses(kind: str, name: str, use: str) -> None:
    assert hasattr(make(kind), name), f"mlx-lm's {kind} no longer has `{name}`, which {use}"


@pytest.mark.parametrize("kind", sorted(STOCK_CACHES))
def test_a_cache_of_a_file_can_be_made_from_its_state(kind: str) -> None:
    cache = make(kind)
    message = f"mlx-lm's {kind} can no longer be made by from_state(state), with which {INTERNALS} reads it from a file"
    assert type(STOCK_CACHES[kind].from_state(cache.state)) is type(cache), message


def test_the_state_of_a_plain_cache_is_keys_values_and_number_of_tokens() -> None:
    keys = mx.ones((1, 2, 5, 8))
    cache = KVCache()
    cache.state = (keys, keys, 5)
    message = f"mlx-lm's KVCache.state is no longer (keys, values, tokens), which {INTERNALS} sets in kv_cache"
    assert cache.offset == 5, message
    assert cache.keys_and_values()[0].shape == (1, 2, 5, 8), message


def test_a_plain_cache_allocates_as_many_tokens_as_its_step_says() -> None:
    cache = KVCache()
    cache.step = 7
    message = f"mlx-lm's KVCache no longer allocates `step` tokens, so {PREFIX} would allocate again and again"
    assert filled(cache).keys.shape[2] == 7, message


def test_the_fields_of_the_caches_in_files_are_keys_values_and_counts() -> None:
    for kind in ("KVCache", "RotatingKVCache", "ChunkedKVCache"):
        others = {name: value for name, value in vars(make(kind)).items() if name not in ("keys", "values")}
        message = f"mlx-lm's {kind} has a field that is not a count, which cache_from_state in {INTERNALS} refuses"
        assert all(type(value) is int for value in others.values()), f"{message}: {others}"


def test_a_batch_pads_shorter_rows_on_the_left() -> None:
    batch = make("BatchKVCache")
    message = f"mlx-lm's BatchKVCache no longer aligns rows on the right, as {STREAMING} and drop_oldest assume"
    assert batch.left_padding.tolist() == [2, 0], message
    assert batch.offset.tolist() == [3, 5], message
    assert batch._idx == batch.size() == 5, message
    assert batch.keys.shape[2] >= 5, message


def test_a_batch_cuts_off_what_is_padding_in_all_rows() -> None:
    batch = make("BatchKVCache")
    batch.filter([0])
    message = f"mlx-lm's BatchKVCache.filter no longer cuts off common padding, which {STREAMING} counts"
    assert (batch.size(), batch.left_padding.tolist()) == (3, [0]), message


def test_a_batch_moves_padding_from_the_right_to_the_left() -> None:
    batch = make("BatchKVCache")
    batch.prepare(lengths=[1, 2], right_padding=[1, 0])
    batch.update_and_fetch(mx.ones((2, 2, 2, 8)), mx.ones((2, 2, 2, 8)))
    batch.finalize()
    message = f"mlx-lm's BatchKVCache.finalize no longer moves padding to the left, which {STREAMING} follows"
    assert batch.left_padding.tolist() == [3, 0], message


def test_a_batch_binds_its_offset_anew_whenever_it_changes() -> None:
    cache, more = make("BatchKVCache"), mx.ones((2, 2, 4, 8))
    changes = {
        "update_and_fetch": lambda: cache.update_and_fetch(more, more),
        "trim": lambda: cache.trim(1),
        "prepare": lambda: cache.prepare(left_padding=None, lengths=[4, 3], right_padding=[0, 1]),
        "finalize": lambda: (cache.update_and_fetch(more, more), cache.finalize()),
        "extend": lambda: cache.extend(make("BatchKVCache")),
        "filter": lambda: cache.filter(mx.array([1])),
    }
    for name, change in changes.items():
        before = cache.offset
        values = before.tolist()
        change()
        assert before.tolist() == values, f"{name} changes offset in place; {FORK} remembers positions by it"
        assert cache.offset is not before or cache.offset.tolist() == values


def test_a_mask_of_a_plain_cache_is_causal_over_what_it_holds() -> None:
    cache = filled(KVCache())
    message = f"mlx-lm's KVCache.make_mask no longer masks causally as {FORK} passes it on"
    assert cache.make_mask(1, return_array=False, window_size=None) is None, message
    assert isinstance(cache.make_mask(2, return_array=False, window_size=None), str), message
    assert cache.make_mask(2, return_array=True, window_size=None).shape[-2:] == (2, 5), message


def test_model_files_call_attention_by_the_name_that_is_replaced() -> None:
    llama = importlib.import_module(f"{MODELS}.llama")
    message = f"mlx-lm's model files no longer import base.scaled_dot_product_attention by name, which {PATCH} replaces"
    assert vars(llama).get("scaled_dot_product_attention") is base.scaled_dot_product_attention, message


def test_attention_has_the_parameters_that_the_replacement_has() -> None:
    names = list(inspect.signature(base.scaled_dot_product_attention).parameters)
    message = f"mlx-lm's scaled_dot_product_attention has other parameters than its replacement in {PATCH}"
    assert names == ["queries", "keys", "values", "cache", "scale", "mask", "sinks"], message


def test_a_cache_with_bits_is_taken_for_a_quantised_one() -> None:
    message = f"mlx-lm no longer recognises its quantised cache by `bits`, which {FORK} therefore avoids"
    assert hasattr(QuantizedKVCache(), "bits"), message
    assert 'hasattr(cache, "bits")' in inspect.getsource(base.scaled_dot_product_attention), message


@pytest.mark.parametrize("command", ["generate", "chat", "server"])
def test_commands_load_models_and_make_caches_by_the_names_that_are_replaced(command: str) -> None:
    for module in command_modules(command):
        assert any(hasattr(module, name) for name in LOADERS), (
            f"{module.__name__} loads models by none of {LOADERS}, which {COMMANDS} replaces"
        )
        assert hasattr(module, "make_prompt_cache"), (
            f"{module.__name__} no longer makes caches by `make_prompt_cache`, which {COMMANDS} replaces"
        )
    assert callable(command_modules(command)[0].main), f"mlx_lm.{command} has no `main`, which {COMMANDS} calls"


def test_the_generate_command_reads_a_prompt_cache_by_the_name_that_is_replaced() -> None:
    (generate,) = command_modules("generate")
    message = "mlx_lm.generate no longer has `load_prompt_cache`, which turboquant/generate.py replaces"
    assert list(inspect.signature(generate.load_prompt_cache).parameters) == ["file_name", "return_metadata"], message
