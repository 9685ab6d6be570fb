"""``python -m turboquant.server``: mlx_lm.server with a compressed K/V cache.

python -m turboquant.server --model MODEL --turbo-kv-bits 4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from turboquant.runtime.blas import load_tuned_blas


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until it is interrupted, and return its exit code."""
    load_tuned_blas()
    from turboquant import mlx_lm_commands as commands

    options, rest = commands.parse("server", arguments)
    return commands.run("server", rest, commands.make_codec(options))


if __name__ == "__main__":
    sys.exit(main())
