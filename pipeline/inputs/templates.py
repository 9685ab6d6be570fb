"""Jinja templates and expressions over a row's columns, in a sandbox. Knows no prompts and no files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from pipeline.errors import JobError


def environment() -> SandboxedEnvironment:
    """Where every name is a column, and a null is no text."""
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, finalize=lambda value: "" if value is None else value)
    # Every name in a template is a column, even one called `range` or `dict`.
    sandbox.globals.clear()
    return sandbox


def checked(key: str, source: str) -> str:
    """A template that is well-formed. Raises JobError, which names ``key``, where it is not."""
    try:
        environment().from_string(source)
    except TemplateSyntaxError as error:
        raise JobError(f"{key}: line {error.lineno} of the template: {error.message}") from None
    return source


class Expression:
    """What is written between `{{` and `}}`, to be evaluated row by row.

    columns: those that it uses. Raises JobError where it is none, or uses no column.
    """

    def __init__(self, key: str, source: str) -> None:
        sandbox = environment()
        try:
            self._evaluate = sandbox.compile_expression(source, undefined_to_none=False)
        except TemplateSyntaxError as error:
            raise JobError(f"{key}: {error.message}: {source}") from None
        self.columns = frozenset(meta.find_undeclared_variables(sandbox.parse(f"{{{{ ({source}) }}}}")))
        if not self.columns:
            raise JobError(f"{key} uses no column: {source}; write a condition such as year >= 2020 and lang == 'en'")

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """The value for a row; raises whatever goes wrong."""
        return self._evaluate(values)
