"""The contenders of ``pipeline bench``: mlx-lm without changes, used in four good ways, and the pipeline.

All contenders load the same weights and read the same tokens. In mlx-lm's contenders the model calls mlx-lm's own
attention and prefills in mlx-lm's own steps.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pyarrow.parquet as pq

from pipeline.commands.bench_result import WARM, BenchResult, Pair
from pipeline.errors import NotApplicable, PipelineError, RowError, one_line
from pipeline.execution.decode import make_sampler, row_name
from pipeline.execution.pool_executor import PoolExecutor
from pipeline.execution.process_pool import ProcessPool, processes_and_threads
from pipeline.execution.runner import Runner
from pipeline.execution.worker_pool import WorkerHandle
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.inputs.questions import is_chained
from pipeline.inputs.windows import WindowCutter, too_long
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
from pipeline.progress import RunObserver
from turboquant.eval.baselines import group_size_of
from turboquant.eval.results import CannotRun
from turboquant.runtime.device import on_cpu

_PROC = Path("/proc")


def run_contender(contender: str, job: Job, small: Job, folder: Path) -> BenchResult:
    """Do a job as one contender does it, and return the result.

    small: a job that a GPU does first, without measurement. folder: for the prompt caches that mlx-lm writes. Raises
    NotApplicable if mlx-lm cannot do the job, and the errors of mlx-lm and the pipeline.
    """
    if contender not in _STOCK:
        if not on_cpu():
            cache = small.cache.model_copy(update={"resident": job.cache.resident})
            Runner(small.model_copy(update={"cache": cache}), RunObserver()).run()
            shutil.rmtree(small.result_file.parent)
        return _run_pipeline(job, warm=contender == WARM)
    loaded = load_model(job.model, job.revision, job.adapter, job.trust_remote_code)
    if not on_cpu():
        _STOCK[contender](_StockModel(small, loaded, folder / f"{contender}-small.safetensors"))
    stock = _StockModel(job, loaded, folder / f"{contender}.safetensors")
    meter = ResourceMeter()
    _STOCK[contender](stock)
    return BenchResult(
        stock.answers, stock.answer_tokens, stock.left_out, stock.prefill_seconds, stock.disk_bytes, *meter.read()
    )


# ---- memory and time


class ResourceMeter:
    """Measures time and memory since it was made: the memory of MLX's arrays on a GPU, all resident memory on a CPU.

    Without Linux's /proc the peak cannot be reset, so a peak that is smaller than an earlier one is not seen.
    """

    def __init__(self) -> None:
        mx.clear_cache()
        if on_cpu():
            with suppress(OSError):
                _reset_peak("self")
            self._held = _resident_bytes("VmRSS")
        else:
            mx.reset_peak_memory()
            self._held = mx.get_active_memory()
        self._started = time.monotonic()

    def read(self) -> tuple[float, int, int]:
        """Return the seconds, the peak in bytes, and the part of the peak beyond the memory in use at the start."""
        seconds = time.monotonic() - self._started
        peak = _resident_bytes("VmHWM") if on_cpu() else mx.get_peak_memory()
        return seconds, peak, max(0, peak - self._held)


def _reset_peak(pid: object) -> None:
    """Set the process's VmHWM to its VmRSS, see proc(5)."""
    (_PROC / str(pid) / "clear_refs").write_text("5")


