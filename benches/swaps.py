"""Replaces files of a model's folder at random moments of runs, and looks for results under a wrong fingerprint.

    python -m benches.swaps [--swaps 200] [--seed 0]

Each run has a fresh store and a fresh result. At a random moment a file of the model's folder is replaced, and mostly
put back a moment later. Then every row and every stored segment is compared with those of undisturbed runs: with the
model as it was, and with each of the files replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq

from benches.tiny import TEMPLATE, Place, text_of, write_model

REPLACEABLE = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
]
DOCUMENTS = {f"d{number}": text_of(number, 6) for number in range(2)}


@dataclass
class Known:
    """What undisturbed runs gave: the answer of each fingerprint, and the checksum of each segment."""

    answers: dict[str, Any] = field(default_factory=dict)
    segments: dict[str, str] = field(default_factory=dict)

    def read(self, place: Place) -> Known:
        """Add the rows and segments of a place."""
        for file in [*place.parts.glob("*/[!.]*.parquet"), *place.output.parent.glob(place.output.name)]:
            for row in pq.read_table(file).to_pylist():
                self.answers[row["fingerprint"]] = row["answer"], row["context_tokens"], row["finish_reason"]
        for file in place.store.glob("??/*/segment.json"):
            self.segments[file.parent.name] = json.loads(file.read_bytes())["checksum"]
        return self


def swap_at_random(folder: Path, swaps: int, seed: int) -> Counter[str]:
    """Disturb so many runs; how they ended, and how many rows and segments were `wrong`."""
    rng, counts = random.Random(seed), Counter[str]()
    original, model = write_model(folder / "original"), folder / "model"
    (original / "generation_config.json").write_text("{}")
    other = _write_others(folder / "other", original)
    shutil.copytree(original, model)
    run(Place(folder / "first", model))  # imports everything
    started = time.monotonic()
    known = run(Place(folder / "undisturbed", model))[1]
    seconds = time.monotonic() - started
    for name in REPLACEABLE:
        shutil.copy(other / name, model / name)
        known.read(run(Place(folder / f"with-{name}", model))[0])
        shutil.copy(original / name, model / name)
    for _ in range(swaps):
        place, name = Place(folder / "run", model), rng.choice(REPLACEABLE)
        waits = rng.uniform(0, seconds), rng.choice([0.0, rng.uniform(0, seconds / 4), seconds])
        held = folder / "held"
        shutil.copy(other / name, held)

        def swap(name: str = name, waits: tuple[float, float] = waits, held: Path = held) -> None:
            time.sleep(waits[0])
            (model / name).rename(folder / "kept")
            held.rename(model / name)
            time.sleep(waits[1])
            (folder / "kept").rename(model / name)

        swapping = Thread(target=swap)
        swapping.start()
        found, outcome = run(place, swapping.join)[1], "finished"
        if isinstance(found, Exception):
            outcome, found = type(found).__name__, Known().read(place)
        counts[outcome] += 1
        counts["rows"] += len(found.answers)
        counts["segments"] += len(found.segments)
        counts["wrong"] += sum(known.answers.get(key) != value for key, value in found.answers.items())
        counts["wrong"] += sum(known.segments.get(key) != value for key, value in found.segments.items())
        shutil.rmtree(place.folder)
    return counts


def run(place: Place, then: Callable[[], None] = lambda: None) -> tuple[Place, Any]:
    """Run a place's job in this process; returns the place with what it holds, or with the error."""
    from pipeline.errors import PipelineError
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job
    from pipeline.progress import RunObserver

    job = load_job(place.write(DOCUMENTS, max_tokens=4))
    try:
        Runner(job, RunObserver()).run()
    except (PipelineError, FileNotFoundError) as error:
        return place, error
    finally:
        then()
    return place, Known().read(place)


def _write_others(folder: Path, original: Path) -> Path:
    """Write another version of each file, with which the model gives other answers."""
    write_model(folder, seed=1)
    config = json.loads((original / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0}))
    tokenizer = (original / "tokenizer.json").read_text()
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    first, second = vocabulary["e"], vocabulary["t"]
    changed = tokenizer.replace(f'"e": {first},', f'"e": {second},').replace(f'"t": {second},', f'"t": {first},')
    (folder / "tokenizer.json").write_text(changed)
    settings = json.loads((original / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("}}<|end|>", "}} again<|end|>"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(5, 600, 2))}))
    assert all((folder / name).read_bytes() != (original / name).read_bytes() for name in REPLACEABLE)
    return folder


def main() -> None:
    """Swap and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    with tempfile.TemporaryDirectory() as folder:
        counts = swap_at_random(Path(folder), arguments.swaps, arguments.seed)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
