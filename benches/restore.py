"""The demo's documents: seconds to prefill a context against restoring it, and how fast restoring reads.

    python -m benches.restore [--rounds 5] [--documents 12]

One prefill and the best of several restorations a document, with the files in the page cache; beside it what ``cat``
of the same files to /dev/null takes, and the rate of either.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant import CacheCodec, Prefix

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """Of one document, in seconds and bytes."""

    name: str
    tokens: int
    bytes: int
    prefill_s: float
    restore_s: float


def measure(job_file: Path, folder: Path, rounds: int, count: int | None = None) -> Iterator[Measured]:
    """Prefill, store and restore the context of every document, or of the first ``count``."""
    from pipeline.cache.codec import job_codec
    from pipeline.execution.fingerprint import job_identity
    from pipeline.inputs.documents import stream_documents
    from pipeline.inputs.prompts import PromptTokenizer, Renderer, template_columns
    from pipeline.job.job_file import load_job
    from pipeline.models.loading import load_model
    from turboquant.caches.prefix import prefill_segment
    from turboquant.io.segment_file import write_segment

    job = load_job(job_file, [f"cache.dir={folder}"])
    identity, codec, loaded = job_identity(job), job_codec(job.cache), load_model(job.model)
    tokenizer, renderer = PromptTokenizer(loaded.tokenizer), Renderer(job.prompt, job.documents)
    queries = [query.text for query in job.queries]
    documents = list(stream_documents(job.documents, template_columns(job.prompt, job.documents)))[:count]
    contexts = [tokenizer.tokenise(renderer.render(document), queries).context for document in documents]
    prefill_segment(loaded.model, contexts[0], codec)  # what is built or compiled once
    for document, context in zip(documents, contexts, strict=True):
        key = identity.key(context)
        seconds, segment = timed(partial(prefill_segment, loaded.model, context, codec))
        size = write_segment(folder / key, key, segment, identity)
        restore = min(timed(partial(_restore, folder / key, key, codec))[0] for _ in range(rounds))
        yield Measured(document.id, len(context), size, seconds, restore)


def _restore(folder: Path, key: str, codec: CacheCodec) -> Prefix:
    from turboquant.caches.prefix import join
    from turboquant.io.segment_file import read_segment

    return join([read_segment(folder, key, codec)])


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gives."""
    started = time.perf_counter()
    result = do()
    return time.perf_counter() - started, result


def seconds_of_cat(files: list[Path], rounds: int) -> float:
    """The best of some rounds, starting ``cat`` included."""
    command = ["cat", *map(str, files)]
    return min(timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))[0] for _ in range(rounds))


def main() -> None:
    """Print a line of JSON for each document, and one of the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "summarize.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, help="only so many")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        for one in measure(arguments.job, Path(folder), arguments.rounds, arguments.documents):
            found.append(one)
            print(json.dumps(asdict(one)), flush=True)
        files = list(Path(folder).glob("*/segment.*"))
        cat = seconds_of_cat(files, arguments.rounds)
    size, prefill, restore = (sum(getattr(one, name) for one in found) for name in ("bytes", "prefill_s", "restore_s"))
    total = {
        "name": "all",
        "prefill_s": prefill,
        "restore_s": restore,
        "prefill_by_restore": prefill / restore,
        "least_prefill_by_restore": min(one.prefill_s / one.restore_s for one in found),
        "restore_MB_per_s": size / restore / 1e6,
        "cat_MB_per_s": size / cat / 1e6,
    }
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in total.items()}))


if __name__ == "__main__":
    main()
