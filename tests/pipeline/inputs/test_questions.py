"""What texts and conditions of queries may do, and what they may not."""

from __future__ import annotations

import time

import pytest

from benches.fuzz_questions import fuzz
from pipeline.errors import JobError, PromptFailed
from pipeline.inputs import time_limit
from pipeline.inputs.documents import Document
from pipeline.inputs.questions import Question, QuestionWriter, chain_of, is_template, question_columns
from pipeline.inputs.templates import used_names
from pipeline.job.job import Documents, Query

A = Query(id="a", text="A?")
J = Query(id="j", text="J?", json_schema='{"type": "object"}')
ANSWERS = {"a": "Ada", "j": '{"n": 3, "owner": "Löwe"}'}


def written(text: str, answers: dict[str, str | None] | None = None) -> str:
    query = Query(id="q", text=text, template=True)
    document = Document("d", "A paper.", {"id": "d", "text": "A paper.", "title": None, "answers": "x"}, [A, J, query])
    chain_of(document.queries)
    return QuestionWriter(Documents(path="p")).write(document, query, ANSWERS | (answers or {})).text


def is_asked(when: str, answers: dict[str, str | None] | None = None) -> bool:
    query = Query(id="q", text="Q?", when=when)
    document = Document("d", "A paper.", {"id": "d", "text": "A paper.", "title": None}, [A, J, query])
    return QuestionWriter(Documents(path="p")).is_asked(document, query, ANSWERS | (answers or {}))


def test_the_names_that_a_text_uses_are_found_once() -> None:
    queries = [Query(id="once", text="Who is {{ title }}?", template=True, max_tokens=n) for n in (1, 2, 3)]
    before = used_names.cache_info()
    assert question_columns(queries, Documents(path="p")) == {"title"}
    after = used_names.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Who is {{ answers.a }}?", "Who is Ada?"),
        ("  {{ answers['a'] | upper }}\n", "ADA"),
        (
            "{{ answers.j.owner }} has {{ answers.j.n + 1 }} of {{ answers.j }}",
            'Löwe has 4 of {"n": 3, "owner": "Löwe"}',
        ),
        ("{{ id }}: {{ text }}{{ title }}", "d: A paper."),
        ("{{ row['answers'] }} and {{ answers.a }}", "x and Ada"),
        ("{% if answers.a %}yes{% else %}no{% endif %}", "yes"),
    ],
)
def test_what_is_filled_in(text: str, expected: str) -> None:
    assert written(text) == expected


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("answers.a == 'Ada'", True),
        ("answers.j.n > 3", False),
        ("title > 'b'", False),
        ("answers.a is none or id == 'd'", True),
        ("none", False),
    ],
)
def test_when_a_query_is_asked(when: str, expected: bool) -> None:
    assert is_asked(when) is expected
    assert is_asked("answers.a > 'A'", {"a": None}) is False


def test_what_is_a_template_and_what_is_read_as_it_is() -> None:
    for text in ("{{ answers.a }}", "{% if answers['a'] %}x{% endif %}", "Is {{ (answers.a) }}"):
        assert is_template(Query(id="q", text=text))
    for text in ("{{ title }}", "Use {{x}} in your answers. Then stop.", "answers.a", "{{ x }} answers.a {{ y }}", "{"):
        assert not is_template(Query(id="q", text=text))
    assert not is_template(Query(id="q", text="{{ answers.a }}", template=False))


def test_a_conversation_has_the_earlier_queries_that_were_asked() -> None:
    queries = [A, J, Query(id="p", text="P?", previous=True), Query(id="z", text="Z?")]
    document = Document("d", "t", {"id": "d", "text": "t"}, queries)
    writer = QuestionWriter(Documents(path="p"))
    assert writer.write(document, queries[2], {"a": "Ada", "j": None}) == Question("P?", (("A?", "Ada"),))
    assert chain_of(queries).uses("p") == ("a", "j")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ answers.a.__class__ }}", "access to attribute '__class__'"),
        ("{{ answers.a | attr('__class__') }}", "__class__"),
        ("{{ ''['format'](1) }}", "unsafe"),
        ("{{ answers.a.format(1) }}", "unsafe"),
        ("{{ answers.a.center(10 ** 9) }}", "a number above 100,000"),
        ("{{ answers.a | center(10 ** 9) }}", "a number above 100,000"),
        ("{{ '%999999999d' % 1 }}", "the text would be too long"),
        ("{{ 'x' * 10 ** 9 }}", "would be too large"),
        ("{% for a in text * 999 %}{{ text * 999 }}{% endfor %}", "it makes more than 1,048,576 characters"),
        ("{{ answers.a.upper }}", "has no text"),
        ("{{ answers.a.upper ~ '!' }}", "has no text of its own"),
        ("{% include 'other' %}", "no loader"),
        ("{{ '' }}", "nothing is left of it"),
    ],
)
def test_what_a_text_may_not_do_fails_its_row(text: str, reason: str) -> None:
    with pytest.raises(PromptFailed, match=reason):
        written(text)


def test_a_text_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 0.3)
    loop = "{% for a in text %}" * 9 + "{% endfor %}" * 9
    started = time.monotonic()
    with pytest.raises(PromptFailed, match="it took longer than"):
        written(loop)
    with pytest.raises(PromptFailed, match="it took longer than"):
        is_asked("(text * 400000) | map('string') | map('string') | list | length > 3")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "text", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}", "{{ 1.x and 2 }}"]
)
def test_what_python_cannot_compile_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(JobError, match="queries: the text of 'q': ") as error:
        written(text)
    assert len(str(error.value).splitlines()) == 1


def test_an_address_that_the_document_has_is_text() -> None:
    assert written("{{ answers.a }}", {"a": "<f at 0x7f00aa11bb>"}) == "<f at 0x7f00aa11bb>"


def test_odd_questions_are_refused_or_asked() -> None:
    """A few of those that benches/fuzz_questions.py makes."""
    counts = fuzz(120, seed=3)
    assert not [name for name in counts if name.startswith(("escape", "hang", "traceback", "refused in"))]
    assert {"asked", "refused", "row error PromptFailed"} <= set(counts)
