"""Models that mlx-lm's batches answer wrongly: a job gives the answers that its rows have alone, and says how."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import quantize_model

from benches import tiny
from pipeline.models.loading import load_model, weights_bytes
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace
from tests.turboquant.tiny_models import save

FAMILIES = [("mamba", "equal lengths"), ("jamba", "equal lengths"), ("gemma2", "one by one"), ("llama4", "one by one")]


@pytest.mark.parametrize(("family", "batching"), FAMILIES)
def test_rows_of_different_lengths_have_the_answers_that_they_have_alone(
    family: str, batching: str, tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place = Workplace(tmp_path / "work", save(tmp_path / "model", family, tokenizer))
    with caplog.at_level(logging.WARNING):
        report = place.run()
    assert (report.rows_answered, report.rows_failed, report.prefixes_built) == (9, 0, 3)
    assert report.batching == batching
    assert any("share a batch" in message or "one by one" in message for message in caplog.messages)
    together = place.answers()

    place.tree["output"] = {"path": "out/again.parquet"}
    place.output = place.output.with_name("again.parquet")
    again = place.run("generation.batch_size=1")
    assert (again.prefixes_built, again.prefixes_restored) == (0, 3)  # by another run, from the store
    assert place.answers() == together
    assert len(set(together.values())) >= 3


def test_plan_says_which_rows_share_a_batch_and_what_the_weights_take(tmp_path: Path, tokenizer: Any) -> None:
    place = Workplace(tmp_path / "work", save(tmp_path / "model", "gemma2", tokenizer))
    shown = invoke("plan", place.save()).stdout
    assert "batches    rows are decoded one by one: mlx-lm's batches change this model's answers" in shown
    assert "weights    " in shown


def test_a_token_beyond_the_embedding_fails_its_row_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With it the model would compute with foreign memory, or the process would end."""
    model = tiny.write_model(tmp_path / "model", vocab_size=len(tiny.make_tokenizer()))
    grown = tiny.make_tokenizer()
    grown.add_tokens(["<|grown|>"])
    grown.save_pretrained(model)
    place = Workplace(tmp_path / "work", model)
    place.tree["prompt"] = {"special_tokens": "allow"}  # or the query's text would not become that token
    place.queries[1]["text"] = "What is <|grown|>?"
    with caplog.at_level(logging.WARNING):
        report = place.run()
    assert any("the tokenizer has more tokens than" in message for message in caplog.messages)
    assert report.rows_answered == 6
    assert report.failures == {"UnknownToken": 3}
    row = place.rows()["d0", "when"]
    assert "'<|grown|>'" in row["error"]


QUANTISED: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 64, "bits": 4},
    "8 bits": {"group_size": 32, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "3 and 4 bits": {
        "group_size": 64,
        "bits": 4,
        "quant_predicate": lambda path, _: {"group_size": 32, "bits": 3} if "down_proj" in path else True,
    },
}


@pytest.mark.parametrize("format_", QUANTISED)
def test_quantised_models_answer_alike_in_batches_and_plan_knows_their_memory(format_: str, tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "model")
    model, _, config = load(str(source), return_config=True)
    model, config = quantize_model(model, config, **QUANTISED[format_])
    leaves: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(source / "model.safetensors"), dict(leaves), {"format": "mlx"})
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")

    parameters: Any = tree_flatten(load_model(source).model.parameters())
    assert weights_bytes(source, config) == sum(x.nbytes for _, x in parameters)
    place = Workplace(tmp_path / "work", source)
    together = (place.run(), place.answers())[1]
    place.run("generation.batch_size=1")
    assert place.answers() == together
    assert len(set(together.values())) >= 3
