"""``python -m turboquant.chat``: mlx_lm.chat with a compressed K/V cache.

python -m turboquant.chat --model MODEL --turbo-kv-bits 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from turboquant.runtime.blas import load_tuned_blas


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until the user leaves, and return its exit code: 2 for a model or flags that cannot be used."""
    load_tuned_blas()
    from turboquant import mlx_lm_commands as commands

    options, rest = commands.parse("chat", arguments)
    return commands.run("chat", rest, commands.make_codec(options))


if __name__ == "__main__":
    sys.exit(main())
