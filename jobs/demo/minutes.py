"""Invented minutes of meetings in which every fact is stated once, with the questions that ask for the facts.

It knows how minutes are put together and writes the demo's documents and gold answers:

    python jobs/demo/minutes.py

It knows no tokenizer and no model; the length of a text is counted in characters. Everything follows from the
seed. One in five of all full names, codes and references is reserved for the demo, so that a model trained on
minutes made here has never seen one of those. Dates, amounts, numbers and places are few, and any may be drawn
anywhere: a model that never saw some of them would only learn that these are never the answer.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import phrases
import pyarrow as pa
import pyarrow.parquet as pq

SYSTEM = "You answer from the document only."
SUMMARY_ID = "summary"
SUMMARY_QUESTION = "Summarize the decisions."

T = TypeVar("T")
Slot = tuple[str, str]
"""A kind of `phrases.KINDS` and a subject."""

DEMO_SLOTS: dict[str, Slot] = {
    "supplier-review-owner": ("owner", "supplier review"),
    "pilot-owner": ("owner", "pilot scheme"),
    "pilot-start": ("start", "pilot scheme"),
    "training-budget": ("budget", "staff training"),
    "pilot-budget": ("budget", "pilot scheme"),
    "roof-company": ("company", "roof repair"),
    "archive-code": ("code", "archive room"),
    "insurance-reference": ("reference", "insurance policy"),
    "lease-deadline": ("deadline", "lease agreement"),
    "dinner-venue": ("venue", "annual dinner"),
    "dinner-opener": ("opener", "annual dinner"),
    "open-day-date": ("day", "open day"),
    "chairs-ordered": ("quantity", "folding chairs"),
    "help-desk-extension": ("extension", "help desk"),
}
DEMO_SEED = 20_260
DEMO_CHARACTERS = (
    17_600, 18_200, 18_800, 19_400, 20_000, 20_600, 21_200, 22_000, 23_000, 24_500, 30_000, 40_000,
)  # fmt: skip
SENTENCES = ("talk",) * 15 + ("noise",) * 3 + ("aside", "recap")
OTHER_FACTS = 8
"""Facts in a demo document that no query asks for, as distractors."""


@dataclass(frozen=True)
class Fact:
    kind: str
    subject: str
    answer: str
    statement: str
    depth: float
    """Where the statement begins, as a share of the text: 0 is the first character, 1 the end."""

    @property
    def question(self) -> str:
        return phrases.KINDS[self.kind].question.format(s=self.subject)


@dataclass(frozen=True)
class Minutes:
    title: str
    date: str
    text: str
    facts: tuple[Fact, ...]
    decisions: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The answer to `SUMMARY_QUESTION`: the decisions in order, one a line."""
        return "\n".join(f"{number}. {decision}" for number, decision in enumerate(self.decisions, 1))


class Writer:
    """Draws words and values for one document."""

    def __init__(self, rng: random.Random, for_demo: bool) -> None:
        self.rng = rng
        self.for_demo = for_demo
        self.drawn: dict[str, Callable[[], str]] = {
            "person": self._person,
            "group_start": lambda: self.say("group").capitalize(),
            "outsider": self._full_name,
            "placename": self._place_name,
            "date": lambda: f"{self.between(1, 28)} {self.pick(phrases.MONTHS)} {self.between(2024, 2031)}",
            "amount": lambda: f"{self._thousands(self.between(12, 990) * 50)} euros",
            "code": lambda: f"{self._letters(1)}{self.between(1, 9)}-{self.between(1000, 9999)}",
            "reference": lambda: f"{self._letters(2)}-{self.between(10000, 99999)}",
            "quantity": lambda: self._thousands(self.between(103, 3999)),
            "extension": lambda: str(self.between(2100, 9899)),
            "small": lambda: self.pick(phrases.SMALL_NUMBERS),
            "hundreds": lambda: f"{self.between(2, 19) * 50}",
            "month": lambda: self.pick(phrases.MONTHS),
        }
        self.attendees = [self.say("outsider").split() for _ in range(self.between(6, 9))]

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.rng.random() * (high - low + 1))

    def say(self, rule: str) -> str:
        """One expansion of a rule of `phrases.RULES`, or of a drawn symbol."""
        if rule in self.drawn:
            return self._from_pool(self.drawn[rule]) if rule in RESERVABLE else self.drawn[rule]()
        if rule in phrases.SUBJECTS:
            return self.pick(phrases.SUBJECTS[rule])
        return self.fill(self.pick(phrases.RULES[rule]))

    def fill(self, template: str, **given: str) -> str:
        """The template with every rule in braces expanded."""
        return "".join(
            part if literal else (given[part] if part in given else self.say(part))
            for literal, part in _parts(template)
        )

    def _from_pool(self, draw: Callable[[], str]) -> str:
        while True:
            value = draw()
            if is_reserved(value) == self.for_demo:
                return value

    def _full_name(self) -> str:
        return f"{''.join(map(self.pick, phrases.FIRST_NAMES))} {self._place_name()}"

    def _place_name(self) -> str:
        return "".join(map(self.pick, phrases.SURNAMES))

    def _person(self) -> str:
        first, last = self.pick(self.attendees)
        return first if self.rng.random() < 0.75 else f"{first} {last}"

    def _letters(self, count: int) -> str:
        return "".join(self.pick(string.ascii_uppercase) for _ in range(count))

    @staticmethod
    def _thousands(number: int) -> str:
        return f"{number:,}"


