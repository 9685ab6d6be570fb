"""How right one answer is: as a text, as a number, as a date, and by its evidence.

    exact             the same text, apart from white space at both ends
    normalised        the same text without case, punctuation, English articles and superfluous spaces (SQuAD)
    f1                harmonic mean of precision and recall of normalised words (SQuAD)
    number            the gold answer is a number; the answer holds one number, which has the same value
    date              the gold answer is a date; the answer holds one date, which is the same day
    evidence_f1       harmonic mean of precision and recall of characters of the quotations
    evidence_overlap  any quotation overlaps the gold evidence

The first three are those of Rajpurkar et al. 2016 (arXiv 1606.05250). If there are several gold answers, the best of
them counts. A metric that does not apply, such as the number of a gold answer that is no number, has no value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from difflib import SequenceMatcher

from pipeline.evaluation.gold import Gold, Span
from pipeline.models.normalise import normalised
from pipeline.output.rows import Row

METRICS = ("exact", "normalised", "f1", "number", "date", "evidence_f1", "evidence_overlap")

_MULTIPLES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMBER = (
    r"(?<![\w.,−-])(?P<sign>[-−]?)[$€£¥]?\s?(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)"
    rf"(?:\s?(?P<multiple>{'|'.join(_MULTIPLES)})\b)?"
)
_A_NUMBER = re.compile(_NUMBER, re.IGNORECASE)
_NOTHING_BUT_A_NUMBER = re.compile(
    rf"(?:[a-z]{{3}}\s?)?{_NUMBER}\s?(?:%|per\s?cent|[$€£¥]|[a-z]{{3}}|dollars|euros)?", re.IGNORECASE
)

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_A_DATE = re.compile(
    rf"(?<![\w/.-])(?:(?P<iso>\d{{4}}-\d{{1,2}}-\d{{1,2}})"
    rf"|(?:the\s+)?(?P<day_month>{_DAY}\s+(?:day\s+of\s+|of\s+)?{_MONTH},?\s+\d{{4}})"
    rf"|(?P<month_day>{_MONTH}\s+{_DAY},?\s+\d{{4}})"
    r"|(?P<slashes>\d{1,2}/\d{1,2}/(?:\d{4}|\d{2}))"
    r"|(?P<points>\d{1,2}\.\d{1,2}\.\d{4}))(?![\w/-])",
    re.IGNORECASE,
)
_SHORTEST_RUN = 20  # characters; shorter common runs of two texts are words that any text has


def score_row(row: Row | None, gold: Gold) -> dict[str, float]:
    """Return the metrics of a row that apply, each from 0 to 1. A row that is missing or failed has 0 in all."""
    answered = row is not None and row.status == "ok"
    scores = score_answer(row.answer or "" if row is not None and answered else None, gold.answers)
    if gold.evidence is not None:
        quotations = row.evidence if row is not None and answered else None
        found = [Span(each["start"], each["end"], each["quote"]) for each in quotations or ()]
        f1 = evidence_f1(found, gold.evidence) if answered else 0.0
        scores |= {"evidence_f1": f1, "evidence_overlap": float(f1 > 0)}
    return scores


def score_answer(answer: str | None, gold: Sequence[str] | None) -> dict[str, float]:
    """Return the metrics of an answer. answer: None if there is none. gold: right answers; None if unknown."""
    if gold is None:
        return {}
    right = gold or ("",)
    numbers, dates = [gold_number(each) for each in right], [gold_date(each) for each in right]
    scores = {"exact": 0.0, "normalised": 0.0, "f1": 0.0}
    if answer is not None:
        scores["exact"] = float(answer.strip() in {each.strip() for each in right})
        scores["normalised"] = float(normalised(answer) in map(normalised, right))
        scores["f1"] = max(token_f1(answer, each) for each in right)
    if None not in numbers:
        scores["number"] = float(answer is not None and number_in(answer) in numbers)
    if None not in dates:
        scores["date"] = float(answer is not None and date_in(answer) in dates)
    return scores


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of normalised words. Two texts without words are equal.

    >>> token_f1("the board of Acme", "Acme Ltd.")
    0.4
    """
    ours, theirs = normalised(answer).split(), normalised(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


# ---- numbers and dates


def number_in(text: str) -> Decimal | None:
    """Return the value of the only number in a text; None if there is none, or several values.

    Commas separate thousands, and a point the decimals. Signs of currencies and of percent do not count.

    >>> number_in("a fee of $1.5 million, payable at once")
    Decimal('1500000.0')
    """
    values = {_value(match) for match in _A_NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 else None


def gold_number(text: str) -> Decimal | None:
    """Return the value of a text that is nothing but a number, perhaps with a currency or percent, or None."""
    match = _NOTHING_BUT_A_NUMBER.fullmatch(text.strip().rstrip("."))
    return _value(match) if match else None


def date_in(text: str) -> date | None:
    """Return the only date in a text; None if there is none, several, or one that can be read as two days.

    >>> date_in("It ends on the 3rd day of May, 2029.")
    datetime.date(2029, 5, 3)
    """
    days = {_day(match) for match in _A_DATE.finditer(text)}
    return days.pop() if len(days) == 1 else None


def gold_date(text: str) -> date | None:
    """Return the date that a text is and nothing else, or None."""
    match = _A_DATE.fullmatch(text.strip().rstrip("."))
    return _day(match) if match else None


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", "")) * _MULTIPLES.get((match["multiple"] or "").lower(), 1)
    return -value if match["sign"] else value


def _day(match: re.Match[str]) -> date | None:
    """Return the date of a match; None if there is no such day, or if month and day may be read either way."""
    form, text = str(match.lastgroup), match[str(match.lastgroup)].lower()
    first, second, third = re.findall(r"\d+|(?:" + "|".join(_MONTHS) + ")", text)
    if form == "iso":
        readings = [(first, second, third)]
    elif form == "month_day":
        readings = [(third, first, second)]
    elif form == "slashes":
        readings = [(third, first, second), (third, second, first)]
    else:
        readings = [(third, second, first)]
    days = {day for year, month, day_ in readings if (day := _make_date(year, month, day_))}
    return days.pop() if len(days) == 1 else None


def _make_date(year: str, month: str, day: str) -> date | None:
    number = int(year)
    if len(year) == 2:
        number += 1900 if number > 68 else 2000  # as in POSIX
    try:
        return date(number, _MONTHS.index(month) + 1 if month in _MONTHS else int(month), int(day))
    except ValueError:
        return None


# ---- evidence


def evidence_f1(found: Sequence[Span], gold: Sequence[Span]) -> float:
    """Return the F1 of characters. Without gold evidence, finding none is right.

    Gold spans with places are compared by place. Those without are compared by text: a quotation overlaps a gold text
    in their longest common run of characters, if that is a whole one of the two, or has at least 20 characters and half
    of the shorter one. Case and white space do not count.
    """
    if not found or not gold:
        return float(not found and not gold)
    if all(span.has_place for span in gold):
        ours, theirs = _characters(found), _characters(gold)
        common = ours + theirs - _characters([*found, *gold])
        return 2 * common / max(1, ours + theirs)
    quotes, texts = [_plain(span) for span in found], [_plain(span) for span in gold]
    runs = [[_common_run(quote, text) for text in texts] for quote in quotes]
    precision = sum(map(max, runs)) / max(1, sum(map(len, quotes)))
    recall = sum(map(max, zip(*runs, strict=True))) / max(1, sum(map(len, texts)))
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def _characters(spans: Iterable[Span]) -> int:
    """Return how many characters lie in at least one of the spans."""
    count = reached = 0
    for span in sorted(spans, key=lambda span: span.start):
        count += max(0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return count


def _plain(span: Span) -> str:
    return " ".join(span.text.lower().split())


def _common_run(quote: str, text: str) -> int:
    """Return the length of the longest common run of characters, or 0 if it is too short to mean anything."""
    length = SequenceMatcher(None, quote, text, autojunk=False).find_longest_match().size
    shorter = min(len(quote), len(text))
    return length if length == shorter or length >= max(_SHORTEST_RUN, shorter / 2) else 0
