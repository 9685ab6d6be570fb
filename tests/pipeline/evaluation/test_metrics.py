"""Metrics of one answer, beside values that were worked out by hand."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from pipeline.evaluation.gold import Gold, Span
from pipeline.evaluation.metrics import date_in, evidence_f1, gold_date, gold_number, number_in, score_answer, score_row
from pipeline.output.rows import Row


def test_texts_are_compared_as_squad_compares_them() -> None:
    # "acme" and "corporation" of 3 words of the answer and 4 of the gold: 2 * 2 / 7
    scores = score_answer("the Acme Corporation, Berlin", ["Acme Corporation of Delaware"])
    assert scores == {"exact": 0, "normalised": 0, "f1": pytest.approx(4 / 7)}
    assert score_answer("The Acme.", ["acme"]) == {"exact": 0, "normalised": 1, "f1": 1}
    assert score_answer(" Acme\n", ["Acme"]) == {"exact": 1, "normalised": 1, "f1": 1}
    # Of "yes", the answer has two: only one of them is common.
    assert score_answer("yes yes", ["yes no"])["f1"] == pytest.approx(0.5)


def test_the_best_of_several_gold_answers_counts() -> None:
    assert score_answer("Delaware", ["State of Delaware", "delaware"]) == {"exact": 0, "normalised": 1, "f1": 1}


def test_an_empty_gold_answer_wants_an_empty_answer() -> None:
    assert score_answer("", []) == {"exact": 1, "normalised": 1, "f1": 1}
    assert score_answer("None.", [])["f1"] == 0
    assert score_answer(None, []) == {"exact": 0, "normalised": 0, "f1": 0}  # it failed
    assert score_answer("anything", None) == {}


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("The fee is $1,250.00 in all.", "1250", 1),
        ("1.5 million dollars", "USD 1,500,000", 1),
        ("30 days", "30", 1),
        ("30 days, or 60 if asked", "30", 0),  # which one is meant?
        ("about -5 %", "-5%", 1),
        ("5 million", "5", 0),
        ("thirty", "30", 0),
        ("version 1.2.3", "1.2", 0),
    ],
)
def test_numbers_are_compared_by_value(answer: str, gold: str, right: int) -> None:
    assert score_answer(answer, [gold])["number"] == right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("€ 12.50", "12.50"),
        ("1,234", "1234"),
        (".5", "0.5"),
        ("12,50", None),
        ("30 days", None),
        ("Section 3", None),
        ("1 or 2", None),
    ],
)
def test_only_a_gold_answer_that_is_nothing_but_a_number_is_one(text: str, value: str | None) -> None:
    assert gold_number(text) == (None if value is None else Decimal(value))


def test_a_number_that_is_said_twice_is_one_number() -> None:
    assert number_in("5, that is 5.0") == 5


@pytest.mark.parametrize(
    "text",
    [
        "2029-05-03",
        "3 May 2029",
        "May 3rd, 2029",
        "the 3rd day of May, 2029",
        "3.5.2029",
        "03 Sept. 2029",
        "9/13/29",
        "13/09/2029",
    ],
)
def test_dates_are_read_in_the_usual_forms(text: str) -> None:
    month, day = (9, 13) if "13" in text else (9 if "Sept" in text else 5, 3)
    assert gold_date(text) == date_in(f"It ends on {text}.") == date(2029, month, day)


@pytest.mark.parametrize("text", ["5/3/2029", "31 February 2029", "from 3 May 2029 to 4 May 2029", "May 2029", "maybe"])
def test_a_date_that_could_be_another_is_none(text: str) -> None:
    assert date_in(text) is None


def test_dates_are_compared_by_day() -> None:
    assert score_answer("It ends on May 3, 2029.", ["2029-05-03"])["date"] == 1
    assert score_answer("4 May 2029", ["2029-05-03"])["date"] == 0
    assert score_answer("9/13/2029", ["2029-09-13"])["date"] == 1


def test_evidence_is_compared_by_the_places_of_its_characters() -> None:
    # 10 of 20 characters found, of 30 that are gold: precision .5, recall 1/3
    assert evidence_f1([Span(0, 20)], [Span(10, 20), Span(50, 70)]) == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert evidence_f1([Span(0, 10), Span(5, 15)], [Span(0, 15)]) == 1  # characters found twice count once
    assert evidence_f1([Span(0, 10)], [Span(10, 20)]) == 0


def test_evidence_is_compared_by_text_where_no_place_is_known() -> None:
    gold = [Span(-1, -1, "This Agreement ends\non 3 May 2029.")]
    assert evidence_f1([Span(7, 41, "This agreement ends on 3 May 2029.")], gold) == 1
    # "ends on 3 May" has 13 characters of 34: precision 1, recall 13/34
    assert evidence_f1([Span(0, 13, "ends on 3 May")], gold) == pytest.approx(2 * (13 / 34) / (1 + 13 / 34))
    assert evidence_f1([Span(0, 20, "The agreement is long")], gold) == 0  # common words are no overlap


def test_no_evidence_is_right_where_there_is_none() -> None:
    none = Gold(evidence=[])
    assert score_row(Row("d", "q", "ok", "0", answer="x"), none) == {"evidence_f1": 1, "evidence_overlap": 1}
    assert score_row(Row("d", "q", "error", "0"), none) == {"evidence_f1": 0, "evidence_overlap": 0}
    assert score_row(None, none) == {"evidence_f1": 0, "evidence_overlap": 0}
