"""Everything of this package that depends on how mlx-lm works inside.

The other modules import mlx-lm's names from here and read a tokenizer through the functions below, so that a new
release of mlx-lm is met in one place. The tests in test_mlx_lm_contract state every assumption in words.
How models are loaded, and what replaces mlx-lm's attention, is in turboquant/mlx_lm/.

Importing this module imports MLX and mlx-lm, which takes two seconds: modules that the parent process of a run needs
import it inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import turboquant.mlx_lm.imported  # noqa: F401, before mlx-lm's own modules

# isort: split
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step, generation_stream, stream_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import apply_top_p, greedy_sampler
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, MODEL_REMAPPING, load_tokenizer

from turboquant.mlx_lm.families import BATCHING, Batching

__all__ = [
    "DEFAULT_ALLOW_PATTERNS",
    "BatchGenerator",
    "apply_top_p",
    "batch_generate",
    "can_use_chat_template",
    "embedding_rows",
    "generate_step",
    "generation_stream",
    "greedy_sampler",
    "hugging_face_tokenizer",
    "load_prompt_cache",
    "load_tokenizer_only",
    "make_prompt_cache",
    "model_batching",
    "save_prompt_cache",
    "special_token_ids",
    "stop_token_ids",
    "stream_generate",
    "thinking_marks",
    "tool_call_marks",
]


# The names that mlx-lm's models give to the table that turns token ids into vectors.
_EMBEDDINGS = """
embed embed_in embed_tokens embedding embeddings tok_embeddings token_embeddings word_embeddings wte
"""


def embedding_rows(model: Any) -> int | None:
    """Return how many token ids a model has vectors for; None if its embedding has a name that is not known.

    Reading beyond the table would return foreign memory, or end the process.
    """
    tables = [part for name, part in model.named_modules() if name.rpartition(".")[2] in _EMBEDDINGS.split()]
    return min((int(table.weight.shape[0]) for table in tables if "weight" in table), default=None)


def model_batching(config: Mapping[str, Any]) -> Batching:
    """Return which rows of a model with this config.json may share a batch, as far as is known of its architecture."""
    kinds = [part.get("model_type", "") for part in (config, config.get("text_config") or {})]
    files = [MODEL_REMAPPING.get(kind, kind) for kind in kinds]
    return next((BATCHING[file] for file in files if file in BATCHING), "together")


def thinking_marks(tokenizer: Any) -> tuple[list[int], list[int], str]:
    """Return the marks with which a model begins and ends its thinking, of mlx-lm's tokenizer wrapper.

    Returns the tokens of both, and the text of the first one; all are empty if the tokenizer has no marks.
    """
    start, end = tokenizer.think_start_tokens, tokenizer.think_end_tokens
    return list(start or ()), list(end or ()), tokenizer.think_start or ""


def tool_call_marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens with which a model begins and ends a call of a tool; empty if the tokenizer has none.

    The end is also empty if a call goes on to the end of the answer.
    """
    return list(tokenizer.tool_call_start_tokens or ()), list(tokenizer.tool_call_end_tokens or ())


def special_token_ids(tokenizer: Any) -> dict[int, str]:
    """Return the text of each token that decoding leaves out with `skip_special_tokens`, of a tokenizer's wrapper."""
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, in ascending order, of mlx-lm's tokenizer wrapper."""
    return sorted(tokenizer.eos_token_ids)


def hugging_face_tokenizer(tokenizer: Any) -> Any:
    """Return the Hugging Face tokenizer inside of mlx-lm's wrapper, or the tokenizer itself if it is not wrapped.

    mlx-lm's wrapper forwards methods, but cannot be called.
    """
    return tokenizer if callable(tokenizer) else getattr(tokenizer, "_tokenizer", tokenizer)


def can_use_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer, wrapped or not, can render messages as a prompt."""
    # mlx-lm's wrapper may render in Python, with no template in the tokenizer.
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


def load_tokenizer_only(folder: Path, stop_tokens: int | Sequence[int] | None, trust_remote_code: bool) -> Any:
    """Load mlx-lm's tokenizer wrapper from a model folder, without the model. Raises what mlx-lm raises."""
    return load_tokenizer(folder, {"trust_remote_code": trust_remote_code}, eos_token_ids=stop_tokens)
