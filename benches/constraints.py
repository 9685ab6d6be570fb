"""Decoding steps of rows that are held to JSON schemas, beside the same rows free, and how long a row's mask takes.

    python -m benches.constraints --model FOLDER [--tokens 1024] [--rows 1 8 32] [--quote]

The rows share one context of random tokens. They have 8 different schemas in turn; with --quote, each of them quotes
from 30,000 characters of the demo's documents instead. The two ways take turns of 10 steps. Medians: milliseconds of a
step with the log-probabilities of its tokens, microseconds of a row's mask without the wait for its last token and its
logits. The model writes garbage, as its context is, so masks are those of text that no schema foresaw.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.steps import random_tokens

STEPS, TURNS = 10, 12
MINUTES = Path(__file__).parents[1] / "jobs" / "demo" / "minutes.parquet"
CHARACTERS = 30_000  # of the text that is quoted
TEXT = {"type": "string", "maxLength": 30}
FIELDS: list[dict[str, Any]] = [
    {"name": TEXT},
    {"name": TEXT, "amount": {"type": "integer", "minimum": 0, "maximum": 10**6}},
    {"kind": {"enum": ["lease", "loan", "sale"]}, "name": TEXT},
    {"on": {"type": "string", "format": "date"}, "name": TEXT},
    {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, "sure": {"type": "boolean"}},
    {"rate": {"type": "number", "minimum": 0, "maximum": 1}, "name": {"anyOf": [TEXT, {"type": "null"}]}},
    {"tags": {"type": "array", "items": TEXT, "maxItems": 5}},
    {"who": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}, "note": TEXT},
]
SCHEMAS = [
    {"type": "array", "minItems": 50, "items": {"type": "object", "properties": fields, "required": list(fields)}}
    for fields in FIELDS
]


def minutes(characters: int) -> str:
    """The beginning of the demo's documents."""
    import pyarrow.parquet as pq

    texts = pq.read_table(MINUTES, columns=["text"]).column(0).to_pylist()
    return "\n".join(texts)[:characters]


def begin(model: Any, prefix: Any, vocabulary: int, constraints: Sequence[Any]) -> Any:
    """A generator of a row for each constraint or None."""
    from mlx_lm.generate import BatchGenerator

    count = len(constraints)
    generator = BatchGenerator(model, stop_tokens=[], completion_batch_size=count, prefill_batch_size=count)
    generator.insert(
        [random_tokens(20 + row % 5, vocabulary, row) for row in range(count)],
        max_tokens=[STEPS * TURNS + 1] * count,
        caches=[prefix.fork() for _ in range(count)],
        logits_processors=[[each] if each else [] for each in constraints],
    )
    return generator


def measure(generators: Sequence[Any], parsers: Sequence[Any]) -> list[float]:
    """The median of what each generator's steps take, in milliseconds; the first turn is not counted.

    parsers: of each generator's rows.
    """
    import mlx.core as mx

    from pipeline.execution.decode import chosen_logprobs

    times: list[list[float]] = [[] for _ in generators]
    for _ in range(TURNS):
        for generator, of_rows, own in zip(generators, parsers, times, strict=True):
            started = time.perf_counter()
            for _ in range(STEPS):
                chosen_logprobs(generator.next_generated(), of_rows)
            mx.synchronize(generator.stream)  # which is a step ahead
            own.append(1e3 * (time.perf_counter() - started) / STEPS)
    for generator in generators:
        generator.close()
    return [statistics.median(own[1:]) for own in times]


@dataclass(frozen=True)
class Parser:
    """What the log-probabilities of a row's tokens need: its constraint, or None."""

    constraint: Any


class Timed:
    """A constraint, with the seconds that its masks take once its row's last token and its logits are known."""

    def __init__(self, constraint: Callable[[Any, Any], Any], seconds: list[float]) -> None:
        self._constraint, self._seconds = constraint, seconds

    def __call__(self, tokens: Any, logits: Any) -> Any:
        import mlx.core as mx

        mx.eval(tokens, logits)
        started = time.perf_counter()
        masked = self._constraint(tokens, logits)
        self._seconds.append(time.perf_counter() - started)
        return masked


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quote", action="store_true", help="rows quote from a text in place of writing JSON")
    arguments = parser.parse_args()
    from turboquant.runtime.blas import load_tuned_blas

    load_tuned_blas()

    from pipeline.models.constraints import Grammars
    from pipeline.models.loading import load_model
    from pipeline.models.quotations import Passages
    from pipeline.models.thinking import ThinkingMarks
    from turboquant import CacheCodec, enabled, prefill
    from turboquant.caches.prefix import make_resident
    from turboquant.mlx_lm.cpu_functions import numpy_functions

    loaded = load_model(arguments.model)
    vocabulary = int(loaded.config["vocab_size"])
    texts = [] if arguments.quote else [json.dumps(schema) for schema in SCHEMAS]
    passages, marks = Passages((minutes(CHARACTERS),)), ThinkingMarks(loaded.tokenizer)

    def constraint(row: int) -> Any:
        thoughts = marks.parser([], may_think=False)
        return grammars.constraint(texts[row % 8], thoughts) if texts else grammars.quotation(passages, thoughts)

    started = time.perf_counter()
    grammars = Grammars(loaded.tokenizer, texts)
    constraint(0)
    compiling = time.perf_counter() - started
    packed = prefill(loaded.model, random_tokens(arguments.tokens, vocabulary, -1), CacheCodec(), 512)
    (prefix,) = make_resident([packed], "dense")
    for rows in arguments.rows:
        seconds: list[float] = []
        held = [constraint(row) for row in range(rows)]
        with enabled(loaded.model), numpy_functions(loaded.model):
            ways = [None] * rows, [Timed(each, seconds) for each in held]
            generators = [begin(loaded.model, prefix, vocabulary, way) for way in ways]
            constraints = [None] * rows, held
            before, after = measure(generators, [[Parser(each) for each in of_rows] for of_rows in constraints])
        times = {"free_ms": before, "held_ms": after, "mask_us": 1e6 * statistics.median(seconds)}
        rounded = {name: round(value, 2) for name, value in {**times, "compiling_s": compiling}.items()}
        held_to = "a quotation" if arguments.quote else "a schema"
        print(json.dumps({"vocabulary": vocabulary, "rows": rows, "held_to": held_to, **rounded}), flush=True)


if __name__ == "__main__":
    main()
