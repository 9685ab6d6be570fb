"""``pipeline plan`` and ``pipeline status``: count the rows that are done, and estimate the cost of the others.

Both read the files that a run would read. They load no weights and change no file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from pipeline.cache.codec import job_codec
from pipeline.cache.hit_index import HitIndex, label_number
from pipeline.errors import JobError, RowError
from pipeline.execution.fingerprint import job_identity
from pipeline.execution.planner import TaskPlanner
from pipeline.execution.process_pool import processes_and_threads
from pipeline.execution.pruning import Surplus, find_surplus
from pipeline.execution.task import DocumentTask
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Rendered
from pipeline.inputs.token_counter import Effort, Lengths, TokenCounter
from pipeline.inputs.windows import OVERLAP, prompt_room, reserved_tokens, too_long
from pipeline.job.budget import budget_bytes, existing
from pipeline.job.job import Job, Query
from pipeline.job.selection import Selection
from pipeline.job.shards import Shard
from pipeline.models.constraints import check_schemas
from pipeline.models.loading import (
    load_tokenizer,
    max_context,
    model_folder,
    prefix_bytes,
    read_config,
    weights_bytes,
)
from pipeline.models.special_tokens import BREAK
from pipeline.output.export import check_output
from pipeline.output.results import Results
from pipeline.output.rows import Row
from pipeline.printable import printable
from pipeline.progress import with_progress_bar
from pipeline.report import CutAnswers
from turboquant.io.identity import Identity


@dataclass
class Status:
    """Numbers of documents and rows.

    skipped: rows that are done because the condition of their query does not hold.
    failed: rows that the last run could not answer; they are not done. cut: answers, done or failed, that `max_tokens`
    cut off.
    """

    documents: int = 0
    rows: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    cut: CutAnswers = field(default_factory=CutAnswers)

    @property
    def left(self) -> int:
        """Rows without an answer or an error that still counts."""
        return self.rows - self.done - self.failed

    @property
    def to_do(self) -> int:
        """Rows that the next run will answer: those that are left and those that failed."""
        return self.rows - self.done


@dataclass
class Plan:
    """The cost of a run.

    surplus: rows that it would remove, because the job does not ask for them any more.
    unreadable, too_long: documents of which some rows will fail. truncated, split: documents that will be cut. tokens,
    longest: tokens of all contexts, and of the longest one. hits: prefixes in the store. misses: prefixes that a run
    would build; documents of the same text share one. seconds: how long the run would take, None if the speeds are not
    known yet. tokens_to_answer: as many for each answer as answers had before, otherwise as many as it may have;
    answers_at_most says that these are. load_seconds: how long loading the model took, None if not known yet.
    processes: how many answer, with a model each. stages: how many groups of a document's queries are asked one behind
    the other.
    estimated: some tokens were estimated from characters, and with them the bytes and which documents are too long.
    """

    status: Status
    surplus: Surplus = field(default_factory=Surplus)
    unreadable: int = 0
    too_long: int = 0
    truncated: int = 0
    split: int = 0
    tokens: int = 0
    longest: int = 0
    hits: int = 0
    misses: int = 0
    tokens_to_prefill: int = 0
    tokens_to_restore: int = 0
    tokens_to_answer: float = 0
    answers_at_most: bool = False
    seconds: float | None = None
    bytes_to_store: int = 0
    free_bytes: int = 0
    budget_bytes: int | None = None
    estimated: bool = False
    batching: str | None = None
    weights_bytes: int = 0
    processes: int = 1
    load_seconds: float | None = None
    stages: int = 1


def job_status(job: Job, quiet: bool = True, shard: Shard | None = None) -> Status:
    """Count a job's rows. A row that was answered with other settings, weights or text is not done."""
    inputs, status = Inputs(job, shard), Status()
    for document in with_progress_bar(
        _documents(job, inputs, job_identity(job, remember=False)), inputs.documents, quiet
    ):
        document.add_to(status)
    return status


