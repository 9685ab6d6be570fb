"""Templates, conditions and chat templates that loop are ended, and give the same text whenever they are rendered."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time

import pytest

from pipeline.errors import InputError, JobError, ModelError
from pipeline.inputs import time_limit
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.time_limit import TookTooLong, limited
from pipeline.job.job_file import load_job
from tests.pipeline.workplace import Workplace

LOOP = (
    "{% for a in text %}{% for b in text %}{% for c in text %}{% for d in text %}{% endfor %}{% endfor %}{% endfor %}"
)
LOOP += "{% endfor %}"


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "SECONDS", 0.3)


def count_for_ever() -> None:
    while True:
        pass


def test_a_loop_is_ended_in_the_thread_that_runs_it() -> None:
    ended = []

    def run() -> None:
        with pytest.raises(TookTooLong, match=r"it took longer than 0\.3 s and was ended"), limited():
            count_for_ever()
        ended.append(threading.get_ident())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(set(ended)) == 3


def test_a_loop_that_catches_exceptions_is_told_all_the_same() -> None:
    def run() -> None:
        try:
            count_for_ever()
        except Exception as error:
            raise ValueError("something else") from error

    with pytest.raises(TookTooLong), limited():
        run()


def test_what_is_quick_is_not_ended_later() -> None:
    with limited():
        pass
    time.sleep(0.6)
    with pytest.raises(KeyError), limited():
        raise KeyError


def test_a_prompt_that_loops_costs_its_row(workplace: Workplace) -> None:
    workplace.documents["d1"] = "yes"
    context = "{% if text != 'yes' %}" + LOOP + "{% endif %}{{ text }}"
    report = workplace.run_with(prompt={"context": context})
    assert (report.rows_answered, report.rows_failed) == (3, 6)
    assert report.failures == {"PromptFailed": 6}
    assert "prompt.context: it took longer than 0.3 s and was ended" in workplace.rows()["d0", "what"]["error"]


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("(text * 9999) | map('string') | map('string') | list | length > 3", "it took longer than 0.3 s"),
        ("9 ** (9 ** 9) > 1 and text", "would be too large"),
        ("(text * 9999999999) | length > 1", "would be too large"),
    ],
)
def test_a_condition_that_loops_is_an_error(workplace: Workplace, where: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=rf"documents\.where: .*{reason}"):
        workplace.run_with(documents={"path": "docs.parquet", "where": where})
    assert time.monotonic() - started < 60  # for ever, otherwise


def with_chat_template(workplace: Workplace, source: str) -> None:
    """Give the job a model with this chat template before its own."""
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    file = model / "chat_template.jinja"
    if not file.exists():
        settings = json.loads((model / "tokenizer_config.json").read_text())
        file.write_text(settings.pop("chat_template"))
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    file.write_text(source + file.read_text())
    workplace.tree["model"] = str(model)


def test_a_chat_template_that_loops_costs_its_row(workplace: Workplace) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with_chat_template(workplace, "{% if 'Paper d1' in messages[-1].content %}" + loop + "{% endif %}")
    report = workplace.run()
    assert (report.rows_answered, report.rows_failed) == (6, 3)
    assert "the model's chat template fails: it took longer" in workplace.rows()["d1", "what"]["error"]


# ---- the same text for the same row


@pytest.mark.parametrize("key", ["prompt.context", "prompt.system", "documents.where"])
def test_nothing_is_chosen_at_random(workplace: Workplace, key: str) -> None:
    value = "[text, id] | random" if key == "documents.where" else "{{ text }}{{ [text, id] | random }}"
    workplace.save()
    with pytest.raises(JobError, match=rf"{key}: .*No filter named 'random'.*must always give the same text"):
        Inputs(load_job(workplace.job_file, [f"{key}={json.dumps(value)}"]))


def test_a_chat_template_that_chooses_at_random_is_refused(workplace: Workplace) -> None:
    with_chat_template(workplace, "{{ ['a', 'b'] | random }}")
    with pytest.raises(ModelError, match="the filter random: its prompts would never be the same"):
        workplace.run()


@pytest.mark.parametrize("written", ["text.upper", "text | map('upper')"])
def test_an_address_in_memory_is_no_text(workplace: Workplace, written: str) -> None:
    report = workplace.run_with(prompt={"context": f"{{{{ {written} }}}}"})
    assert report.failures == {"PromptFailed": 9}
    assert "has no text; call it, or write | list" in workplace.rows()["d0", "what"]["error"]


def test_one_thread_watches_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "_watcher", type(time_limit._watcher)())
    monkeypatch.setattr(time_limit, "_IDLE_TICKS", 1)
    before = set(threading.enumerate())  # among them perhaps the thread that served other tests, which may end now

    def watching() -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - before]

    for _ in range(3):
        with limited(), limited():
            assert watching() == ["time limit"]
    deadline = time.monotonic() + 60
    while watching():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_forked_process_has_limits_too() -> None:
    with limited():
        pass
    child = os.fork()
    if not child:
        try:
            with limited():
                count_for_ever()
        except TookTooLong:
            os._exit(3)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 3
