"""The same questions on full precision, on a prefix just built and on one saved and loaded, one by one and in a batch.

The failure this guards against is a reused cache that answers fluently and wrongly where the cold one was right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pyarrow.parquet as pq
import pytest
import yaml
from mlx_lm.generate import generate_step

from pipeline.execution.decode import Request, generate_answers
from pipeline.inputs.prompts import PromptTokenizer, Rendered
from pipeline.job.job import Prompt, Settings
from pipeline.models.loading import LoadedModel, load_model
from pipeline.models.output_parser import OutputParser
from tests import ROOT
from turboquant import CacheCodec, Prefix, enabled
from turboquant.caches.prefix import PrefillCache, Segment, feed, join
from turboquant.io.identity import Identity
from turboquant.io.segment_file import read_segment, write_segment

JOBS = ROOT / "jobs"
DEPTHS = (0.05, 0.27, 0.5, 0.73, 0.95)
DOCUMENT, TOKENS = "minutes-01", 16


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(JOBS / "demo" / "model")


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    """For each depth the fact of the document that is nearest to it."""
    rows = pq.read_table(JOBS / "demo" / "gold.parquet").to_pylist()
    rows = [row for row in rows if row["document_id"] == DOCUMENT and row["depth"] is not None]
    return [min(rows, key=lambda row: abs(row["depth"] - depth)) for depth in DEPTHS]


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel, facts: list[dict[str, Any]]) -> tuple[list[int], list[list[int]]]:
    """The document's context, and what each question adds."""
    job = yaml.safe_load((JOBS / "summarize.yaml").read_text(encoding="utf-8"))
    texts = {query["id"]: query["text"] for query in job["queries"]}
    rows = pq.read_table(JOBS / "demo" / "minutes.parquet").to_pylist()
    text = next(row["text"] for row in rows if row["id"] == DOCUMENT)
    rendered = Rendered(Prompt(**job["prompt"]).system, text)
    tokenised = PromptTokenizer(loaded.tokenizer).tokenise(rendered, [texts[fact["query_id"]] for fact in facts])
    return tokenised.context, tokenised.suffixes


@pytest.fixture(scope="module")
def filled(loaded: LoadedModel, prompts: tuple[list[int], list[list[int]]]) -> list[Any]:
    """The context in full precision; to be copied, not used up."""
    context, caches = prompts[0], [PrefillCache(len(prompts[0])) for _ in loaded.model.layers]
    with enabled(loaded.model):
        feed(loaded.model, caches, context, 512)
    return caches


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel, prompts: tuple[list[int], list[list[int]]], filled: list[Any]) -> list[str]:
    """Full precision's answers, by mlx-lm's own loop."""
    found = []
    with enabled(loaded.model):
        for suffix in prompts[1]:
            tokens: list[int] = []
            caches = copy.deepcopy(filled)
            for token, _ in generate_step(mx.array(suffix), loaded.model, max_tokens=TOKENS, prompt_cache=caches):
                if token in loaded.tokenizer.eos_token_ids:
                    break
                tokens.append(token)
            found.append(loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return found


def answers(loaded: LoadedModel, prefix: Prefix, suffixes: Sequence[list[int]], batch_size: int) -> list[str]:
    requests = [
        Request(prefix, suffix, Settings(TOKENS, temperature=0.0, top_p=1.0, seed=0), str(i))
        for i, suffix in enumerate(suffixes)
    ]
    return [one.text for one in generate_answers(loaded, requests, OutputParser(loaded.tokenizer), batch_size)]


def test_answers_are_full_precision_s_at_every_depth(
    loaded: LoadedModel,
    facts: list[dict[str, Any]],
    prompts: tuple[list[int], list[list[int]]],
    filled: list[Any],
    expected: list[str],
    tmp_path: Path,
) -> None:
    context, suffixes = prompts
    right = [fact["answer"] in text for fact, text in zip(facts, expected, strict=True)]
    assert right == [True] * len(DEPTHS)
    for bits in (4, 3):
        codec = CacheCodec(bits, bits)
        cold = Prefix.encode(copy.deepcopy(filled), len(context), codec)
        segment = Segment(cold.layers, 0, cold.tokens)
        (folder := tmp_path / str(bits)).mkdir()
        write_segment(folder, "key", segment, Identity("", "", codec.identity, "exact"))
        warm = join([read_segment(folder, "key", codec)])
        for prefix in (cold, warm):
            assert answers(loaded, prefix, suffixes, 1) == expected
            assert answers(loaded, prefix, suffixes + suffixes[:3], 8) == expected + expected[:3]
