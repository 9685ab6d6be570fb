"""One job's greedy answers with batches of several sizes: how many differ, and whether those are ties.

    python -m benches.batch_sizes [--job jobs/summarize.yaml] [--sizes 1 4 32] [--set key=value ...]

Sums are rounded differently where another number of rows shares a product. Where two answers part, the logits of the
two tokens are computed, behind what both have in common: a difference within 1e-4 is a tie, which rounding may decide.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.progress import RunObserver

if TYPE_CHECKING:
    from pipeline.job.job import Job

ROOT = Path(__file__).resolve().parent.parent
TIE = 1e-4
Pair = tuple[str, str]


@dataclass(frozen=True)
class Parting:
    """Where two answers to one query part: their tokens from there on, and how far apart the two logits are."""

    pair: Pair
    size: int
    at: int
    gap: float


def answers(job: Job) -> dict[Pair, str | None]:
    """Run a job; its answers."""
    import pyarrow.parquet as pq

    from pipeline.execution.runner import Runner

    Runner(job, RunObserver()).run()
    rows = pq.read_table(job.result_file).to_pylist()
    return {(row["document_id"], row["query_id"]): row["answer"] for row in rows}


def partings(job: Job, size: int, first: dict[Pair, str | None], other: dict[Pair, str | None]) -> list[Parting]:
    """All rows whose answers differ, looked into."""
    differing = [pair for pair in first if first[pair] != other[pair]]
    if not differing:
        return []
    import mlx.core as mx

    from pipeline.cache.codec import job_codec
    from pipeline.inputs.documents import stream_documents
    from pipeline.inputs.prompts import PromptTokenizer, Renderer, template_columns
    from pipeline.models.loading import load_model
    from turboquant import enabled
    from turboquant.caches.prefix import join, make_resident, prefill_segment

    loaded, renderer = load_model(job.model), Renderer(job.prompt, job.documents)
    tokenizer = PromptTokenizer(loaded.tokenizer)
    ids = [query.id for query in job.queries]
    found = []
    for document in stream_documents(job.documents, template_columns(job.prompt, job.documents)):
        mine = [pair for pair in differing if pair[0] == document.id]
        if not mine:
            continue
        tokens = tokenizer.tokenise(renderer.render(document), [query.text for query in job.queries])
        segment = prefill_segment(loaded.model, tokens.context, job_codec(job.cache))
        (prefix,) = make_resident([join([segment])], job.cache.resident)
        for pair in mine:
            ends = [*sorted(loaded.tokenizer.eos_token_ids)][:1]
            a, b = (
                [*loaded.tokenizer.encode(answer or "", add_special_tokens=False), *ends]
                for answer in (first[pair], other[pair])
            )
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            suffix = [*tokens.suffixes[ids.index(pair[1])], *a[:at]]
            with enabled(loaded.model):
                logits = loaded.model(mx.array(suffix)[None], cache=prefix.fork())[0, -1]
            found.append(Parting(pair, size, at, abs((logits[a[at]] - logits[b[at]]).item())))
    return found


def main() -> None:
    """Print a line for each answer that differs, and the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "summarize.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pipeline run")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()
    from pipeline.job.job_file import load_job

    with tempfile.TemporaryDirectory() as folder:
        jobs = {
            size: load_job(
                arguments.job,
                [
                    *arguments.set,
                    f"generation.batch_size={size}",
                    f"cache.dir={folder}/cache",
                    f"output.path={folder}/{size}.parquet",
                ],
            )
            for size in arguments.sizes
        }
        base, *others = arguments.sizes
        first = answers(jobs[base])
        for size in others:
            found = partings(jobs[size], size, first, answers(jobs[size]))
            for one in found:
                print(f"{one.pair[0]} {one.pair[1]}: parts at token {one.at}, logits {one.gap:.1e} apart")
            ties = sum(one.gap <= TIE for one in found)
            counts = {"answers": len(first), "differ": len(found), "ties": ties}
            print(json.dumps({"batch_size": size, "against": base, **counts}), flush=True)


if __name__ == "__main__":
    main()
