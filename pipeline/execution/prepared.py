"""Prompts and tasks whose texts are tokens: what the engine works on, and where rows are made of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import AnswerCutOff, RowError
from pipeline.execution.prefixes import Piece, Restored
from pipeline.execution.task import DocumentTask, TaskResult, error_row
from pipeline.inputs.prompts import Rendered
from pipeline.job.job import Query
from pipeline.models.output_parser import Answer
from pipeline.models.quotations import Passages, located
from pipeline.output.rows import Row


@dataclass
class PreparedPrompt:
    """One context in tokens, and the queries that are asked of it: a whole document, a window of one, or the answers on
    its windows.

    queries: those whose questions are known. suffixes: tokens behind the context, by query id. rows: results so far, by
    query id; only the engine adds to them. failure: the reason why no query can be asked, if there is one. refusals:
    how often the answer to a query was refused, by query id. accepted: ids of queries whose check holds.
    """

    task: DocumentTask
    queries: list[Query]
    context: Sequence[int] = ()
    suffixes: dict[str, list[int]] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()
    restored: Restored | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    rendered: Rendered | None = None
    quotations: Passages | None = None
    failure: RowError | None = None
    refusals: dict[str, int] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)

    @property
    def passages(self) -> Passages:
        """The texts that evidence is quoted from: the part of the document that the context has, if none are given."""
        if self.quotations is not None:
            return self.quotations
        assert self.rendered is not None
        return Passages((self.task.document.text[self.rendered.start : self.rendered.end],))

    @property
    def open_queries(self) -> list[Query]:
        """The queries without a row."""
        return [query for query in self.queries if query.id not in self.rows]

    def row(self, query: Query) -> Row:
        """Return the row of a query without an answer."""
        row = self.task.row(query)
        if query.id not in self.suffixes:
            return row
        return replace(row, context_tokens=len(self.context), query_tokens=len(self.suffixes[query.id]))

    def fail(self, error: RowError, queries: Sequence[Query] | None = None) -> None:
        """Make error rows for queries, by default for all open ones."""
        for query in self.open_queries if queries is None else queries:
            self.rows[query.id] = error_row(self.row(query), error)

    def accept(self, query: Query, answer: Answer) -> None:
        """Make the row of a query from its answer."""
        if answer.failure is not None and not isinstance(answer.failure, AnswerCutOff):
            self.fail(answer.failure, [query])
            return
        start = self.rendered.start if self.rendered else 0
        row = replace(
            self.row(query),
            answer=answer.text,
            answer_json=answer.text if query.json_schema else None,
            thinking=answer.thinking,
            finish_reason=answer.finish_reason,
            answer_tokens=answer.tokens,
            logprob_mean=_rounded(sum(answer.logprobs) / len(answer.logprobs)) if answer.logprobs else None,
            logprob_min=_rounded(min(answer.logprobs, default=None)),
            choice_probabilities=answer.choice_probabilities,
            samples=answer.samples,
            agreement=answer.agreement,
            evidence=[located(quote, self.task.document.text, start) for quote in answer.quotes or ()] or None,
        )
        if answer.failure is not None:  # the text so far is of use to the user
            row = error_row(replace(row, answer=answer.text or None, answer_json=None), answer.failure)
        self.rows[query.id] = row


@dataclass
class PreparedTask:
    """A task whose prompts are tokenised: one prompt, several windows, or none if nothing is open.

    rows: finished rows, except for those that the only prompt keeps. combined: for each query of a document read in
    windows, the prompt that combines the answers on the windows. failure: the reason why there are no prompts, if
    there is one.
    """

    task: DocumentTask
    prompts: Sequence[PreparedPrompt] = ()
    truncated: bool = False
    rows: dict[str, Row] = field(default_factory=dict)
    combined: list[PreparedPrompt] = field(default_factory=list)
    failure: RowError | None = None

    @property
    def is_split(self) -> bool:
        """Whether the document is read in windows."""
        return len(self.prompts) > 1

    @property
    def all_rows(self) -> dict[str, Row]:
        """The rows so far, by query id."""
        own = self.prompts[0].rows if self.prompts and not self.is_split else {}
        return {**self.task.decided, **self.rows, **own}

    def result(self, shared_label: str) -> TaskResult:
        """Return the result. shared_label: label of segments that other documents use too."""
        pieces = [piece for prompt in (*self.prompts, *self.combined) for piece in prompt.pieces]
        own_keys = frozenset(piece.key for piece in pieces if piece.about["label"] != shared_label)
        return TaskResult(self.all_rows, self.truncated, self.is_split, own_keys)


def _rounded(logprob: float | None) -> float | None:
    return None if logprob is None else round(logprob, 3) + 0.0  # so that it is never -0.0
