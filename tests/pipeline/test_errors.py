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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a.parquet: gone", "s3://bucket/a.parquet: gone"),
        ("https://ada:p@ss@host:80/a?x=1: gone", "https://***@host:80/a?x=1: gone"),
        ("hf://hf_token@datasets/a/b.parquet", "hf://***@datasets/a/b.parquet"),
        ("'http://h/a?X-Amz-Credential=A%2F&X-Amz-Signature=1f' fails", None),
        ("see <https://h/?sv=1&sig=ab%3D&se=2>, then https://h/#key", None),
        ("mail ada@host or a key=1", "mail ada@host or a key=1"),
    ],
)
def test_secrets_of_urls_are_left_out(text: str, shown: str | None) -> None:
    expected = {
        None: text.replace("A%2F", "***").replace("1f", "***").replace("ab%3D", "***"),
    }.get(shown, shown)
    assert errors.redact(text) == expected
    assert str(errors.JobError(text)) == expected
    assert errors.one_line(OSError(text)) == expected


def test_a_long_message_is_no_work() -> None:
    text = "x" * 300_000  # in which a URL might begin anywhere
    assert errors.redact(text) == text


def test_other_libraries_messages_become_one_line() -> None:
    assert errors.one_line(ValueError("a\n  b")) == "a b"
    assert errors.one_line(ValueError()) == "ValueError"
    assert len(errors.one_line(ValueError("x" * 1000))) == 300
