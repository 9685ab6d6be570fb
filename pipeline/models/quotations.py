"""Evidence: quotations that the model takes from the document, word for word, after it has answered.

The model is asked in a next turn of the conversation, so that the answer itself does not depend on whether evidence is
wanted. While it writes, a grammar holds it to the words of the passages. A field of a JSON schema with `x-evidence:
true` is left out while the JSON is written, and filled by such a turn of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict

from pipeline.job.job import EVIDENCE_KEY

NONE = "NO EVIDENCE"
QUESTION = (
    "Quote the passage of the document that shows this answer, word for word and without a comment. "
    f"If there is none, write {NONE}."
)
SLOT_QUESTION = QUESTION.replace("this answer", "{field}")  # for one field of a JSON answer
NEXT_QUESTION = f"Quote one more passage that shows it, word for word. If there is none, write {NONE}."
QUOTATION_TOKENS = 96  # the most tokens of a quotation
_MARK = "answer-before-the-question"
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces between words
_WALKED_KEYS = {"properties", "items", "$defs", "definitions"}


class Quotation(TypedDict):
    """A quotation and its place in the text column of its document.

    start, end: offsets in characters of its first occurrence. occurrences: how often the text has it, in whole words if
    it has any such. page: the page on which it begins, from 1, if the text has pages, each of which ends with a form
    feed.
    """

    quote: str
    start: int
    end: int
    occurrences: int
    page: int | None


@dataclass(frozen=True)
class Passages:
    """The texts that quotations are taken from. whole: a quotation is one of them, not any part of one."""

    texts: tuple[str, ...]
    whole: bool = False


def located(quote: str, text: str, start: int = 0) -> Quotation:
    """Return a quotation with its first place in the text from ``start`` on. Raises ValueError if it has none.

    A place that begins or ends inside a word, as "no" in "not", counts only if there is no other.
    """
    ends = ("" if _UNSPACED.search(quote) else r"\b" * bool(re.match(r"\w", end)) for end in (quote[:1], quote[-1:]))
    places = [found.start() for found in re.finditer(re.escape(quote).join(ends), text)]
    begin = next((place for place in places if place >= start), None)
    if begin is None:
        begin = text.index(quote, start)
    page = text.count("\f", 0, begin) + 1 if "\f" in text else None
    occurrences = len(places) or text.count(quote)
    return Quotation(quote=quote, start=begin, end=begin + len(quote), occurrences=occurrences, page=page)


def grammar(passages: Passages) -> str:
    """Return llguidance's grammar, in Lark's notation, of one quotation or NONE."""
    if passages.whole:
        return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in (NONE, *passages.texts))
    quotes, rules = [], []
    for number, text in enumerate(passages.texts):
        kind = "substring_chars" if _UNSPACED.search(text) else "substring_words"
        quotes.append(f"QUOTE{number}")
        rules.append(f"QUOTE{number}: %regex {json.dumps({kind: text}, ensure_ascii=False)}")
    return "\n".join([f'start: "{NONE}" | {" | ".join(quotes)}', *rules])


def turn_tokens(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens that follow an answer, with which the user asks a question and the model's next turn begins.

    tokenizer: mlx-lm's wrapper. If its chat template takes no second question, the question stands by itself.
    """
    from pipeline.models.mlx_lm_internals import can_use_chat_template

    after = ""
    if can_use_chat_template(tokenizer):
        turns = (("user", "What?"), ("assistant", _MARK), ("user", question))
        messages = [{"role": role, "content": content} for role, content in turns]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        with suppress(Exception):  # templates are code of the model's authors, and raise what they like
            after = tokenizer.apply_chat_template(messages, **options).partition(_MARK)[2]
    if question not in after:
        after = f"\n\n{question}\n\n"
    return list(tokenizer.encode(after, add_special_tokens=False))


# ---- fields of JSON schemas that are quotations


def check_evidence_fields(schema: Any, inside: str = "") -> None:
    """Raise ValueError if a field that is a quotation is where it cannot be filled."""
    if isinstance(schema, list):
        for each in schema:
            check_evidence_fields(each, inside)
    elif isinstance(schema, dict):
        if inside and schema.get(EVIDENCE_KEY) is True:
            raise ValueError(f"has {EVIDENCE_KEY} inside of {inside}; it can be within properties, items and $defs")
        for key, value in schema.items():
            children = list(value.values()) if key in {"properties", "$defs", "definitions"} else value
            check_evidence_fields(children, inside if key in _WALKED_KEYS else inside or key)


def without_evidence_fields(schema: Any) -> Any:
    """Return a JSON schema without the properties that are quotations."""
    if isinstance(schema, list):
        return [without_evidence_fields(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    quoted, kept = _evidence_names(schema), dict(schema)
    for key in {"properties", "$defs", "definitions"} & schema.keys():
        if isinstance(schema[key], dict):
            kept[key] = {
                name: without_evidence_fields(child)
                for name, child in schema[key].items()
                if key != "properties" or name not in quoted
            }
    if "items" in schema:
        kept["items"] = without_evidence_fields(schema["items"])
    if quoted and isinstance(schema.get("required"), list):
        kept["required"] = [name for name in schema["required"] if name not in quoted]
    return kept


class EvidenceFields:
    """The fields of a JSON answer that are quotations: found by its schema, and filled one by one."""

    def __init__(self, schema: str, answer: str) -> None:
        self._schema, self._answer = json.loads(schema), json.loads(answer)
        self._slots = list(self._find(self._schema, self._answer, ""))

    @property
    def paths(self) -> list[str]:
        """The path of each field, such as `parties[0].quote`."""
        return [path for path, _, _, _ in self._slots]

    def filled(self, quotes: Sequence[str | None]) -> str:
        """Return the answer with these quotations, in the order of the paths and of the schema's properties."""
        for (_, owner, name, names), quote in zip(self._slots, quotes, strict=True):
            owner[name] = quote
            others = {key: owner.pop(key) for key in list(owner)}
            owner.update({key: others[key] for key in names if key in others} | others)
        return json.dumps(self._answer, ensure_ascii=False)

    def _find(self, schema: Any, value: Any, path: str) -> Iterator[tuple[str, dict[str, Any], str, list[str]]]:
        seen = 0
        while isinstance(schema, dict) and "$ref" in schema and seen < 100:
            schema, seen = self._resolve(schema["$ref"]), seen + 1
        if not isinstance(schema, dict):
            return
        if isinstance(value, list):
            for number, each in enumerate(value):
                yield from self._find(schema.get("items"), each, f"{path}[{number}]")
        elif isinstance(value, dict):
            properties = schema.get("properties", {})
            for name, child in properties.items():
                inner = f"{path}.{name}" if path else name
                if name in _evidence_names(schema):
                    yield inner, value, name, list(properties)
                elif name in value:
                    yield from self._find(child, value[name], inner)

    def _resolve(self, reference: str) -> Any:
        found = self._schema
        for key in reference.removeprefix("#").strip("/").split("/"):
            if key:
                found = found[key.replace("~1", "/").replace("~0", "~")]
        return found


def _evidence_names(schema: Mapping[str, Any]) -> set[str]:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return set()
    return {name for name, child in properties.items() if isinstance(child, dict) and child.get(EVIDENCE_KEY) is True}
