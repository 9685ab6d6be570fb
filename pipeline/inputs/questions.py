"""Questions: what a query asks of one document, with columns of the document and answers to its other queries in it.

The text of a query is a template if it uses `answers`, or if its `template` is true. `answers.NAME`, or
`answers["NAME"]`, is the answer to the query of that id, and names of columns are those of prompts. Which answers a
query uses is read from the template, so the order in which queries are asked is known before anything is answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from graphlib import CycleError, TopologicalSorter
from itertools import takewhile
from typing import Any

from jinja2 import nodes

from pipeline.errors import JobError, PromptFailed, one_line, suggestion
from pipeline.inputs.documents import Document
from pipeline.inputs.templates import (
    UsedNames,
    bounded_sandbox,
    braces_of_template,
    checked,
    checked_expression,
    used_names,
    written,
)
from pipeline.inputs.time_limit import limited
from pipeline.job.job import Documents, Generation, Query

ANSWERS = "answers"
_OF_CHECKS = ("answer", "context", "len")  # names that `check` has besides columns; `context` is the document's text
MOST_CHARACTERS = 1 << 20  # of a text that a template makes
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")  # of an object of Python in memory, another one in each run
_AN_ANSWER = re.compile(r"\banswers(\.\w|\[\s*['\"])")


@dataclass(frozen=True)
class Question:
    """What the model is asked. turns: earlier questions and their answers, which it is shown as a conversation."""

    text: str
    turns: tuple[tuple[str, str], ...] = ()


def is_template(query: Query) -> bool:
    """Return whether the text of a query is a template.

    >>> is_template(Query(id="q", text="When did {{ party }} sign?"))
    False
    >>> is_template(Query(id="q", text="When did {{ answers.party }} sign?"))
    True
    """
    if query.template is not None:
        return query.template
    text = query.text
    for use in _AN_ANSWER.finditer(text):
        start = max(text.rfind("{{", 0, use.start()), text.rfind("{%", 0, use.start()))
        if start >= 0 and not any(end in text[start : use.start()] for end in ("}}", "%}")):
            return True
    return False


def unfilled_place(query: Query) -> str | None:
    """Return the first part of a text that looks like a place in a template and is none, unless the user says so."""
    return None if is_template(query) or query.template is False else braces_of_template(query.text)


def is_chained(query: Query) -> bool:
    """Return whether a query may use columns or other answers, so that it is not simply asked as it is written."""
    return query.when is not None or query.previous or is_template(query)


@dataclass(frozen=True)
class _Source:
    """A template or an expression of a query. answers: ids of the queries whose answers it uses. key: for messages."""

    key: str
    used: UsedNames
    answers: frozenset[str]


@lru_cache(maxsize=4096)
def _text_source(query: Query) -> _Source | None:
    return _source(f"queries: the text of '{query.id}'", query.text, False) if is_template(query) else None


@lru_cache(maxsize=4096)
def _condition(query: Query) -> _Source | None:
    return None if query.when is None else _source(f"queries: `when` of '{query.id}'", query.when, True)


@lru_cache(maxsize=4096)
def _check(query: Query) -> _Source | None:
    if query.check is None:
        return None
    key = f"queries: `check` of '{query.id}'"
    source = _source(key, query.check, True)
    if source.answers:
        raise JobError(f"{key}: it is about one answer; compare answers in `when`, or ask a query that uses both")
    names = source.used.names - set(_OF_CHECKS) | ({"text"} if "context" in source.used.names else set())
    return _Source(key, UsedNames(names, source.used.in_row), frozenset())


def _source(key: str, source: str, is_expression: bool) -> _Source:
    """Return what a template uses. Raises JobError."""
    sandbox = bounded_sandbox()
    template = checked_expression(key, source, sandbox) if is_expression else checked(key, source, sandbox)
    used, tree = used_names(key, template, sandbox), sandbox.parse(template)
    named: list[str] = []
    for node in tree.find_all(nodes.Expr):
        if isinstance(node, nodes.Getattr | nodes.Getitem) and isinstance(node.node, nodes.Name):
            name: Any = node.attr if isinstance(node, nodes.Getattr) else node.arg
            name = name.value if isinstance(name, nodes.Const) else name
            named += [name] if node.node.name == ANSWERS and isinstance(name, str) else []
    if len(named) < sum(name.name == ANSWERS for name in tree.find_all(nodes.Name)):
        raise JobError(f'{key}: answers is used without the id of a query; write answers.ID or answers["ID"]')
    return _Source(key, UsedNames(used.names - {ANSWERS}, used.in_row), frozenset(named))


class Chain:
    """How the queries of one document use each other's answers; see `chain_of`.

    order: the queries, each behind all whose answers it uses. stages: the same, in groups that may be asked together.
    is_plain: whether every query is asked as it is written, of every document.
    """

    def __init__(self, queries: Sequence[Query]) -> None:
        self._uses: dict[str, tuple[str, ...]] = {}
        by_id = {query.id: query for query in queries}
        self.is_plain = not any(map(is_chained, queries))
        self.order: tuple[Query, ...] = tuple(queries)
        self.stages: tuple[tuple[Query, ...], ...] = (self.order,)
        if self.is_plain:
            return
        named = {query.id: _named_answers(query) for query in queries}
        for query in queries:
            for name in sorted(named[query.id].difference(by_id)):
                near = suggestion(name, [other for other in by_id if other != query.id])
                raise JobError(f"queries: '{query.id}' uses the answer of '{name}'; there is no such query{near}")
        for number, query in enumerate(queries):
            earlier = [other.id for other in queries[:number]] if query.previous else []
            in_turns = {name for other in earlier for name in named[other]} - {query.id}
            self._uses[query.id] = tuple(dict.fromkeys([*earlier, *sorted(named[query.id] | in_turns)]))
        sorter = TopologicalSorter({query.id: self._uses[query.id] for query in queries})
        try:
            sorter.prepare()
        except CycleError as error:
            first, *others = reversed(error.args[1])
            circle = ", which uses that of ".join(f"'{name}'" for name in others)
            raise JobError(f"queries: '{first}' uses the answer of {circle}: that is a circle") from None
        stages = []
        while sorter.is_active():
            ready = set(sorter.get_ready())
            stages.append(tuple(query for query in queries if query.id in ready))
            sorter.done(*ready)
        self.stages = tuple(stages)
        self.order = tuple(query for stage in stages for query in stage)

    def uses(self, query_id: str) -> tuple[str, ...]:
        """Return the ids of the queries whose answers a query uses."""
        return self._uses.get(query_id, ())

    def with_needed(self, query_ids: set[str]) -> set[str]:
        """Return the ids, and those of all queries whose answers these need."""
        needed = set(query_ids)
        for query in reversed(self.order):
            if query.id in needed:
                needed |= set(self.uses(query.id))
        return needed

    def reserve(self, query: Query, generation: Generation) -> int:
        """Return how many tokens the answers that a query uses may take in its question, besides its own text."""
        used = set(self.uses(query.id))
        if not used:
            return 0
        return sum(
            other.settings(generation).max_tokens + (len(other.text.encode()) if query.previous else 0)
            for other in self.order
            if other.id in used
        )


@lru_cache(maxsize=256)
def _chain(queries: tuple[Query, ...]) -> Chain:
    return Chain(queries)


def chain_of(queries: Sequence[Query]) -> Chain:
    """Return the chain of a document's queries. Raises JobError for circles and answers that there are not.

    >>> queries = [Query(id="b", text="Why {{ answers.a }}?"), Query(id="a", text="What?"), Query(id="c", text="Who?")]
    >>> [[query.id for query in stage] for stage in chain_of(queries).stages]
    [['a', 'c'], ['b']]
    """
    return _chain(tuple(queries))


def question_columns(queries: Iterable[Query], documents: Documents) -> set[str]:
    """Return the columns of documents that the queries use. Raises JobError."""
    columns: set[str] = set()
    for query in queries:
        for source in (_text_source(query), _condition(query), _check(query)):
            columns |= _columns(source, documents)
    return columns


def check_columns(query: Query, documents: Documents) -> set[str]:
    """Return the columns of documents that the `check` of a query reads."""
    return _columns(_check(query), documents)


def _columns(source: _Source | None, documents: Documents) -> set[str]:
    return set() if source is None else source.used.columns(documents.meanings)


def condition_answers(query: Query) -> frozenset[str]:
    """Return the ids of the queries whose answers the condition of a query uses."""
    source = _condition(query)
    return source.answers if source else frozenset()


class _Answers:
    """The answers as a template sees them: by ids only, so that no id is hidden by a method."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__values = values

    def __getitem__(self, name: str) -> Any:
        return self.__values[name]


