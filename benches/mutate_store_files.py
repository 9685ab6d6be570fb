"""Spoils each kind of file of a store thousands of times, and does to the store what each command does to it.

    python -m benches.mutate_store_files [--mutations 10000] [--seed 0] [--kinds manifest index …]

benches/mutate_store.py runs a whole job on each spoilt store; here no model runs, so that many more mutations fit into
an hour. A mutation flips, cuts, lengthens or replaces bytes, edits values of JSON (with the checksum put right again
or not), makes a file of many gigabytes without content, or puts a link, a pipe or a folder in the file's place. Then
segments are loaded, saved, evicted and removed, pins and the memo are read, and the store is listed, shrunk and
verified. Nothing of that may raise an exception, no segment may be loaded that is not the one that was stored, and no
file outside the store may change.
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
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import ArraysCache, KVCache

from pipeline.cache.maintenance import clean_store, list_store, verify_store
from pipeline.cache.pins import Pins, output_digest
from pipeline.cache.store import Store
from pipeline.models.fingerprints import weights_fingerprint
from turboquant import CacheCodec, Prefix
from turboquant.caches.prefix import Segment
from turboquant.io.identity import Identity

CODEC = CacheCodec()
IDENTITY = Identity("w", "t", CODEC.identity, "exact")
KEYS = [IDENTITY.key([number]) for number in range(3)]
OUTPUT, OTHER = Path("/results/a.parquet"), Path("/results/b.parquet")
KINDS = {
    "manifest": f"{KEYS[0][:2]}/{KEYS[0]}/segment.json",
    "tensors": f"{KEYS[0][:2]}/{KEYS[0]}/segment.safetensors",
    "pins": f"jobs/{output_digest(OTHER)}.json",
    "memo": "fingerprints.json",
    "name": "locks/name",
    "lock": "locks/write.lock",
    "index": "index.sqlite",
    "journal": "index.sqlite-journal",
}
VALUES: list[Any] = [None, 0, -1, 7, 1.5, 1 << 40, 1 << 70, 1e999, float("nan"), "", "x", "\ud800", [], {}, True, [[]]]
FORGED = "forged"  # mutations after which the checksums are right, so that a segment may be another one


def make_segment(seed: int) -> Segment:
    """A compressed layer and a stock one."""
    mx.random.seed(seed)
    cache, arrays = KVCache(), ArraysCache(2)
    cache.update_and_fetch(mx.random.normal((1, 1, 300, 64)), mx.random.normal((1, 1, 300, 64)))
    arrays[0] = mx.ones((2, 3))
    return Segment((*Prefix.encode([cache], 300, CODEC).layers, arrays), 0, 300)


def content_of(segment: Segment) -> dict[str, bytes]:
    """The bytes of its compressed layer."""
    return {name: bytes(memoryview(x)) for name, x in segment.layers[0].tensors().items()}


class Target:
    """A small store with all kinds of files, and what it must give."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.good, self.store = folder, folder / "good", folder / "store"
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "letter.txt").write_text("mine")
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_bytes(bytes(1000))
        self.segments = [make_segment(seed) for seed in range(3)]
        self.contents = [content_of(segment) for segment in self.segments]
        store = Store(self.good, 1 << 40)
        for number, segment in enumerate(self.segments[:2]):
            self._save(store, number, segment)
        store.folder_id()
        store.make_room(1)
        Pins(self.good, OTHER).pin(["label 1"])
        self.print = weights_fingerprint(self.model, self.good / "fingerprints.json")
        (self.good / KINDS["journal"]).write_bytes((self.good / KINDS["index"]).read_bytes()[:512])

    def spoil_and_use(self, kind: str, rng: random.Random) -> str:
        """Spoil one file of the kind and use the store; what became of it."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.good, self.store)
        if kind != "journal":
            (self.store / KINDS["journal"]).unlink()
        way = spoil(self.store / KINDS[kind], self.outside, rng)
        try:
            problem = self._use()
        except Exception:
            traceback.print_exc()
            return f"{way}: ended"
        if [path.name for path in self.outside.iterdir()] != ["letter.txt"]:
            problem = "a file was made outside"
        elif (self.outside / "letter.txt").read_text() != "mine":
            problem = "a file outside was changed"
        return f"{way}: {problem}" if problem and way != FORGED else "used"

    def _use(self) -> str:
        problem = ""
        pins = Pins(self.store, OUTPUT)
        pins.pin(["label 0"])
        store = Store(self.store, 1 << 40, pins.is_pinned)
        if weights_fingerprint(self.model, self.store / "fingerprints.json") != self.print:
            problem = "another fingerprint"
        list(list_store(self.store))
        clean_store(self.store, None, None, dry_run=True)
        store.folder_id()
        for number in range(2):
            loaded = store.load(KEYS[number], 0, CODEC, IDENTITY, f"label {number}", most_bytes=1 << 30)
            if loaded is None:
                self._save(store, number, self.segments[number])
                loaded = store.load(KEYS[number], 0, CODEC, IDENTITY, f"label {number}", most_bytes=1 << 30)
            if loaded is None:
                problem = "not rebuilt"
            elif content_of(loaded) != self.contents[number]:
                problem = "another segment"
        self._save(store, 2, self.segments[2])
        store.remove_built(output_digest(OUTPUT), [KEYS[2]])
        verify_store(self.store)
        clean_store(self.store, 1, None, dry_run=False)
        pins.close()
        return problem

    def _save(self, store: Store, number: int, segment: Segment) -> None:
        about = {"label": f"label {number}", "whole": True, "output": output_digest(OUTPUT), "document": "d"}
        store.make_room(segment.nbytes)
        store.save(KEYS[number], segment, IDENTITY, None, about)


def spoil(file: Path, outside: Path, rng: random.Random) -> str:
    """Spoil a file in one way, and return its name."""
    ways: list[Callable[[Path, Path, random.Random], str]] = [flip, cut, lengthen, replace, edit, edit, edit, enlarge]
    if rng.random() < 0.05:
        ways = [replace_by_link, replace_by_pipe, replace_by_folder]
    return rng.choice(ways)(file, outside, rng)


def flip(file: Path, _: Path, rng: random.Random) -> str:
    """Some bits are others."""
    content = bytearray(file.read_bytes() or b"x")
    for _number in range(rng.choice((1, 1, 3, 50))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return "flip"


def cut(file: Path, _: Path, rng: random.Random) -> str:
    """The file ends early."""
    os.truncate(file, rng.randrange(file.stat().st_size + 1))
    return "cut"


def lengthen(file: Path, _: Path, rng: random.Random) -> str:
    """Bytes behind the end."""
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice((1, 8, 4096))))
    return "lengthen"


def replace(file: Path, _: Path, rng: random.Random) -> str:
    """Something else altogether."""
    contents = (
        b"",
        b"[" * 100_000,
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        rng.randbytes(5000),
        b'{"a":' * 5000,
        bytes(9000),
    )
    file.write_bytes(rng.choice(contents))
    return "replace"


def enlarge(file: Path, _: Path, rng: random.Random) -> str:
    """Gigabytes without content."""
    os.truncate(file, rng.choice((8, 60)) << 30 if rng.random() < 0.02 else 100 << 20)
    return "enlarge"


def edit(file: Path, outside: Path, rng: random.Random) -> str:
    """One value of JSON is another, in a manifest, a header or a small file; some checksums are put right again."""
    content = file.read_bytes()
    start, end = 0, len(content)
    if file.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[start:end])
        parent: Any = tree
        key: Any = rng.choice(list(tree))
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key] = rng.choice(VALUES)
        name = next((name for name in ("manifest_checksum", "checksum") if name in tree and start == 0), None)
        forged = name is not None and key != name and rng.random() < 0.5
        if forged:
            rest = {other: value for other, value in tree.items() if other != name}
            tree[name] = xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())
        text = json.dumps(tree).encode()
    except (ValueError, TypeError, IndexError, KeyError):
        return flip(file, outside, rng)
    if start:
        forged = rng.random() < 0.5
        if forged:
            content = len(text).to_bytes(8, "little") + text + content[end:]
            manifest = json.loads((other := file.with_name("segment.json")).read_text())
            manifest |= {"bytes": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}
            del manifest["manifest_checksum"]
            seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
            other.write_text(json.dumps(manifest | {"manifest_checksum": seal}))
            file.write_bytes(content)
            return FORGED
        text = len(text).to_bytes(8, "little") + text + content[end:]
    file.write_bytes(text)
    return FORGED if forged else "edit"


def replace_by_link(file: Path, outside: Path, _: random.Random) -> str:
    """A link to a file outside of the store."""
    file.unlink()
    file.symlink_to(outside / "letter.txt")
    return "link"


def replace_by_pipe(file: Path, _: Path, __: random.Random) -> str:
    """A pipe, from which no reader ever gets anything."""
    file.unlink()
    os.mkfifo(file)
    return "pipe"


def replace_by_folder(file: Path, _: Path, __: random.Random) -> str:
    """A folder."""
    file.unlink()
    file.mkdir()
    (file / "inner").write_text("x")
    return "folder"


def mutate(mutations: int, seed: int, folder: Path, kinds: list[str]) -> Counter[tuple[str, str]]:
    """Spoil files of each kind so many times; counts (kind, what became of it)."""
    target, counts = Target(folder), Counter[tuple[str, str]]()
    for kind in kinds:
        rng = random.Random(f"{seed} {kind}")
        for _ in range(mutations):
            counts[kind, target.spoil_and_use(kind, rng)] += 1
    return counts


def main() -> None:
    """Print a line of JSON for each kind and outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    logging.getLogger("pipeline").propagate = False
    logging.getLogger("pipeline").addHandler(logging.NullHandler())
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            counts = mutate(arguments.mutations, arguments.seed, Path(folder), [kind])
        for (_, outcome), count in sorted(counts.items()):
            print(json.dumps({"file": kind, "outcome": outcome, "count": count}), flush=True)


if __name__ == "__main__":
    main()
