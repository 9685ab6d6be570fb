"""The assumptions of pipeline/models/mlx_lm_internals.py about mlx-lm, each as a test that says it in words.

If one of these fails after mlx-lm was updated, its docstring says what the pipeline relies on.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from pipeline.models import mlx_lm_internals
from pipeline.models.loading import LoadedModel, load_model
from pipeline.models.mlx_lm_internals import BatchGenerator

PROMPTS = [[7, 8, 9], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(tiny_model)


@pytest.fixture
def thinker(make_tokenizer: Callable[..., Any]) -> TokenizerWrapper:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(tokenizer)


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def generator_of(loaded: LoadedModel, rows: int, **options: Any) -> BatchGenerator:
    return BatchGenerator(loaded.model, completion_batch_size=rows, prefill_batch_size=rows, **options)


def generated(generator: BatchGenerator, numbers: Sequence[int]) -> dict[int, list[tuple[int, str | None]]]:
    """Each row's tokens with their finish reasons, until all rows have one."""
    found: dict[int, list[tuple[int, str | None]]] = {number: [] for number in numbers}
    while not all(row and row[-1][1] for row in found.values()):
        for response in generator.next_generated():
            found[response.uid].append((response.token, response.finish_reason))
    return found


# ---- loading


def test_load_takes_the_options_that_we_give() -> None:
    """`mlx_lm.load` reads weights lazily, returns the config, and passes an adapter and trust_remote_code on."""
    from mlx_lm import load

    assert {"tokenizer_config", "adapter_path", "lazy", "return_config", "trust_remote_code"} <= parameters(load)


def test_load_tokenizer_needs_no_weights_and_takes_stop_tokens(tiny_model: Path) -> None:
    """`mlx_lm.utils.load_tokenizer` takes a folder, options of the tokenizer and the ids of stop tokens."""
    wrapped = mlx_lm_internals.load_tokenizer_only(tiny_model, [1, 3], trust_remote_code=False)
    assert isinstance(wrapped, TokenizerWrapper)
    assert mlx_lm_internals.stop_token_ids(wrapped) == [1, 3]


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja",
     "tokenizer.model", "merges.txt", "modeling.py"],
)  # fmt: skip
def test_a_download_has_every_file_that_load_reads(name: str) -> None:
    """DEFAULT_ALLOW_PATTERNS are glob patterns of all files of a repo that `load` reads."""
    assert any(fnmatch.fnmatch(name, pattern) for pattern in mlx_lm_internals.DEFAULT_ALLOW_PATTERNS)


# ---- the tokenizer's wrapper


def test_the_wrapper_knows_the_marks_of_thinking(thinker: TokenizerWrapper) -> None:
    """think_start_tokens and think_end_tokens are the marks' tokens, think_start is the first one's text."""
    start, end = (thinker.encode(mark, add_special_tokens=False) for mark in ("<think>", "</think>"))
    assert mlx_lm_internals.thinking_marks(thinker) == (start, end, "<think>")


def test_the_wrapper_of_a_model_that_does_not_think_has_no_marks(tokenizer: Any) -> None:
    """The same attributes are empty or None if the vocabulary has no marks of thinking."""
    assert mlx_lm_internals.thinking_marks(TokenizerWrapper(tokenizer)) == ([], [], "")


def test_the_wrapper_hides_a_tokenizer_that_can_be_called(tokenizer: Any) -> None:
    """The wrapper cannot be called; the Hugging Face tokenizer is its attribute `_tokenizer`."""
    wrapped = TokenizerWrapper(tokenizer)
    assert not callable(wrapped)
    assert mlx_lm_internals.hugging_face_tokenizer(wrapped) is tokenizer
    assert mlx_lm_internals.hugging_face_tokenizer(tokenizer) is tokenizer


def test_the_wrapper_says_whether_it_has_a_chat_template(make_tokenizer: Callable[..., Any]) -> None:
    """has_chat_template is true also of a template in Python; a Hugging Face tokenizer has only chat_template."""
    for tokenizer, expected in ((make_tokenizer(), True), (make_tokenizer(chat_template=None), False)):
        assert TokenizerWrapper(tokenizer).has_chat_template is expected
        assert mlx_lm_internals.can_use_chat_template(TokenizerWrapper(tokenizer)) is expected
        assert mlx_lm_internals.can_use_chat_template(tokenizer) is expected
    in_python = TokenizerWrapper(make_tokenizer(chat_template=None), chat_template=lambda *_, **__: "")
    assert mlx_lm_internals.can_use_chat_template(in_python)


# ---- BatchGenerator


