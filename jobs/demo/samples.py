"""Minutes as tokens: the demo's tokenizer, its chat template, and rows to train on.

It knows how a conversation about a document is laid out in tokens and which of them are to be learnt; it
knows no model. An answer's tokens are those that the same words have inside the document: the space before a
capital letter or a number is a token of its own, so that copying is token for token.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import minutes
import numpy as np
import phrases
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2560
PIECES = r"\p{Lu}\p{Ll}*| ?\p{Ll}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n+|\s+"
ASCII_PIECES = re.compile(r"<\|\w+\|>|[A-Z][a-z]*| ?[a-z]+|[0-9]{1,2}| ?[^\sA-Za-z0-9<]+|\n+|\s+")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHARACTERS_PER_TOKEN = 4.15

# How much a token's loss counts. The talk is mostly chance, but it teaches the language to a new model.
ANSWER_WEIGHT, FIRST_ANSWER_WEIGHT = 1.0, 3.0
DOCUMENT_WEIGHT, SHORT_DOCUMENT_WEIGHT, SHORT = 0.05, 0.2, 512


class Encoder:
    """Encodes plain ASCII as the tokenizer does, several times faster, by remembering every word.

    The tests compare the two.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in ASCII_PIECES.findall(text):
            if piece not in self.known:
                self.known[piece] = self.tokenizer.encode(piece).ids
            tokens += self.known[piece]
        return tokens


@dataclass(frozen=True)
class Batch:
    tokens: np.ndarray
    """(rows, length + 1) int32"""
    weights: np.ndarray
    """(rows, length) float32: the weight of predicting the next token; 0 for questions and padding."""


def tokenizer_texts() -> Iterator[str]:
    """Short minutes with many facts, and the parts of names and numbers so often that each becomes a token.

    Whole names stay rare: one that were a token of its own would teach the model nothing about new names.
    """
    for index in range(1500):
        yield minutes.write_minutes(f"tokenizer-{index}", 5000, (), 24).text
    starts = (*phrases.FIRST_NAMES[0], *phrases.SURNAMES[0])
    yield " ".join([*starts, *(f"{number:02}" for number in range(100))] * 2000)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer in which no token crosses from one word, or one line, to the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def context(text: str) -> str:
    """What comes before the question, as the chat template renders it."""
    return f"{START}system\n{minutes.SYSTEM}{END}\n{START}user\n{text}\n\n"


def make_batch(encode: Encoder, seed: str, rows: int, length: int, for_demo: bool = False) -> Batch:
    """Rows of one document each, with questions about all of its facts behind it, as turns of one chat.

    for_demo: write the minutes with the reserved values, to measure on.
    """
    tokens = np.full((rows, length + 1), encode.tokenizer.token_to_id(END_OF_TEXT), np.int32)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        row_tokens, row_weights = _row(encode, f"{seed}-{row}", length, for_demo)
        tokens[row, : len(row_tokens)] = row_tokens[: length + 1]
        weights[row, : len(row_tokens) - 1] = row_weights[1 : length + 1]
    return Batch(tokens, weights)


def _row(encode: Encoder, seed: str, length: int, for_demo: bool) -> tuple[list[int], list[float]]:
    rng = random.Random(f"row-{seed}")
    facts = min(24, max(2, length // 160))
    decisions = 1 + length // 500 if length < 1024 else rng.randint(3, 6)
    turns_length = 27 * facts + 22 * decisions + 60
    fill = rng.uniform(0.7, 1.0) if length > 3000 else 1.0
    characters = int((length * fill - turns_length) * CHARACTERS_PER_TOKEN)
    document = minutes.write_minutes(seed, characters, (), facts, decisions, for_demo)

    turns = [(fact.question, fact.answer) for fact in document.facts]
    rng.shuffle(turns)
    turns.insert(0 if rng.random() < 0.12 else rng.randrange(len(turns)), _summary_turn(document))

    tokens = encode(context(document.text))
    weights = [SHORT_DOCUMENT_WEIGHT if length <= SHORT else DOCUMENT_WEIGHT] * len(tokens)
    for number, (question, answer) in enumerate(turns):
        opening = f"{START}user\n" if number else ""
        asked = encode(f"{opening}{question}{END}\n{START}assistant\n")
        answered = encode(f"{answer}{END}")
        if len(tokens) + len(asked) + len(answered) > length:
            break
        weight = ANSWER_WEIGHT if number else FIRST_ANSWER_WEIGHT
        tokens += [*asked, *answered, *encode("\n")]
        weights += [*([0.0] * len(asked)), *([weight] * len(answered)), 0.0]
    return tokens[: length + 1], weights[: length + 1]


def _summary_turn(document: minutes.Minutes) -> tuple[str, str]:
    return minutes.SUMMARY_QUESTION, document.summary
