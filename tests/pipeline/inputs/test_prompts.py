from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import EmptyDocument, JobError, ModelError, PromptFailed
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Rendered, Renderer, template_columns
from pipeline.job.job import Documents, Prompt

MINUTES = "The board met on the third of May and decided the budget.\n\nThe lease ends in May."

SOURCE = Documents(path="papers.parquet")


def document(text: str = MINUTES, **columns: object) -> Document:
    return Document("1", text, {"id": "1", "text": text, **columns})


def encode(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def test_template_columns() -> None:
    prompt = Prompt(
        system="About {{ company }}.",
        context="{% for p in pages %}{{ loop.index }}{{ p }}{% endfor %}{% set a = text %}{{ a }}{{ range }}",
    )
    assert template_columns(prompt, SOURCE) == {"company", "pages", "text", "range"}
    assert template_columns(Prompt(system=None), SOURCE) == {"text"}


@pytest.mark.parametrize("use", [template_columns, Renderer])
def test_a_broken_template_names_its_key_and_line(use: Callable[[Prompt, Documents], object]) -> None:
    with pytest.raises(JobError, match=r"^prompt\.context: line 2 of the template: ") as caught:
        use(Prompt(context="{{ text }}\n{% if %}"), SOURCE)
    assert "\n" not in str(caught.value)
    with pytest.raises(JobError, match=r"^prompt\.system: line 1 of the template: "):
        use(Prompt(system="{{ a"), SOURCE)


def test_a_context_without_any_column_is_refused() -> None:
    with pytest.raises(JobError, match="uses no column"):
        template_columns(Prompt(context="text"), SOURCE)


def test_rendering() -> None:
    prompt = Prompt(system="About {{ title }}.", context="{{ title }}: {{ text }}{{ note }}")
    rendered = Renderer(prompt, SOURCE).render(document("x {{ y }}", title="T", note=None))
    assert rendered == Rendered("About T.", "T: x {{ y }}")
    assert Renderer(Prompt(system=None), SOURCE).render(document("x")).system is None


def test_a_template_that_fails_on_a_row_fails_that_row() -> None:
    renderer = Renderer(Prompt(context="{{ text }}{{ meta.author.name }}"), SOURCE)
    assert renderer.render(document("x", meta={"author": {"name": "A"}})).context == "xA"
    with pytest.raises(PromptFailed, match=r"^prompt\.context: .*'author'"):
        renderer.render(document("x", meta={}))
    with pytest.raises(PromptFailed, match="unsafe"):
        Renderer(Prompt(context="{{ text.__class__ }}"), SOURCE).render(document("x"))


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_blank_text_is_an_empty_document(text: str) -> None:
    with pytest.raises(EmptyDocument):
        Renderer(Prompt(), SOURCE).render(document(text))


# Long enough for merges across the seam; the alphabet has what merges in the test tokenizer.
_texts = st.text("aby ,.?!\n\t-(1é<|end|>", max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    system=st.none() | _texts.filter(str.strip),
    context=_texts.filter(str.strip),
    queries=st.lists(_texts.filter(str.strip), min_size=1, max_size=10),
    chat=st.booleans(),
)
def test_context_and_suffix_are_the_tokens_of_the_whole_prompt(
    make_tokenizer: Callable[..., Any], system: str | None, context: str, queries: list[str], chat: bool
) -> None:
    tokenizer = make_tokenizer() if chat else make_tokenizer(chat_template=None)
    prompts = PromptTokenizer(tokenizer, special_tokens="allow")
    rendered = Rendered(system, context)
    document = prompts.tokenise(rendered, queries)
    assert len(document.suffixes) == len(queries)
    for query, suffix in zip(queries, document.suffixes, strict=True):
        whole = encode(tokenizer, prompts.prompt_text(rendered, query), add_special_tokens=not chat)
        assert document.context + suffix == whole
        assert suffix


@given(queries=st.lists(_texts, min_size=1, max_size=4), added=_texts)
def test_an_added_query_never_lengthens_the_context(tokenizer: Any, queries: list[str], added: str) -> None:
    prompts = PromptTokenizer(tokenizer)
    before = prompts.tokenise(Rendered(None, MINUTES), queries).context
    after = prompts.tokenise(Rendered(None, MINUTES), [added, *queries]).context
    assert before[: len(after)] == after


@pytest.mark.parametrize("added", ["Why?", "2", "\n", "  x", "...", "(a)", "Été", "<|user|>", "<", "日本"])
def test_an_ordinary_added_query_leaves_the_context_alone(tokenizer: Any, added: str) -> None:
    prompts = PromptTokenizer(tokenizer)
    rendered = Rendered("Be brief.", MINUTES)
    before = prompts.tokenise(rendered, ["Who signed?"])
    assert prompts.tokenise(rendered, ["Who signed?", added]).context == before.context
    assert len(before.suffixes[0]) < 12


def test_one_query_does_not_swallow_the_question(tokenizer: Any) -> None:
    tokenised = PromptTokenizer(tokenizer).tokenise(Rendered(None, MINUTES), ["What did the board decide?"])
    assert tokenizer.decode(tokenised.suffixes[0]).strip().startswith("What did the board decide?")


def test_a_suffix_has_a_token_even_where_prompts_are_the_same(tokenizer: Any) -> None:
    tokenised = PromptTokenizer(tokenizer).tokenise(Rendered(None, "C"), ["What", "What"])
    assert all(tokenised.suffixes)


def test_the_chat_template_writes_system_context_and_query(tokenizer: Any) -> None:
    text = PromptTokenizer(tokenizer).prompt_text(Rendered("S", "C"), "Q")
    assert text == "<|bos|><|system|>S<|end|><|user|>C\n\nQ<|end|><|assistant|>"


def test_without_a_chat_template_the_prompt_is_plain(make_tokenizer: Callable[..., Any]) -> None:
    prompts = PromptTokenizer(make_tokenizer(chat_template=None))
    assert prompts.prompt_text(Rendered("S", "C"), "Q") == "S\n\nC\n\nQ\n\n"
    assert prompts.prompt_text(Rendered(None, "C"), "Q") == "C\n\nQ\n\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}",
        "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}",
    ],
    ids=["refuses", "drops"],
)
def test_a_template_without_a_system_role_gets_the_system_text_in_the_user_message(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    prompts = PromptTokenizer(make_tokenizer(chat_template=template))
    assert prompts.prompt_text(Rendered("S", "C"), "Q") == "[S\n\nC\n\nQ]"


def test_the_prompt_does_not_change_with_the_day(make_tokenizer: Callable[..., Any]) -> None:
    template = "\n{{ strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d') }}: {{ messages[-1].content }}"
    for written in (template, {"default": template, "tool_use": "{{ tools }}"}):
        prompts = PromptTokenizer(make_tokenizer(chat_template=written))
        assert prompts.prompt_text(Rendered(None, "C"), "Q") == "\n26 Jul 2024, 2024-07-26: C\n\nQ"


def test_a_chat_template_that_never_works_is_the_models_fault(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="cannot be used: only tools"):
        PromptTokenizer(make_tokenizer(chat_template="{{ raise_exception('only tools') }}"))


def test_a_chat_template_that_fails_on_a_row_fails_that_row(make_tokenizer: Callable[..., Any]) -> None:
    fails = "{% if 'bad' in messages[-1].content %}{{ raise_exception('x') }}{% endif %}"
    template = "{{ messages[-1].content }}" + fails
    prompts = PromptTokenizer(make_tokenizer(chat_template=template))
    with pytest.raises(PromptFailed, match="chat template fails: x"):
        prompts.tokenise(Rendered(None, "bad"), ["Q"])


def test_mlx_lms_wrapper_gives_the_same_tokens(tokenizer: Any) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    rendered = Rendered("S", MINUTES)
    queries = ["What?", "When does the lease end?"]
    expected = PromptTokenizer(tokenizer).tokenise(rendered, queries)
    assert PromptTokenizer(TokenizerWrapper(tokenizer)).tokenise(rendered, queries) == expected


@pytest.mark.parametrize("template", ["$A <|end|>", "<|bos|> $A <|end|> <|end|>", "<|bos|> $A"])
def test_an_end_that_the_tokenizer_puts_behind_every_text_is_taken_off(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
    )
    tokenised = PromptTokenizer(tokenizer).tokenise(Rendered(None, MINUTES), ["Who?"])
    text = tokenizer.encode(f"{MINUTES}\n\nWho?\n\n", add_special_tokens=False)
    assert tokenised.context + tokenised.suffixes[0] == [0] * template.count("bos") + text


def test_a_tokenizer_that_overrides_encode_alone_is_respected(tokenizer: Any) -> None:
    class Wrapped:
        chat_template = None

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **options)

        def encode(self, text: str, **options: Any) -> Any:
            return tokenizer.encode(text.replace("\n", "<n>"), **options)

    prompts = PromptTokenizer(Wrapped())
    tokenised = prompts.tokenise(Rendered(None, "a\nb"), ["Q"])
    assert tokenised.context + tokenised.suffixes[0] == encode(tokenizer, "a<n>b<n><n>Q<n><n>", True)


def test_prompts_that_share_no_token_have_no_context(make_tokenizer: Callable[..., Any]) -> None:
    prompts = PromptTokenizer(make_tokenizer(chat_template="{{ messages[-1].content[-2:] + messages[-1].content }}"))
    with pytest.raises(PromptFailed, match="differ from the first token on"):
        prompts.tokenise(Rendered(None, "A lease."), ["What?", "Who is"])