RESERVABLE = frozenset({"outsider", "code", "reference"})
_PARTS: dict[str, tuple[tuple[bool, str], ...]] = {}


def _parts(template: str) -> tuple[tuple[bool, str], ...]:
    """The template as (is literal, text or rule name) pairs."""
    if template not in _PARTS:
        pieces = re.split(r"\{(\w+)\}", template)
        _PARTS[template] = tuple((index % 2 == 0, piece) for index, piece in enumerate(pieces) if piece)
    return _PARTS[template]


def is_reserved(value: str) -> bool:
    """Whether a full name, code or reference is one of the demo's, never used in training."""
    return zlib.crc32(value.encode()) % 5 == 0


def write_minutes(
    seed: str, characters: int, asked: Sequence[Slot] = (), other_facts: int = 20, decisions: int = 5,
    for_demo: bool = False,
) -> Minutes:  # fmt: skip
    """Minutes of about `characters` characters that state the asked facts, and other ones, once each.

    seed: the same seed and arguments give the same minutes.
    asked: facts that must be there; `other_facts` more are drawn.
    for_demo: take the values from the reserved fifth instead of the rest.
    """
    rng = random.Random(seed)
    while True:
        minutes = _compose(Writer(rng, for_demo), characters, asked, other_facts, decisions)
        stated_once = all(
            minutes.text.count(fact.answer) == 1 and minutes.text.count(fact.statement) == 1 for fact in minutes.facts
        )
        if stated_once and all(minutes.text.count(decision) == 1 for decision in minutes.decisions):
            return minutes


def _compose(writer: Writer, characters: int, asked: Sequence[Slot], other_facts: int, decisions: int) -> Minutes:
    slots = [*asked, *_other_slots(writer.rng, asked, other_facts)]
    writer.rng.shuffle(slots)
    stated = [_state(writer, slot) for slot in slots]
    resolved = [writer.fill(writer.pick(phrases.DECISIONS)) for _ in range(decisions)]

    places: list[Slot | int] = [*slots, *([-1] * decisions)]
    writer.rng.shuffle(places)
    number = 0
    statement_of = {slot: statement for slot, (_, statement) in zip(slots, stated, strict=True)}
    inserted: list[str] = []
    for place in places:
        if isinstance(place, int):
            number += 1
            lead = writer.pick(phrases.DECISION_LEADS)
            inserted.append(writer.fill(lead, k=str(number), d=resolved[number - 1]))
        else:
            inserted.append(statement_of[place])

    title, date, opening = _opening(writer)
    closing = f"The chair counted {decisions} decisions, thanked everyone and closed the meeting."
    body = _talk(writer, characters - len(opening) - len(closing), inserted)
    text = f"{opening}\n\n{body}\n\n{closing}"
    facts = tuple(
        Fact(kind, subject, answer, statement, text.index(statement) / len(text))
        for (kind, subject), (answer, statement) in zip(slots, stated, strict=True)
    )
    return Minutes(title, date, text, facts, tuple(resolved))


def _other_slots(rng: random.Random, asked: Sequence[Slot], count: int) -> list[Slot]:
    """Slots that share their subjects where they can, so that a subject alone tells nothing."""
    subjects = {subject for _, subject in asked}
    for names in phrases.SUBJECTS.values():
        subjects.update(rng.sample(names, 3))
    candidates = [
        (kind, subject)
        for kind, form in phrases.KINDS.items()
        for subject in phrases.SUBJECTS[form.subjects]
        if subject in subjects and (kind, subject) not in asked
    ]
    return rng.sample(candidates, min(count, len(candidates)))


