"""Rows that fail: what is tried again and when, what is kept, where a run stops, and what is said at its end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import pytest

from pipeline import retry
from pipeline.errors import GenerationFailed, Interrupted
from pipeline.retry import attempts
from tests import warm
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace

# The command line, with a model that fails in so many of its first calls, when all is computed.
MAIN = """
import builtins, os
from turboquant.runtime.blas import load_tuned_blas

load_tuned_blas()
if __name__ == "__mp_main__":
    from pipeline import retry
    from pipeline.execution import engine
    retry.FIRST_WAIT = 0.01
    real, left = engine.generate_answers, int(os.environ["FAILURES"])

    def answer(*args):
        global left
        given = real(*args)
        left -= 1
        if left >= 0:
            raise getattr(builtins, os.environ["ERROR"])("[malloc] Unable to allocate")
        return given

    engine.generate_answers = answer

if __name__ == "__main__":
    from pipeline.cli import main
    main()
"""


def run(workplace: Workplace, fails: int, *options: str, error: str = "RuntimeError") -> tuple[int, str, str]:
    """Run a job with a model that fails so often: exit code, output, and what is said."""
    main = workplace.folder / "main.py"
    main.write_text(MAIN)
    environment = os.environ | {"FAILURES": str(fails), "ERROR": error}
    done = warm.run([sys.executable, str(main), "run", str(workplace.save()), *options], env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("batch_size", [3, 9])
def test_a_failure_that_passes_changes_nothing(workplace: Workplace, batch_size: int) -> None:
    workplace.tree["generation"] = {"max_tokens": 5, "batch_size": batch_size}
    workplace.run()
    whole = workplace.output.read_bytes()
    workplace.output.unlink()
    code, out, error = run(workplace, 1)
    assert code == 0, error
    assert "9 answered, 0 kept, 0 failed" in out
    assert error.count("the model failed: [malloc] Unable to allocate; trying again in 0.01 s") == 1
    assert workplace.output.read_bytes() == whole


def test_one_that_does_not_pass_is_an_error_and_summed_up(workplace: Workplace) -> None:
    code, out, error = run(workplace, 3, "--set", "retries=2")
    assert code == 3, error
    assert [line.rsplit("; ", 1)[1] for line in error.splitlines()] == [
        "trying again in 0.01 s",
        "trying again in 0.02 s",
    ]
    assert "6 answered, 0 kept, 3 failed" in out
    assert (
        "failures  3 GenerationFailed, first document 'd0', query 'what': the model failed: "
        "[malloc] Unable to allocate\n"
        f"          to see them: pipeline show {workplace.job_file} --set retries=2 --failed\n"
    ) in out
    assert invoke("show", workplace.job_file, "--failed").stdout.count("GenerationFailed") == 3


def test_what_trying_again_cannot_help_is_not_tried_again(workplace: Workplace) -> None:
    workplace.documents |= {"long": "The board met. " * 900, "blank": ""}
    code, out, error = run(workplace, 1, "--set", "retries=5", error="ValueError")
    assert code == 3
    assert "trying again" not in error
    for kind in ("ContextTooLong", "EmptyDocument", "GenerationFailed"):
        assert f"failures  3 {kind}, first document '" in out


def test_failed_rows_are_kept_where_that_is_asked(workplace: Workplace) -> None:
    assert run(workplace, 1, "--set", "retries=0")[0] == 3
    workplace.queries.append({"id": "new", "text": "What is new?"})
    kept = invoke("run", workplace.save(), "--keep-failed", "--json")
    assert kept.exit_code == 3
    told = json.loads(kept.stdout)
    assert [told[name] for name in ("rows_kept", "rows_answered", "rows_failed")] == [6, 3, 3]
    assert told["failures"] == {"GenerationFailed": 3}
    assert len(workplace.rows()) == 12
    again = json.loads(invoke("run", workplace.job_file, "--retry-failed", "--json").stdout)
    assert [again[name] for name in ("rows_kept", "rows_answered", "rows_failed")] == [9, 3, 0]


def test_a_run_stops_where_a_row_fails_if_asked(workplace: Workplace) -> None:
    workplace.documents["d1"] = " "
    result = invoke("run", workplace.save(), "--fail-fast")
    assert result.exit_code == 1
    assert "3 answered, 0 kept, 3 failed of 9" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "stopped at the first failure: document 'd1', query 'what': the document's text is empty; "
        f"to resume: pipeline run {workplace.job_file} --fail-fast"
    )
    assert workplace.report()["stopped_at"] == "document 'd1', query 'what': the document's text is empty"
    assert not workplace.output.exists()
    workplace.documents["d1"] = "The board met again."
    assert invoke("run", workplace.save(), "--fail-fast").exit_code == 0
    assert [workplace.report()[name] for name in ("rows_kept", "rows_answered")] == [3, 6]


def test_how_often_is_tried_changes_no_answer(workplace: Workplace) -> None:
    workplace.run()
    assert workplace.run("retries=7").rows_kept == 9


def test_waiting_grows_and_ends_where_the_user_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry, "_wait", lambda seconds, check: waits.append(seconds))
    with pytest.raises(GenerationFailed):
        _fail(8, lambda: None)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    monkeypatch.undo()

    def interrupt() -> None:
        raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        _fail(1, interrupt)


def _fail(retries: int, check: Callable[[], None]) -> None:
    for attempt in attempts(retries, check):
        with attempt:
            raise GenerationFailed("the model failed")
