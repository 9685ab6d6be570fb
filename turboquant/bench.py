"""``python -m turboquant.bench`` measures attention over compressed K/V on this machine, beside full precision.

    python -m turboquant.bench
    python -m turboquant.bench --tokens 4096 32768 131072 --rows 1 16 --bits 4 3 4/3 --json --plot speed.png

The measurements are in eval/speed.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from turboquant.eval import plot
from turboquant.eval.arguments import bits, count
from turboquant.eval.columns import aligned
from turboquant.runtime.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.eval.speed import Speed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a wrong command line, or 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} is not a multiple of --kv-heads {options.kv_heads}")
    if options.plot is not None and (reason := plot.why_not(options.plot)):
        parser.error(reason)
    load_tuned_blas()
    from turboquant.eval.speed import Sizes, group_size_for, machine, measure  # MLX, and so after the BLAS

    sizes = Sizes(options.heads, options.kv_heads, options.head_dim)
    if group_size_for([sizes.head_dim]) is None:
        print(f"mlx-lm's quantised cache is left out: it cannot hold heads of {sizes.head_dim}", file=sys.stderr)
    try:
        speeds = []
        for speed in measure(options.tokens, options.rows, options.bits, sizes):
            speeds.append(speed)
            print(f"{speed.way}: {speed.tokens:,} tokens, {speed.rows} rows", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps([{**asdict(s), "gigabytes_per_second": s.gigabytes_per_second} for s in speeds], indent=1))
    else:
        device, heads = machine(options.bits, sizes.head_dim), f"{sizes.heads} query and {sizes.kv_heads} K/V heads"
        print(f"{device}, {heads} of {sizes.head_dim}\n\n{table(speeds)}")
    if options.plot is not None:
        plot.draw_speeds(options.plot, speeds)
    return 0


def table(speeds: Sequence[Speed]) -> str:
    """Return the figures as a table of text."""
    lines = [("tokens", "rows", "", "us a step", "of full precision", "MB", "GB/s", "ms to encode")]
    for s in speeds:
        encode = "" if s.milliseconds_to_encode is None else f"{s.milliseconds_to_encode:.1f}"
        relative = f"{s.relative:.2f}x"
        figures = f"{s.microseconds:,.1f}", relative, f"{s.nbytes / 1e6:,.1f}", f"{s.gigabytes_per_second:,.1f}"
        lines.append((f"{s.tokens:,}", str(s.rows), s.way, *figures, encode))
    return aligned(lines, left={2})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m turboquant.bench",
        description="Measure attention over compressed K/V on this machine, beside full precision.",
    )
    parser.add_argument(
        "--tokens", type=count, nargs="+", help="lengths of the context in tokens (default: depends on the device)"
    )
    parser.add_argument(
        "--rows",
        type=count,
        nargs="+",
        default=[1, 16],
        help="numbers of rows that share the context (default: 1 16)",
    )
    parser.add_argument(
        "--bits",
        type=bits,
        nargs="+",
        default=[(4, 4), (3, 3)],
        help="bits of keys and values: 4, or 4/3 (default: 4 3)",
    )
    parser.add_argument("--heads", type=count, default=32, help="number of query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=count, default=8, help="number of K/V heads (default: %(default)s)")
    parser.add_argument(
        "--head-dim", type=partial(count, least=2), default=128, help="coordinates of a head (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (needs the extra `plot`)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