class QuestionWriter:
    """Writes the questions of a job. documents: tells which columns `text` and `id` are.

    In its methods, `answers` has the answers that a template uses, by the ids of their queries; None for a query that
    was not asked. They raise PromptFailed.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        sandbox = bounded_sandbox(finalize=_written)
        self._template = lru_cache(maxsize=1024)(sandbox.from_string)
        self._expression = lru_cache(maxsize=1024)(partial(sandbox.compile_expression, undefined_to_none=False))

    def is_asked(self, document: Document, query: Query, answers: Mapping[str, str | None]) -> bool:
        """Return whether the condition of a query holds; True if it has none.

        A condition that orders or computes with a null does not hold.
        """
        source = _condition(query)
        if source is None or query.when is None:
            return True
        variables = self._variables(document, source, answers)
        try:
            with limited():
                value = self._expression(query.when)(variables)
        except Exception as error:
            columns = [document.columns.get(name) for name in question_columns([query], self._documents)]
            if isinstance(error, TypeError) and None in [*columns, *(answers[name] for name in source.answers)]:
                return False
            raise PromptFailed(f"{source.key}: {one_line(error)}") from error
        if not isinstance(value, bool | None):
            kind = type(value).__name__
            raise PromptFailed(f"{source.key}: it is a {kind}; expected a condition that is true or false")
        return bool(value)

    def refusal(self, document: Document, query: Query, answer: str) -> str | None:
        """Return why the `check` of a query refuses an answer; None if it does not, or if there is no check."""
        source = _check(query)
        if source is None or query.check is None:
            return None
        value = _parsed(answer) if query.json_schema else answer
        own = dict(zip(_OF_CHECKS, (value, document.text, len), strict=True))
        try:
            with limited():
                holds = self._expression(query.check)(self._variables(document, source, {}) | own)
        except Exception as error:
            return f"{query.check} ({one_line(error)})"
        if isinstance(holds, bool):
            return None if holds else query.check
        return f"{query.check} (it is a {type(holds).__name__}; expected a condition that is true or false)"

    def write(self, document: Document, query: Query, answers: Mapping[str, str | None]) -> Question:
        """Return the question of a query."""
        turns = []
        for earlier in takewhile(lambda other: other.id != query.id, document.queries) if query.previous else ():
            answer = answers[earlier.id]
            if answer is not None:
                turns.append((self._text(document, earlier, answers), answer))
        return Question(self._text(document, query, answers), tuple(turns))

    def _text(self, document: Document, query: Query, answers: Mapping[str, str | None]) -> str:
        source = _text_source(query)
        if source is None:
            return query.text
        variables = self._variables(document, source, answers)
        pieces, size = list[str](), 0
        try:
            with limited():
                for piece in self._template(query.text).generate(variables):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MOST_CHARACTERS:
                        raise OverflowError(f"it makes more than {MOST_CHARACTERS:,} characters")
        except Exception as error:
            raise PromptFailed(f"{source.key}: {one_line(error)}") from error
        text = "".join(pieces).strip()
        address = _ADDRESS.search(text)
        if address and not any(address[0] in str(value) for value in (*document.columns.values(), *answers.values())):
            raise PromptFailed(f"{source.key}: it writes what has no text of its own, as a method that is not called")
        if not text:
            raise PromptFailed(f"{source.key}: nothing is left of it, because what it is filled in with is empty")
        return text

    def _variables(self, document: Document, source: _Source, answers: Mapping[str, str | None]) -> dict[str, Any]:
        has_schema = {query.id for query in document.queries if query.json_schema}
        values = {name: _parsed(answers[name]) if name in has_schema else answers[name] for name in source.answers}
        return source.used.variables(document.columns, self._documents.meanings) | {ANSWERS: _Answers(values)}


def _named_answers(query: Query) -> frozenset[str]:
    source = _text_source(query)
    return condition_answers(query) | (source.answers if source else frozenset())


def _parsed(answer: str | None) -> Any:
    try:
        return None if answer is None else json.loads(answer)
    except ValueError:
        return answer


def _written(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else written(value)
