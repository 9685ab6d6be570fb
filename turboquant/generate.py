"""``python -m turboquant.generate``: mlx_lm.generate with a compressed K/V cache.

    python -m turboquant.generate --model MODEL --prompt "..." --turbo-kv-bits 3

It takes every flag of mlx_lm.generate except those for other kinds of caches. It prints the same text, and one line
about the cache. ``--prompt-cache-file`` is a file of ``turboquant.save_prompt_cache``, with the metadata that mlx-lm
reads from its own files: the model's name (``model``), and the tokenizer's configuration as JSON
(``tokenizer_config``, "{}" for none).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from turboquant.runtime.blas import load_tuned_blas

METADATA = ("model", "tokenizer_config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for a model, a prompt cache or flags that cannot be used."""
    load_tuned_blas()
    from turboquant import mlx_lm_commands as commands
    from turboquant.io.prompt_cache import PromptCacheError, load_prompt_cache, make_prompt_cache
    from turboquant.mlx_lm.internals import generate_is_verbose

    options, rest = commands.parse("generate", arguments)
    codec = commands.make_codec(options)
    used: list[list[Any]] = []

    def make(model: Any, max_kv_size: None = None) -> list[Any]:
        used.append(make_prompt_cache(model, codec))
        return used[-1]

    def load(path: str, return_metadata: bool) -> tuple[list[Any], dict[str, str]]:
        if options.turbo_kv_bits or options.turbo_key_bits or options.turbo_value_bits:
            raise PromptCacheError("--prompt-cache-file has bits of its own: leave the --turbo flags out")
        cache, metadata = load_prompt_cache(path, return_metadata=return_metadata)
        if missing := [name for name in METADATA if name not in metadata]:
            raise PromptCacheError(f"{path}: save the cache with {' and '.join(missing)} in its metadata")
        used.append(cache)
        return cache, metadata

    code = commands.run("generate", rest, codec, {"make_prompt_cache": make, "load_prompt_cache": load})
    if code == 0 and generate_is_verbose(rest):
        print(f"Cache: {describe(used[0])}")  # the second one is a draft model's
    return code


def describe(caches: Sequence[Any]) -> str:
    """Return the bytes of a cache's compressed layers, and their bytes in full precision, as text.

    >>> describe([])
    'no layer is compressed'
    """
    from turboquant.caches.streaming import TurboQuantKVCache

    compressed = [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]
    if not compressed:
        return "no layer is compressed"
    held, full = sum(x.nbytes for x in compressed), sum(x.full_precision_nbytes for x in compressed)
    numbers = sum(x.numbers for x in compressed)
    return (
        f"{held / 1e6:.3f} MB, {8 * held / max(1, numbers):.2f} bits a value; in full precision {full / 1e6:.3f} MB "
        f"({len(compressed)} of {len(caches)} layers, {compressed[0].offset} tokens)"
    )


if __name__ == "__main__":
    sys.exit(main())
