from __future__ import annotations

import pytest

from pipeline import errors


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.PipelineError, 1),
        (errors.JobError, 2),
        (errors.InputError, 2),
        (errors.ModelError, 2),
        (errors.StoreError, 1),
        (errors.OutputError, 1),
        (errors.Interrupted, 130),
    ],
)
def test_exit_codes(error: type[errors.PipelineError], exit_code: int) -> None:
    assert error("x").exit_code == exit_code


def test_a_row_error_is_named_in_its_row() -> None:
    assert errors.ContextTooLong("x").error_type == "ContextTooLong"


def test_suggestions_name_the_nearest_choice_or_all_of_them() -> None:
    assert errors.suggestion("txt", ["id", "text"]) == "; did you mean 'text'?"
    assert errors.suggestion("TEXT", ["id", "text"]) == "; did you mean 'text'?"
    assert errors.suggestion("zzz", ["id", "text"]) == "; there are: id, text"
    assert errors.suggestion("zzz", []) == ""


def test_other_libraries_messages_become_one_line() -> None:
    assert errors.one_line(ValueError("a\n  b")) == "a b"
    assert errors.one_line(ValueError()) == "ValueError"
    assert len(errors.one_line(ValueError("x" * 1000))) == 300