def _state(writer: Writer, slot: Slot) -> tuple[str, str]:
    """(answer, the sentence that states it)."""
    kind, subject = slot
    answer = writer.say(phrases.KINDS[kind].value)
    core = writer.pick(phrases.KINDS[kind].statements).format(s=subject, v=answer)
    sentence = f"{writer.fill(writer.pick(phrases.LEADS))}{core}."
    return answer, sentence[0].upper() + sentence[1:]


def _opening(writer: Writer) -> tuple[str, str, str]:
    date = writer.say("date")
    title = f"Minutes of the {writer.say('board')} of the {writer.say('body')}"
    present = [f"{first} {last}" for first, last in writer.attendees]
    named = [f"{name} ({role})" for name, role in zip(present, phrases.ROLES, strict=False)]
    lines = (title, f"Held on {date} at {writer.say('venue')}", f"Present: {', '.join(named)}")
    return title, date, "\n".join(lines)


def _talk(writer: Writer, characters: int, inserted: Sequence[str]) -> str:
    """Talk under agenda items, with the inserted sentences spread evenly over its length."""
    spread = [(index + writer.rng.random()) / len(inserted) for index in range(len(inserted))]
    sentences: list[str] = []
    length, waiting = 0, 0
    while length < characters or waiting < len(inserted):
        if waiting < len(inserted) and length >= spread[waiting] * characters * 0.98:
            sentences.append(inserted[waiting])
            waiting += 1
        else:
            sentence = writer.say(writer.pick(SENTENCES))
            sentences.append(sentence[0].upper() + sentence[1:])
        length += len(sentences[-1]) + 1
    return _paragraphs(writer, sentences)


def _paragraphs(writer: Writer, sentences: Sequence[str]) -> str:
    titles = writer.rng.sample(phrases.RULES["agenda"], len(phrases.RULES["agenda"]))
    blocks: list[str] = []
    start, left_in_item, item = 0, 0, 0
    while start < len(sentences):
        if left_in_item == 0:
            blocks.append(f"{item + 1}. {titles[item % len(titles)]}")
            item, left_in_item = item + 1, writer.between(3, 6)
        size = writer.between(3, 7)
        blocks.append(" ".join(sentences[start : start + size]))
        start, left_in_item = start + size, left_in_item - 1
    return "\n\n".join(blocks)


def demo_minutes() -> list[Minutes]:
    """The demo's documents: the same ones at every call."""
    asked = tuple(DEMO_SLOTS.values())
    return [
        write_minutes(f"{DEMO_SEED}-{index}", characters, asked, OTHER_FACTS, 4 + index % 3, for_demo=True)
        for index, characters in enumerate(DEMO_CHARACTERS)
    ]


def tables(documents: Sequence[Minutes]) -> tuple[pa.Table, pa.Table]:
    """The documents and their gold answers, as tables."""
    rows, gold = [], []
    for index, minutes in enumerate(documents, 1):
        document_id = f"minutes-{index:02}"
        rows.append({"id": document_id, "title": minutes.title, "date": minutes.date, "text": minutes.text})
        gold.append((document_id, SUMMARY_ID, minutes.summary, None, None))
        fact_of = {(fact.kind, fact.subject): fact for fact in minutes.facts}
        for query_id, slot in DEMO_SLOTS.items():
            fact = fact_of[slot]
            gold.append((document_id, query_id, fact.answer, round(fact.depth, 4), fact.statement))
    schema = pa.schema(
        [("document_id", pa.string()), ("query_id", pa.string()), ("answer", pa.string()),
         ("depth", pa.float64()), ("statement", pa.string())]
    )  # fmt: skip
    named = [dict(zip(schema.names, row, strict=True)) for row in gold]
    return pa.Table.from_pylist(rows), pa.Table.from_pylist(named, schema=schema)


def main() -> None:
    folder = Path(__file__).parent
    documents, gold = tables(demo_minutes())
    pq.write_table(documents, folder / "minutes.parquet", compression="zstd")
    pq.write_table(gold, folder / "gold.parquet", compression="zstd")
    print(f"{documents.num_rows} documents, {gold.num_rows} gold answers in {folder}")


if __name__ == "__main__":
    main()