def plan_job(
    job: Job,
    quiet: bool = True,
    effort: Effort | None = None,
    shard: Shard | None = None,
    selection: Selection | None = None,
) -> Plan:
    """Return the cost of a run. effort: how much to tokenise. Raises JobError for errors in the job.

    selection: the part of the job that is answered.
    """
    from pipeline.cache.speeds import read_speeds
    from pipeline.cache.store import Store
    from pipeline.models.mlx_lm_internals import model_batching
    from turboquant.mlx_lm.families import BATCHING_MESSAGES

    inputs = Inputs(job, shard, selection)
    check_schemas(inputs.schemas, inputs.query_with_evidence)
    check_output(job, inputs.all_queries())
    path = model_folder(job)
    config, identity = read_config(path), job_identity(job, remember=False)
    tokenizer = load_tokenizer(path, job.trust_remote_code)
    prompts = PromptTokenizer(tokenizer, bool(job.generation.thinking), job.prompt.special_tokens)
    counter = TokenCounter(prompts, inputs.documents, effort or Effort())
    hit_index = HitIndex(Store(job.cache.dir, read_only=True).contexts(identity))
    planner = _Planner(job, config, max_context(config, tokenizer), counter, hit_index)
    speeds = read_speeds(job.cache.dir, identity)
    planner.plan.answers_at_most = speeds.answer_length is None
    for document in with_progress_bar(_documents(job, inputs, identity), inputs.documents, quiet):
        planner.add(document, speeds.answer_length or float("inf"))
    planner.plan.batching = BATCHING_MESSAGES[model_batching(config)] or None
    planner.plan.weights_bytes = weights_bytes(path, config)
    planner.plan.stages = inputs.stages
    plan = planner.plan
    plan.load_seconds = speeds.load
    plan.processes, _ = processes_and_threads(job, inputs)
    plan.seconds = speeds.seconds(plan.tokens_to_prefill, plan.tokens_to_restore, plan.tokens_to_answer)
    if not selection:
        with _results(job) as results:
            planner.plan.surplus = find_surplus(results, inputs)
    return planner.plan


def first_prompt(job: Job, shard: Shard | None = None, selection: Selection | None = None) -> str:
    """Return the prompt of the first query on the first document, as the model reads it, safe to show.

    selection: the part of the job in which they are the first. Raises JobError for errors in the job, and RowError if
    this document has no prompt.
    """
    part = selection or Selection()
    document = next((each for each in Inputs(job, shard).stream() if part.has_document(each.id)), None)
    query = next((query for query in document.queries if part.has_query(query.id)), None) if document else None
    if document is None or query is None:
        raise JobError("plan --prompt: there is no such document, or nothing is asked of it")
    with _results(job) as results:
        task = TaskPlanner(job, job_identity(job, remember=False)).plan(document, results.rows(document.id))
    if task.rendered is None or task.decided.get(query.id):
        raise JobError(f"plan --prompt: {(task.decided[query.id]).failure}")
    if query.id not in task.questions:
        raise JobError(f"plan --prompt: query '{query.id}' uses answers that are not there yet; run the job first")
    tokenizer = load_tokenizer(model_folder(job), job.trust_remote_code)
    prompts = PromptTokenizer(tokenizer, bool(job.generation.thinking), job.prompt.special_tokens)
    question = task.questions[query.id]
    return printable(prompts.prompt_text(task.rendered, question.text, question.turns).replace(BREAK, ""))


@dataclass(frozen=True)
class _Document:
    """One document.

    queries: all of its queries. wanted: ids of those that the run answers. open: ids of those without a valid row.
    rendered: None if the template fails. failed: failed rows. skipped: skipped ones. cut: rows whose answers were
    cut off. texts: of all queries, as they are asked; the template where that is not known yet.
    """

    queries: Sequence[Query]
    wanted: frozenset[str]
    rendered: Rendered | None
    open: frozenset[str]
    failed: int
    skipped: int
    cut: Sequence[Row]
    label: str
    texts: Sequence[str]

    def add_to(self, status: Status) -> None:
        """Count this document's rows."""
        status.documents += 1
        status.rows += len(self.wanted)
        status.done += len(self.wanted) - len(self.open)
        status.failed += self.failed
        status.skipped += self.skipped
        for row in self.cut:
            status.cut.add(row)


def _documents(job: Job, inputs: Inputs, identity: Identity) -> Iterator[_Document]:
    planner = TaskPlanner(job, identity)
    with _results(job) as results:
        for document in inputs.stream():
            wanted = frozenset(query.id for query in document.wanted)
            rows = results.rows(document.id)
            failed = [row for query_id, row in rows.items() if query_id in wanted and row.status == "error"]
            task = planner.plan(document, rows)
            skipped = sum(row.status == "skipped" for row in task.kept)
            open_ = frozenset(query.id for query in task.queries)
            cut = [row for row in [*task.kept, *failed] if row.is_cut]
            texts = [query_text(task, query) for query in document.queries]
            yield _Document(
                document.queries, wanted, task.rendered, open_, len(failed), skipped, cut, task.label, texts
            )


