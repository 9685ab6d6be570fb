"""A job's answers as one page of HTML that needs nothing else: the table is written, filters are in its script.

Texts come from anywhere, so all of them are escaped, and the page's policy lets no other script or style run. Knows
how the page is put together; nothing of where answers are.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.commands.show import Answers, said
from pipeline.files.atomic import atomic_file


def write_page(path: Path, name: str, answers: Answers) -> None:
    """Write the page, one document after the other. Raises OutputError where the disk refuses."""
    environment = Environment(loader=PackageLoader(__name__, ""), autoescape=True, undefined=StrictUndefined)
    files = resources.files(__name__)
    style, script = (Markup((files / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    chunks = environment.get_template("page.html").generate(
        name=name, queries=answers.queries, answers=answers, said=said, style=style, script=script, digest=_digest
    )
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(chunks)


def _digest(content: str) -> str:
    """As a content security policy names what may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
