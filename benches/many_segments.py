"""Measures what a document costs a run besides the model, in stores of many segments.

    python -m benches.many_segments [--segments 1000 10000 100000] [--documents 50]

The segments are small manifests and sparse files. For each document the store does what a run with ``cache.budget`` and
``keep: job`` asks of it: make room, save a segment (with and without one to be evicted), and remove it again. The time
of saving alone, in an empty store, is shown too. The first use makes the index, which is measured by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import KVCache

from pipeline.cache.pins import output_digest
from pipeline.cache.store import Store
from pipeline.execution.executor import drop_segments
from turboquant import CacheCodec, Prefix
from turboquant.caches.prefix import Segment
from turboquant.io.identity import FORMAT_VERSION, Identity

CODEC = CacheCodec()
IDENTITY = Identity("w", "t", CODEC.identity, "exact")
TENSOR_BYTES = 1 << 20
JOB: Any = SimpleNamespace(result_file=Path("/results/answers.parquet"))


def fill(store: Path, segments: int) -> None:
    """Write sparse segments of another job."""
    for number in range(segments):
        key = sha256(str(number).encode()).hexdigest()
        folder = store / key[:2] / key
        folder.mkdir(parents=True)
        with (folder / "segment.safetensors").open("wb") as file:
            file.truncate(TENSOR_BYTES)
        about = {"model": "m", "output": "0" * 16, "label": key, "document": f"d{number}", "whole": True}
        manifest = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "parent": None,
            "start": 0,
            "tokens": 1000,
            "identity": vars(IDENTITY),
            "about": about,
            "layers": [{"kind": "encoded"}] * 30,
            "bytes": TENSOR_BYTES,
            "checksum": "0" * 32,
            "versions": {},
            "created": "2026-01-01T00:00:00+00:00",
        }
        seal = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
        (folder / "segment.json").write_text(json.dumps({**manifest, "manifest_checksum": seal}, indent=1))
        os.utime(folder / "segment.json", (1e9 + number, 1e9 + number))


def make_segment() -> Segment:
    """A segment of one small layer."""
    cache = KVCache()
    cache.update_and_fetch(mx.random.normal((1, 1, 300, 64)), mx.random.normal((1, 1, 300, 64)))
    return Segment(Prefix.encode([cache], 300, CODEC).layers, 0, 300)


def seconds_per_document(store: Store, segment: Segment, documents: int, name: str, keep: bool) -> float:
    """Save segments, and remove each one again unless ``keep``; the mean time of one."""
    started = time.perf_counter()
    for number in range(documents):
        key = sha256(f"{name} {number}".encode()).hexdigest()
        about = {"label": key, "whole": True, "output": output_digest(JOB.result_file), "document": "d"}
        store.make_room(segment.nbytes)
        store.save(key, segment, IDENTITY, None, about)
        if not keep:
            drop_segments(store, JOB, {key})
    return (time.perf_counter() - started) / documents


def main() -> None:
    """Print a line of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--documents", type=int, default=50)
    arguments = parser.parse_args()
    segment = make_segment()
    for segments in arguments.segments:
        with tempfile.TemporaryDirectory() as folder:
            empty = Store(Path(folder) / "empty")
            saving = seconds_per_document(empty, segment, arguments.documents, "plain", keep=True)
            fill(path := Path(folder) / "store", segments)
            started = time.perf_counter()
            Store(path, 1 << 50).make_room(1)
            first = time.perf_counter() - started
            job = seconds_per_document(Store(path, 1 << 50), segment, arguments.documents, "job", keep=False)
            full = Store(path, Store(path).used_bytes() + 100_000)
            evicting = seconds_per_document(full, segment, arguments.documents, "evict", keep=True)
        milliseconds = {"keep_job_ms": job, "evicting_ms": evicting, "saving_ms": saving}
        rounded = {name: round(1e3 * value, 2) for name, value in milliseconds.items()}
        print(json.dumps({"segments": segments, "first_use_s": round(first, 3), **rounded}), flush=True)


if __name__ == "__main__":
    main()
