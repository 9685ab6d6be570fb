"""Lines of cells as aligned text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Columns as wide as their widest cell; those numbered in ``left`` begin together, the others end together.

    >>> print(aligned([("a", "1"), ("bcd", "234")], left={0}))
    a      1
    bcd  234
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
