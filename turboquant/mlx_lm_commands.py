"""mlx-lm's own commands with compressed caches: what generate.py, chat.py and server.py share.

A command of mlx-lm runs as it is, all of its flags included, while the functions it loads models and makes caches with
are replaced in its modules; they are put back when it ends, however it ends. Knows the names of those functions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from turboquant.io.prompt_cache import make_prompt_cache
from turboquant.mlx_lm.families import explain
from turboquant.mlx_lm.patch import enabled
from turboquant.quant import SUPPORTED_BITS
from turboquant.quant.cache_codec import CacheCodec
from turboquant.runtime.device import prepare_weights

DEFAULT_BITS = 4


def parse(command: str, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This package's flags, and the arguments left for mlx-lm's command. Exits with 2 where they don't go together."""
    parser = argparse.ArgumentParser(
        prog=f"turboquant.{command}",
        description=f"mlx_lm.{command} with a compressed K/V cache; its own flags are below.",
        add_help=False,
        allow_abbrev=False,
    )
    for name, what in (("kv", "keys and values"), ("key", "keys"), ("value", "values")):
        parser.add_argument(
            f"--turbo-{name}-bits",
            type=int,
            choices=SUPPORTED_BITS,
            help=f"bits a coordinate of {what} (default: {DEFAULT_BITS if name == 'kv' else '--turbo-kv-bits'})",
        )
    for flag in ("--kv-bits", "--max-kv-size"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if options.kv_bits is not None:
        parser.error("--kv-bits is mlx-lm's own quantisation of the cache: use --turbo-kv-bits instead")
    if options.max_kv_size is not None:
        parser.error("--max-kv-size makes a rotating cache, which is not compressed: leave it out")
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    return options, rest


def codec_of(options: argparse.Namespace) -> CacheCodec:
    """The codec that the flags ask for."""
    both = options.turbo_kv_bits or DEFAULT_BITS
    return CacheCodec(options.turbo_key_bits or both, options.turbo_value_bits or both)


def run(command: str, arguments: Sequence[str], codec: CacheCodec, **replacements: Callable[..., Any]) -> None:
    """Run ``mlx_lm.<command>`` with these arguments and compressed caches.

    replacements: functions to take the place of others of the command's module, by name.
    """
    module = importlib.import_module(f"mlx_lm.{command}")
    modules = [module, importlib.import_module("mlx_lm.generate")]
    given, sys.argv = sys.argv, [f"turboquant.{command}", *arguments]
    try:
        with _compressing(modules, codec), contextlib.ExitStack() as stack:
            for name, function in replacements.items():
                stack.enter_context(_replaced(module, name, function))
            module.main()
    finally:
        sys.argv = given


@contextlib.contextmanager
def _compressing(modules: Sequence[ModuleType], codec: CacheCodec) -> Iterator[None]:
    """While the block runs, models loaded by the modules run on compressed caches, which the modules make."""
    with contextlib.ExitStack() as stack:

        def loading(load: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(load)
            def load_and_enable(*arguments: Any, **options: Any) -> Any:
                loaded = load(*arguments, **options)
                prepare_weights(loaded[0])
                stack.enter_context(enabled(loaded[0]))
                if message := explain(loaded[0]).message:
                    print(f"[turboquant] {message}", file=sys.stderr)
                return loaded

            return load_and_enable

        def make(model: Any, max_kv_size: None = None) -> list[Any]:
            return make_prompt_cache(model, codec)

        for module in dict.fromkeys(modules):
            for name in ("load", "sharded_load"):
                if hasattr(module, name):
                    stack.enter_context(_replaced(module, name, loading(getattr(module, name))))
            stack.enter_context(_replaced(module, "make_prompt_cache", make))
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    stock = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, stock)