def query_text(task: DocumentTask, query: Query) -> str:
    """Return what is asked, or the template if that uses answers that are not known yet."""
    return task.questions[query.id].text if query.id in task.questions else query.text


def _results(job: Job) -> Results:
    return Results(job.result_file, url=job.result_url, read_only=True)


class _Planner:
    """Adds documents to a plan, and remembers a number for each prefix that it has counted.

    limit: the most tokens that the model reads, or None.
    """

    def __init__(
        self, job: Job, config: Mapping[str, Any], limit: int | None, counter: TokenCounter, hit_index: HitIndex
    ) -> None:
        budget = None if job.cache.budget is None else budget_bytes(job.cache.budget, job.cache.dir)
        free = shutil.disk_usage(existing(job.cache.dir)).free
        self.plan = Plan(Status(), free_bytes=free, budget_bytes=budget)
        self._job, self._limit, self._counter, self._hit_index = job, limit, counter, hit_index
        self._prefix_bytes = lru_cache(maxsize=4096)(partial(prefix_bytes, job_codec(job.cache), config))
        self._hits: set[int] = set()
        self._misses: set[int] = set()

    def add(self, document: _Document, answer_length: float) -> None:
        """Add one document. answer_length: the tokens that an answer is expected to have at most."""
        plan = self.plan
        document.add_to(plan.status)
        settings = [query.settings(self._job.generation) for query in document.queries]
        rooms = [] if self._limit is None else [prompt_room(each, self._limit) for each in settings]
        label = label_number(document.label)
        lengths = self._lengths(document, label, rooms)
        if lengths is None:
            plan.unreadable += 1
            return
        lengths, is_cut = self._cut(document, lengths)
        plan.truncated += is_cut and self._job.documents.too_long == "truncate"
        plan.split += is_cut and self._job.documents.too_long == "split"
        fits = [
            is_cut or not too_long(lengths.context, suffix, each, self._limit)
            for suffix, each in zip(lengths.suffixes, settings, strict=True)
        ]
        plan.too_long += not all(
            fit for query, fit in zip(document.queries, fits, strict=True) if query.id in document.wanted
        )
        plan.tokens += lengths.context
        plan.longest = max(plan.longest, lengths.context)
        plan.estimated |= lengths.estimated
        open_settings = [
            each
            for query, fit, each in zip(document.queries, fits, settings, strict=True)
            if fit and query.id in document.open
        ]
        plan.tokens_to_answer += sum(min(each.max_tokens, answer_length) for each in open_settings)
        if self._hit_index.contains(label, lengths.context, lengths.estimated):
            self._hits.add(label)
            plan.tokens_to_restore += lengths.context if open_settings else 0
        elif label not in self._misses and open_settings:
            self._misses.add(label)
            plan.tokens_to_prefill += lengths.context
            plan.bytes_to_store += self._prefix_bytes(lengths.context)
        plan.hits, plan.misses = len(self._hits), len(self._misses)

    def _lengths(self, document: _Document, label: int, rooms: Sequence[int]) -> Lengths | None:
        """Return the lengths of a document's prompts, or None if they cannot be made."""
        if document.rendered is None:
            return None
        texts = document.texts
        try:
            stored_tokens = self._hit_index.trusted_tokens(label)
            if stored_tokens is not None:
                return Lengths(stored_tokens, self._counter.suffixes(document.rendered, texts))
            return self._counter.count(document.rendered, texts, rooms)
        except RowError:
            return None

    def _cut(self, document: _Document, lengths: Lengths) -> tuple[Lengths, bool]:
        """Return the lengths after the document is cut, all windows together, and whether it is cut at all."""
        policy = self._job.documents.too_long
        if policy == "error" or self._limit is None:
            return lengths, False
        room = self._limit - reserved_tokens(document.queries, self._job.generation) - min(lengths.suffixes)
        if not 0 < room < lengths.context:
            return lengths, False
        context = room if policy == "truncate" else round(lengths.context * OVERLAP / (OVERLAP - 1))
        return replace(lengths, context=context, estimated=True), True
