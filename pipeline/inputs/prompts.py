"""Prompts: rendered from a document's columns, tokenised as a whole, and cut where the context ends and a query begins.

In a template, `text` and `id` are the columns that `documents.text` and `documents.id` name. Every other column has its
own name, and `row["name"]` is the column of any name.

Two texts that are tokenised separately do not give the tokens of the whole text. Therefore every query's whole prompt
is tokenised, and the context is the longest run of tokens with which all prompts begin: those of the job's queries and
those of a few fixed probes. The probes end the context where it ends for almost any query, so a query that is added to
a job rarely changes the context. If it does, it shortens the context, and the only harm is a miss in the cache.
(Tokenising only the end of each prompt would be faster, but no tokenizer promises the same tokens.)

`Renderer` needs no tokenizer, so that fingerprints of rows need no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, cycle
from typing import Any

from jinja2 import Template, meta, nodes

from pipeline.errors import EmptyDocument, JobError, ModelError, PromptFailed, UnreadableText, one_line
from pipeline.inputs.documents import Document
from pipeline.inputs.questions import Question
from pipeline.inputs.templates import UsedNames, checked, compiled, environment, used_names
from pipeline.inputs.time_limit import limited
from pipeline.job.job import Documents, Prompt, SpecialTokensMode
from pipeline.models.special_tokens import BREAK, BreakingTokenizer, SpecialTokens

SHARED_CHARACTERS = 1000  # a beginning of this length that all documents share is prefilled once, by itself
_PROBES = ("What", "1", "(x)", "\n-", " é")
# Prompts tokenised in one call: few, to bound the tokens in memory, but enough to keep the threads busy.
_PROMPTS_PER_GROUP = 8
_CHARACTERS_PER_GROUP = 4 << 20  # a token takes some 200 bytes while its text is tokenised
_SLICE = 1 << 16  # characters of a context that are counted at once; a context that has fewer is tokenised as a whole
_SHORT = 4  # characters per token of the limit: so is one that has fewer


# What a template must write once and unchanged: with cases, quotes, marks of HTML, line breaks, and long.
_PROBE_SYSTEM = "Probe of the System: <b>Aa</b> & 'b' \"C\"\n\n\t- {1} É ß."
_PROBE_USER = "Probe of a Document, <i>Aa</i> & b.\n\n- " * 2000 + "\n\nProbe of a Query?"


class _TextLost(Exception):
    """A chat template does not write the text that it was given."""


@dataclass(frozen=True)
class Rendered:
    """A document's system text and context, as text.

    start, end: the part of the document's text that the context has; an end of None is the end of the text.
    """

    system: str | None
    context: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class TokenisedDocument:
    """The tokens of a document and its queries.

    `context + suffixes[i]` are the tokens of the i-th query's whole prompt. No suffix is empty.
    """

    context: list[int]
    suffixes: list[list[int]]


def template_columns(prompt: Prompt, documents: Documents) -> set[str]:
    """Return the columns that the prompt's templates use. Raises JobError if the context uses none.

    >>> documents = Documents(path="papers.parquet", text="body")
    >>> sorted(template_columns(Prompt(context="{{ title }}: {{ text }}"), documents))
    ['body', 'title']
    """
    context = _columns("prompt.context", prompt.context, documents)
    if not context:
        raise JobError("prompt.context uses no column, so every document would have the same context; use {{ text }}")
    return context | _columns("prompt.system", prompt.system or "", documents)


def check_context_has_text(prompt: Prompt, documents: Documents) -> None:
    """Raise JobError if the context does not use the column that `documents.text` names."""
    columns = _columns("prompt.context", prompt.context, documents)
    if documents.text not in columns:
        used = ", ".join(f"'{name}'" for name in sorted(columns))
        raise JobError(
            f"prompt.context has none of the text: it uses {used}, and documents.text names the column "
            f"'{documents.text}'; write {{{{ text }}}} where the text belongs, or name another column as the text"
        )


class Renderer:
    """Renders the prompt's templates with the columns of documents.

    documents: tells which columns `text` and `id` are. shared: the beginning that the prompts of all documents share,
    if it is long; otherwise None.
    """

    def __init__(self, prompt: Prompt, documents: Documents) -> None:
        self._documents = documents
        self._context = compiled(checked("prompt.context", prompt.context))
        self._system = compiled(checked("prompt.system", prompt.system or ""))
        self._used_by_context = used_names("prompt.context", prompt.context)
        self._used_by_system = used_names("prompt.system", prompt.system or "")
        self.shared = _shared(prompt.system or "", prompt.context)

    def render(self, document: Document) -> Rendered:
        """Render a document.

        Raises EmptyDocument if its text is blank, UnreadableText if a column that templates use is not text, and
        PromptFailed if a template fails on its row.
        """
        if document.unreadable:
            raise UnreadableText(document.unreadable)
        if not document.text.strip():
            raise EmptyDocument("the document's text is empty")
        system = self._fill(self._system, "prompt.system", self._used_by_system, document)
        return Rendered(system or None, self._fill(self._context, "prompt.context", self._used_by_context, document))

    def keeps_text(self, document: Document, rendered: Rendered) -> bool:
        """Return whether the context has the document's text unchanged, so that the context tells the text.

        rendered: the document, as `render` returns it.
        """
        marked = f"\ue000{document.text}\ue001"
        own = replace(document, columns={**document.columns, self._documents.text: marked})
        try:
            context = self._fill(self._context, "prompt.context", self._used_by_context, own)
        except PromptFailed:
            return False
        return marked in context and context.replace(marked, document.text) == rendered.context

    def _fill(self, template: Template, key: str, used: UsedNames, document: Document) -> str:
        variables = used.variables(document.columns, self._documents.meanings)
        try:
            with limited():
                return template.render(variables)
        except Exception as error:
            raise PromptFailed(f"{key}: {one_line(error)}") from error


class PromptTokenizer:
    """Tokenises rendered documents with their queries, through the model's chat template if it has one.

    tokenizer: mlx-lm's TokenizerWrapper or a Hugging Face tokenizer. thinks: whether the template shall make the model
    think before it answers, if the model can. special_tokens: `text` if special tokens in texts are read as ordinary
    text, `allow` if they are special tokens there too. Raises ModelError if the chat template cannot be used at all.

    folds_system: whether the system text is put before the context, because the template takes none.
    """

    def __init__(self, tokenizer: Any, thinks: bool = False, special_tokens: SpecialTokensMode = "text") -> None:
        self._tokenizer = tokenizer
        from pipeline.models.mlx_lm_internals import can_use_chat_template, hugging_face_tokenizer

        self._plain = hugging_face_tokenizer(tokenizer)
        self._special = SpecialTokens.of_tokenizer(self._plain) if special_tokens == "text" else SpecialTokens([], "")
        self._broken = lru_cache(maxsize=2)(self._special.broken)  # of a document and its system text
        self._has_template = can_use_chat_template(tokenizer)
        if re.search(r"\|\s*random\b", str(getattr(tokenizer, "chat_template", None))):
            raise ModelError("the model's chat template uses the filter random: its prompts would never be the same")
        self._template_options = {"enable_thinking": thinks, **_template_options(tokenizer)}
        self.folds_system = self._in_parts = False
        if self._has_template:
            self._find_form()
        self._find_encoder = partial(_find_encoder, add_special_tokens=not self._has_template)
        self._encode_unbroken = self._find_encoder(tokenizer)

    def tokenise(
        self, rendered: Rendered, query_texts: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> TokenisedDocument:
        """Tokenise each query's whole prompt, and split it at the end of the context. Raises PromptFailed.

        check: is called between the parts of the work, and may raise an exception to end it.
        """
        first: list[int] = []
        tails: list[tuple[int, list[int]]] = []  # the number of tokens shared with the first prompt, and the others
        texts = [*query_texts, *_PROBES]
        size = max(1, min(_PROMPTS_PER_GROUP, _CHARACTERS_PER_GROUP // max(len(rendered.context), 1)))
        for start in range(0, len(texts), size):
            check()
            group = texts[start : start + size]
            for tokens in self._encode([self.prompt_text(rendered, text) for text in group]):
                first = first or tokens
                # The last token is never part of the context: decoding starts from at least one token of a suffix.
                shared = min(_shared_length(first, tokens), len(tokens) - 1)
                tails.append((shared, tokens[shared:]))
        end = min(shared for shared, _ in tails)
        if end < 1:
            raise PromptFailed("the prompts of two queries differ from the first token on: there is no context")
        suffixes = [first[end:shared] + tail for shared, tail in tails[: len(query_texts)]]
        return TokenisedDocument(first[:end], suffixes)

    def suffix(self, rendered: Rendered, question: Question, context: Sequence[int]) -> list[int]:
        """Return the tokens of a question's whole prompt behind those of the context. Raises PromptFailed."""
        (tokens,) = self._encode([self.prompt_text(rendered, question.text, question.turns)])
        if len(tokens) <= len(context) or tokens[: len(context)] != list(context):
            raise PromptFailed(
                "the tokens of the whole prompt do not begin with those of the context; begin the query with a word"
            )
        return tokens[len(context) :]

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each whole prompt. Many prompts at once are faster."""
        return [len(tokens) for tokens in self._encode(list(prompts))]

    def estimate_beyond(self, context: str, limit: int) -> int | None:
        """Return about how many tokens a context has if these are certainly more than `limit`, otherwise None.

        It is counted in slices, and only until the limit is passed: a context of any length takes as long as one of
        `limit` tokens. Where a slice ends, tokens may be cut in two, for which the count has a reserve.
        """
        if len(context) <= max(_SHORT * limit, _SLICE):
            return None
        tokens = 0
        for start in range(0, len(context), _SLICE):
            tokens += self.count([context[start : start + _SLICE]])[0]
            if tokens > limit * 17 // 16 + 64:
                return round(tokens * len(context) / min(start + _SLICE, len(context)))
        return None

    def shared_tokens(self, shared: Rendered) -> list[int]:
        """Return the tokens with which every document's context begins. Raises PromptFailed."""
        texts = (Rendered(shared.system, shared.context + probe) for probe in _PROBES)
        prompts = self._encode([self.prompt_text(text, _PROBES[0]) for text in texts])
        return prompts[0][: min(_shared_length(prompts[0], other) for other in prompts[1:])]

    def prompt_text(self, rendered: Rendered, query_text: str, turns: Sequence[tuple[str, str]] = ()) -> str:
        """Return the whole prompt of one query, as the model reads it, with BREAK in special tokens of its texts.

        turns: queries before this one and their answers, which are shown as a conversation. Raises PromptFailed.
        """
        system = None if rendered.system is None else self._broken(rendered.system)
        said = [self._special.broken(text) for text in chain(*turns, (query_text,))]
        said[0] = f"{self._broken(rendered.context)}\n\n{said[0]}"
        if not self._has_template:
            return "".join(f"{text}\n\n" for text in (system, *said) if text is not None)
        try:
            return self._apply(system, *said)
        except _TextLost as error:
            raise PromptFailed(str(error)) from None
        except Exception as error:
            raise PromptFailed(f"the model's chat template fails: {one_line(error)}") from error

    def _apply(self, system: str | None, *said: str) -> str:
        """Return the chat template's text. Raises what the template raises, and _TextLost.

        said: what the user says, perhaps what the model answers, what the user says then, and so on.
        """
        if system is not None and self.folds_system:
            system, said = None, (f"{system}\n\n{said[0]}", *said[1:])
        texts = [
            *([] if system is None else [("system", system)]),
            *zip(cycle(("user", "assistant")), said, strict=False),
        ]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for role, text in texts
        ]
        with limited():
            prompt: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._template_options
            )
        end = 0
        for role, text in texts:  # many templates trim texts, which is harmless
            start = prompt.find(text.strip(), end)
            if start < 0:
                raise _TextLost(f"the model's chat template leaves out or changes text of the {role}'s message")
            end = start + len(text.strip())
        return prompt

    def _find_form(self) -> None:
        """Choose how messages are given to the chat template, so that all of their text comes out, in order.

        Some templates refuse the role of the system or leave its text out; some take the content of a message in parts
        only. Raises ModelError if nothing helps.
        """
        problems: list[str] = []
        for self._in_parts, self.folds_system in ((False, False), (False, True), (True, False), (True, True)):
            try:
                prompt = self._apply(_PROBE_SYSTEM, _PROBE_USER)
            except Exception as error:
                problems.append(one_line(error))
                continue
            if prompt.count(_PROBE_SYSTEM) == prompt.count(_PROBE_USER) == 1:
                return
            problems.append("it writes the text of a message twice")
        raise ModelError(
            f"the model's chat template cannot be used: {problems[1]}; put another one in its place "
            "(chat_template.jinja in the model's folder)"
        )

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        """Return the tokens of whole prompts. Raises PromptFailed if special tokens cannot be kept out of a text."""
        if not any(BREAK in prompt for prompt in prompts):
            return self._encode_unbroken(prompts)
        return [self._encode_broken(text) if BREAK in text else self._encode_unbroken([text])[0] for text in prompts]

    def _encode_broken(self, prompt: str) -> list[int]:
        tokens = self._breaking_tokenizer.encode(prompt)
        if tokens is None:
            raise PromptFailed(
                "the text holds a special token of the model that its tokenizer cannot read as ordinary text; "
                "take it out of the text, or set prompt.special_tokens: allow"
            )
        return tokens

    @cached_property
    def _breaking_tokenizer(self) -> BreakingTokenizer:
        return BreakingTokenizer(self._plain, self._special, self._find_encoder)


