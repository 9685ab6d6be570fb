"""The demo's documents: seconds to prefill a context against restoring it, and how fast restoring reads.

    python -m benches.restore [--rounds 5] [--documents 12]

One prefill and the best of several restorations a document, with the files in the page cache; beside it what ``cat``
of the same files to /dev/null takes, and the rate of either.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    size: int
    prefill: float
    restore: float


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
    """Print a line a document, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "summarize.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, help="only so many")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    print("document      tokens      bytes  prefill s  restore ms   ratio")
    found: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        for one in measure(arguments.job, Path(folder), arguments.rounds, arguments.documents):
            found.append(one)
            print(
                f"{one.name:12}{one.tokens:8,}{one.size:11,}{one.prefill:11.3f}{one.restore * 1e3:12.2f}"
                f"{one.prefill / one.restore:8.0f}",
                flush=True,
            )
        files = list(Path(folder).glob("*/segment.*"))
        cat = seconds_of_cat(files, arguments.rounds)
    size, prefill, restore = (sum(getattr(one, name) for one in found) for name in ("size", "prefill", "restore"))
    print(f"all: prefill {prefill:.2f} s, restore {restore * 1e3:.1f} ms, ratio {prefill / restore:.0f}")
    print(
        f"restoring reads {size / restore / 1e6:,.0f} MB/s, cat {size / cat / 1e6:,.0f} MB/s; "
        f"ratio {cat / restore:.2f}; the least of a document: {min(one.prefill / one.restore for one in found):.0f}"
    )


if __name__ == "__main__":
    main()
