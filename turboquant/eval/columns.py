"""Print rows of cells as aligned text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Return lines whose columns are as wide as their widest cell.

    left: the numbers of the columns that are aligned at the left; the others are aligned at the right.

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
