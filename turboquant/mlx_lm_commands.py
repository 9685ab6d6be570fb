"""Run mlx-lm's own commands with compressed caches, for generate.py, chat.py and server.py.

A command of mlx-lm runs with all of its flags. While it runs, the functions with which its modules load models and make
caches are replaced; they are restored when it ends, also by an exception.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turboquant.io.prompt_cache import make_prompt_cache
from turboquant.io.safetensors import FileError
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.internals import LOADERS, command_modules
from turboquant.mlx_lm.loading import prepare_weights
from turboquant.mlx_lm.patch import enabled, replaced
from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.cache_codec import CacheCodec

DEFAULT_BITS = 4


def parse(command: str, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return turboquant's own flags, and the arguments left for mlx-lm's command.

    Exits with code 2 for flags that cannot be used together. With --help it prints its own help; mlx-lm's follows.
    """
    parser = argparse.ArgumentParser(
        prog=f"turboquant.{command}",
        description=f"mlx_lm.{command} with a compressed K/V cache. The flags of mlx_lm.{command} are listed below.",
        add_help=False,
        allow_abbrev=False,
    )
    for name, vectors in (("kv", "keys and values"), ("key", "keys"), ("value", "values")):
        parser.add_argument(
            f"--turbo-{name}-bits",
            type=int,
            choices=SUPPORTED_BITS,
            help=f"bits for one coordinate of {vectors} "
            f"(default: {DEFAULT_BITS if name == 'kv' else '--turbo-kv-bits'})",
        )
    # mlx-lm's parser takes every beginning of a flag that no other flag of its own has.
    for flag, shortest in (("--kv-bits", "--kv-b"), ("--max-kv-size", "--max-k")):
        names = [flag[:length] for length in range(len(flag), len(shortest) - 1, -1)]
        parser.add_argument(*names, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if options.kv_bits is not None:
        parser.error("--kv-bits is mlx-lm's own quantisation of the cache: use --turbo-kv-bits instead")
    if options.max_kv_size is not None:
        parser.error("--max-kv-size makes a rotating cache, which is not compressed: leave it out")
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    return options, rest


def make_codec(options: argparse.Namespace) -> CacheCodec:
    """Return the codec that the flags ask for."""
    both = options.turbo_kv_bits or DEFAULT_BITS
    return CacheCodec(options.turbo_key_bits or both, options.turbo_value_bits or both)


def run(
    command: str,
    arguments: Sequence[str],
    codec: CacheCodec,
    replacements: Mapping[str, Callable[..., Any]] | None = None,
) -> int:
    """Run ``mlx_lm.<command>`` with these arguments and compressed caches, and return its exit code.

    It is 2 if a model or a file cannot be used; one line then says why.

    replacements: further functions to replace in the command's module, by name.
    """
    from huggingface_hub.errors import HFValidationError  # mlx-lm raises it where a model's folder is missing

    modules = command_modules(command)
    with contextlib.ExitStack() as stack:

        def enabling(load: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(load)
            def load_and_enable(*arguments: Any, **options: Any) -> Any:
                loaded = load(*arguments, **options)
                prepare_weights(loaded[0])
                stack.enter_context(enabled(loaded[0]))
                if message := explain(loaded[0]).message:
                    print(f"[turboquant] {message}", file=sys.stderr)
                return loaded

            return load_and_enable

        def make_cache(model: Any, max_kv_size: None = None) -> list[Any]:
            return make_prompt_cache(model, codec)

        loaders = [(module, name) for module in modules for name in LOADERS if hasattr(module, name)]
        stack.enter_context(
            replaced(
                (sys, "argv", [f"turboquant.{command}", *arguments]),
                *((module, name, enabling(getattr(module, name))) for module, name in loaders),
                *((module, "make_prompt_cache", make_cache) for module in modules),
                *((modules[0], name, function) for name, function in (replacements or {}).items()),
            )
        )
        try:
            modules[0].main()
        except (FileError, OSError, HFValidationError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0
