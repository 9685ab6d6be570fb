"""Jinja templates and expressions over the columns of a row, in jinja2's sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from pipeline.errors import JobError


def environment() -> SandboxedEnvironment:
    """Return a sandbox in which every name is a column, and null is written as an empty text."""
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, finalize=lambda value: "" if value is None else value)
    # Every name in a template is a column, even one called `range` or `dict`.
    sandbox.globals.clear()
    return sandbox


def checked(key: str, source: str) -> str:
    """Return the source of a template if its syntax is right. Raises JobError, which names `key`, if it is not."""
    try:
        environment().from_string(source)
    except TemplateSyntaxError as error:
        raise JobError(f"{key}: line {error.lineno} of the template: {error.message}") from None
    return source


class Expression:
    """An expression, as a template has it between `{{` and `}}`, that is evaluated for each row.

    key: of the job file, for error messages. columns: the names of the columns that it uses. Raises JobError if the
    syntax is wrong, or if it uses no column.
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
        """Return the value for a row. Raises whatever the expression raises."""
        return self._evaluate(values)