def _columns(key: str, source: str, documents: Documents) -> set[str]:
    """Return the columns that a template uses. Raises JobError, which names `key`."""
    return used_names(key, checked(key, source)).columns(documents.meanings)


@lru_cache(maxsize=64)
def _shared(system: str, context: str) -> Rendered | None:
    """Return the system text and the beginning of the context if neither uses a column and they are long."""
    sandbox = environment()
    if meta.find_undeclared_variables(sandbox.parse(system)):
        return None
    first = next(iter(sandbox.parse(context).body), None)
    literal = ""
    if isinstance(first, nodes.Output) and isinstance(first.nodes[0], nodes.TemplateData):
        literal = first.nodes[0].data
    try:
        with limited():
            system = compiled(system).render()
    except Exception:  # it fails for every document too, and each of their rows then has the error
        return None
    return Rendered(system or None, literal) if len(system) + len(literal) >= SHARED_CHARACTERS else None


# The date that Llama's template uses if it has no clock.
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%H": "00", "%M": "00"}


def _template_options(tokenizer: Any) -> dict[str, str]:
    """Return options that make a chat template write a fixed date: with today's, contexts would change every day."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name, of which this one is meant if no tools are given
        template = template.get("default")
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    date = "".join(f" | replace('{directive}', '{value}')" for directive, value in _DATE.items())
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{date} }}}}{{% endmacro +%}}"
    return {"chat_template": macro + template}


def _find_encoder(tokenizer: Any, add_special_tokens: bool) -> Callable[[list[str]], list[list[int]]]:
    """Return the fastest function that tokenises several texts and gives the same tokens as `tokenizer.encode`.

    Tokens that the tokenizer puts behind every text are left out: behind the token that ends an answer, none begins.
    """
    from pipeline.models.mlx_lm_internals import hugging_face_tokenizer

    # With `verbose`, there is a warning for each text that is longer than the model's training length.
    options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": False}

    def one_by_one(texts: list[str]) -> list[list[int]]:
        return [list(tokenizer.encode(text, **options)) for text in texts]

    call = hugging_face_tokenizer(tokenizer)

    def together(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = call(texts, return_attention_mask=False, **options)["input_ids"]
        return ids

    # Some classes override `encode` only, for example mlx-lm's NewlineTokenizer.
    sample = ["one\ntwo  three\r\n\té <n> 42"]
    encode = together if callable(call) and together(sample) == one_by_one(sample) else one_by_one
    appended = (
        _count_appended(encode(sample)[0], _find_encoder(tokenizer, False)(sample)[0]) if add_special_tokens else 0
    )
    return (lambda texts: [tokens[:-appended] for tokens in encode(texts)]) if appended else encode


def _count_appended(whole: Sequence[int], text: Sequence[int]) -> int:
    """Return how many tokens follow those of a text; 0 if the text's tokens are not found."""
    starts = (start for start in range(len(whole)) if whole[start : start + len(text)] == text)
    return len(whole) - next(starts, len(whole) - len(text)) - len(text)


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
