"""Random models with their tokenizer, and jobs that use them: for tests, and benches that measure all but what is said.

The tiny one answers garbage, and other garbage for other contexts and queries, within milliseconds.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIALS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SENTENCES = [
    "The board met on the third of May and decided the budget for the year.",
    "What did the board decide? When does the lease end? Who signed the contract?",
    "1, 2, 3; first, second; (x) and (y) are equal.",
]
_READ = [*SENTENCES[:2], "  1, 2, 3;\n\n- first\n- second\n\n(x) and (y) are equal.\n\n\n"]
_READ += ["Le café est fermé; où est l'été? ...... !!!! ???? aaaa bbbb"]  # what the tokenizer is made from
QUERIES = ["What did the board decide?", "When does the lease end?"]
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string())])


def write_model(
    folder: Path,
    dtype: str = "float32",
    seed: int = 0,
    scale: float = 4.0,
    quantized_bits: int | None = None,
    **config: Any,
) -> Path:
    """Save a random llama of a byte-level vocabulary: two layers that read 2,048 tokens, unless ``config`` says more.

    dtype: MLX's name of it. scale: of the projections' weights, large so that attention counts, or every context would
    give the same answer. quantized_bits: of the weights, in groups of 64; None: not quantised. config: keys of
    config.json.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
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
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(settings))
    leaves: Any = tree_flatten(model.parameters())
    weights = {name: x * scale if name.endswith("_proj.weight") else x for name, x in leaves}
    weights = {name: x.astype(getattr(mx, dtype)) for name, x in weights.items()}
    if quantized_bits is not None:
        settings["quantization"] = {"group_size": 64, "bits": quantized_bits}
        model.load_weights(list(weights.items()))
        nn.quantize(model, **settings["quantization"])
        weights = dict(tree_flatten(model.parameters()))
        del leaves, model  # so that each matrix is freed when it is quantised
        for name in list(weights):
            mx.eval(weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = TEMPLATE) -> Any:
    """A Hugging Face tokenizer of 600 tokens."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(),
        bos_token=_SPECIALS[0],
        eos_token=_SPECIALS[1],
        additional_special_tokens=_SPECIALS[2:],
        chat_template=chat_template,
    )


@functools.cache
def _trained() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=_SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_READ * 4, trainer)
    return tokenizer


@dataclass
class Place:
    """A folder with documents and a job on them; the paths in it are what the job says."""

    folder: Path
    model: Path
    cache: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)  # in place of those that the job has otherwise

    @property
    def output(self) -> Path:
        """The result file."""
        return self.folder / "out" / "answers.parquet"

    @property
    def store(self) -> Path:
        """The folder of segments."""
        return self.folder / "cache"

    @property
    def parts(self) -> Path:
        """Where committed rows are while the job runs."""
        return Path(f"{self.output}.parts")

    def segments(self) -> set[str]:
        """The keys of the segments that are complete."""
        return {path.parent.name for path in self.store.glob("??/*/segment.json")}

    def write(self, texts: dict[str, str] | None = None, max_tokens: int = 8) -> Path:
        """Write the job and, unless they are there, its documents; returns the job file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if texts is not None:
            table = pa.table({"id": list(texts), "text": list(texts.values())}, schema=SCHEMA)
            pq.write_table(table, self.folder / "documents.parquet")
        job = {
            "model": str(self.model),
            "documents": {"path": "documents.parquet"},
            "queries": [{"id": f"q{index}", "text": text} for index, text in enumerate(QUERIES)],
            "generation": {"max_tokens": max_tokens},
            "cache": {"dir": "cache", **self.cache},
            "output": {"path": "out/answers.parquet"},
            **self.sections,
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(job), encoding="utf-8")
        return path


def text_of(number: int, sentences: int) -> str:
    """A text of about 25 tokens a sentence, another for every number."""
    return " ".join(f"{number}.{index} {SENTENCES[(number + index) % len(SENTENCES)]}" for index in range(sentences))
