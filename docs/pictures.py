"""Draws the charts of README and docs from the figures in docs/figures/, as SVG files with light and dark colours.

python -m docs.pictures
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
WIDTH, MARGIN, NAMES = 640, 20, 208
LETTERS = 68  # of small print on a line
# Colours that colour-blind people can tell apart (Okabe and Ito), for a light and for a dark page.
COLOURS = {
    "ours": ("#0072b2", "#56b4e9"),
    "ours-2": ("#009e73", "#2fc79d"),
    "theirs": ("#c04f00", "#f08a4b"),
    "theirs-2": ("#a3488f", "#d990c4"),
    "theirs-3": ("#946f00", "#e0b63c"),
    "plain": ("#6e7781", "#8d96a0"),
}
# Contenders of `pipeline bench`, with how they held prefixes: their names in README.
WAYS = {
    ("naive", None): "mlx-lm, the whole prompt for each question",
    ("reloaded", None): "mlx-lm, a saved prompt cache for each question",
    ("copied", None): "mlx-lm, batches with a copy of the cache for each row",
    ("quantized", None): "mlx-lm, a saved cache in 4 bits",
    ("pipeline-cold", "dense"): "this, first run",
    ("pipeline-warm", "dense"): "this, new questions on the same documents",
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Line:
    """A line of a chart with its name at the end. points: pairs of x and y. colour: a name of `COLOURS`."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis from its first to its last tick. format: how a tick is written. log: logarithmic."""

    name: str
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float, begin: float, end: float) -> float:
        """Return the coordinate of a value on an axis that is drawn from ``begin`` to ``end``."""
        low, high, at = (math.log(one) if self.log else one for one in (self.ticks[0], self.ticks[-1], value))
        return begin + (end - begin) * (at - low) / (high - low)


