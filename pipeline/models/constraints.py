"""Hold answers to JSON schemas and quotations to their document: llguidance restricts the tokens while decoding.

llguidance refuses every part of a schema that it has no rule for, so a complete answer always follows its schema.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from pipeline.errors import AnswerCutOff, GenerationFailed, JobError, ModelError, RowError, one_line
from pipeline.models.quotations import Passages, check_evidence_fields, grammar, without_evidence_fields
from turboquant.io.json_file import parse_json

if TYPE_CHECKING:
    import mlx.core as mx

    from pipeline.models.channels import ChannelParser
    from pipeline.models.thinking import ThinkingParser

# JSON on one line: a model that has nothing to say could otherwise write spaces without end.
_FORM = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}

_SCHEMA_KEYS = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"}
_MAPPING_KEYS = {"properties", "patternProperties", "$defs", "definitions"}
_OPEN_KEYS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}


def check_schemas(schemas: Mapping[str, str], evidence: str | None = None) -> None:
    """Raise JobError if a schema cannot be compiled, or if llguidance is not installed.

    schemas: each schema with the id of the first query that has it. evidence: the id of a query with evidence.
    """
    origins = {schema: f"queries: json_schema of query '{query_id}'" for schema, query_id in schemas.items()}
    for origin in [*origins.values(), *([] if evidence is None else [f"queries: evidence of query '{evidence}'"])]:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise JobError(
                f"{origin}: needs the package llguidance; install it with `pip install llguidance`, "
                "or this project with its extra `schemas`"
            ) from None
    for schema, origin in origins.items():
        from llguidance import LLMatcher

        try:
            check_evidence_fields(json.loads(schema))
        except ValueError as error:
            raise JobError(f"{origin}: {error}") from None
        if problem := LLMatcher.validate_grammar(_grammar(schema)):
            raise JobError(f"{origin}: cannot be compiled: {' '.join(problem.split())}")


class Grammars:
    """JSON schemas and passages to quote, compiled for one tokenizer.

    tokenizer: mlx-lm's wrapper. Raises ModelError if llguidance cannot find out the bytes of its tokens.
    """

    def __init__(self, tokenizer: Any, schemas: Collection[str]) -> None:
        self._wrapped = tokenizer
        self._matchers = {schema: self._compile(_grammar(schema)) for schema in schemas}
        self._last_passages: tuple[Passages, Any] = (Passages(()), None)  # the queries of a document follow each other

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        from pipeline.models.mlx_lm_internals import hugging_face_tokenizer, stop_token_ids

        try:
            return from_tokenizer(hugging_face_tokenizer(self._wrapped), eos_token=stop_token_ids(self._wrapped))
        except ValueError as error:
            message = "json_schema and evidence cannot be used with this model's tokenizer"
            raise ModelError(f"{message}: {one_line(error)}") from error

    def _compile(self, text: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        # The default limits refuse a document of 300,000 characters, which compiles in a third of a second.
        limits = LLParserLimits(initial_lexer_fuel=10**10, step_lexer_fuel=10**9, max_lexer_states=10**7)
        return LLMatcher(self._tokenizer, text, log_level=0, limits=limits)

    def constraint(self, schema: str, thinking: ThinkingParser | ChannelParser) -> Constraint:
        """Return the constraint that holds one answer to a schema, beginning where its thinking ends."""
        return Constraint(self._matchers[schema].deep_copy(), self._tokenizer, thinking)

    def quotation(self, passages: Passages, thinking: ThinkingParser | ChannelParser) -> Constraint:
        """Return the constraint that holds one turn to a quotation from the passages."""
        if self._last_passages[0] != passages:
            self._last_passages = (passages, self._compile(grammar(passages)))
        return Constraint(self._last_passages[1].deep_copy(), self._tokenizer, thinking)


class Constraint:
    """A logits processor of mlx-lm that holds one row to its grammar, independently of the other rows of the batch.

    logits: for each token that was chosen and not yet taken from here, the logits (1, vocabulary) of all tokens, before
    the grammar excluded any.
    """

    def __init__(self, matcher: Any, tokenizer: Any, thinking: ThinkingParser | ChannelParser) -> None:
        self._matcher, self._tokenizer, self._thinking = matcher, tokenizer, thinking
        self.logits: deque[mx.array] = deque()
        self._tokens_read: int | None = None  # of the prompt and the answer

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Return the logits, (1, vocabulary), with minus infinity for every token that cannot come next.

        tokens: the tokens of the prompt that mlx-lm knows, and all that were generated, which are none at the first
        call.
        """
        import mlx.core as mx

        if self._tokens_read is not None:
            generated: Any = tokens[self._tokens_read :].tolist()
            for token in generated:
                self._matcher.consume_tokens(self._thinking.add(token))
        self._tokens_read = tokens.size
        self.logits.append(logits)
        if self._thinking.is_open:
            return logits
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # only the stop token if llguidance gave up
        allowed = np.unpackbits(words, count=logits.shape[-1], bitorder="little").view(bool)
        if (start_token := self._thinking.next_start_token) is not None:
            allowed &= not self._thinking.tokens  # a mark of several tokens that was begun must be completed
            allowed[start_token] = True
        return mx.where(mx.array(allowed), logits, -mx.inf)

    @property
    def is_complete(self) -> bool:
        """Whether the tokens so far are a complete text of the grammar: JSON of the schema, or a quotation."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens as llguidance reads it, byte by byte."""
        text: str = self._tokenizer.decode_str(list(tokens))
        return text

    def failure(self, tokens: int) -> RowError | None:
        """Return the error of an answer that ended after `tokens` tokens, or None if it is complete."""
        if self.is_complete:
            return None
        if problem := self._matcher.get_error():
            return GenerationFailed(f"llguidance gave up on the grammar: {' '.join(problem.split())}")
        return AnswerCutOff(
            f"the JSON is not complete after {tokens:,} tokens; raise max_tokens, or bound what the schema allows"
        )


