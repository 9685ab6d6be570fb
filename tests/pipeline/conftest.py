"""A tiny byte-level tokenizer, a tiny random model and a job that uses them, so that no test downloads one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workplace import Workplace

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_LINES = [
    "The board met on the third of May and decided the budget for the year.",
    "What did the board decide? When does the lease end? Who signed the contract?",
    "  1, 2, 3;\n\n- first\n- second\n\n(x) and (y) are equal.\n\n\n",
    "Le café est fermé; où est l'été? ...... !!!! ???? aaaa bbbb",
] * 4


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(chat_template=...)` gives a Hugging Face tokenizer with 600 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)

    def make(chat_template: str | None = CHAT_TEMPLATE) -> Any:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|bos|>",
            eos_token="<|end|>",
            additional_special_tokens=specials[2:],
            chat_template=chat_template,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def write_model(make_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    """`write_model(folder, seed, **config)` saves a random llama of two layers with the tokenizer above.

    Its greedy answers are garbage, and different garbage for other contexts and queries.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    def write(folder: Path, seed: int = 0, **config: Any) -> Path:
        tokenizer = make_tokenizer()
        settings = {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "vocab_size": len(tokenizer),
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "eos_token_id": tokenizer.eos_token_id,
        } | config
        folder.mkdir(parents=True, exist_ok=True)
        mx.random.seed(seed)
        weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(settings)).parameters()))
        # Attention must count, or every context would give the same answer.
        weights = {name: x * 4 if name.endswith("_proj.weight") else x for name, x in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(settings))
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands set the level of the package's log."""
    before = logging.getLogger("pipeline").level
    yield
    logging.getLogger("pipeline").setLevel(before)


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path) -> Workplace:
    return Workplace(tmp_path, tiny_model)
