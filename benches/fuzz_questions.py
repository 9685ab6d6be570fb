"""Makes thousands of odd texts and conditions of queries, asks each of them, and counts what comes of it.

    python -m benches.fuzz_questions [--questions 10000] [--seed 0]

Templates and expressions are put together at random from what jinja2 knows, from ways out of sandboxes that have been
published, and from what grows without bound; some are then spoilt. So are the checks of answers. Each is to be refused
by a JobError of one line, or to give a question, a skipped row, or a RowError. An escape is a text that shows what
belongs to Python and not to the document; a hang is a question that takes longer than a few times the limit. Memory is
bounded by the limit on texts.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import sys
import time
from collections import Counter
from unittest.mock import patch

from pipeline.errors import JobError, RowError
from pipeline.inputs import time_limit
from pipeline.inputs.documents import Document
from pipeline.inputs.questions import QuestionWriter, chain_of, question_columns
from pipeline.job.job import Documents, Query

LIMIT = 0.3  # seconds of a template, in place of ten
CANARY = "canary-in-the-environment"
_PYTHON = re.compile(r"<(class|module|function|method|bound|built-in|slot|frame|code)\b|object at 0x|canary-in-the-env")
_ANSWERS_IN = re.compile(r"answers(\.\w+|\['b c'\])")
NAMES = ["answers.a", "answers['b c']", "answers.j", "answers.j.n", "answers.none", "title", "year", "text", "id"]
VALUES = [
    *("1", "-1", "0", "2.5", "10 ** 9", "9 ** 99999", "99999999999", "'x'", "'x' * 99999", "''", "none"),
    *("true", "[1, 2]", "{'k': 1}", "()", "'%s'", "'%99999999d'", "'{:>999999999}'", "'{0.__class__}'", "self", "loop"),
    *("answers", "answers.__class__", "answers._Answers__values", "title.__class__.__mro__", "''.__class__.__base__"),
    *("cycler.__init__.__globals__.os", "lipsum.__globals__", "joiner", "namespace", "range(9 ** 9)", "dict", "caller"),
    *("''.format.__self__", "title.format", "title.format_map", "().__class__.__subclasses__()", "config", "request"),
    *(
        "self._TemplateReference__context",
        "self.__init__.__globals__",
        "text.encode",
        "answers.__getitem__",
        "__import__",
    ),
    *("g.__globals__", "(title | map('upper')).gi_frame", "title.join", "text.maketrans", "year.__class__.__doc__"),
]
FILTERS = [
    *("length", "upper", "list", "join", "string", "int", "float", "tojson", "pprint", "first", "sort", "reverse"),
    *("center(999999999)", "center(99)", "indent(999999999)", "indent(99999)", "format(1)", "wordwrap(1)", "xmlattr"),
    *("attr('__class__')", "attr('format')", "map('attr', '__class__')", "map('upper')", "map(attribute='__class__')"),
    *(
        "replace('', 'xxxxxxxx')",
        "replace('x', text)",
        "batch(9)",
        "batch(999999999, 'x')",
        "slice(999999999)",
        "urlize",
    ),
    *(
        "select('in', title)",
        "groupby('__class__')",
        "sum",
        "default('d')",
        "list is matches('(x+x+)+y')",
        "truncate(9)",
        "striptags",
        "random",
        "nope",
    ),
    *("selectattr('__class__')", "dictsort", "filesizeformat", "unique", "trim", "urlencode", "escape", "safe"),
]
CALLS = [
    *(
        "upper()",
        "split()",
        "join([title, title])",
        "center(9 ** 9)",
        "ljust(999999)",
        "zfill(99999999)",
        "expandtabs(9 ** 9)",
    ),
    *(
        "format(title)",
        "format_map({})",
        "replace('', 'yy')",
        "encode()",
        "__class__()",
        "items()",
        "mro()",
        "splitlines()",
    ),
]
OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "!=", "<", ">=", "and", "or", "in", "not in", "is", "if"]
STATEMENTS = [
    "{{% for c in {0} %}}{1}{{% endfor %}}",
    "{{% for c in text %}}{{% for d in text %}}{{% for e in text %}}{1}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "{{% if {0} %}}{1}{{% else %}}no{{% endif %}}",
    "{{% set a = {0} %}}{{% set a = a ~ a ~ a %}}{{% set a = a ~ a ~ a %}}{1}{{{{ a }}}}",
    "{{% macro f(x) %}}{{{{ f(x) }}}}{{{{ f(x) }}}}{{% endmacro %}}{{{{ f({0}) }}}}{1}",
    "{{% include {0} %}}{1}",
    "{{% import {0} as m %}}{1}",
    "{{% extends {0} %}}{1}",
    "{{% set answers = {0} %}}{1}",
    "{{% filter upper %}}{1}{{% endfilter %}}",
    "{{% call f() %}}{1}{{% endcall %}}",
    "{{% raw %}}{1}{{% endraw %}}",
    "{{% with z = {0} %}}{1}{{% endwith %}}",
    "{{% block b %}}{1}{{% endblock %}}",
    "{{% set ns = namespace(x={0}) %}}{1}",
]
ANSWERS = {"a": "Ada — «Löwe» {{ 7 * 7 }}", "b c": "", "j": '{"n": 3, "items": [1, null]}', "none": None}
PIECES = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "'",
    '"',
    "(",
    ")",
    "[",
    "|",
    ".",
    "\\",
    "\n",
    "\0",
    "é",
    "😀",
    "\ud800",
    "_" * 99,
    "9" * 5000,
]
OTHERS = [
    Query(id="a", text="A?"),
    Query(id="b c", text="B?"),
    Query(id="j", text="J?", json_schema='{"type": "object"}'),
    Query(id="none", text="N?", when="id == 'x'"),
]
SOURCE = Documents(path="papers.parquet")
COLUMNS = {"id": "d1", "text": "A paper. " * 300, "title": None, "year": 2020}


def expression(rng: random.Random, depth: int = 0) -> str:
    """An odd expression."""
    way = rng.random()
    if depth > 3 or way < 0.3:
        return rng.choice(NAMES if rng.random() < 0.7 else VALUES)
    if way < 0.5:
        return f"({expression(rng, depth + 1)} | {rng.choice(FILTERS)})"
    if way < 0.62:
        return f"({expression(rng, depth + 1)}).{rng.choice(CALLS)}"
    if way < 0.66:
        return f"{expression(rng, depth + 1)}[{expression(rng, depth + 1)}]"
    if way < 0.69:
        return "(" * (deep := rng.choice((5, 50, 500))) + expression(rng, depth + 1) + ")" * deep
    return f"({expression(rng, depth + 1)} {rng.choice(OPERATORS)} {expression(rng, depth + 1)})"


def template(rng: random.Random, depth: int = 0) -> str:
    """An odd template."""
    if depth > 2 or rng.random() < 0.5:
        return f"Why {{{{ {expression(rng)} }}}}?"
    return rng.choice(STATEMENTS).format(expression(rng), template(rng, depth + 1))


def spoilt(text: str, rng: random.Random) -> str:
    """The text, in one of five cases with something put in, cut out or doubled."""
    if rng.random() > 0.2 or len(text) < 2:
        return text
    start, end = sorted(rng.sample(range(len(text)), 2))
    return rng.choice(
        [text[:start] + text[end:], text[:end] + text[start:], text[:start] + rng.choice(PIECES) + text[end:]]
    )


def outcome(rng: random.Random, writer: QuestionWriter) -> tuple[str, str]:
    """What comes of an odd query, and the query."""
    text = spoilt(template(rng), rng)
    when = spoilt(expression(rng), rng) if rng.random() < 0.5 else None
    check = spoilt(_ANSWERS_IN.sub("answer", expression(rng)), rng) if rng.random() < 0.5 else None
    described, said = f"{text!r} when {when!r} check {check!r}", ""
    started = time.monotonic()
    try:
        try:
            query = Query(id="q", text=text, when=when, template=True, previous=rng.random() < 0.1, check=check)
        except ValueError:
            return "refused by the job's types", described
        document = Document("d1", COLUMNS["text"], COLUMNS, [*OTHERS, query])  # type: ignore[arg-type]
        chain_of(document.queries)
        question_columns([query], SOURCE)  # a run refuses names that are no columns; here they are undefined
        if not writer.is_asked(document, query, ANSWERS):
            said = "skipped"
        else:
            question = writer.write(document, query, ANSWERS)
            refusal = writer.refusal(document, query, str(ANSWERS["a"])) or ""
            said = "escape" if _PYTHON.search(question.text) or CANARY in refusal else "asked"
    except JobError as error:
        said = "refused" if len(str(error).splitlines()) == 1 else "refused in several lines"
    except RowError as error:
        said = "escape" if CANARY in str(error) else f"row error {error.error_type}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = f"traceback: {type(error).__name__}: {error}"[:80]
    return "hang" if time.monotonic() - started > 10 * LIMIT + 2 else said, described


def fuzz(questions: int, seed: int) -> Counter[str]:
    """What came of so many odd queries, by outcome; what should not is printed."""
    rng, counts = random.Random(seed), Counter[str]()
    os.environ["CANARY"] = CANARY
    with patch.object(time_limit, "SECONDS", LIMIT):
        writer = QuestionWriter(SOURCE)
        for _ in range(questions):
            said, described = outcome(rng, writer)
            counts[said] += 1
            if said.startswith(("escape", "hang", "traceback", "refused in")):
                print(f"{said}: {described[:2000]}", file=sys.stderr)
    return counts


def main() -> int:
    """Run the command; returns 1 where something came that should not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = fuzz(options.questions, options.seed)
    for name, count in counts.most_common():
        print(f"{name:40} {count:6}")
    print(f"{'peak memory, MB':40} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:6}")
    return 1 if any(name.startswith(("escape", "hang", "traceback", "refused in")) for name in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
