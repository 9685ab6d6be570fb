"""Chat templates of the main families: where the context ends, where the system text goes, and whole runs."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from pipeline.inputs.prompts import PromptTokenizer, Rendered
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.inputs.templates import FAMILIES, PROMPTS, REFUSED
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

MINUTES = "The board met on the third of May and decided the budget.\n\nThe lease ends in May."
SYSTEM = "Answer from the paper only."
FOLDED = "the chat template takes no system text: it is put before the document in the user's message"
_words = st.text("aby ,.?!\n\t-(1é<|end|>", max_size=40).filter(str.strip)


@pytest.fixture(scope="module")
def tokenizers(make_tokenizer: Callable[..., Any]) -> dict[str, TokenizerWrapper]:
    """By family: the template, and its marks as tokens."""
    made = {}
    for name, family in FAMILIES.items():
        tokenizer = make_tokenizer(chat_template=family.template)
        tokenizer.add_tokens(list(family.marks), special_tokens=True)
        made[name] = TokenizerWrapper(tokenizer)
    return made


@functools.cache
def allowing(tokenizer: TokenizerWrapper, thinks: bool) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, thinks, special_tokens="allow")


each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
@settings(max_examples=12, deadline=None)  # of each family
@given(
    system=st.none() | _words,
    context=_words,
    queries=st.lists(_words, min_size=1, max_size=10),
    thinks=st.booleans(),
)
def test_context_and_suffix_are_the_tokens_of_the_whole_prompt(
    tokenizers: dict[str, Any], name: str, system: str | None, context: str, queries: list[str], thinks: bool
) -> None:
    prompts = allowing(tokenizers[name], thinks)
    rendered = Rendered(system, context)
    document = prompts.tokenise(rendered, queries)
    for query, suffix in zip(queries, document.suffixes, strict=True):
        whole = tokenizers[name].encode(prompts.prompt_text(rendered, query), add_special_tokens=False)
        assert document.context + suffix == whole
        assert suffix


@each_family
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_the_context_ends_where_the_query_begins(tokenizers: dict[str, Any], name: str, system: str | None) -> None:
    tokenizer = tokenizers[name]
    prompts = PromptTokenizer(tokenizer)
    queries = ["Who signed the contract?", "When does the lease end?"]
    document = prompts.tokenise(Rendered(system, MINUTES), queries)
    context = tokenizer.decode(document.context)
    assert context.rstrip().endswith(MINUTES.rstrip(".")) or context.rstrip().endswith(MINUTES)
    assert (system is not None) == (SYSTEM in context)
    for query, suffix in zip(queries, document.suffixes, strict=True):
        assert tokenizer.decode(suffix).lstrip("\n.").startswith(query)
    added = prompts.tokenise(Rendered(system, MINUTES), [*queries, "Why?", "2", "(a)"])
    assert added.context == document.context


@each_family
def test_where_the_system_text_goes(tokenizers: dict[str, Any], name: str) -> None:
    prompts = PromptTokenizer(tokenizers[name])
    assert prompts.folds_system is not FAMILIES[name].has_system
    text = prompts.prompt_text(Rendered(SYSTEM, MINUTES), "Who?")
    assert text.count(SYSTEM) == text.count(MINUTES) == 1
    assert text.index(SYSTEM) < text.index(MINUTES) < text.index("Who?")
    if not FAMILIES[name].has_system:
        assert f"{SYSTEM}\n\n{MINUTES}\n\nWho?" in text


@each_family
def test_templates_are_told_whether_to_think(tokenizers: dict[str, Any], name: str) -> None:
    texts = [PromptTokenizer(tokenizers[name], t).prompt_text(Rendered(None, MINUTES), "Who?") for t in (False, True)]
    assert (texts[0] != texts[1]) is FAMILIES[name].can_think


@each_family
def test_a_run(
    workplace: Workplace, make_tokenizer: Callable[..., Any], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    make_tokenizer(chat_template=FAMILIES[name].template).save_pretrained(model)
    workplace.documents = {"d0": MINUTES * 3}
    job = workplace.save(model="model", prompt={"system": SYSTEM}, generation={"max_tokens": 2, "batch_size": 3})
    result = invoke("run", job)
    assert result.exit_code == 0, result.output
    assert caplog.text.count(FOLDED) == (0 if FAMILIES[name].has_system else 1)
    assert len(workplace.segments()) == 1
    assert all(row["query_tokens"] < row["context_tokens"] for row in workplace.rows().values())


@each_family
def test_plan_shows_the_exact_prompt(workplace: Workplace, make_tokenizer: Callable[..., Any], name: str) -> None:
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    make_tokenizer(chat_template=FAMILIES[name].template).save_pretrained(model)
    workplace.documents = {"d0": "  The lease ends\nin <May>."}
    workplace.queries[0]["text"] = "When?"
    job = workplace.save(model="model", prompt={"system": "Be brief."})
    result = invoke("plan", job, "--prompt")
    assert result.exit_code == 0, result.output
    assert result.stdout == PROMPTS[name] + "\n"


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_loses_text_is_refused_before_anything_is_run(
    workplace: Workplace, make_tokenizer: Callable[..., Any], name: str
) -> None:
    template, reason = REFUSED[name]
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    make_tokenizer(chat_template=template).save_pretrained(model)
    job = workplace.save(model="model")
    for command in ("plan", "run"):
        assert reason in error_of(invoke(command, job))
    assert not workplace.output.exists()


def test_a_template_that_loses_the_text_of_some_documents_fails_their_rows(
    workplace: Workplace, make_tokenizer: Callable[..., Any]
) -> None:
    template = "{% if 'confidential' not in messages[-1].content %}{{ messages[-1].content }}{% endif %}{{ 9 * '.' }}"
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    make_tokenizer(chat_template=template).save_pretrained(model)
    workplace.documents["d1"] += "confidential"
    assert invoke("run", workplace.save(model="model"), "--quiet").exit_code == 3
    failed = {pair: row["error"] for pair, row in workplace.rows().items() if row["status"] == "error"}
    assert {document for document, _ in failed} == {"d1"}
    assert all("leaves out or changes text" in error for error in failed.values())


def test_a_template_that_fails_on_one_document_fails_its_rows(
    workplace: Workplace, make_tokenizer: Callable[..., Any]
) -> None:
    fails = "{% if 'décidé' in messages[-1].content %}{{ raise_exception('not this one') }}{% endif %}"
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    make_tokenizer(chat_template=fails + "{{ messages[-1].content }}").save_pretrained(model)
    workplace.documents["d1"] = "Le conseil a décidé."
    workplace.save(model="model")
    planned = invoke("plan", workplace.job_file)
    assert "will fail  documents: 1 blank or not fit for the prompt" in planned.stdout
    assert invoke("run", workplace.job_file, "--quiet").exit_code == 3
    rows = workplace.rows()
    assert {pair[0] for pair, row in rows.items() if row["status"] == "error"} == {"d1"}
    assert {row["error_type"] for row in rows.values()} == {None, "PromptFailed"}
    assert "not this one" in rows["d1", "who"]["error"]
