"""A job by `pipeline run` and by Hugging Face transformers, side by side on this machine's CPU.

    python -m benches.contracts_job FOLDER --data CUAD --model SMOLLM2 --contracts 8 --questions 8 --tokens 2000
    python -m benches.transformers_cache FOLDER/job.yaml

transformers reads each document once into a cache, by two of its own recipes: a static cache that is copied for each
question, and a dynamic cache that is repeated for all questions, which are then answered together. It gets the tokens
that the pipeline gives its model, and computes in float32 as the pipeline does, and in bfloat16, for which some
processors have matrix instructions. If torch is missing, the bench says so and stops. Both sides are
timed without the time that loading takes. The pipeline runs on an empty store, then once more with the stored prefixes.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benches.llama_cpp import by_pipeline, prompts
from pipeline.job.job import Job
from pipeline.job.job_file import load_job
from pipeline.models.loading import model_folder
from turboquant.runtime.machine import usable_cpus

WAYS = (("float32", "static"), ("float32", "repeated"), ("bfloat16", "repeated"))


class Transformers:
    """A model in PyTorch, and the two ways to answer all questions on a document."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._torch, self._library = importlib.import_module("torch"), importlib.import_module("transformers")
        self._torch.set_num_threads(threads)
        self.tokenizer = self._library.AutoTokenizer.from_pretrained(folder)
        self._model = self._library.AutoModelForCausalLM.from_pretrained(folder).eval()

    def compute_in(self, dtype: str) -> None:
        """Convert the weights to a dtype."""
        self._model = self._model.to(getattr(self._torch, dtype))

    def static(self, context: list[int], rows: list[tuple[list[int], int]]) -> list[list[int]]:
        """Answer one question after the other, each on a copy of a static cache."""
        longest = len(context) + max(len(suffix) + limit for suffix, limit in rows)
        filled = self._fill(self._library.StaticCache(config=self._model.config, max_cache_len=longest), context)
        return [
            self._answer(copy.deepcopy(filled), [context + suffix], [[1] * len(context + suffix)], limit)[0]
            for suffix, limit in rows
        ]

    def repeated(self, context: list[int], rows: list[tuple[list[int], int]]) -> list[list[int]]:
        """Answer all questions together, on a dynamic cache repeated for each. Shorter ones are padded on the left."""
        cache = self._fill(self._library.DynamicCache(config=self._model.config), context)
        cache.batch_repeat_interleave(len(rows))
        longest = max(len(suffix) for suffix, _ in rows)
        pads = [longest - len(suffix) for suffix, _ in rows]
        tokens = [context + [0] * pad + suffix for pad, (suffix, _) in zip(pads, rows, strict=True)]
        masks = [
            [1] * len(context) + [0] * pad + [1] * len(suffix) for pad, (suffix, _) in zip(pads, rows, strict=True)
        ]
        return self._answer(cache, tokens, masks, max(limit for _, limit in rows))

    def _fill(self, cache: Any, context: list[int]) -> Any:
        with self._torch.inference_mode():
            self._model(self._torch.tensor([context]), cache=cache, logits_to_keep=1)
        return cache

    def _answer(self, cache: Any, tokens: list[list[int]], masks: list[list[int]], limit: int) -> list[list[int]]:
        with self._torch.inference_mode():
            found = self._model.generate(
                self._torch.tensor(tokens),
                attention_mask=self._torch.tensor(masks),
                cache=cache,
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )
        answers: list[list[int]] = found[:, len(tokens[0]) :].tolist()
        return answers


def by_transformers(job: Job, model: Transformers, way: str) -> tuple[float, list[str]]:
    """Answer the job in one of the ways. Return seconds, and the answers in the order of documents and queries."""
    asked = prompts(job)
    started = time.monotonic()
    found = [answer for context, rows in asked for answer in getattr(model, way)(context, rows)]
    seconds = time.monotonic() - started
    return seconds, [model.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found]


def main() -> None:
    """Run all sides in turn, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("transformers is left out: `pip install torch` lets it run models")
    job = load_job(arguments.job, ())
    model = Transformers(model_folder(job), arguments.threads)
    for _ in range(arguments.rounds):
        folder = Path(tempfile.mkdtemp(prefix="transformers-"))
        cold = by_pipeline(arguments.job, folder)
        answers = [str(each) for each in pq.read_table(folder / "answers.parquet")["answer"].to_pylist()]
        (folder / "answers.parquet").unlink()
        restored = by_pipeline(arguments.job, folder)
        shutil.rmtree(folder)
        figures = {
            "way": "pipeline",
            "rows": cold["rows"],
            "seconds": round(cold["seconds"], 1),
            "of_that_prefill_s": round(cold["prefill_seconds"] / cold["processes"], 1),
            "restored_s": round(restored["seconds"], 1),
        }
        print(json.dumps(figures), flush=True)
        for dtype, way in WAYS:
            model.compute_in(dtype)
            seconds, theirs = by_transformers(job, model, way)
            figures = {
                "way": f"{way} cache, {dtype}",
                "rows": len(theirs),
                "seconds": round(seconds, 1),
                "ratio": round(seconds / cold["seconds"], 2),
                "ratio_restored": round(seconds / restored["seconds"], 2),
                "equal_answers": sum(a == b for a, b in zip(answers, theirs, strict=True)),
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
