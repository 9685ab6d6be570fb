"""Pictures and tables show the figures that benches wrote, and pages show only pictures that exist."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
from PIL import Image

from benches import all as benches
from docs import pictures, recordings
from pipeline.commands.show import confidence
from pipeline.job.job_file import load_job
from pipeline.output.rows import Row
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.json"))


def cells_below(page: str, words: str) -> list[list[str]]:
    """Return the lines of the first table below some words, without its head."""
    lines = page[page.index(words) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| ---"))
    return [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in takewhile(lambda line: line.startswith("|"), lines[first + 1 :])
    ]


@pytest.mark.parametrize("name", pictures.DRAWN)
def test_a_picture_shows_the_figures(name: str) -> None:
    drawn = (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == pictures.DRAWN[name](), "run `python -m docs.pictures`"


@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_figures_say_what_they_are_of(file: Path) -> None:
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert file.stem in {known.name for known in benches.ALL}
    assert (ROOT / figures["page"]).is_file()
    assert figures["machine"]["device"]
    assert "taken_from" in figures or {"date", "commit", "versions"} <= set(figures)
    assert all(run["command"].startswith("python ") and run["rows"] for run in figures["runs"])


def test_the_table_of_readme_has_the_figures() -> None:
    expected = {
        pictures.WAYS[key]: [
            f"{row['answers_per_second']:.3g}",
            f"{row['extra_bytes'] / 1e6:,.0f} MB",
            f"{row['disk_bytes'] / 1e6:,.0f} MB" if row.get("disk_bytes") else "",
        ]
        for row in pictures.rows("against-mlx-lm")
        if (key := (row["contender"], row["resident"])) in pictures.WAYS
    }
    assert {name: cells for name, *cells in cells_below(README, "## How fast")} == expected


@pytest.mark.parametrize(
    ("page", "words", "name"),
    [
        ("performance.md", "## The demo job, stage by stage", "own-time"),
        ("performance.md", "## A decoding step on a CPU", "step-parts"),
        ("performance.md", "## Answers held to JSON schemas", "schemas"),
        ("performance.md", "## Against llama.cpp", "llama-cpp"),
        ("performance.md", "## Against transformers", "transformers"),
        ("performance.md", "## Against mlx-lm on a CPU", "against-mlx-lm"),
        ("performance.md", "Fewer questions, on two of the documents", "against-queries"),
        ("performance.md", "A real model on real text", "contracts-job"),
        ("performance.md", "For each length, the three columns", "gpu-16384 gpu-32768 gpu-65536"),
        ("performance.md", "Decoding steps of rows on one context of 32,768", "eight-billion"),
        ("kernels.md", "## Measured", "kernels"),
        ("kernels.md", "The next table has milliseconds for one decoding step", "steps"),
        ("kernels.md", "The next table has milliseconds to encode one layer", "kernels"),
        ("kernels.md", "The next table has what encoding adds", "steps"),
        ("fidelity.md", "## SmolLM2-135M on real contracts", "fidelity"),
        ("fidelity.md", "## Other packages", "peers"),
        ("fidelity.md", "## Trellis codes", "trellis"),
        ("fidelity.md", "### Other methods", "papers"),
        ("scaling.md", "Driver, Ray and workers shared it", "ray-overhead"),
        ("running.md", "A store of many segments", "many-segments"),
    ],
)
def test_a_table_has_the_figures(page: str, words: str, name: str) -> None:
    known = []
    for figures in map(pictures.rows, name.split()):
        known += [value for row in figures for value in row.values() if isinstance(value, int | float)]
        rates = [(row["contender"], row["answers_per_second"]) for row in figures if "answers_per_second" in row]
        known += [rate / dict(rates).get("naive", dict(rates)["copied"]) for _, rate in rates]
    for _, *cells in cells_below((ROOT / "docs" / page).read_text(encoding="utf-8"), words):
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?|\.\d+", " ".join(cells)):
            exact, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
            shown = {round(value * scale, decimals) for value in known for scale in (1, 100, 1e-6, 1e-9)}
            assert exact in shown, f"{page}: {number} in {cells}"


def test_pages_show_pictures_that_exist_and_say_what_is_on_them() -> None:
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = [(source, words) for words, source in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)]
        found += re.findall(r'<img src="([^"]+)" alt="([^"]*)"', text)
        assert text.count("<img ") + text.count("![") == len(found), page
        for source, words in [
            *found,
            *((source, "the same, dark") for source in re.findall(r'srcset="([^"]+)"', text)),
        ]:
            assert (page.parent / source).is_file(), f"{page.name}: {source}"
            assert len(words.split()) >= 3, f"{page.name}: {source} has no description"
            shown.add((page.parent / source).resolve())
    assert shown == set(pictures.PICTURES.iterdir())


def test_the_terminal_shows_the_commands_of_readme() -> None:
    drawn = (pictures.PICTURES / "terminal.svg").read_text(encoding="utf-8")
    assert recordings.terminal([("pipeline plan job.yaml", "2 rows")]).count("<text") == 2
    for command in ("init", "plan", "run"):
        assert f"$ pipeline {command} " in drawn
        assert f".venv/bin/pipeline {command} " in README[README.index("## Your data") :]


@pytest.mark.parametrize("name", ["answers", "answers-dark"])
def test_the_picture_of_answers_shows_those_that_were_measured(name: str) -> None:
    with Image.open(pictures.PICTURES / f"{name}.png") as picture:
        words = picture.info["Description"]
    for row in pictures.rows("leases"):
        shown = [row["answer"], confidence(Row(**row)), *(quotation["quote"] for quotation in row["evidence"])]
        places = [words.find(one) for one in shown]
        assert -1 not in places, f"run `python -m docs.screenshots SMOLLM2`: {shown}"
        words = words[places[0] :]


def test_what_is_said_of_the_picture_is_on_it() -> None:
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    said, found = text[: text.index("## Evidence")], pictures.rows("leases")
    job = load_job(ROOT / "jobs" / "leases.yaml", [f"model={ROOT / 'jobs' / 'demo' / 'model'}"])
    documents = sorted(file.name for file in Path(job.documents.path).iterdir())
    asked = [(document, query.id) for document in documents for query in job.queries]
    assert [(row["document_id"], row["query_id"]) for row in found] == asked
    shown = {f"{row['logprob_mean']:.2f}" for row in found}
    for row in found:
        for probability in (row["choice_probabilities"] or {}).values():
            shown |= {f"{probability:.2f}", f"{probability:.5f}"}
        if row["evidence"]:
            text = (ROOT / "jobs" / "leases" / row["document_id"]).read_text(encoding="utf-8")
            assert all(text[one["start"] : one["end"]] == one["quote"] for one in row["evidence"])
    assert set(re.findall(r"-?\d+\.\d+", said)) <= shown
    (deposit,) = (row for row in found if (row["document_id"], row["query_id"]) == ("house.txt", "deposit"))
    assert "The landlord asks for no deposit." in deposit["evidence"][0]["quote"]


def test_what_a_bench_prints_as_json_is_kept(tmp_path: Path) -> None:
    lines = ("begins", "[here]", json.dumps({"a": 1, "file": str(tmp_path)}), "[", '{"b": 0.5}]', "[x")
    (tmp_path / "bench.py").write_text(f"print(*{lines!r}, sep=chr(10))")
    one = benches.Figures("one", "measured.md", ("{out}/bench.py",))
    assert benches.run(one, tmp_path, {"out": str(tmp_path)}, "a machine", tmp_path / "figures")
    kept = json.loads((tmp_path / "figures" / "one.json").read_text())
    assert kept["runs"] == [{"command": "python OUT/bench.py", "rows": [{"a": 1, "file": "OUT"}, {"b": 0.5}]}]
    assert (tmp_path / "one.txt").read_text().startswith("a machine\n\n$ python ")
