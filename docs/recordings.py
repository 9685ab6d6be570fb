"""Draws a terminal in which the commands of README's "Your data" are typed, as an SVG file.

    python -m docs.recordings

The commands are really run, with the demo's model and three of its documents, in a temporary folder.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import pyarrow.parquet as pq

from docs.pictures import PICTURES

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "jobs" / "demo"
COMMANDS = (
    "pipeline init minutes/ --model model --query 'Who owns the pilot scheme?'",
    "pipeline plan job.yaml",
    "pipeline run job.yaml --limit 3",
    "pipeline show job.yaml",
)
COLUMNS, WIDTH, LINE = 76, 720, 20


def write_documents(folder: Path) -> None:
    """Write three of the demo's documents as texts, and a link to its model beside them."""
    (folder / "minutes").mkdir()
    for row in pq.read_table(DEMO / "minutes.parquet").slice(0, 3).to_pylist():
        (folder / "minutes" / f"{row['id']}.txt").write_text(row["text"], encoding="utf-8")
    (folder / "model").symlink_to(DEMO / "model")


def outputs(folder: Path, commands: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run commands one after the other, and yield each with what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command.replace("pipeline", "pipeline.cli", 1))]
        done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        printed = done.stdout.replace(f"{sys.executable} -m pipeline.cli", "pipeline")
        yield command, printed.replace(f"{folder}/", "").replace("\t", "  ")


def terminal(shown: Sequence[tuple[str, str]]) -> str:
    """Return an SVG of a terminal in which commands appear with their outputs, one after the other."""
    lines: list[tuple[str, str, float]] = []  # text, class, second at which it appears
    second = 0.5
    for command, output in shown:
        lines.append((f"$ {command}", "typed", second))
        second += 1
        lines += ((line[:COLUMNS], "", second) for line in output.rstrip().splitlines())
        lines.append(("", "", second))
        second += 1.5
    height = 46 + LINE * len(lines)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">',
            "<title>A terminal: commands and what they print</title>",
            "<style>text{font:14.5px ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#c9d1d9;"
            "white-space:pre;animation:show 1ms both}.typed{fill:#7ee787;font-weight:600}"
            "@keyframes show{from{opacity:0}}"
            "@media(prefers-reduced-motion:reduce){text{animation:none}}</style>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#0d1117" stroke="#30363d"/>',
            *(
                f'<circle cx="{20 + 18 * number}" cy="18" r="5.5" fill="{colour}"/>'
                for number, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
            ),
            *(
                f'<text x="18" y="{54 + LINE * number}" class="{kind}" style="animation-delay:{at:g}s" '
                f'xml:space="preserve">{escape(line)}</text>'
                for number, (line, kind, at) in enumerate(lines)
                if line
            ),
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_documents(folder)
        (PICTURES / "terminal.svg").write_text(terminal(list(outputs(folder, COMMANDS))), encoding="utf-8")


if __name__ == "__main__":
    main()
