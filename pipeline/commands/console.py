"""The parts that all commands share: error messages, exit codes, questions, and the format of sizes and tables."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from pipeline.logs import LogFormat, set_up, tell
from pipeline.printable import printable

if TYPE_CHECKING:
    from pipeline.job.job import Job
    from pipeline.job.shards import Shard


INTERRUPTED = 130  # exit code
_JOB = ("job_file", "one_shard", "set_")  # parameters of commands
_PART_OF_JOB = (*_JOB, "document", "query", "limit", "prune")


class CommandGroup(TyperGroup):
    """A group whose help does not cut what it says of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command's name and the first paragraph of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, " ".join((command.help or "").partition("\n\n")[0].split()))
                    for name, command in commands
                    if command
                ]
            )


def load(job_file: Path, overrides: list[str] | None, shard: str | None = None) -> tuple[Job, Shard | None]:
    """Return the job of a command, and the shard of it that is wanted. Raises JobError."""
    from pipeline.job.job_file import load_job
    from pipeline.job.shards import Shard

    one = None if shard is None else Shard.parse(shard)
    return load_job(job_file, overrides or [], one), one


@contextmanager
def errors_explained(
    debug: bool, quiet: bool = False, computes: bool = True, log_format: LogFormat = LogFormat.text
) -> Iterator[None]:
    """Set up the log, and turn an exception into one line on stderr and an exit code.

    computes: whether this process may use MLX. debug: raise the exception, which shows a traceback.
    """
    from pipeline.errors import PipelineError, one_line

    if computes:
        from turboquant.runtime.blas import load_tuned_blas

        load_tuned_blas()
    set_up(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO, log_format)
    try:
        yield
    except PipelineError as error:
        if debug:
            raise
        tell(f"error: {error}", logging.ERROR, exit_code=error.exit_code, error_type=type(error).__name__)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        tell("interrupted; the same command resumes", exit_code=INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    except typer.Abort as error:  # Ctrl-C or the end of the input, in place of an answer
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        tell("interrupted", exit_code=INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, BrokenPipeError):  # for Typer; the last one means that the reader of our output closed it
        raise
    except Exception as error:
        if debug:
            raise
        message = f"error: {type(error).__name__}: {one_line(error)} (--debug shows where)"
        tell(message, logging.ERROR, exit_code=1, error_type=type(error).__name__)
        raise typer.Exit(1) from None


def command_line(context: typer.Context, name: str, *more: str) -> str:
    """Return a command for the same job as the running one, quoted for a shell, so that it runs as printed.

    The running command (``name`` is its own) is returned with all options that the user gave; another one with those
    that say which job is meant: the file, ``--set`` and ``--shard``; and if a run follows a plan, which part of it is.
    more: further words.
    """
    words = [*_program(), name]
    shared = _PART_OF_JOB if (context.info_name, name) == ("plan", "run") else _JOB
    for parameter in context.command.params:
        key, is_argument = str(parameter.name), parameter.param_type_name == "argument"
        source = context.get_parameter_source(key)
        is_given = is_argument or (source is not None and source.name == "COMMANDLINE")
        if not is_given or (name != context.info_name and key not in shared):
            continue
        value = context.params[key]
        for each in value if isinstance(value, list | tuple) else [value]:
            text = str(getattr(each, "value", each))  # of an Enum
            if is_argument:
                words.append(f"./{text}" if text.startswith("-") else text)
            elif isinstance(each, bool):
                words.append((parameter.opts if each else parameter.secondary_opts)[0])
            else:
                words += [parameter.opts[0], text]
    return quoted([*words, *more])


def anywhere(command: str) -> str:
    """Return a command that does in any folder what ``command`` does in this one."""
    return f"cd {quoted([os.getcwd()])} && {command}"


def quoted(words: Sequence[str]) -> str:
    """Return a command line of these words. A word with control characters is quoted as bash and zsh read it."""

    def escaped(character: str) -> str:
        if character.isprintable() and character not in "'\\":
            return character
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))

    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{''.join(map(escaped, word))}'" for word in words)


def _program() -> list[str]:
    """Return the words by which the user calls this program: its path, unless the shell finds it by its name."""
    script = sys.argv[0]
    if os.path.basename(script) == "cli.py":
        return [sys.executable, "-m", "pipeline.cli"]
    if os.path.basename(script) != "pipeline" or shutil.which("pipeline") == os.path.abspath(script):
        return ["pipeline"]  # also where another program, such as a test, has called the command
    return [script]


def size(count: float) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equally many cells in columns that are aligned at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return printable("\n".join(line.rstrip() for line in lines))


def ask(question: str, default: str) -> str:
    """Return the user's answer, or the default if there is no terminal to ask on."""
    return str(typer.prompt(question, default, err=True)) if sys.stdin.isatty() else default


def ask_questions(default: str) -> list[str]:
    """Return the user's questions; the first empty line after the first question ends them."""
    questions = [ask("First question", default)]
    while sys.stdin.isatty() and (question := typer.prompt("Another one, or Enter", "", show_default=False, err=True)):
        questions.append(question)
    return questions
