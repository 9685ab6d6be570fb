"""Evidence of one answer: the turns in which the model quotes from the document, after it has answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import AnswerCutOff, RowError
from pipeline.job.job import Settings
from pipeline.models.output_parser import Answer, OutputParser, RowParser
from pipeline.models.quotations import (
    NEXT_QUESTION,
    NONE,
    QUESTION,
    SLOT_QUESTION,
    EvidenceFields,
    Passages,
)


class Turn:
    """Asks for quotations with one question, up to ``most`` of them, until the model has no more.

    tokens: of the conversation so far, behind the prefix. quotes: those that were found.
    """

    def __init__(self, tokens: Sequence[int], question: str, most: int, parser: OutputParser) -> None:
        self._parser, self._most, self.is_open = parser, most, most > 0
        self.tokens = [*tokens, *parser.turn_tokens(question)]
        self.quotes: list[str] = []
        self.failure: RowError | None = None

    def start(self, settings: Settings, passages: Passages) -> RowParser:
        """Return the parser of the next quotation."""
        return self._parser.start_quotation(self.tokens, settings, passages)

    def add(self, output: Answer) -> None:
        """Add the model's next quotation. A quotation that was cut off is a part of the document, too."""
        if output.failure is not None and not isinstance(output.failure, AnswerCutOff):
            self.failure, self.is_open = output.failure, False
            return
        quote = output.text.rstrip("\ufffd").strip()  # a character of which the last bytes are missing
        if not quote or quote == NONE or quote in self.quotes:
            self.is_open = False
            return
        self.quotes.append(quote)
        self.is_open = len(self.quotes) < self._most
        self.tokens = [*self.tokens, *output.generated, *self._parser.turn_tokens(NEXT_QUESTION)]


class Evidence:
    """All turns for one answer: one for the answer, and one for each field of its JSON that is a quotation."""

    def __init__(self, tokens: Sequence[int], settings: Settings, answer: Answer, parser: OutputParser) -> None:
        self._answer, self._fields = answer, None
        self.turns: list[Turn] = []
        if answer.failure is not None:
            return
        behind = [*tokens, *answer.generated]
        self.turns = [Turn(behind, QUESTION, settings.evidence, parser)]
        if settings.json_schema is not None:
            self._fields = EvidenceFields(settings.json_schema, answer.text)
            self.turns += [Turn(behind, SLOT_QUESTION.format(field=path), 1, parser) for path in self._fields.paths]

    def answer(self) -> Answer:
        """Return the answer with its quotations. Its failure is that of a turn, if one failed."""
        if not self.turns:
            return self._answer
        if failure := next((turn.failure for turn in self.turns if turn.failure), None):
            return replace(self._answer, failure=failure)
        quotes = list(dict.fromkeys(quote for turn in self.turns for quote in turn.quotes))
        text = self._answer.text
        if self._fields is not None:
            text = self._fields.filled([turn.quotes[0] if turn.quotes else None for turn in self.turns[1:]])
        return replace(self._answer, text=text, quotes=quotes)
