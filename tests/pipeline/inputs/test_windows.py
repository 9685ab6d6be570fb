"""Documents that are longer than the model reads, by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.execution.engine
from benches import tiny
from pipeline.errors import Interrupted
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer
from pipeline.inputs.windows import WindowCutter, combined, longest_fitting
from pipeline.job.job_file import load_job
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

LONG = "The board met on the third of May, and café no. {} was decided. "
READS = 512  # tokens that the model reads


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("small") / "model", max_position_embeddings=READS)


@pytest.fixture
def long(workplace: Workplace, small_model: Path) -> Workplace:
    """Two documents that are too long for the model, and one that is not."""
    workplace.tree["model"] = str(small_model)
    workplace.documents = {name: "".join(map(LONG.format, range(first, 100))) for name, first in (("a", 0), ("b", 7))}
    workplace.documents["short"] = "The board met."
    workplace.save(documents={"path": "docs.parquet", "too_long": "truncate"})
    return workplace


def test_what_is_too_long_is_cut_off_and_answered(long: Workplace) -> None:
    planned = invoke("plan", long.job_file)
    assert "truncated  2 documents, too long for the model" in planned.stdout
    assert "will fail  nothing known beforehand" in planned.stdout
    result = invoke("run", long.job_file)
    assert result.exit_code == 0
    assert "truncated  2 documents, too long for the model" in result.stdout
    rows = long.rows()
    assert [row["status"] for row in rows.values()] == ["ok"] * 9
    for (document, _), row in rows.items():
        room = READS - row["query_tokens"] - 5
        assert row["context_tokens"] <= room
        assert document == "short" or row["context_tokens"] > room * 0.9
    before = long.output.read_bytes()
    assert json.loads(invoke("run", long.job_file, "--json").stdout)["rows_kept"] == 9
    assert "3 in the store, 0 to build" in invoke("plan", long.job_file).stdout
    long.output.unlink()
    assert json.loads(invoke("run", long.job_file, "--json").stdout)["prefixes_restored"] == 3
    assert long.output.read_bytes() == before


# ---- far longer


class Counting:
    """A tokenizer without a chat template that counts the characters that it is given."""

    chat_template = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer.encode(text, **options)


def test_a_document_far_too_long_is_an_error_that_says_about_how_long_it_is(long: Workplace) -> None:
    long.documents["a"] = LONG * 2_000
    long.save(documents={"path": "docs.parquet"})
    assert "3 (about " in invoke("plan", long.job_file).stdout
    result = invoke("run", long.job_file)
    assert result.exit_code == 3
    assert "6 ContextTooLong" in result.stdout
    row = long.rows()["a", "what"]
    assert (row["context_tokens"], row["query_tokens"]) == (None, None)
    tokens = int(row["error"].removeprefix("about ").partition(" ")[0].replace(",", ""))
    assert row["error"] == f"about {tokens:,} tokens of context; the model reads {READS}"
    tokenizer = PromptTokenizer(tiny.make_tokenizer())
    assert tokens == pytest.approx(tokenizer.count([LONG * 2_000])[0], rel=0.02)
    assert long.rows()["b", "what"]["context_tokens"] > READS


@pytest.mark.parametrize("text", [LONG, "a", "ab é", "日本", "\n"])
def test_nothing_is_tokenised_far_beyond_the_limit(text: str) -> None:
    tokenizer = Counting(tiny.make_tokenizer())
    prompts = PromptTokenizer(tokenizer)
    context = text * (400_000 // len(text))
    tokenizer.characters = 0
    about = prompts.estimate_beyond(context, 2048)
    assert about is not None
    assert tokenizer.characters <= 1 << 16
    assert about == pytest.approx(prompts.count([context])[0], rel=0.02)


@settings(max_examples=25)
@given(st.text(max_size=60), st.integers(1, 80_000), st.integers(1, 30_000))
def test_a_document_that_fits_is_never_far_too_long(text: str, times: int, limit: int) -> None:
    prompts = PromptTokenizer(tiny.make_tokenizer())
    context = (text * times)[:80_000]
    if prompts.estimate_beyond(context, limit) is not None:
        assert prompts.count([context])[0] > limit


def test_ctrl_c_is_heard_while_a_long_document_is_tokenised(tokenizer: Any) -> None:
    heard: list[int] = []

    def check() -> None:
        heard.append(1)
        if len(heard) == 2:
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        PromptTokenizer(tokenizer).tokenise(Rendered(None, LONG * 20_000), ["Who?", "When?"], check)


def test_what_is_too_long_is_read_in_windows(long: Workplace) -> None:
    long.save(documents={"path": "docs.parquet", "too_long": "split"})
    planned = invoke("plan", long.job_file)
    assert "split      2 documents, too long for the model" in planned.stdout
    assert "will fail  nothing known beforehand" in planned.stdout
    result = invoke("run", long.job_file, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["documents_split"], report["documents_truncated"]) == (2, 0)
    rows = long.rows()
    assert [row["status"] for row in rows.values()] == ["ok"] * 9
    assert rows["a", "what"]["context_tokens"] > 1_250
    assert rows["short", "what"]["context_tokens"] < 100
    windows = report["prefixes_built"] - 1 - 2 * 3  # what each query is asked of in the end has a prefix as well
    assert windows >= 2 * 3
    before = long.output.read_bytes()
    assert json.loads(invoke("run", long.job_file, "--json").stdout)["rows_kept"] == 9
    long.output.unlink()
    again = json.loads(invoke("run", long.job_file, "--json").stdout)
    assert (again["prefixes_built"], again["prefixes_restored"]) == (0, report["prefixes_built"])
    assert long.output.read_bytes() == before


def test_windows_are_dropped_with_their_document(long: Workplace) -> None:
    long.tree["cache"]["keep"] = "job"
    long.save(documents={"path": "docs.parquet", "too_long": "split"})
    assert invoke("run", long.job_file, "--quiet").exit_code == 0
    assert long.segments() == []


def test_a_document_in_windows_that_was_cut_off_is_answered_again_whole(
    long: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    long.save(documents={"path": "docs.parquet", "too_long": "split"})
    long.run()
    whole = long.output.read_bytes()
    long.output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.execution.engine, "generate_answers", calls_fail_at(9, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            long.run()
    assert long.run().rows_kept == 3
    assert long.output.read_bytes() == whole


def test_what_fails_on_one_window_fails(long: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    long.save(documents={"path": "docs.parquet", "too_long": "split"}, retries=0)
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline.execution.engine, "generate_answers", calls_fail_at(2, RuntimeError("[malloc] Unable to allocate"))
        )
        report = long.run()
    assert report.failures == {"GenerationFailed": 3}
    assert str(long.rows()["a", "what"]["error"]).startswith("window 2 of ")
    assert sum(long.observer.rows) == 9
    assert long.run().rows_answered == 3


def calls_fail_at(number: int, error: BaseException) -> Callable[..., Any]:
    """What answers, but for one call."""
    real, calls = pipeline.execution.engine.generate_answers, iter(range(1, 1000))

    def answer(*arguments: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*arguments)

    return answer


@pytest.mark.parametrize("ending", ["", " THE END"])
def test_windows_hold_the_whole_text(long: Workplace, tokenizer: Any, ending: str) -> None:
    long.tree["prompt"] = {"context": "{{ text }}" + ending}
    job = load_job(long.save(documents={"path": "docs.parquet", "too_long": "split"}))
    text = long.documents["a"]
    document = Document("a", text, {"id": "a", "text": text}, job.queries)
    prompts = PromptTokenizer(tokenizer)
    windows = WindowCutter(job).windows(document, Renderer(job.prompt, job.documents).render(document), prompts, READS)
    at = 0
    for number, window in enumerate(windows):
        assert window.context.endswith(ending)
        part = window.context.removesuffix(ending)
        start = text.index(part)  # no two parts of the text are the same
        assert start <= at
        assert number == 0 or at - start >= len(part) // 32
        at = start + len(part)
        (tokens,) = prompts.count([prompts.prompt_text(window, job.queries[0].text)])
        assert tokens + 5 <= READS
        assert tokens > READS * 0.87 or number == len(windows) - 1
    assert at == len(text)


def test_what_is_asked_of_in_the_end_are_the_windows_answers() -> None:
    told = "A document was read in 2 parts, and this was answered on each of them.\n\nPart 1: May\n\nPart 2: June"
    assert combined(Rendered("S", "text"), ["May", "June"]) == Rendered("S", told)


def test_otherwise_it_is_an_error(long: Workplace) -> None:
    result = invoke("run", long.job_file, "--set", "documents.too_long=error")
    assert result.exit_code == 3
    assert "6 ContextTooLong" in result.stdout
    report = json.loads(invoke("run", long.job_file, "--json").stdout)
    assert report["rows_failed"] == 0
    assert report["documents_truncated"] == 2
    assert "expected 'error', 'truncate' or 'split', got 'cut'" in error_of(
        invoke("run", long.job_file, "--set", "documents.too_long=cut")
    )


def test_what_is_answered_again_is_what_a_cut_may_have_moved(
    long: Workplace, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    long.documents |= {name: "".join(map(LONG.format, range(first, 400))) for name, first in (("a", 0), ("b", 7))}
    long.tree["model"] = str(write_model(tmp_path / "reads-more", max_position_embeddings=8192))
    long.run()
    long.queries.append({"id": "new", "text": "And?"})  # no longer than the longest
    report = long.run()
    assert (report.rows_kept, report.rows_answered) == (9, 3)
    long.queries[-1]["text"] += " What else was decided, and by whom?"
    report = long.run()
    assert (report.rows_kept, report.rows_answered) == (3, 9)
    assert report.documents_truncated == 2


def test_the_template_s_end_is_kept(long: Workplace, tokenizer: Any) -> None:
    long.tree["prompt"] = {"context": "{{ id }}: {{ text }} THE END"}
    job = load_job(long.save())
    text = long.documents["a"]
    document = Document("a", text, {"id": "a", "text": text}, job.queries)
    whole = Renderer(job.prompt, job.documents).render(document)
    prompts = PromptTokenizer(tokenizer)
    (cut,) = WindowCutter(job).windows(document, whole, prompts, READS)
    assert cut.context.startswith("a: The board met")
    assert cut.context.endswith(" THE END")
    assert len(cut.context) < len(whole.context) / 2
    assert WindowCutter(job).windows(document, whole, prompts, None) == [whole]
    assert WindowCutter(job).windows(document, whole, prompts, 1 << 30) == [whole]


@pytest.mark.parametrize("characters", [1, 2, 1 << 20])
def test_as_much_is_kept_as_there_is_room_for(
    long: Workplace, tokenizer: Any, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many characters a token is taken to have at first."""
    monkeypatch.setattr("pipeline.inputs.windows._CHARACTERS_PER_TOKEN", characters)
    job = load_job(long.job_file)
    text = long.documents["a"]
    document = Document("a", text, {"id": "a", "text": text}, job.queries)
    whole, prompts = Renderer(job.prompt, job.documents).render(document), PromptTokenizer(tokenizer)
    (cut,) = WindowCutter(job).windows(document, whole, prompts, READS)
    (tokens,) = prompts.count([prompts.prompt_text(cut, job.queries[0].text)])
    assert READS * 0.87 < tokens <= READS - 5
    (needed,) = prompts.count([prompts.prompt_text(whole, job.queries[0].text)])
    assert WindowCutter(job).windows(document, whole, prompts, 2 * needed) == [whole]


def test_what_has_no_room_at_all_is_an_error(long: Workplace) -> None:
    long.tree["prompt"] = {"system": "word " * 500}
    result = invoke("run", long.save(), "--quiet")
    assert result.exit_code == 3
    assert set(pq.read_table(long.output)["error_type"].to_pylist()) == {"ContextTooLong"}


def test_a_bench_cuts_them_off_as_well(long: Workplace) -> None:
    options = ["--contender", "naive", "--contender", "pipeline-cold", "--documents", "1", "--queries", "1", "--json"]
    result = invoke("bench", long.job_file, *options, "--set", "cache.resident=dense")
    assert [row["answers"] for row in json.loads(result.stdout)] == [1, 1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(-5, 2000))
def test_the_longest_beginning_that_fits(weights: list[int], room: int) -> None:
    def tokens(characters: int) -> int:
        return 3 + sum(weights[:characters])

    found = longest_fitting(len(weights), room, tokens)
    if tokens(len(weights)) <= room:
        assert found == len(weights)
    elif tokens(0) <= room:
        assert tokens(found) <= room
        assert tokens(found) >= room - room // 64 or tokens(found + 1) > room
    else:
        assert found == 0
