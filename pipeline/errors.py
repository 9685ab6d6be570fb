"""The errors of the pipeline, with their exit codes.

    PipelineError              exit 1    anything else that has a clear message
    ├── JobError               exit 2    the job, its inputs or the command line is wrong
    │   ├── InputError                   the files, columns or ids of documents or queries are wrong
    │   ├── ModelError                   the model cannot be found, loaded or used
    │   └── ResultWouldShrink            a run would remove rows that the job does not ask for any more
    ├── StoreError             exit 1    the cache folder cannot be used
    │   ├── DiskFull                     its disk is full
    │   └── BudgetTooSmall               its budget has no room for what jobs need
    ├── RemoteError            exit 1    a file on another machine cannot be reached
    ├── OutputError            exit 1    the result cannot be written, or another run is writing it
    ├── NotApplicable          exit 1    a contender of a bench can't do what the job asks
    ├── Interrupted            exit 130  stopped by the user; the same command resumes
    │   └── StoppedAtFailure   exit 1    a row failed, and the run has --fail-fast
    └── RowError                         one row failed and the job goes on: the class's name becomes the
        ├── EmptyDocument                row's `error_type`, the message its `error`
        ├── UnreadableText
        ├── ContextTooLong
        ├── PromptFailed
        ├── UnknownToken
        ├── AnswerMissing
        ├── CheckFailed
        ├── GenerationFailed
        ├── AnswerCutOff
        └── ModelProcessDied

A message is one line: what is wrong, where, and how to fix it. A job that finishes with failed rows raises no error;
its exit code is 3.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection
from typing import ClassVar

_URL = re.compile(r"[A-Za-z][\w+.-]{0,40}://[^\s'\"<>]+")
_USER = re.compile(r"://[^/?#]+@")
_SECRET_VALUE = re.compile(
    r"([?&;][^=&;]*(?:key|token|secret|sig|pass|pwd|auth|cred)[^=&;]*=)[^&;#]*", flags=re.IGNORECASE
)


class PipelineError(Exception):
    """An error with a message meant for the user, without the secrets of the URLs in it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class JobError(PipelineError):
    """The job, its inputs or the command line is wrong: nothing was run."""

    exit_code = 2


class InputError(JobError):
    """The files, columns or ids of documents or queries are wrong."""


class ModelError(JobError):
    """The model cannot be found, loaded or used for this job."""


class ResultWouldShrink(JobError):
    """A run would remove rows that the job does not ask for any more, and the user did not ask for that."""


class StoreError(PipelineError):
    """The cache folder cannot be used."""


class DiskFull(StoreError):
    """The disk is full."""


class BudgetTooSmall(StoreError):
    """The budget has no room, and nothing in it may be removed."""


class RemoteError(PipelineError):
    """A file on another machine cannot be reached, at the moment."""

    may_pass: ClassVar[bool] = True


class OutputError(PipelineError):
    """The result cannot be written, or another run is writing it."""


class NotApplicable(PipelineError):
    """A contender of a bench cannot do what the job asks, or not with this model."""


class Interrupted(PipelineError):
    """The user stopped the run; what was committed is kept."""

    exit_code = 130


class StoppedAtFailure(Interrupted):
    """A row failed, and the user asked to stop at the first failed row (--fail-fast)."""

    exit_code = 1


class RowError(PipelineError):
    """One row cannot be answered; it becomes an error row and the job goes on."""

    @property
    def error_type(self) -> str:
        """The text of the result's column ``error_type``: the name of the class."""
        return type(self).__name__


class EmptyDocument(RowError):
    """The document's text is null, empty or blank."""


class UnreadableText(RowError):
    """A value that the prompt needs is not text: its bytes do not decode, or it holds NUL bytes or half characters."""


class ContextTooLong(RowError):
    """The context and the answer do not fit what the model can read."""


class PromptFailed(RowError):
    """The prompt's template or the model's chat template fails on this row."""


class AnswerMissing(RowError):
    """The query uses the answer to another query of the document, and that failed."""


class CheckFailed(RowError):
    """The answer is not as the query's `check` wants it, however often the query was asked."""


class UnknownToken(RowError):
    """The prompt has a token that the model has no vector for: its tokenizer has more tokens than its embedding."""


class GenerationFailed(RowError):
    """The model failed. ``may_pass``: whether another attempt may succeed, for example after a lack of memory."""

    def __init__(self, message: str, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class AnswerCutOff(RowError):
    """The answer was cut off before it was usable: its JSON is incomplete, or its thinking had not ended."""


class ModelProcessDied(RowError):
    """The model's process died twice while it worked on this row's document."""


def redact(text: str) -> str:
    """Return a text without the user, the password and the secret parameters of the URLs in it.

    >>> redact("https://ada:pw@host/a.parquet?X-Amz-Signature=1f&part=2: is not there")
    'https://***@host/a.parquet?X-Amz-Signature=***&part=2: is not there'
    """
    return _URL.sub(lambda url: _SECRET_VALUE.sub(r"\1***", _USER.sub("://***@", url[0])), text)


def suggestion(word: str, choices: Collection[str]) -> str:
    """Return the end of a message about an unknown word: the most similar choice, or else all choices.

    >>> suggestion("max_token", ["max_tokens", "seed"])
    "; did you mean 'max_tokens'?"
    >>> suggestion("zzz", ["max_tokens", "seed"])
    '; there are: max_tokens, seed'
    """
    nearest = difflib.get_close_matches(word.lower(), sorted(choices), n=1)
    if nearest:
        return f"; did you mean '{nearest[0]}'?"
    return f"; there are: {', '.join(sorted(choices))}" if choices else ""


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that the disk is full, a quota is used up, or a file is too large."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, cut to 300 characters."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