def rows(name: str, command: str = "") -> list[dict[str, Any]]:
    """Return the rows of docs/figures/NAME.json, or of those of its runs whose command ends with some words."""
    runs = json.loads((DOCS / "figures" / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    return [row for run in runs if run["command"].endswith(command) for row in run["rows"]]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return words at a place; kind: classes of the style."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def picture(title: str, note: str, height: float, content: Iterable[str]) -> str:
    """Return an SVG file: a title, small print below it, and the content, which begins below `top`."""
    style = [
        f"text{{font:17px {FONT};fill:#1f2328}}.title{{font-size:21px;font-weight:600}}.small{{font-size:15px}}",
        ".small{fill:#59636e}.back{fill:#fff}.grid{stroke:#d8dee4}.strong{font-weight:600}",
        *(f".{name}{{fill:{light}}}.{name}-line{{stroke:{light}}}" for name, (light, _) in COLOURS.items()),
        "polyline{fill:none;stroke-width:3;stroke-linejoin:round}.lead{stroke-dasharray:2 4;stroke-width:1.5}",
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b1}.back{fill:#0d1117}",
        ".grid{stroke:#30363d}",
        *(f".{name}{{fill:{dark}}}.{name}-line{{stroke:{dark}}}" for name, (_, dark) in COLOURS.items()),
        "}",
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img">',
            f"<title>{escape(title)}</title>",
            "<style>",
            *style,
            "</style>",
            f'<rect class="back" width="{WIDTH}" height="{height:.0f}" rx="8"/>',
            text(MARGIN, 36, title, "title"),
            *(text(MARGIN, 62 + 20 * number, line, "small") for number, line in enumerate(wrap(note, LETTERS))),
            *content,
            "</svg>",
            "",
        ]
    )


def top(note: str) -> int:
    """Return how high the small print reaches down."""
    return 52 + 20 * len(wrap(note, LETTERS))


def bars(
    title: str, note: str, columns: Mapping[str, str], lines: Sequence[tuple[str, str, Sequence[float | None]]]
) -> str:
    """Draw a bar for each line and column.

    columns: their names, and formats such as ``{:.1f} GB``. lines: name, colour, and a value for each column.
    """
    begin, step, gap = top(note) + 42, 56, 86
    width = (WIDTH - 2 * MARGIN) / len(columns) - gap
    places = [MARGIN + number * (width + gap) for number in range(len(columns))]
    content = [text(x, begin - 16, name, "small") for x, name in zip(places, columns, strict=True)]
    largest = dict.fromkeys(columns.values(), 0.0)  # columns of one unit have one scale
    for _, _, values in lines:
        for form, value in zip(columns.values(), values, strict=True):
            largest[form] = max(largest[form], value or 0)
    for number, (name, colour, values) in enumerate(lines):
        y = begin + step * number
        content.append(text(MARGIN, y + 12, name, "strong" if colour.startswith("ours") else ""))
        for x, form, value in zip(places, columns.values(), values, strict=True):
            if value is None:
                continue
            length = max(2.0, width * value / largest[form])
            content.append(f'<rect class="{colour}" x="{x:.1f}" y="{y + 19}" width="{length:.1f}" height="20" rx="2"/>')
            content.append(text(x + length + 7, y + 35, form.format(value)))
    return picture(title, note, begin + step * len(lines) + 4, content)


def curves(title: str, note: str, x_axis: Axis, y_axis: Axis, lines: Sequence[Line]) -> str:
    """Draw lines with their names beside them, to the right of the chart."""
    begin, left, height = top(note) + 42, 74, 330
    end, bottom = WIDTH - NAMES, begin + height
    content = [text(MARGIN, begin - 16, y_axis.name, "small")]
    for tick in y_axis.ticks:
        y = y_axis.place(tick, bottom, begin)
        content.append(f'<path class="grid" d="M{left} {y:.1f}H{end}"/>')
        content.append(text(left - 8, y + 5, f"{tick:,g}".replace("0.", "."), "small", "end"))
    for tick in x_axis.ticks:
        content.append(text(x_axis.place(tick, left, end), bottom + 22, f"{tick:,g}", "small", "middle"))
    content.append(text((left + end) / 2, bottom + 46, x_axis.name, "small", "middle"))
    drawn = [
        (line, [(x_axis.place(x, left, end), y_axis.place(y, bottom, begin)) for x, y in line.points]) for line in lines
    ]
    lowest = -math.inf
    for line, points in sorted(drawn, key=lambda one: one[1][-1][1]):
        x, y = points[-1]
        lowest = max(y, lowest + 23)
        if x < end:
            content.append(f'<path class="{line.colour}-line lead" d="M{x:.1f} {y:.1f}L{end + 8} {lowest:.1f}"/>')
        content.append(text(end + 12, lowest + 6, line.name, f"strong {line.colour}"))
    for line, points in drawn:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        content.append(f'<polyline class="{line.colour}-line" points="{path}"/>')
        content += (f'<circle class="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in points)
    return picture(title, note, bottom + 62, content)


def speed() -> str:
    """Draw ours beside mlx-lm's ways: answers per second, and memory."""
    found = {(row["contender"], row["resident"]): row for row in rows("against-mlx-lm")}
    lines = [
        (name, "plain" if resident is None else "ours", (row["answers_per_second"], row["extra_bytes"] / 1e6))
        for (contender, resident), name in WAYS.items()
        if (row := found[contender, resident])
    ]
    note = "32 questions on each of 8 documents of 5,600 tokens, a small model, two CPU cores."
    columns = {"answers per second": "{:.3g}", "memory beyond the model": "{:,.0f} MB"}
    best, first, again = (
        max(values[0] for name, _, values in lines if name.startswith(begin))
        for begin in ("mlx-lm", "this, first", "this, new")
    )
    title = f"{first / best:.0f} to {again / best:.0f} times the answers of mlx-lm's fastest way"
    return bars(title, note, columns, lines)


def steps() -> str:
    """Draw memory against the rows that are answered at once."""
    ways = {
        "copied": ("mlx-lm, copies", "theirs"),
        "dense": ("dense prefix", "ours-2"),
        "packed": ("packed prefix", "ours"),
        "no context": ("no document", "plain"),
    }
    lines = [
        Line(name, colour, [(row["rows"], row["memory_GB"]) for row in found if "memory_GB" in row])
        for way, (name, colour) in ways.items()
        if (found := [row for row in rows("eight-billion") if row.get("way") == way])
    ]
    note = (
        "Memory of the model, a document of 32,768 tokens and all rows. A model of 8B shape in 4 bits, one NVIDIA "
        "H200. With 32 copies, mlx-lm is out of memory."
    )
    x_axis, y_axis = Axis("questions answered at once", (1, 8, 16, 24, 32)), Axis("GB", (0, 20, 40, 60, 80, 100))
    return curves("One copy of the document for all questions", note, x_axis, y_axis, lines)


def fidelity() -> str:
    """Draw the loss of the codec, and of the codec without its parts, against bits."""
    found = [row | {"way": (row["cache"], row["prefill"])} for row in rows("fidelity") if row["tokens"] == 4000]
    codings = [row for row in rows("trellis", "CUAD --codings --json FILE") if row["tokens"] == 4000]
    found += [row | {"way": re.sub(r"[\d.]+ bits ", "", row["cache"])} for row in codings]
    ways = {
        ("turboquant", "streaming"): ("streaming cache", "theirs-3"),
        ("neither, 4 sinks", "exact"): ("neither, 4 sinks", "theirs-2"),
        ("no finer tokens", "exact"): ("no finer tokens", "theirs"),
        ("nearest levels", "exact"): ("nearest levels", "plain"),
        ("turboquant", "exact"): ("in a job", "ours"),
        "scalar, by layer": ("bits by layer", "theirs-3"),
        "turboquant, trellis": ("trellis codes", "ours-2"),
        "trellis, by layer": ("trellis, by layer", "plain"),
    }
    x_axis = Axis("bits per number, with everything counted", (2, 2.5, 3, 3.5, 4, 4.5, 5))
    y_axis = Axis("KL divergence, nats (lower is better)", (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), log=True)
    note = "How far compression moves the predictions of SmolLM2-135M on ten contracts of 4,000 tokens."
    return curves("What each part of the codec saves", note, x_axis, y_axis, _losses(found, ways))


def peers() -> str:
    """Draw the loss of other packages' caches against bits."""
    found = [row | {"way": (row["cache"].split(" ")[0], row["prefill"])} for row in rows("peers")]
    ways = {
        ("mlx-lm", "exact"): ("mlx-lm", "theirs-3"),
        ("turboquant-mlx-full", "streaming"): ("turboquant-mlx-full", "theirs-2"),
        ("mlx-turboquant", "streaming"): ("mlx-turboquant", "theirs"),
        ("turboquant", "streaming"): ("ours, streaming", "ours-2"),
        ("turboquant", "exact"): ("ours, in a job", "ours"),
    }
    x_axis = Axis("bits per number, with everything counted", (2, 3, 4, 5, 6, 7, 8, 9))
    y_axis = Axis("KL divergence, nats (lower is better)", (0.0001, 0.001, 0.01, 0.1, 1, 10), log=True)
    note = (
        "SmolLM2-135M on two contracts cut to 600 tokens, on a CPU. The two packages compress while they read, as the "
        "streaming cache does, half of which is not compressed at this length."
    )
    return curves("Caches of other packages", note, x_axis, y_axis, _losses(found, ways))


def _losses(found: Sequence[Mapping[str, Any]], ways: Mapping[Any, tuple[str, str]]) -> list[Line]:
    return [
        Line(name, colour, sorted((row["effective_bits"], row["kl"]) for row in found if row["way"] == way))
        for way, (name, colour) in ways.items()
    ]


def stages() -> str:
    """Draw the share of a job's time that each stage takes."""
    shares = [
        {row["stage"]: row["percent"] for row in rows("own-time", command)}
        for command in ("own_time", "own_time --warm")
    ]
    names = {
        "prefill: the model": ("reading documents: the model", "plain"),
        "prefill: encoding": ("reading documents: compression", "ours"),
        "answers: the model, in BatchGenerator": ("answering: the model", "plain"),
        "decoding prefixes once": ("answering: decompression", "ours"),
        "the pipeline itself": ("everything else", "ours"),
    }
    lines = [(name, colour, [share.get(stage) for share in shares]) for stage, (name, colour) in names.items()]
    note = "The demo on two CPU cores: share of the time of the thread that drives the model."
    columns = {"first run": "{:.3g} %", "prefixes restored": "{:.3g} %"}
    return bars("Where a job's time goes", note, columns, lines)


def growth() -> str:
    """Draw what a document costs the driver of a cluster, for few and many documents."""
    lines = [
        (f"{row['documents']:,} documents", "ours", (row["ms_per_document"], row["peak_MB"]))
        for row in rows("ray-overhead", "driver")
        if "memory" not in row.get("note", "")
    ]
    note = (
        "The driver of a Ray cluster, whose workers answer at once. Each document has 8,000 characters, two CPU cores."
    )
    columns = {"time for each document": "{:.3g} ms", "peak memory": "{:,.0f} MB"}
    return bars("The cost of a document does not grow", note, columns, lines)


def store() -> str:
    """Draw what the store costs a document, for few and many segments in it."""
    found = rows("many-segments")
    ways = {
        "keep_job_ms": ("save and remove", "ours"),
        "evicting_ms": ("save and evict", "ours-2"),
        "saving_ms": ("save, empty store", "plain"),
    }
    lines = [
        Line(name, colour, [(row["segments"], row[column]) for row in found]) for column, (name, colour) in ways.items()
    ]
    more = found[-1]["segments"] / found[0]["segments"]
    factor = max(found[-1][column] / found[0][column] for column in ("keep_job_ms", "evicting_ms"))
    title = f"{more:.0f} times the segments, {factor:.1f} times the work"
    note = (
        "What the store does for each document besides the model: it makes room, saves a small segment, and removes it "
        "again or evicts another one. Two CPU cores."
    )
    x_axis = Axis("segments in the store", [row["segments"] for row in found], log=True)
    return curves(title, note, x_axis, Axis("milliseconds for each document", (0, 2, 4, 6, 8)), lines)


DRAWN = {
    "speed": speed,
    "steps": steps,
    "fidelity": fidelity,
    "peers": peers,
    "stages": stages,
    "growth": growth,
    "store": store,
}


def main() -> None:
    """Write all pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (PICTURES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
