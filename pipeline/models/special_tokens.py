"""Special tokens: tokens with a text of their own, such as <|im_end|>, that structure what a model reads.

A tokenizer finds them in any text, also in a document's. There they would end a turn or begin one, as if the chat
template had written them. `SpecialTokens.broken` puts BREAK into each of them, and a tokenizer that knows BREAK as a
token of its own reads the text on both sides of it as ordinary text. Texts without special tokens stay as they are.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BREAK = "\U000f52b7\U000fa1c3\U000f52b7"  # private characters, in an order that no text has
_MARK = re.compile(r"[<\[]\S+[>\]]")
_CERTAIN_MARK = re.compile(r"<[|\uff5c]\S+|\S+[|\uff5c]>")  # no HTML tag looks like this


class SpecialTokens:
    """The texts of a model's special tokens.

    added: each token that the tokenizer finds before it splits a text, and whether it is called special. template: the
    chat template. Some families do not call the marks of their template special; those count too. Other added tokens,
    such as spaces and HTML tags, are ordinary text.
    """

    def __init__(self, added: Iterable[tuple[str, bool]], template: str) -> None:
        texts = {
            text
            for text, is_special in added
            if len(text) > 1 and not text.isspace()
            if is_special or _CERTAIN_MARK.fullmatch(text) or (_MARK.fullmatch(text) and text in template)
        }
        self.texts = frozenset(texts)
        by_first: dict[str, list[str]] = {}  # so that a search looks at few characters of a text
        for text in sorted(texts, key=lambda text: (-len(text), text)):
            by_first.setdefault(text[0], []).append(re.escape(text[1:]))
        branches = (f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items())
        any_of_them = "|".join(branches) or r"(?!)"
        self._pattern = re.compile(any_of_them)
        self._starts = re.compile(f"(?=(?:{any_of_them}))(.)", re.DOTALL)  # those that overlap too

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> SpecialTokens:
        """Return those of a Hugging Face tokenizer."""
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        return cls(
            ((token.content, token.special) for token in added), str(getattr(tokenizer, "chat_template", None) or "")
        )

    @classmethod
    def of_folder(cls, path: Path) -> SpecialTokens:
        """Return those of a model's folder, without loading the tokenizer, which takes seconds."""
        config = _read_object(path / "tokenizer_config.json")
        template = str(config.get("chat_template") or "")
        for name in ("chat_template.jinja", "chat_template.json"):
            with suppress(OSError, UnicodeDecodeError):
                template += (path / name).read_text(encoding="utf-8")
        return cls(_added_tokens(path, config), template)

    def are_in(self, text: str | None) -> bool:
        """Return whether a text has a special token's text."""
        return text is not None and self._pattern.search(text) is not None

    def count(self, text: str) -> int:
        """Return how many special tokens a tokenizer finds in a text."""
        return len(self._pattern.findall(text))

    def broken(self, text: str) -> str:
        """Return a text with BREAK in each special token, behind its first character."""
        return self._starts.sub(rf"\1{BREAK}", text) if self.are_in(text) else text


class BreakingTokenizer:
    """Tokenises texts in which BREAK stands: a copy of a Hugging Face tokenizer that knows BREAK as a token.

    special: the tokenizer's special tokens. make_encoder: returns the function that tokenises texts with a tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: SpecialTokens,
        make_encoder: Callable[[Any], Callable[[list[str]], list[list[int]]]],
    ) -> None:
        from transformers import AddedToken

        self._special, copied = special, copy.deepcopy(tokenizer)
        copied.add_tokens([AddedToken(BREAK, special=True, normalized=False)])
        self._break = copied.convert_tokens_to_ids(BREAK)
        self._ids = set(copied.convert_tokens_to_ids(sorted(special.texts)))
        self._encode = make_encoder(copied)
        self._always = self._count(self._encode([""])[0])  # those that begin or end every text

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of a text without BREAK, or None if the tokenizer finds special tokens in broken ones."""
        tokens = self._encode([text])[0]
        if tokens.count(self._break) != text.count(BREAK):
            return None
        if self._count(tokens) != self._always + self._special.count(text):
            return None
        return [token for token in tokens if token != self._break]

    def _count(self, tokens: list[int]) -> int:
        return sum(token in self._ids for token in tokens)


def _added_tokens(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the added tokens that the files of a tokenizer name, and whether they are special."""
    decoder = config.get("added_tokens_decoder")
    for token in [*_listed(path / "tokenizer.json"), *(decoder.values() if isinstance(decoder, dict) else [])]:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            yield token["content"], bool(token.get("special"))
    for text in _read_object(path / "added_tokens.json"):
        yield text, False
    for source in (config, _read_object(path / "special_tokens_map.json")):
        for key, value in source.items():
            if key.endswith(("_token", "_special_tokens")):
                for each in value if isinstance(value, list) else [value]:
                    content = each.get("content") if isinstance(each, dict) else each
                    if isinstance(content, str):
                        yield content, True


def _listed(file: Path) -> list[Any]:
    """Return the list of added tokens in tokenizer.json, without parsing the vocabulary, which has many megabytes."""
    with suppress(OSError, ValueError, RecursionError):
        content = file.read_text(encoding="utf-8")
        start = content.index("[", content.index('"added_tokens"'))
        listed = json.JSONDecoder().raw_decode(content, start)[0]
        if isinstance(listed, list):
            return listed
    return []


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is none."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return content
    return {}
