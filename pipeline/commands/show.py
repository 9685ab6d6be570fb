"""``pipeline show``: a job's answers as a table on a terminal, or one row a line.

The parts that are finished can be shown while the job runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import OutputError
from pipeline.inputs.inputs import Inputs
from pipeline.job.job import Job
from pipeline.job.selection import Selection
from pipeline.job.shards import Shard, shards_folder
from pipeline.output.results import Results
from pipeline.output.rows import Row
from pipeline.printable import printable
from pipeline.report import CutAnswers

SURROUNDINGS = 160  # characters of the document that are shown on either side of a quotation
LINES = 8  # the most lines of an answer in a table
_LEAST_WIDTH = 24  # characters of a column of answers
_MOST_ID_WIDTH = 24
_GAP = 2  # characters between columns
_CUT_FIRST = re.compile(r"^(\S{0,30}\s+|.)", re.DOTALL)  # in scripts without spaces, a character
_CUT_LAST = re.compile(r"(\s+\S{0,30}|.)\Z", re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """A quotation with what stands before and behind it in the document, and how often the document has it.

    page: the page on which it begins, from 1; None if the document has no pages.
    """

    before: str
    quote: str
    after: str
    occurrences: int
    page: int | None


class AnswerTable:
    """A job's answers by document and query, read from disk each time that they are iterated.

    selection: the documents and queries to show. failed: show failed rows only. commands: the commands that run and
    merge the job, which an error names. cut_only: show answers that `max_tokens` cut off only. Raises JobError for
    unknown ids and OutputError if there is no result yet.

    cut: counts the answers cut off, of the rows that were iterated last.
    """

    def __init__(
        self,
        job: Job,
        selection: Selection | None = None,
        failed: bool = False,
        shard: Shard | None = None,
        commands: tuple[str, str] = ("pipeline run", "pipeline merge"),
        cut_only: bool = False,
    ) -> None:
        self._job, self._failed, self._cut_only = job, failed, cut_only
        self.cut = CutAnswers()
        self._inputs = Inputs(job, shard, selection, takes_along=False)
        self.queries = self._inputs.queries
        self._text = ""  # of the document that is being shown, if any query has evidence
        with self._results() as results:
            if not results.exist:
                in_shards = shards_folder(job.result_file).exists()
                run, merge = commands
                cure = f"{merge} takes them from the shards" if in_shards else f"{run} makes them"
                raise OutputError(f"{job.output.path}: there are no answers yet; {cure}")

    def ids(self) -> Iterator[str]:
        """Yield the ids of the documents to show."""
        return (name for name, _ in self._inputs.pairs())

    def __iter__(self) -> Iterator[tuple[str, dict[str, Row | None]]]:
        """Yield each document's id and its rows by query id, in input order; None for a row that is not there yet."""
        self.cut = CutAnswers()
        with self._results() as results:
            for document_id, text, query_ids in self._documents():
                self._text, known = text, results.rows(document_id)
                rows = {query_id: known.get(query_id) for query_id in query_ids}
                if self._failed:
                    rows = {query_id: row for query_id, row in rows.items() if row and row.status == "error"}
                if self._cut_only:
                    rows = {query_id: row for query_id, row in rows.items() if row and row.is_cut}
                for row in rows.values():
                    if row and row.is_cut:
                        self.cut.add(row)
                if rows:
                    yield document_id, rows

    def passages(self, row: Row) -> list[Passage]:
        """Return the evidence of a row of the document that iteration has reached."""
        passages = []
        for quotation in row.evidence or ():
            quote, start, end = quotation["quote"], quotation["start"], quotation["end"]
            is_there = self._text[start:end] == quote  # the document may have changed since
            before = _last_words(self._text[max(0, start - SURROUNDINGS - 1) : start], SURROUNDINGS) if is_there else ""
            after = _first_words(self._text[end : end + SURROUNDINGS + 1], SURROUNDINGS) if is_there else ""
            before, quote, after = (text.replace("\f", "\n") for text in (before, quote, after))  # the ends of pages
            passages.append(Passage(before, quote, after, quotation["occurrences"], quotation["page"]))
        return passages

    def _documents(self) -> Iterator[tuple[str, str, list[str]]]:
        """Yield each document's id, its text if any query has evidence, and the ids of its queries."""
        if any(query.settings(self._job.generation).wants_evidence for query in self.queries):
            for document in self._inputs.stream():
                yield document.id, document.text, [query.id for query in document.wanted]
        else:
            yield from ((document_id, "", query_ids) for document_id, query_ids in self._inputs.pairs())

    def _results(self) -> Results:
        return Results(self._job.result_file, url=self._job.result_url, read_only=True)


