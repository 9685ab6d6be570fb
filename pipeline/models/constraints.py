"""JSON schemas that answers must follow: compiled before a run, and enforced while decoding, by llguidance.

Knows schemas, the extra that compiles them, and tokens; not prompts or rows, nor which rows share a batch. What
llguidance has no rule for it refuses, so JSON that it lets through to the end is JSON of the schema.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import AnswerCutOff, GenerationFailed, JobError, ModelError, RowError, one_line
from pipeline.models.thinking import Thinking

if TYPE_CHECKING:
    import mlx.core as mx

# One line, or a model that is at a loss could go on with spaces for ever.
_FORM = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}

_SCHEMA_KEYS = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf"}
_MAPPING_KEYS = {"properties", "patternProperties", "$defs", "definitions"}
_OPEN_KEYS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}


def check_schemas(schemas: Mapping[str, str]) -> None:
    """Raises JobError for a schema that cannot be compiled, and where there is nothing to compile it with.

    schemas: each with the id of the first query that has it.
    """
    for schema, query_id in schemas.items():
        origin = f"queries: json_schema of query '{query_id}'"
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise JobError(
                f"{origin}: needs the package llguidance; install it with `pip install llguidance`, "
                "or this project with its extra `schemas`"
            ) from None
        if problem := LLMatcher.validate_grammar(_grammar(schema)):
            raise JobError(f"{origin}: cannot be compiled: {' '.join(problem.split())}")


class Grammars:
    """Schemas, compiled for a tokenizer (mlx-lm's wrapper). Raises ModelError where it does not tell its bytes."""

    def __init__(self, tokenizer: Any, schemas: Collection[str]) -> None:
        self._matchers: dict[str, Any] = {}
        if not schemas:
            return
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        try:
            self._tokenizer = from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))
        except ValueError as error:
            raise ModelError(f"json_schema cannot be used with this model's tokenizer: {one_line(error)}") from error
        for schema in schemas:
            self._matchers[schema] = LLMatcher(self._tokenizer, _grammar(schema), log_level=0)

    def constraint(self, schema: str, thinking: Thinking) -> Constraint:
        """What keeps one answer to one of the schemas, from where its thinking is over."""
        return Constraint(self._matchers[schema].deep_copy(), self._tokenizer, thinking)


class Constraint:
    """Keeps one row to its schema, as a logits processor of mlx-lm's; whatever rows are beside it."""

    def __init__(self, matcher: Any, tokenizer: Any, thinking: Thinking) -> None:
        self._matcher, self._tokenizer, self._thinking = matcher, tokenizer, thinking
        self._read: int | None = None  # tokens seen, the prompt's among them

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits, (1, vocabulary), without the tokens that cannot come next.

        tokens: the prompt's, as far as the generator knows them, and all that were generated; none at the first call.
        """
        import mlx.core as mx

        if self._read is not None:
            generated: Any = tokens[self._read :].tolist()
            for token in generated:
                self._matcher.consume_tokens(self._thinking.take(token))
        self._read = tokens.size
        if self._thinking.is_open:
            return logits
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # only the end where it gave up
        allowed = np.unpackbits(words, count=logits.shape[-1], bitorder="little").view(bool)
        if (mark := self._thinking.awaited) is not None:
            allowed &= not self._thinking.tokens  # a mark that was begun is ended
            allowed[mark] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens so far are JSON of the schema that nothing can be added to."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens are to the schema, to the byte."""
        text: str = self._tokenizer.decode_str(list(tokens))
        return text

    def failure(self, tokens: int) -> RowError | None:
        """What is wrong with an answer that ended with so many tokens."""
        if self.is_complete:
            return None
        if problem := self._matcher.get_error():
            return GenerationFailed(f"llguidance gave up on the schema: {' '.join(problem.split())}")
        return AnswerCutOff(
            f"the JSON is not complete after {tokens:,} tokens; raise max_tokens, or bound what the schema allows"
        )


def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    is_merged = '"allOf"' in schema  # of parts, each of which must let the others' properties pass
    tree = json.loads(schema)
    grammar: str = LLMatcher.grammar_from_json_schema(tree if is_merged else _closed(tree), overrides=_FORM)
    return grammar


def _closed(schema: Any) -> Any:
    """A schema whose objects have the properties it names and no others, but where it says what others may be.

    All that it allows the schema itself allows; a model that may add properties finds no end.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) if key in _SCHEMA_KEYS else value for key, value in schema.items()}
    for key in _MAPPING_KEYS & schema.keys():
        if isinstance(schema[key], dict):
            closed[key] = {name: _closed(value) for name, value in schema[key].items()}
    if "properties" in schema and not _OPEN_KEYS & schema.keys():
        closed["additionalProperties"] = False
    return closed
