"""A tiny byte-level tokenizer, trained on a few lines, so that no test downloads one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