def _resident_bytes(name: str, pid: object = "self") -> int:
    """Return a value of /proc/PID/status in bytes; without /proc, the peak of this process."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- the pipeline


class _MeterStart(RunObserver):
    """Starts to measure when the model is loaded, just before the first document."""

    meter: ResourceMeter | None = None

    def documents_started(self, document_ids: Sequence[str]) -> None:
        self.meter = self.meter or ResourceMeter()


class _MeteredPool(ProcessPool):
    """Measures the time since the first process is ready, and the memory of all of them, as ResourceMeter does."""

    started: float | None = None
    held = peak = 0

    def note_ready(self, worker: WorkerHandle) -> None:
        super().note_ready(worker)
        pid = worker.report.pid
        with suppress(OSError):
            _reset_peak(pid)
        self.started = self.started or time.monotonic()
        self.held += _resident_bytes("VmRSS", pid)

    def close(self) -> None:
        self.peak = sum(_resident_bytes("VmHWM", worker.report.pid) for worker in self.workers.values())
        super().close()

    def read(self) -> tuple[float, int, int]:
        """Return the seconds, the peak in bytes, and the part of the peak beyond the memory in use at the start."""
        return time.monotonic() - (self.started or 0.0), self.peak, max(0, self.peak - self.held)


def _run_pipeline(job: Job, warm: bool) -> BenchResult:
    job = job.model_copy(update={"retries": 0})
    processes, threads = processes_and_threads(job, Inputs(job))
    if processes > 1:
        pool = _MeteredPool(job, processes, threads)
        report = Runner(
            job, RunObserver(), executor=lambda context, inputs, finished: PoolExecutor(context, inputs, finished, pool)
        ).run()
        measured = pool.read()
    else:
        observer = _MeterStart()
        report = Runner(job, observer).run()
        assert observer.meter is not None
        measured = observer.meter.read()
    if warm and report.prefixes_built:
        raise PipelineError(f"{report.prefixes_built} prefixes were not in the store, so this was no warm run")
    if broken := report.failures.get("GenerationFailed"):
        raise PipelineError(f"{broken} rows failed: GenerationFailed")
    rows = pq.read_table(job.result_file).to_pylist()
    return BenchResult(
        {(row["document_id"], row["query_id"]): row["answer"] for row in rows if row["status"] == "ok"},
        report.answer_tokens,
        report.rows_failed,
        report.prefill_seconds / report.processes,
        sum(file.stat().st_size for file in job.cache.dir.glob("??/*/*")),
        *measured,
    )


# ---- mlx-lm


@dataclass(frozen=True)
class _Question:
    """One query of one document. suffix: the tokens after the context."""

    pair: Pair
    suffix: list[int]
    settings: Settings


class _StockModel:
    """A loaded model and a job, with mlx-lm's ways to prefill and to answer. It counts the answers, tokens and bytes.

    file: path of the first prompt cache that is written; the others are written beside it.
    """

    def __init__(self, job: Job, loaded: LoadedModel, file: Path) -> None:
        self._job, self._loaded, self._file = job, loaded, file
        self._inputs = Inputs(job)
        self._reader = OutputParser(loaded.tokenizer, self._inputs.schemas)
        self.answers: dict[Pair, str] = {}
        self.answer_tokens = self.left_out = self.disk_bytes = 0
        self.prefill_seconds = 0.0

    def documents(self) -> Iterator[tuple[list[int], list[_Question]]]:
        """Yield each document's context and the questions that fit into the model, in the job's order.

        Raises NotApplicable if a query is not asked as it is written.
        """
        job, loaded = self._job, self._loaded
        renderer, cutter = Renderer(job.prompt, job.documents), WindowCutter(job)
        tokenizer = PromptTokenizer(loaded.tokenizer, bool(job.generation.thinking), job.prompt.special_tokens)
        limit = max_context(loaded.config, loaded.tokenizer)
        for document in self._inputs.stream():
            if any(is_chained(query) for query in document.queries):
                raise NotApplicable("mlx-lm fills in no columns or answers, and queries of this job use them")
            questions: list[_Question] = []
            with suppress(RowError):
                (rendered,) = cutter.windows(document, renderer.render(document), tokenizer, limit)
                tokens = tokenizer.tokenise(rendered, [query.text for query in document.queries])
                for query, suffix in zip(document.queries, tokens.suffixes, strict=True):
                    settings = query.settings(job.generation)
                    if not too_long(len(tokens.context), len(suffix), settings, limit):
                        questions.append(_Question((document.id, query.id), suffix, settings))
            self.left_out += len(document.queries) - len(questions)
            if questions:
                yield tokens.context, questions

    def prefill(self, context: list[int]) -> list[Any]:
        """Return a prompt cache of a context, made as mlx_lm.cache_prompt makes it."""
        started = time.monotonic()
        cache: list[Any] = make_prompt_cache(self._loaded.model)
        for _ in generate_step(mx.array(context), self._loaded.model, max_tokens=0, prompt_cache=cache):
            pass
        mx.eval([layer.state for layer in cache])
        self.prefill_seconds += time.monotonic() - started
        return cache

    def save(self, cache: list[Any]) -> str:
        """Write a prompt cache to a new file, and return the name of the file."""
        file = self._file.with_stem(f"{self._file.stem}-{len(self.answers)}")
        save_prompt_cache(str(file), cache)
        self.disk_bytes += file.stat().st_size
        return str(file)

    def answer(self, question: _Question, prompt: list[int], cache: list[Any] | None = None) -> float:
        """Answer a question by stream_generate, and return the seconds until the first token."""
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
            self._record(question, reading, tokens())
        return seconds

    def answer_together(self, questions: Sequence[_Question], cache: list[Any]) -> None:
        """Answer a document's questions by batch_generate, each with a copy of the cache."""
        size = self._job.generation.batch_size
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            response = batch_generate(
                self._loaded.model,
                self._loaded.tokenizer,
                [question.suffix for question in batch],
                prompt_caches=[cache] * len(batch),  # batch_generate copies it
                max_tokens=[question.settings.max_tokens for question in batch],
                return_token_ids=True,
                completion_batch_size=size,
                prefill_batch_size=size,
            )
            for question, tokens in zip(batch, response.token_ids, strict=True):
                self._record(question, self._reader.start_row(question.suffix, question.settings), tokens)

    def _record(self, question: _Question, reading: RowParser, tokens: Iterable[int]) -> None:
        """Read tokens until the answer ends, and keep the answer."""
        any(reading.add(token, 0.0) for token in tokens)  # baselines show no log-probabilities
        answer = reading.answer("stop")
        self.answers[question.pair] = answer.text
        self.answer_tokens += answer.tokens

    @property
    def samples(self) -> bool:
        """Whether any answer is sampled rather than greedy."""
        queries = (query for document in self._inputs.stream() for query in document.queries)
        return any(query.settings(self._job.generation).temperature for query in queries)

    @property
    def has_schemas(self) -> bool:
        """Whether any answer must be JSON of a schema."""
        return bool(self._inputs.schemas)

    @property
    def bits(self) -> int:
        """The bits of mlx-lm's quantised cache that are nearest to those of the job."""
        return 4 if max(self._job.cache.key_bits, self._job.cache.value_bits) <= 4 else 8


