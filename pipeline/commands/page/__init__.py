"""Pages for a browser, each one HTML file that loads no other: a job's answers with filters, and titled tables.

The texts are untrusted, so all of them are escaped, and the page's security policy allows no script or style but its
own.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.commands.show import AnswerTable, answer_or_error, confidence
from pipeline.files.atomic import output_file


def write_page(path: Path, name: str, answers: AnswerTable) -> None:
    """Write the page of a job's answers, one document after the other. Raises OutputError as `write_template` does."""
    write_template(
        path,
        "page.html",
        name=name,
        queries=answers.queries,
        answers=answers,
        answer_or_error=answer_or_error,
        confidence=confidence,
    )


def write_template(path: Path, template: str, **values: object) -> None:
    """Write a page from a template of this folder. Raises OutputError if the file cannot be written."""
    environment = Environment(loader=PackageLoader(__name__, ""), autoescape=True, undefined=StrictUndefined)
    files = resources.files(__name__)
    style, script = (Markup((files / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    chunks = environment.get_template(template).generate(values, style=style, script=script, digest=_digest)
    with output_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(chunks)


def _digest(content: str) -> str:
    """Return the digest by which a content security policy allows a script or a style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
