"""A job with 16 bits: keys and values are stored and shared, but not compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.inputs.documents import Document
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.job.job import Documents, Prompt
from pipeline.models.loading import load_model
from pipeline.models.mlx_lm_internals import batch_generate
from tests.pipeline.workplace import Workplace


@pytest.fixture
def uncompressed(workplace: Workplace) -> Workplace:
    workplace.tree["cache"] |= {"key_bits": 16, "value_bits": 16}
    workplace.tree["generation"]["max_tokens"] = 40
    workplace.queries = [{key: query[key] for key in ("id", "text")} for query in workplace.queries]
    return workplace


@pytest.mark.parametrize("sections", [{}, {"prefill": "streaming", "segment": 512}])
def test_answers_are_those_of_mlx_lm(uncompressed: Workplace, sections: dict[str, Any]) -> None:
    uncompressed.tree["cache"] |= sections
    uncompressed.documents["d0"] *= 3  # of several segments
    uncompressed.run()
    loaded = load_model(str(uncompressed.model))
    tokenizer, renderer = PromptTokenizer(loaded.tokenizer), Renderer(Prompt(), Documents(path="docs.parquet"))
    for document_id, text in uncompressed.documents.items():
        rendered = renderer.render(Document(document_id, text, {"id": document_id, "text": text}))
        texts = [tokenizer.prompt_text(rendered, query["text"]) for query in uncompressed.queries]
        prompts = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        expected = batch_generate(loaded.model, loaded.tokenizer, prompts, max_tokens=40, return_token_ids=True)
        assert [uncompressed.answers()[document_id, query["id"]] for query in uncompressed.queries] == [
            loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected.token_ids
        ]


def test_restored_prefixes_give_the_same_bytes(uncompressed: Workplace) -> None:
    built = uncompressed.run()
    before = uncompressed.output.read_bytes()
    assert built.effective_bits >= 16
    uncompressed.output.unlink()
    assert uncompressed.run().prefixes_restored == 3
    assert uncompressed.output.read_bytes() == before


def test_single_layers_may_be_left_uncompressed(uncompressed: Workplace, write_model: Callable[..., Path]) -> None:
    uncompressed.tree["model"] = str(write_model(uncompressed.folder / "two-layers", num_hidden_layers=2))
    uncompressed.tree["cache"] |= {"key_bits": 4, "value_bits": 4, "layer_bits": {0: 16}}
    report = uncompressed.run()
    assert report.effective_bits is not None
    assert 5 < report.effective_bits < 32
    before = uncompressed.output.read_bytes()
    uncompressed.output.unlink()
    assert uncompressed.run("cache.resident=packed").prefixes_restored == 3
    assert len(before) > 0


def test_keys_alone_cannot_be_uncompressed(workplace: Workplace) -> None:
    workplace.tree["cache"]["key_bits"] = 16
    with pytest.raises(JobError, match="16 is for both together"):
        workplace.run()
