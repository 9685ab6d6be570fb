"""What each contender of a bench does, in the process that it is called in: mlx-lm as it comes, and the pipeline.

Knows how mlx-lm is used well; not whom a contender is compared with (bench.py). All load the same weights and read the
same tokens. In mlx-lm's contenders the model calls mlx-lm's own attention, and prefills in mlx-lm's own steps.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pyarrow.parquet as pq

from pipeline.commands.bench_result import WARM, Outcome, Pair
from pipeline.commands.resource_meter import ResourceMeter
from pipeline.errors import NotApplicable, PipelineError, RowError, one_line
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.inputs.windows import WindowCutter
from pipeline.job.job import Job, Settings
from pipeline.models.loading import LoadedModel, load_model, max_context
from pipeline.models.mlx_lm_internals import (
    batch_generate,
    generate_step,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from pipeline.models.output_parser import OutputParser, RowParser
from pipeline.progress import Progress
from pipeline.run.decode import make_sampler, row_name
from pipeline.run.engine import too_long
from pipeline.run.runner import Runner
from turboquant.eval.baselines import group_size_of
from turboquant.eval.results import CannotRun
from turboquant.runtime.device import on_cpu


def compete(contender: str, job: Job, small: Job, folder: Path) -> Outcome:
    """Do a job as one of outcome.CONTENDERS does it; ``folder`` takes the prompt caches that mlx-lm writes.

    A GPU does the ``small`` one before, unmeasured. Raises NotApplicable where mlx-lm can't, and what mlx-lm and the
    pipeline raise.
    """
    if contender not in _STOCK:
        if not on_cpu():
            cache = small.cache.model_copy(update={"resident": job.cache.resident})
            Runner(small.model_copy(update={"cache": cache}), quiet=True).run()
            shutil.rmtree(small.result_file.parent)
        return _pipeline(job, warm=contender == WARM)
    loaded = load_model(job.model, job.revision, job.adapter, job.trust_remote_code)
    if not on_cpu():
        _STOCK[contender](_Stock(small, loaded, folder / f"{contender}-small.safetensors"))
    stock = _Stock(job, loaded, folder / f"{contender}.safetensors")
    meter = ResourceMeter()
    _STOCK[contender](stock)
    return Outcome(
        stock.answers, stock.answer_tokens, stock.left_out, stock.prefill_seconds, stock.disk_bytes, *meter.read()
    )


# ---- the pipeline


class _Watch(Progress):
    """Begins to measure when the model is loaded, just before the first document is begun."""

    meter: ResourceMeter | None = None

    def start_documents(self, document_ids: Sequence[str]) -> None:
        self.meter = self.meter or ResourceMeter()


def _pipeline(job: Job, warm: bool) -> Outcome:
    watch = _Watch(0, quiet=True)
    report = Runner(job.model_copy(update={"retries": 0}), watch=lambda rows: watch).run()
    assert watch.meter is not None
    measured = watch.meter.read()
    if warm and report.prefixes_built:
        raise PipelineError(f"{report.prefixes_built} prefixes were not in the store, so this was no warm run")
    if broken := report.failures.get("GenerationFailed"):
        raise PipelineError(f"{broken} rows failed: GenerationFailed")
    rows = pq.read_table(job.result_file).to_pylist()
    return Outcome(
        {(row["document_id"], row["query_id"]): row["answer"] for row in rows if row["status"] == "ok"},
        report.answer_tokens,
        report.rows_failed,
        report.prefill_seconds,
        sum(file.stat().st_size for file in job.cache.dir.glob("??/*/*")),
        *measured,
    )


# ---- mlx-lm


@dataclass(frozen=True)
class _Question:
    """One query of one document, and the tokens that follow the context."""

    pair: Pair
    suffix: list[int]
    settings: Settings


class _Stock:
    """A loaded model, a job's documents as tokens, what mlx-lm does with them, and the tally.

    file: where a prompt cache is written, beside which those of other documents are.
    """

    def __init__(self, job: Job, loaded: LoadedModel, file: Path) -> None:
        self._job, self._loaded, self._file = job, loaded, file
        self._inputs = Inputs(job)
        self._reader = OutputParser(loaded.tokenizer, self._inputs.schemas)
        self.answers: dict[Pair, str] = {}
        self.answer_tokens = self.left_out = self.disk_bytes = 0
        self.prefill_seconds = 0.0

    def documents(self) -> Iterator[tuple[list[int], list[_Question]]]:
        """Each document's context and the questions that the model has room for, in the job's order."""
        job, loaded = self._job, self._loaded
        renderer, fitting = Renderer(job.prompt), WindowCutter(job)
        tokenizer = PromptTokenizer(loaded.tokenizer, bool(job.generation.thinking))
        limit = max_context(loaded.config, loaded.tokenizer)
        for document in self._inputs.stream():
            questions: list[_Question] = []
            with suppress(RowError):
                (rendered,) = fitting.windows(document, renderer.render(document), tokenizer, limit)
                tokens = tokenizer.tokenise(rendered, [query.text for query in document.queries])
                for query, suffix in zip(document.queries, tokens.suffixes, strict=True):
                    settings = query.settings(job.generation)
                    if not too_long(len(tokens.context), len(suffix), settings.max_tokens, limit):
                        questions.append(_Question((document.id, query.id), suffix, settings))
            self.left_out += len(document.queries) - len(questions)
            if questions:
                yield tokens.context, questions

    def prefilled(self, context: list[int]) -> list[Any]:
        """A prompt cache of a context, as mlx_lm.cache_prompt makes it."""
        started = time.monotonic()
        cache: list[Any] = make_prompt_cache(self._loaded.model)
        for _ in generate_step(mx.array(context), self._loaded.model, max_tokens=0, prompt_cache=cache):
            pass
        mx.eval([layer.state for layer in cache])
        self.prefill_seconds += time.monotonic() - started
        return cache

    def saved(self, cache: list[Any]) -> str:
        """The name of a new file that holds a prompt cache."""
        file = self._file.with_stem(f"{self._file.stem}-{len(self.answers)}")
        save_prompt_cache(str(file), cache)
        self.disk_bytes += file.stat().st_size
        return str(file)

    def ask(self, question: _Question, prompt: list[int], cache: list[Any] | None = None) -> float:
        """Answer a question by stream_generate; returns the seconds until there was a token."""
        started, seconds = time.monotonic(), 0.0
        settings = question.settings
        reading = self._reader.start_row(question.suffix, settings)
        responses = stream_generate(
            self._loaded.model,
            self._loaded.tokenizer,
            prompt,
            max_tokens=settings.max_tokens,
            sampler=make_sampler(settings, row_name(*question.pair)),
            logits_processors=[reading.constraint] if reading.constraint else None,
            prompt_cache=cache,
        )

        def tokens() -> Iterator[int]:
            nonlocal seconds
            for response in responses:
                seconds = seconds or time.monotonic() - started
                if response.finish_reason != "stop":
                    yield response.token

        with closing(responses):
            self._note(question, reading, tokens())
        return seconds

    def ask_together(self, questions: Sequence[_Question], cache: list[Any]) -> None:
        """Answer a document's questions by batch_generate, each with a copy of the cache."""
        size = self._job.generation.batch_size
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            response = batch_generate(
                self._loaded.model,
                self._loaded.tokenizer,
                [question.suffix for question in batch],
                prompt_caches=[cache] * len(batch),  # of which it makes the copies
                max_tokens=[question.settings.max_tokens for question in batch],
                return_token_ids=True,
                completion_batch_size=size,
                prefill_batch_size=size,
            )
            for question, tokens in zip(batch, response.token_ids, strict=True):
                self._note(question, self._reader.start_row(question.suffix, question.settings), tokens)

    def _note(self, question: _Question, reading: RowParser, tokens: Iterable[int]) -> None:
        """Take tokens until the answer ends."""
        any(map(reading.add, tokens))
        answer = reading.answer("stop")
        self.answers[question.pair] = answer.text
        self.answer_tokens += answer.tokens

    @property
    def samples(self) -> bool:
        """Whether any query is not answered greedily."""
        queries = (query for document in self._inputs.stream() for query in document.queries)
        return any(query.settings(self._job.generation).temperature for query in queries)

    @property
    def has_schemas(self) -> bool:
        """Whether any query's answer is to be JSON."""
        return bool(self._inputs.schemas)

    @property
    def bits(self) -> int:
        """The bits of a quantised cache that are nearest to the job's."""
        return 4 if max(self._job.cache.key_bits, self._job.cache.value_bits) <= 4 else 8