def check_json(text: str) -> RowError | None:
    """Return the error of JSON that readers take differently: a grammar cannot forbid the same key twice, or 1e999."""
    try:
        parse_json(text.encode())
    except ValueError as error:
        return GenerationFailed(f"the answer is no JSON for every reader: {one_line(error)}", may_pass=False)
    return None


def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    tree = _closed(without_evidence_fields(json.loads(schema)))
    grammar: str = LLMatcher.grammar_from_json_schema(tree, overrides=_FORM)
    return grammar


def _closed(root: Any) -> Any:
    """Return the schema with objects closed to properties that it does not name, unless it describes those too.

    Everything that the result accepts, the schema accepts. A model that may add any property does not come to an end.
    If parts of a schema describe one object together, each of them must accept the properties of the others, and
    nothing is closed.
    """
    root = json.loads(json.dumps(root))
    schemas = list(_schemas(root))
    if not any("allOf" in schema or schema.keys() >= {"$ref", "properties"} for schema in schemas):
        for schema in schemas:
            if "properties" in schema and not _OPEN_KEYS & schema.keys():
                schema["additionalProperties"] = False
    return root


def _schemas(root: Any) -> Iterator[dict[str, Any]]:
    """Yield the schema and all schemas in it, by the keywords that hold them, wherever its references point."""
    open_, seen = [root], set[int]()
    while open_:
        schema = open_.pop()
        if isinstance(schema, list):
            open_ += schema
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        open_ += [schema[key] for key in _SCHEMA_KEYS & schema.keys()]
        mappings = [schema[key] for key in _MAPPING_KEYS & schema.keys()]
        open_ += [each for mapping in mappings if isinstance(mapping, dict) for each in mapping.values()]
        open_.append(_referenced(root, schema.get("$ref")))


def _referenced(root: Any, reference: Any) -> Any:
    """Return what a JSON pointer in a schema, such as `#/components/schemas/P`, points to, or None."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found = root
    for part in unquote(reference[2:]).split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict):
            found = found.get(name)
        else:
            return None
    return found