def answer_or_error(row: Row) -> str:
    """Return a row's answer, or its error, or that it was skipped."""
    if row.status == "skipped":
        return "(skipped)"
    return row.answer or "" if row.status == "ok" else f"{row.error_type}: {row.error}"


def confidence(row: Row) -> str:
    """Return in words how sure the model was of an answer; "" if the row does not say."""
    if row.choice_probabilities is not None and row.answer is not None:
        return f"probability {row.choice_probabilities[row.answer]:.2f}"
    if row.agreement is not None:
        return f"agreement {row.agreement:.2f} of {len(row.samples or ())} samples"
    if row.logprob_mean is None or row.logprob_min is None:
        return ""
    return f"log-probability {row.logprob_mean:.2f}, at least {row.logprob_min:.2f}"


def lines(answers: AnswerTable) -> Iterator[str]:
    """Yield a line for each row: document, query, status and answer, with tabs between them."""
    for document_id, rows in answers:
        for row in filter(None, rows.values()):
            cells = (document_id, row.query_id, row.status, answer_or_error(row))
            yield "\t".join(" ".join(_printable_text(cell).split()) for cell in cells)


def tables(answers: AnswerTable, console: Console, full: bool = False) -> Iterator[Table]:
    """Yield the lines of a table: a line for each document, and as many queries across as the console has room for.

    The table is repeated for the next queries, and so on. Each line is a rich table of its own, so that memory stays
    small. full: do not cut long answers.
    """
    id_width = min(_MOST_ID_WIDTH, max(map(cell_len, answers.ids()), default=0))
    room = console.width - id_width
    across = max(1, min(len(answers.queries), room // (_LEAST_WIDTH + _GAP)))
    width = max(1, room // across - _GAP)
    for start in range(0, len(answers.queries), across):
        band = answers.queries[start : start + across]
        widths = [id_width, *[width] * len(band)]
        heading = [Text(_printable_text(query.id), "bold") for query in band]
        yield _line([Text(""), *heading], widths)
        for document_id, rows in answers:
            cells = [
                _cell(answers, rows[query.id], console, width, full) if query.id in rows else Text() for query in band
            ]
            yield _line([Text(_printable_text(document_id), "bold"), *cells], widths)


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Table:
    line = Table.grid(padding=(0, _GAP, 1, 0))
    for width in widths:
        line.add_column(width=width, overflow="fold")
    line.add_row(*cells)
    return line


def _cell(answers: AnswerTable, row: Row | None, console: Console, width: int, full: bool) -> Text:
    if row is None:
        return Text("open", "dim")
    text = Text(_printable_text(answer_or_error(row)), "red" if row.status == "error" else "")
    if row.is_cut and row.status == "ok":
        text.append(f" [cut off at {row.answer_tokens} tokens]", "dim")
    wrapped = list(text.wrap(console, width, overflow="fold"))
    if not full and len(wrapped) > LINES:
        wrapped = [*wrapped[: LINES - 1], Text("…", "dim")]
    for passage in answers.passages(row):
        quoted = Text.assemble(
            (f"» page {passage.page}: " if passage.page else "» ", "dim"),
            (_last_words(_printable_text(passage.before), 40), "dim"),
            (_printable_text(passage.quote), "italic"),
            (_first_words(_printable_text(passage.after), 40), "dim"),
        )
        wrapped = [*wrapped, *quoted.wrap(console, width, overflow="fold")]
    return Text("\n").join(wrapped)


def _last_words(text: str, most: int) -> str:
    """Return the end of a text, of that many characters at most, without the rest of a word that is cut."""
    return _CUT_FIRST.sub("", text[-most - 1 :], 1) if len(text) > most else text


def _first_words(text: str, most: int) -> str:
    """Return the beginning of a text, of that many characters at most, without the rest of a word that is cut."""
    return _CUT_LAST.sub("", text[: most + 1], 1) if len(text) > most else text


def _printable_text(text: str) -> str:
    return printable(text.replace("\r\n", "\n").expandtabs(4))
