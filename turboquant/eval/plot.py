"""Draw figures with matplotlib (the extra ``plot``): divergence against bits, and time against length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant.eval.results import Fidelity
    from turboquant.eval.speed import Speed


def why_not(path: Path) -> str | None:
    """Return why no picture can be written to ``path``, or None if it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'turboquant-pipeline[plot]'"
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        return f"--plot {path}: the name must end in one of .{', .'.join(known)}"
    return None if path.absolute().parent.is_dir() else f"--plot {path}: there is no such folder"


def write_picture(path: Path, rows: Sequence[Fidelity]) -> None:
    """Draw one series for each cache and prefill: a line through pairs of equal bits, and dots for other pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys((row.cache, row.prefill) for row in rows)):
        points = sorted((r for r in rows if (r.cache, r.prefill) == series), key=lambda r: r.effective_bits)
        color = f"C{number}"
        equal = [row for row in points if row.key_bits == row.value_bits]
        axes.plot([r.effective_bits for r in equal], [r.kl for r in equal], "-", color=color)
        axes.errorbar(
            [r.effective_bits for r in points],
            [r.kl for r in points],
            yerr=[r.kl_stderr or 0 for r in points],
            fmt="o",
            color=color,
            label=" ".join(series),
        )
        for row in points:
            axes.annotate(
                f"{row.key_bits:g}/{row.value_bits:g}",
                (row.effective_bits, row.kl),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_yscale("log")
    axes.set_xlabel("effective bits a coordinate (keys/values beside each point)")
    axes.set_ylabel("KL divergence from full precision, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def draw_speeds(path: Path, speeds: Sequence[Speed]) -> None:
    """Draw the time of each way against the length of the context, with a panel for each number of rows."""
    from matplotlib.figure import Figure

    rows = sorted({speed.rows for speed in speeds})
    figure = Figure(figsize=(5 * len(rows), 4.5), layout="constrained")
    for axes, number in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        here = [speed for speed in speeds if speed.rows == number]
        for way in dict.fromkeys(speed.way for speed in here):
            points = [speed for speed in here if speed.way == way]
            axes.plot([p.tokens for p in points], [p.microseconds for p in points], "o-", label=way)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds a step")
        axes.set_title(f"{number} row" + "s" * (number > 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