def test_insert_numbers_the_rows_in_the_order_of_prompts(loaded: LoadedModel) -> None:
    """`insert` returns one number for each prompt, in their order, and responses carry it as `uid`."""
    generator = generator_of(loaded, rows=3)
    numbers = generator.insert(PROMPTS, max_tokens=[2, 3, 4])
    rows = generated(generator, numbers)
    generator.close()
    assert len(set(numbers)) == 3
    assert [len(rows[number]) for number in numbers] == [2, 3, 4]


def test_the_last_response_of_a_row_has_a_reason(loaded: LoadedModel) -> None:
    """finish_reason is None until the last token; it is `length` when max_tokens are generated."""
    generator = generator_of(loaded, rows=3)
    rows = generated(generator, generator.insert(PROMPTS, max_tokens=[3] * 3))
    generator.close()
    assert [[reason for _, reason in row] for row in rows.values()] == [[None, None, "length"]] * 3


def test_a_stop_token_is_the_last_response(loaded: LoadedModel) -> None:
    """A row that generates one of `stop_tokens` gives that token as its last response, with the reason `stop`."""
    generator = generator_of(loaded, rows=1, stop_tokens=[[5]], sampler=lambda logprobs: mx.array([5]))
    rows = generated(generator, generator.insert(PROMPTS[:1], max_tokens=[9]))
    generator.close()
    assert list(rows.values()) == [[(5, "stop")]]


def test_a_row_joins_when_another_leaves(loaded: LoadedModel) -> None:
    """At most completion_batch_size rows are decoded together; waiting rows take the places of finished ones."""
    generator = generator_of(loaded, rows=2)
    numbers = generator.insert([*PROMPTS, *PROMPTS], max_tokens=[2, 6, 2, 6, 2, 2])
    left, most = dict.fromkeys(numbers, 0), 0
    finished: set[int] = set()
    while len(finished) < len(numbers):
        responses = generator.next_generated()
        most = max(most, len(responses))
        for response in responses:
            left[response.uid] += 1
            if response.finish_reason:
                finished.add(response.uid)
    generator.close()
    assert most == 2
    assert list(left.values()) == [2, 6, 2, 6, 2, 2]


def test_a_removed_row_is_decoded_no_further(loaded: LoadedModel) -> None:
    """`remove`, called on the generator's `stream`, ends one row, and the others generate what they would have."""
    tokens = []
    for is_removed in (False, True):
        generator = generator_of(loaded, rows=2)
        first, second = generator.insert(PROMPTS[:2], max_tokens=[8, 8])
        rows: dict[int, list[int]] = {first: [], second: []}
        while len(rows[second]) < 8:
            for response in generator.next_generated():
                rows[response.uid].append(response.token)
            if is_removed and len(rows[first]) == 3:
                with mx.stream(generator.stream):
                    generator.remove([first])
        generator.close()
        tokens.append((len(rows[first]), rows[second]))
    assert tokens[0] == (8, tokens[1][1])
    assert tokens[1][0] < 8


def test_a_sampler_receives_log_probabilities(loaded: LoadedModel) -> None:
    """A row's sampler takes log-probabilities of shape (1, vocabulary) and returns the token, of shape (1,)."""
    seen: list[mx.array] = []

    def sampler(logprobs: mx.array) -> mx.array:
        seen.append(logprobs)
        return mx.array([9])

    generator = generator_of(loaded, rows=2)
    numbers = generator.insert(PROMPTS[:2], max_tokens=[2, 2], samplers=[sampler, None])
    rows = generated(generator, numbers)
    generator.close()
    assert [token for token, _ in rows[numbers[0]]] == [9, 9]
    assert {logprobs.shape for logprobs in seen} == {(1, loaded.config["vocab_size"])}
    assert mx.allclose(mx.exp(seen[0]).sum(), mx.array(1.0), atol=1e-3).item()


def test_a_logits_processor_sees_each_generated_token_once(loaded: LoadedModel) -> None:
    """A row's logits processor takes the row's tokens so far, which grow by the generated ones, and (1, vocabulary)."""
    seen: list[list[int]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(list(tokens.tolist()))  # type: ignore[arg-type]
        assert logits.shape == (1, loaded.config["vocab_size"])
        return mx.where(mx.arange(logits.shape[-1]) == 11, logits, -mx.inf)

    generator = generator_of(loaded, rows=2)
    numbers = generator.insert(PROMPTS[:2], max_tokens=[3, 3], logits_processors=[[processor], []])
    rows = generated(generator, numbers)
    generator.close()
    assert [token for token, _ in rows[numbers[0]]] == [11, 11, 11]
    start = len(seen[0])
    assert [tokens[start:] for tokens in seen[:3]] == [[], [11], [11, 11]]


# ---- samplers and baselines


def test_greedy_sampler_takes_the_likeliest_token() -> None:
    """`greedy_sampler` returns the index of the largest value of each row."""
    found = mlx_lm_internals.greedy_sampler(mx.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]))
    assert found.tolist() == [1, 0]