def _naive(stock: _StockModel) -> None:
    for context, questions in stock.documents():
        for question in questions:
            stock.prefill_seconds += stock.answer(question, context + question.suffix)


def _reloaded(stock: _StockModel, convert: Callable[[list[Any]], list[Any]] = lambda cache: cache) -> None:
    for context, questions in stock.documents():
        file = stock.save(convert(stock.prefill(context)))
        for question in questions:
            stock.answer(question, question.suffix, load_prompt_cache(file))


def _copied(stock: _StockModel) -> None:
    if stock.samples:
        raise NotApplicable("mlx-lm's batch_generate has one sampler for all rows, and this job has a seed for each")
    if stock.has_schemas:
        raise NotApplicable("mlx-lm's batch_generate holds all rows to one schema, and here each has its own")
    for context, questions in stock.documents():
        cache = stock.prefill(context)
        for kind in {type(layer) for layer in cache if not hasattr(layer, "merge")}:
            raise NotApplicable(f"mlx-lm's batch_generate takes no {kind.__name__}")
        stock.answer_together(questions, cache)


def _quantized(stock: _StockModel) -> None:
    def convert(cache: list[Any]) -> list[Any]:
        group_size = group_size_of(cache)
        return [layer.to_quantized(group_size, stock.bits) for layer in cache]

    try:
        _reloaded(stock, convert)
    except (
        AttributeError,
        CannotRun,
        NotImplementedError,
        ValueError,
    ) as error:  # mlx-lm raises any of these
        raise NotApplicable(f"mlx-lm can't quantise this model's cache: {one_line(error)}") from error


_STOCK: dict[str, Callable[[_StockModel], None]] = {
    "naive": _naive,
    "reloaded": _reloaded,
    "copied": _copied,
    "quantized": _quantized,
}
