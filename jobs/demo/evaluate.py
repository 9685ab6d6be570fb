"""How many of the demo's answers are right: exact matches by depth, decisions recalled in summaries.

    python jobs/demo/evaluate.py out/summarize.parquet         scores a result file
    python jobs/demo/evaluate.py --uncompressed --fresh 60     answers with plain mlx-lm and scores that

It knows gold answers and how to compare. It knows nothing of the pipeline whose results it scores; the second
form answers by itself, with an ordinary full-precision cache, to say what the model is worth without any
compression: on the demo's documents and on that many other ones.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minutes
import phrases
import pyarrow.parquet as pq

from turboquant.runtime.blas import load_tuned_blas

FOLDER = Path(__file__).parent
QUINTILES = 5

Key = tuple[str, str]
"""document_id, query_id"""


@dataclass(frozen=True)
class Share:
    right: float
    count: int

    def __str__(self) -> str:
        return f"{self.right:g}/{self.count} ({self.right / max(1, self.count):.1%})"


@dataclass(frozen=True)
class Score:
    exact: Share
    """Extractive answers that are the gold text, character for character."""
    exact_by_depth: tuple[Share, ...]
    """The same for each fifth of the document, first to last, by where the fact is stated."""
    decisions: Share
    """Decisions of the gold summaries that are a line of the answer, whatever its number."""
    whole_summaries: Share
    wrong: tuple[tuple[Key, str, str], ...]
    """(key, gold answer, answer)"""

    def __str__(self) -> str:
        fifths = ", ".join(map(str, self.exact_by_depth))
        return (
            f"exact: {self.exact}\nby depth: {fifths}\n"
            f"decisions recalled: {self.decisions}\nwhole summaries: {self.whole_summaries}"
        )


def score(answers: Mapping[Key, str], gold: Sequence[Mapping[str, Any]]) -> Score:
    """Compares answers with the gold rows; an answer that is missing is wrong."""
    by_depth = [[0, 0] for _ in range(QUINTILES)]
    recalled, decisions, whole, summaries = 0, 0, 0, 0
    wrong: list[tuple[Key, str, str]] = []
    for row in gold:
        key = (row["document_id"], row["query_id"])
        answer = answers.get(key, "").strip()
        if row["query_id"] == minutes.SUMMARY_ID:
            lines = {_without_number(line) for line in answer.splitlines()}
            expected = [_without_number(line) for line in row["answer"].splitlines()]
            recalled += sum(line in lines for line in expected)
            decisions += len(expected)
            whole += answer == row["answer"]
            summaries += 1
        else:
            fifth = by_depth[min(QUINTILES - 1, int(row["depth"] * QUINTILES))]
            fifth[0] += answer == row["answer"]
            fifth[1] += 1
        if answer != row["answer"]:
            wrong.append((key, row["answer"], answer))
    return Score(
        Share(sum(right for right, _ in by_depth), sum(count for _, count in by_depth)),
        tuple(Share(right, count) for right, count in by_depth),
        Share(recalled, decisions),
        Share(whole, summaries),
        tuple(wrong),
    )


def _without_number(line: str) -> str:
    return line.partition(". ")[2].strip()


def fresh_minutes(count: int) -> list[minutes.Minutes]:
    """Documents like the demo's that are in neither the demo nor the training, with reserved values."""
    asked = tuple(minutes.DEMO_SLOTS.values())
    lengths = random.Random("fresh")
    return [
        minutes.write_minutes(
            f"fresh-{index}", lengths.choice(minutes.DEMO_CHARACTERS), asked, minutes.OTHER_FACTS,
            4 + index % 3, for_demo=True,
        )
        for index in range(count)
    ]  # fmt: skip


def questions() -> dict[str, str]:
    """Query id -> the question, for every query of the demo."""
    return {minutes.SUMMARY_ID: minutes.SUMMARY_QUESTION} | {
        query_id: phrases.KINDS[kind].question.format(s=subject)
        for query_id, (kind, subject) in minutes.DEMO_SLOTS.items()
    }


def uncompressed_answers(
    model_folder: Path,
    documents: Sequence[Mapping[str, Any]],
    queries: Mapping[str, str],
    max_tokens: int = 160,
) -> Iterator[tuple[Key, str]]:
    """Greedy answers in float32; a document is prefilled once, and its cache cut back after every answer."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model, tokenizer = load(str(model_folder))[:2]
    model.set_dtype(mx.float32)
    for document in documents:
        cache = make_prompt_cache(model)
        before: list[int] = []
        for query_id, question in queries.items():
            messages = [
                {"role": "system", "content": minutes.SYSTEM},
                {"role": "user", "content": f"{document['text']}\n\n{question}"},
            ]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            tokens = tokenizer.encode(rendered, add_special_tokens=False)
            shared = _common(before, tokens)
            trim_prompt_cache(cache, cache[0].offset - shared)
            for begin in range(shared, len(tokens), 2048):
                logits = model(mx.array(tokens[begin : min(begin + 2048, len(tokens))])[None], cache=cache)
                mx.eval(logits)
            answer: list[int] = []
            token = _likeliest(logits)
            while len(answer) < max_tokens and token != tokenizer.eos_token_id:
                answer.append(token)
                logits = model(mx.array([[token]]), cache=cache)
                token = _likeliest(logits)
            before = tokens[:-1]
            yield (document["id"], query_id), tokenizer.decode(answer)


def _likeliest(logits: Any) -> int:
    return int(logits[0, -1].argmax().item())


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _report(name: str, result: Score) -> None:
    print(f"# {name}\n{result}", flush=True)
    for key, expected, answer in result.wrong:
        print(f"  {'/'.join(key)}: {answer!r} instead of {expected!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the demo's answers.")
    parser.add_argument("results", type=Path, nargs="?", help="a result file of the pipeline")
    parser.add_argument("--uncompressed", action="store_true", help="answer with plain mlx-lm and score that")
    parser.add_argument("--fresh", type=int, default=0, help="also answer this many other documents")
    parser.add_argument("--model", type=Path, default=FOLDER / "model")
    arguments = parser.parse_args()
    gold = pq.read_table(FOLDER / "gold.parquet").to_pylist()
    if arguments.uncompressed or arguments.fresh:
        load_tuned_blas()
    if arguments.results:
        rows = pq.read_table(arguments.results).to_pylist()
        answers = {(row["document_id"], row["query_id"]): row["answer"] or "" for row in rows}
        _report(str(arguments.results), score(answers, gold))
    if arguments.uncompressed:
        started = time.monotonic()
        documents = pq.read_table(FOLDER / "minutes.parquet").to_pylist()
        _report("demo", score(dict(uncompressed_answers(arguments.model, documents, questions())), gold))
        print(f"{time.monotonic() - started:.0f} s")
    if arguments.fresh:
        texts, fresh_gold = minutes.tables(fresh_minutes(arguments.fresh))
        fresh_answers = dict(uncompressed_answers(arguments.model, texts.to_pylist(), questions()))
        _report("fresh", score(fresh_answers, fresh_gold.to_pylist()))


if __name__ == "__main__":
    main()