def _naive(stock: _Stock) -> None:
    for context, questions in stock.documents():
        for question in questions:
            stock.prefill_seconds += stock.ask(question, context + question.suffix)


def _reloaded(stock: _Stock, convert: Callable[[list[Any]], list[Any]] = lambda cache: cache) -> None:
    for context, questions in stock.documents():
        file = stock.saved(convert(stock.prefilled(context)))
        for question in questions:
            stock.ask(question, question.suffix, load_prompt_cache(file))


def _copied(stock: _Stock) -> None:
    if stock.samples:
        raise NotApplicable("mlx-lm's batch_generate has one sampler for all rows, and this job has a seed for each")
    if stock.has_schemas:
        raise NotApplicable("mlx-lm's batch_generate holds all rows to one schema, and here each has its own")
    for context, questions in stock.documents():
        cache = stock.prefilled(context)
        for kind in {type(layer) for layer in cache if not hasattr(layer, "merge")}:
            raise NotApplicable(f"mlx-lm's batch_generate takes no {kind.__name__}")
        stock.ask_together(questions, cache)


def _quantized(stock: _Stock) -> None:
    def convert(cache: list[Any]) -> list[Any]:
        group_size = group_size_of(cache)
        return [layer.to_quantized(group_size, stock.bits) for layer in cache]

    try:
        _reloaded(stock, convert)
    except (AttributeError, CannotRun, NotImplementedError, ValueError) as error:  # as mlx-lm refuses a model or a size
        raise NotApplicable(f"mlx-lm can't quantise this model's cache: {one_line(error)}") from error


_STOCK: dict[str, Callable[[_Stock], None]] = {
    "naive": _naive,
    "reloaded": _reloaded,
    "copied": _copied,
    "quantized": _quantized,
}