def test_apply_top_p_excludes_unlikely_tokens() -> None:
    """`apply_top_p` sets the log-probabilities of tokens outside of the likeliest share to minus infinity."""
    found = mlx_lm_internals.apply_top_p(mx.log(mx.array([[0.6, 0.3, 0.1]])), 0.7)
    assert mx.isinf(found).tolist() == [[False, False, True]]


def test_generate_step_prefills_a_cache_without_generating(loaded: LoadedModel) -> None:
    """`generate_step` with max_tokens=0 feeds the whole prompt into the prompt cache."""
    cache = mlx_lm_internals.make_prompt_cache(loaded.model)
    steps = mlx_lm_internals.generate_step(mx.array(PROMPTS[2]), loaded.model, max_tokens=0, prompt_cache=cache)
    assert list(steps) == []
    assert {layer.offset for layer in cache} == {len(PROMPTS[2])}


def test_generate_step_decodes_a_row_as_batch_generator_does(loaded: LoadedModel) -> None:
    """`generate_step` gives a sampler and logits processors what BatchGenerator gives them, on the same stream."""
    seen: list[int] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.size)
        return mx.where(mx.arange(logits.shape[-1]) == 11, logits, -mx.inf)

    steps = mlx_lm_internals.generate_step(
        mx.array(PROMPTS[0]), loaded.model, max_tokens=3, logits_processors=[processor]
    )
    tokens, logprobs = zip(*steps, strict=True)
    assert tokens == (11, 11, 11)
    assert {each.shape for each in logprobs} == {(loaded.config["vocab_size"],)}
    assert [size - seen[0] for size in seen[:3]] == [0, 1, 2]
    generator = generator_of(loaded, rows=1)
    assert generator.stream is mlx_lm_internals.generation_stream
    generator.close()


def test_the_embedding_of_a_model_has_a_known_name(loaded: LoadedModel) -> None:
    """Models call the table of their tokens' vectors by a few names; its `weight` has a row for each token id."""
    assert mlx_lm_internals.embedding_rows(loaded.model) == loaded.config["vocab_size"]


def test_a_model_type_may_be_loaded_by_another_s_file() -> None:
    """MODEL_REMAPPING names the file of a model type that has none: falcon_mamba is loaded by mamba's."""
    assert mlx_lm_internals.model_batching({"model_type": "falcon_mamba"}) == "equal lengths"
    assert mlx_lm_internals.model_batching({"model_type": "llama"}) == "together"


def test_a_prompt_cache_is_saved_and_loaded(loaded: LoadedModel, tmp_path: Path) -> None:
    """`save_prompt_cache` and `load_prompt_cache` take the name of a file and keep each layer's state."""
    cache = mlx_lm_internals.make_prompt_cache(loaded.model)
    loaded.model(mx.array([PROMPTS[0]]), cache=cache)
    mlx_lm_internals.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = mlx_lm_internals.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    for layer, other in zip(cache, again, strict=True):
        assert all(mx.array_equal(a, b).item() for a, b in zip(layer.state, other.state, strict=True))


def test_batch_generate_leaves_a_shared_prompt_cache_alone(loaded: LoadedModel) -> None:
    """`batch_generate` copies the prompt caches that it is given, and returns each row's tokens."""
    cache = mlx_lm_internals.make_prompt_cache(loaded.model)
    loaded.model(mx.array([PROMPTS[0]]), cache=cache)
    response = mlx_lm_internals.batch_generate(
        loaded.model, loaded.tokenizer, PROMPTS[1:], prompt_caches=[cache] * 2, max_tokens=[3, 3], return_token_ids=True
    )
    assert [len(tokens) <= 3 for tokens in response.token_ids] == [True, True]
    assert {layer.offset for layer in cache} == {len(PROMPTS[0])}


def test_stream_generate_gives_tokens_one_by_one(loaded: LoadedModel) -> None:
    """Responses of `stream_generate` have `token` and `finish_reason`; it takes a sampler and logits processors."""
    responses = list(
        mlx_lm_internals.stream_generate(
            loaded.model,
            loaded.tokenizer,
            PROMPTS[0],
            max_tokens=3,
            sampler=lambda logprobs: mx.array([9]),
            logits_processors=None,
            prompt_cache=None,
        )
    )
    assert [response.token for response in responses] == [9, 9, 9]
    assert responses[-1].finish_reason == "length"
