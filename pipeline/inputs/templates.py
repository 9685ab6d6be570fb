"""Jinja templates and expressions over the columns of a row, in jinja2's sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, meta, nodes, pass_context
from jinja2.sandbox import SandboxedEnvironment

from pipeline.errors import JobError, one_line
from pipeline.inputs.time_limit import limited

_PLACE = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{[A-Za-z_]\w*\}", re.DOTALL)
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{6}|\*)")
_MOST_WIDTH = 100_000
_MOST_PATTERN, _SECONDS_OF_PATTERN = 1000, 1.0
_MOST_BITS, _MOST_ITEMS = 1 << 20, 1 << 26  # of a number that is computed, and of a text or a list that is multiplied


class _Sandbox(SandboxedEnvironment):
    """jinja2's sandbox, without computations that cannot be ended since they are a single operation."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left * right`` or ``left ** right``. Raises OverflowError if the result would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            is_large = bits > _MOST_BITS
        else:
            sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
            is_large = operator == "*" and all(isinstance(n, int) for n in sizes) and sizes[0] * sizes[1] > _MOST_ITEMS
        if is_large:
            raise OverflowError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


class _BoundedSandbox(_Sandbox):
    """A sandbox whose texts stay small too: for templates and expressions that may come with tables of queries."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute as the sandbox does. Raises OverflowError for a text with a wide place, such as "%9999999d"."""
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise OverflowError("the text would be too long")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Wrap no function that formats a text, so that it is looked at as any attribute is."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use an attribute; not what formats a text, whose places may be wide."""
        return attr not in ("format", "format_map") and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function. Raises OverflowError for a number that would make a text too long, as in center(10 ** 9)."""
        _check_widths(args, kwargs)
        return super().call(context, obj, *args, **kwargs)


def _check_widths(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MOST_WIDTH for value in (*args, *kwargs.values())):
        raise OverflowError(f"a number above {_MOST_WIDTH:,} is not given to functions and filters here")


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked_call(*args: Any, **kwargs: Any) -> Any:
        _check_widths(args, kwargs)
        return function(*args, **kwargs)

    return checked_call


def _matches(text: Any, pattern: str) -> bool:
    """Return whether a regular expression is found in a text. Raises TimeoutError if that takes too long."""
    import regex  # unlike re, it can be ended

    if len(pattern) > _MOST_PATTERN:
        raise ValueError(f"a regular expression has at most {_MOST_PATTERN:,} characters")
    return regex.search(pattern, str(text), timeout=_SECONDS_OF_PATTERN) is not None


@cache  # it is a key of the cache of `used_names`
def bounded_sandbox(finalize: Callable[[Any], Any] | None = None) -> SandboxedEnvironment:
    """Return a sandbox as `environment` does, that bounds texts too, and computes nothing while it compiles."""
    write = finalize or written

    @pass_context  # so that constants too are written when a template is rendered, within its limits
    def write_in_context(context: Any, value: Any) -> Any:
        return write(value)

    sandbox = _BoundedSandbox(undefined=StrictUndefined, finalize=write_in_context, optimized=False)
    sandbox.globals.clear()
    for name in ("random", "format"):
        del sandbox.filters[name]
    sandbox.tests["matches"] = _matches
    for name in ("center", "indent", "wordwrap", "batch", "slice"):
        sandbox.filters[name] = _narrow(sandbox.filters[name])
    return sandbox


def environment() -> SandboxedEnvironment:
    """Return a sandbox in which every name is a variable, null is written as an empty text, and nothing is random."""
    sandbox = _Sandbox(undefined=StrictUndefined, finalize=written)
    # Every name in a template may be a column, even one called `range` or `dict`.
    sandbox.globals.clear()
    del sandbox.filters["random"]  # the same row must always give the same text
    return sandbox


@lru_cache(maxsize=256)  # a run compiles the few templates of its job again and again
def compiled(source: str) -> Template:
    """Return a template of the sandbox that `environment` makes."""
    return environment().from_string(source)


def written(value: Any) -> Any:
    """Return a value as a template writes it. Raises TypeError if it has no text."""
    if value is None:
        return ""
    if not isinstance(value, Undefined) and (callable(value) or isinstance(value, Iterator)):
        raise TypeError(f"a {type(value).__name__} has no text; call it, or write | list or | join behind it")
    return value


def _explained(error: TemplateSyntaxError) -> str:
    why = "; a template must always give the same text for a row" if "'random'" in str(error.message) else ""
    return f"{error.message}{why}"


def checked(key: str, source: str, sandbox: SandboxedEnvironment | None = None) -> str:
    """Return the source of a template if it compiles. Raises JobError, which names `key`, if it does not."""
    try:
        compiled(source) if sandbox is None else sandbox.from_string(source)
    except TemplateSyntaxError as error:
        raise JobError(f"{key}: line {error.lineno} of the template: {_explained(error)}") from None
    except Exception as error:  # nested too deeply for Python, or a number with too many digits
        raise JobError(f"{key}: the template cannot be compiled: {one_line(error)}") from None
    return source


def checked_expression(key: str, source: str, sandbox: SandboxedEnvironment) -> str:
    """Return a template that writes the value of an expression. Raises JobError if the expression does not compile."""
    try:
        sandbox.compile_expression(source)
    except TemplateSyntaxError as error:
        raise JobError(f"{key}: {_explained(error)}: {' '.join(source.split())}") from None
    except Exception as error:
        raise JobError(f"{key}: the expression cannot be compiled: {one_line(error)}") from None
    return f"{{{{ ({source}) }}}}"


def braces_of_template(text: str) -> str | None:
    """Return the first part of a text that looks like a place in a template, or None.

    >>> braces_of_template("When did {{ party }} sign?"), braces_of_template('Answer as {"year": 2020}.')
    ('{{ party }}', None)
    """
    match = _PLACE.search(text)
    return match and match[0]


@dataclass(frozen=True)
class UsedNames:
    """The names that a template uses.

    names: of variables. in_row: names of columns that are written as `row["name"]`; a template that has them does not
    have `row` as the name of a column.
    """

    names: frozenset[str]
    in_row: frozenset[str]

    def columns(self, meanings: Mapping[str, str]) -> set[str]:
        """Return the columns that these are. meanings: of names that have one of their own, the columns."""
        return {meanings.get(name, name) for name in self.names} | self.in_row

    def variables(self, columns: Mapping[str, Any], meanings: Mapping[str, str]) -> dict[str, Any]:
        """Return the values of columns by their names and meanings, and with them `row` if the template uses it."""
        row = {"row": columns} if self.in_row else {}
        return {**columns, **row, **{name: columns[column] for name, column in meanings.items()}}


@lru_cache(maxsize=256)
def used_names(key: str, source: str, sandbox: SandboxedEnvironment | None = None) -> UsedNames:
    """Return the names that a template uses. Raises JobError, which names `key`, if `row` is used in two ways.

    >>> sorted(used_names("prompt.context", '{{ title }} {{ row["Full Text"] }}').in_row)
    ['Full Text']
    """
    tree = (sandbox or environment()).parse(source)
    try:
        names = meta.find_undeclared_variables(tree)
    except Exception as error:  # a part of it that is constant fails
        raise JobError(f"{key}: the template cannot be compiled: {one_line(error)}") from None
    in_row = [
        node.arg.value
        for node in tree.find_all(nodes.Getitem)
        if isinstance(node.node, nodes.Name) and node.node.name == "row"
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
    ]
    if "row" not in names or not in_row:
        return UsedNames(frozenset(names), frozenset())
    if len(in_row) < sum(name.name == "row" for name in tree.find_all(nodes.Name)):
        raise JobError(
            f'{key}: row is used both with and without the name of a column, as in row["{in_row[0]}"]; '
            'write row["row"] for a column that is called row'
        )
    return UsedNames(frozenset(names - {"row"}), frozenset(in_row))


class Expression:
    """An expression, as a template has it between `{{` and `}}`, that is evaluated for each row.

    key: of the job file, for error messages. columns: the names of the columns that it uses. Raises JobError if the
    syntax is wrong, or if it uses no column.
    """

    def __init__(self, key: str, source: str) -> None:
        sandbox = environment()
        template = checked_expression(key, source, sandbox)
        self._evaluate = sandbox.compile_expression(source, undefined_to_none=False)
        self._used = used_names(key, template)
        self.columns = self._used.names | self._used.in_row
        if not self.columns:
            raise JobError(f"{key} uses no column: {source}; write a condition such as year >= 2020 and lang == 'en'")

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return the value for a row. Raises whatever the expression raises, and TookTooLong."""
        with limited():
            return self._evaluate(self._used.variables(values, {}))
