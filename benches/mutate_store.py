"""Spoils the store of a small job in a thousand ways, runs the job again each time, and counts what becomes of it.

    python -m benches.mutate_store [--mutations 1000] [--seed 0]

A mutation is of one segment: bits flipped, files cut off, lengthened, left out or swapped, another segment's files or
a stranger's in its place, its parent or another line of the manifest edited. Checksums are not put right again, which
benches/fuzz_files.py does. Each time the job is to give the same result, with that segment rebuilt and the reason
logged.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.tiny import Place, text_of, write_model
from pipeline.progress import RunObserver

MANIFEST, TENSORS = "segment.json", "segment.safetensors"
MODES: dict[str, dict[str, Any]] = {"exact": {}, "streaming": {"prefill": "streaming", "segment": 512}}
SENTENCES = {"exact": 12, "streaming": 55}


@dataclass(frozen=True)
class Damage:
    """A segment to be spoilt, another of the same job, and one of another job with the same texts and other bits."""

    segment: Path
    other: Path
    foreign: Path
    rng: random.Random

    def file(self) -> Path:
        """One of the segment's files."""
        return self.segment / self.rng.choice((MANIFEST, TENSORS))


def flip_a_bit(damage: Damage) -> None:
    """Anywhere in a file."""
    path = damage.file()
    content = bytearray(path.read_bytes())
    content[damage.rng.randrange(len(content))] ^= 1 << damage.rng.randrange(8)
    path.write_bytes(content)


def cut_off(damage: Damage) -> None:
    """A file ends early."""
    path = damage.file()
    os.truncate(path, damage.rng.randrange(path.stat().st_size))


def lengthen(damage: Damage) -> None:
    """Bytes behind a file's end."""
    path = damage.file()
    length = damage.rng.choice((1, 8, 4096))
    path.write_bytes(path.read_bytes() + damage.rng.choice((bytes(length), damage.rng.randbytes(length))))


def leave_out(damage: Damage) -> None:
    """The tensors are gone."""
    (damage.segment / TENSORS).unlink()


def swap_files(damage: Damage) -> None:
    """Manifest and tensors change places."""
    manifest, tensors = damage.segment / MANIFEST, damage.segment / TENSORS
    manifest.rename(damage.segment / "x")
    tensors.rename(manifest)
    (damage.segment / "x").rename(tensors)


def take_a_file(damage: Damage) -> None:
    """One of the files is another segment's."""
    name = damage.rng.choice((MANIFEST, TENSORS))
    shutil.copyfile(damage.other / name, damage.segment / name)


def take_a_segment(damage: Damage) -> None:
    """Both files are another segment's, or one's of another codec."""
    source = damage.rng.choice((damage.other, damage.foreign))
    for name in (MANIFEST, TENSORS):
        shutil.copyfile(source / name, damage.segment / name)


def take_foreign_tensors(damage: Damage) -> None:
    """The tensors are of another codec."""
    shutil.copyfile(damage.foreign / TENSORS, damage.segment / TENSORS)


def swap_parent(damage: Damage) -> None:
    """It is said to stand behind another segment."""
    manifest = json.loads((damage.segment / MANIFEST).read_text())
    parents = [None, damage.other.name, damage.foreign.name]
    manifest["parent"] = damage.rng.choice([key for key in parents if key != manifest["parent"]])
    (damage.segment / MANIFEST).write_text(json.dumps(manifest))


def edit(damage: Damage) -> None:
    """One value of the manifest is another."""
    manifest = json.loads((damage.segment / MANIFEST).read_text())
    parent: Any = manifest
    key: Any = damage.rng.choice(list(manifest))
    while isinstance(parent[key], dict | list) and parent[key] and damage.rng.random() < 0.7:
        parent = parent[key]
        key = damage.rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    values: tuple[Any, ...] = (None, 0, 7, -1, "x", [], {}, True, 1 << 70)
    parent[key] = damage.rng.choice([value for value in values if value != parent[key]])
    (damage.segment / MANIFEST).write_text(json.dumps(manifest))


WAYS: list[Callable[[Damage], None]] = [
    flip_a_bit,
    cut_off,
    lengthen,
    leave_out,
    swap_files,
    take_a_file,
    take_a_segment,
    take_foreign_tensors,
    swap_parent,
    edit,
]


class Target:
    """A small job whose store is spoilt, and what is told of the segments while it runs."""

    def __init__(self, folder: Path, model: Path, mode: str) -> None:
        self.folder = folder
        self.place = Place(folder / "job", model, MODES[mode])
        foreign = Place(folder / "foreign", model, {**MODES[mode], "value_bits": 3})
        texts = {name: text_of(number, SENTENCES[mode]) for number, name in enumerate(("a", "b"))}
        for place in (self.place, foreign):
            place.write(texts, max_tokens=2)
            run(place)
        self.expected = self.place.output.read_bytes()
        self.good = shutil.copytree(self.place.store, folder / "good")
        self.foreign = segments(foreign.store)

    def spoil_and_run(self, way: Callable[[Damage], None], rng: random.Random) -> str:
        """What becomes of a run on a spoilt store."""
        shutil.rmtree(self.place.store)
        shutil.copytree(self.good, self.place.store)
        segment, other = rng.sample(segments(self.place.store), 2)
        way(Damage(segment, other, rng.choice(self.foreign), rng))
        self.place.output.unlink()
        try:
            with Listening() as messages:
                report = run(self.place)
        except Exception:
            traceback.print_exc()
            return "crashed"
        told = [text for text in messages if text.startswith(f"prefix {segment.name[:12]} rejected and built again: ")]
        if self.place.output.read_bytes() != self.expected:
            return "other result"
        if report.rows_failed:
            return "rows failed"
        if not told:
            return "loaded, or no reason logged"
        if segments(self.place.store) != segments(self.good, self.place.store):
            return "not rebuilt"
        return "rebuilt, reason logged"


def segments(store: Path, instead: Path | None = None) -> list[Path]:
    """The folders of complete segments; as if they were in ``instead``."""
    found = [path.parent.relative_to(store) for path in sorted(store.glob(f"??/*/{MANIFEST}"))]
    return [(instead or store) / path for path in found]


class Listening(logging.Handler):
    """The messages that the pipeline logs while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("pipeline").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("pipeline").removeHandler(self)


def run(place: Place) -> Any:
    """Run a job in this process; returns its report."""
    from pipeline.execution.runner import Runner
    from pipeline.job.job_file import load_job

    return Runner(load_job(place.folder / "job.yaml"), RunObserver()).run()


def mutate(mutations: int, seed: int, folder: Path) -> Counter[tuple[str, str]]:
    """Spoil stores so many times; counts (way, what became of it)."""
    rng, counts = random.Random(seed), Counter[tuple[str, str]]()
    model = write_model(folder / "model")
    targets = [Target(folder / mode, model, mode) for mode in MODES]
    for number in range(mutations):
        way = WAYS[number // len(targets) % len(WAYS)]
        outcome = targets[number % len(targets)].spoil_and_run(way, rng)
        counts[way.__name__, outcome] += 1
        if outcome != "rebuilt, reason logged":
            print(f"mutation {number} of seed {seed}, {way.__name__}: {outcome}", flush=True)
    return counts


def main() -> None:
    """Print a line of JSON for each way and outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("pipeline").propagate = False
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    with tempfile.TemporaryDirectory() as folder:
        counts = mutate(arguments.mutations, arguments.seed, Path(folder))
    for (way, outcome), count in sorted(counts.items()):
        print(json.dumps({"damage": way, "outcome": outcome, "count": count}))


if __name__ == "__main__":
    main()
