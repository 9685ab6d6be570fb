"""Fidelity: the figures, the figures that are refused, and the command."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import ROOT
from tests.turboquant import tiny_models
from turboquant import CacheCodec
from turboquant.caches.prefix import Segment
from turboquant.eval import divergence as drift
from turboquant.eval import scores
from turboquant.eval.baselines import affine, exact, in_segments, streaming
from turboquant.eval.divergence import measure
from turboquant.eval.results import (
    Baseline,
    BatchDiffers,
    FidelityError,
    Filled,
    NoDrift,
    NotFinite,
    Sample,
    WarmDiffers,
)
from turboquant.eval.teacher_forcing import Context
from turboquant.fidelity import main

MODEL = str(ROOT / "jobs" / "demo" / "model")
COMMAND = ["--model", MODEL, "--text", str(ROOT / "README.md"), "--context", "300", "--continuation", "40"]


@pytest.fixture(scope="module")
def samples(random_tokens: Callable[[int, int], list[int]]) -> list[Sample]:
    runs = tuple(tuple(random_tokens(count, count)) for count in (30, 17))
    return [Sample(tuple(random_tokens(200, 1)), runs), Sample(tuple(random_tokens(150, 2)), runs[:1])]


def uncompressed(context: Context) -> Filled:
    return Filled(copy.deepcopy(context.caches), 2 * context.coordinates)


def bypassed(context: Context, factor: float) -> Filled:
    caches = copy.deepcopy(context.caches)
    caches[0].values = caches[0].values * factor
    return Filled(caches, context.coordinates // 2)


def test_fewer_bits_move_the_model_further(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    baselines = [exact(CacheCodec(bits, bits)) for bits in (8, 4, 2)]
    eight, four, two = measure(build_model("llama"), samples, baselines)
    assert 0 < eight.kl < four.kl < two.kl
    assert eight.cosine > four.cosine > two.cosine
    assert eight.top1 > two.top1
    assert two.kl <= two.kl_p99 <= two.kl_worst
    assert eight.positions == 30 + 17 + 30
    assert abs(eight.perplexity_change) < abs(two.perplexity_change)


def test_everything_that_a_prefix_holds_is_counted(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    codecs = [CacheCodec(4, 4, sinks=sinks, window=0, extra_bits=0) for sinks in (0, 10)]
    bare, whole = measure(build_model("llama"), samples[:1], [exact(codec) for codec in codecs])
    means = 32 / 200  # a float32 a coordinate, once for the 200 tokens
    assert bare.effective_bits == pytest.approx(4 + 16 / 64 + means)
    assert whole.effective_bits == pytest.approx((190 * (4 + 16 / 64) + 10 * 16) / 200 + means)
    assert whole.compression == pytest.approx(16 / whole.effective_bits)
    assert whole.bytes_per_token == pytest.approx(whole.effective_bits / 8 * 2 * 2 * 2 * 64)


@pytest.mark.parametrize("make", [exact, functools.partial(in_segments, length=100)])
def test_a_layer_in_full_precision_counts_as_16_bits(
    build_model: Callable[[str], Any], samples: list[Sample], make: Callable[[CacheCodec], Baseline]
) -> None:
    codec = CacheCodec(4, 4, sinks=0, window=0, extra_bits=0, layer_bits=((0, 16, 16),))
    (row,) = measure(build_model("llama"), samples[:1], [make(codec)])
    means = 32 / 200
    assert row.effective_bits == pytest.approx((16 + 4 + 16 / 64) / 2 + means)


def test_a_streaming_cache_counts_its_full_precision_end(
    build_model: Callable[[str], Any], random_tokens: Callable[[int, int], list[int]]
) -> None:
    sample = Sample(tuple(random_tokens(300, 1)), (tuple(random_tokens(20, 2)),))
    windowed, bare = measure(
        build_model("llama"), [sample], [streaming(CacheCodec(4, 4, sinks=4, window=window)) for window in (128, 0)]
    )
    for row, encoded in ((windowed, 128), (bare, 256)):
        assert row.effective_bits == pytest.approx((encoded * (4 + 16 / 64) + (300 - encoded) * 16 + 32) / 300)
    assert 0 < windowed.kl < bare.kl


def test_a_context_too_short_to_be_compressed_is_an_error(
    build_model: Callable[[str], Any], samples: list[Sample]
) -> None:
    with pytest.raises(NoDrift, match="so short a context"):
        measure(build_model("llama"), samples, [streaming(CacheCodec(4, 4, window=1000))])


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_mlx_lms_own_cache_at_its_true_bits(
    build_model: Callable[[str], Any], samples: list[Sample], prefill: str
) -> None:
    eight, four = measure(build_model("llama"), samples, [affine(8, prefill), affine(4, prefill)])
    assert (eight.effective_bits, four.effective_bits) == (8.5, 4.5)
    assert 0 < eight.kl < four.kl


def test_heads_that_mlx_lm_cannot_quantise(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    said: list[str] = []
    ours, *others = measure(build_model("phi"), samples, [affine(4), exact(CacheCodec(4, 4))], on_step=said.append)
    assert (ours.cache, others) == ("turboquant", [])
    assert any("left out" in step and "heads of 80" in step for step in said)


def test_attention_sinks_that_mlx_lm_cannot_quantise(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    with pytest.raises(FidelityError, match="attention sinks"):
        measure(build_model("gpt_oss"), samples, [affine(4)])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("together", [False, True])
def test_families_alone_and_in_a_batch(
    build_model: Callable[[str], Any], samples: list[Sample], family: str, together: bool
) -> None:
    (row,) = measure(build_model(family), samples, [exact(CacheCodec(4, 4))], batched=together)
    assert row.batch_difference is not None
    assert row.kl > 0


@pytest.mark.parametrize("together", [False, True])
def test_a_family_without_batches_is_measured_row_by_row(samples: list[Sample], together: bool) -> None:
    said: list[str] = []
    model = tiny_models.build("gpt_bigcode")
    (row,) = measure(model, samples, [exact(CacheCodec(4, 4))], batched=together, on_step=said.append)
    assert row.batch_difference is None
    assert row.kl > 0
    assert any("rows are decoded one by one" in step for step in said)


def test_a_batch_is_scored_like_single_rows(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    baselines = [exact(CacheCodec(3, 3)), streaming(CacheCodec(3, 3, window=0)), affine(3)]
    alone = measure(build_model("llama"), samples, baselines)
    together = measure(build_model("llama"), samples, baselines, batched=True, verify=False)
    assert [row.kl for row in together] == pytest.approx([row.kl for row in alone], rel=1e-3)


def test_a_model_with_nothing_to_compress_is_refused(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    with pytest.raises(FidelityError, match="MLA"):
        measure(build_model("deepseek_v3"), samples, [exact(CacheCodec())])


@pytest.mark.parametrize("factor", [1, 1 + 2**-23])  # exactly the same, and as another order of additions would have it
def test_no_drift_is_an_error(build_model: Callable[[str], Any], samples: list[Sample], factor: float) -> None:
    fill = functools.partial(bypassed, factor=factor)
    with pytest.raises(NoDrift, match="bypassed"):
        measure(build_model("llama"), samples, [Baseline("bypass", 4, 4, "exact", fill)])


def test_full_precision_does_not_drift(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    (row,) = measure(build_model("llama"), samples, [Baseline("full", 16, 16, "exact", uncompressed)])
    assert (row.kl_worst, row.top1, row.effective_bits) == (0, 1, 16)
    assert row.perplexity == row.perplexity_full


def test_what_is_not_finite_is_an_error(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    fill = functools.partial(bypassed, factor=math.nan)
    with pytest.raises(NotFinite, match="broken 4/4"):
        measure(build_model("llama"), samples, [Baseline("broken", 4, 4, "exact", fill)])


def test_a_prefix_changed_by_saving_is_an_error(
    build_model: Callable[[str], Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = exact(CacheCodec(5, 4))

    def read_other(*_: Any) -> Any:
        return Segment(made.cache.layers, 0, made.cache.tokens)

    made = Filled([], 0)

    def fill(context: Context) -> Filled:
        nonlocal made
        made = other.fill(context)
        return exact(CacheCodec(4, 4)).fill(context)

    monkeypatch.setattr(drift, "read_segment", read_other)
    with pytest.raises(WarmDiffers, match="just built"):
        measure(build_model("llama"), samples, [Baseline("mine", 4, 4, "exact", fill, CacheCodec(4, 4))])


def test_a_batch_that_mixes_its_rows_up_is_an_error(
    build_model: Callable[[str], Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = drift.batch_logits

    def mixed_up(model: Any, rows: Any, runs: Any) -> list[mx.array]:
        return [logits[::-1] for logits in right(model, rows, runs)]

    monkeypatch.setattr(drift, "batch_logits", mixed_up)
    with pytest.raises(BatchDiffers, match="in a batch"):
        measure(build_model("llama"), samples, [exact(CacheCodec(4, 4))])


def test_answers_are_full_precisions_up_to_a_stop_token(
    build_model: Callable[[str], Any], samples: list[Sample], fill: Callable[..., list[Any]]
) -> None:
    model, baselines = build_model("llama"), [exact(CacheCodec(4, 4))]
    context, run = list(samples[1].context), list(samples[1].continuations[0])
    answer: list[int] = []
    for _ in range(3):
        logits = model(mx.array(context + run + answer)[None])
        answer.append(int(mx.argmax(logits[0, -1])))
    stop = {answer[2]} - {answer[0], answer[1]}
    assert stop
    (whole,) = measure(model, samples[1:], baselines, answer_tokens=5)
    (stopped,) = measure(model, samples[1:], baselines, answer_tokens=5, stop=stop)
    assert (whole.positions, stopped.positions) == (30 + 5, 30 + 2)


def test_questions_need_not_be_scored(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    model, rows = build_model("llama"), [exact(CacheCodec(4, 4))]
    (whole,) = measure(model, samples, rows, answer_tokens=5)
    (answers,) = measure(model, samples, rows, answer_tokens=5, answers_only=True)
    assert whole.positions == 30 + 17 + 30 + 3 * 5
    assert answers.positions == 3 * (1 + 5)  # the question's last token predicts the answer's first


def test_samples_that_are_too_short(build_model: Callable[[str], Any]) -> None:
    for sample in (Sample((), ((1, 2),)), Sample((1, 2), ((1,),))):
        with pytest.raises(ValueError, match="needs"):
            measure(build_model("llama"), [sample], [exact(CacheCodec())])


def test_nothing_to_measure(build_model: Callable[[str], Any], samples: list[Sample]) -> None:
    for some, baselines in (([], [exact(CacheCodec())]), (samples, [])):
        with pytest.raises(ValueError, match="at least one"):
            measure(build_model("llama"), some, baselines)


# ---- scores


@pytest.mark.parametrize("module", [np, mx])
def test_scores_are_those_of_the_textbook(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(scores, "array_module", lambda: module)
    random = np.random.default_rng(0)
    full = random.normal(size=(20, 50)) * 5
    compressed = full + random.normal(size=(20, 50)) * 0.01
    tokens = [int(token) for token in random.integers(0, 50, 20)]
    monkeypatch.setattr(scores, "SCORED_AT_ONCE", 150)  # three rows at a time
    found = scores.score(mx.array(full, mx.float32), mx.array(compressed, mx.float32), tokens)
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (full, compressed))
    assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1), rel=1e-3, abs=2e-7)
    assert found.loss == pytest.approx(-log_q[np.arange(19), tokens[1:]], rel=1e-5)
    assert found.loss_full == pytest.approx(-log_p[np.arange(19), tokens[1:]], rel=1e-5)
    assert (found.top1 == (full.argmax(-1) == compressed.argmax(-1))).all()


@pytest.mark.parametrize("module", [np, mx])
def test_equal_logits_diverge_by_exactly_nothing(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(scores, "array_module", lambda: module)
    logits = mx.random.normal((10, 500)) * 10
    assert not scores.score(logits, logits, [0] * 10).kl.any()


def test_positions_of_one_text_are_not_independent() -> None:
    clusters = [np.zeros(100), np.ones(100)]
    assert scores.clustered_error(clusters) == pytest.approx(0.5)  # that of two figures, 0 and 1
    assert scores.clustered_error(clusters[:1]) is None


# ---- the command


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*COMMAND, "--bits", "8", "4/3", "--layer-bits", "-1:8", "--mlx-kv-bits", "4", "--json"])
    assert code == 0
    mlx_lm, eight, mixed = json.loads(capsys.readouterr().out)
    assert {"effective_bits", "kl", "kl_p99", "top1", "cosine", "perplexity_change"} <= mixed.keys()
    assert [(row["key_bits"], row["value_bits"]) for row in (eight, mixed)] == [(8, 8), (4, 3)]
    assert (mlx_lm["cache"], mlx_lm["effective_bits"]) == ("mlx-lm", 4.5)
    assert eight["kl"] < mixed["kl"] < mlx_lm["kl"]
    assert mixed["positions"] == 40
    assert mixed["effective_bits"] > 3.5 + 4.5 / 5  # the last of five layers has 8 bits


def test_the_command_prints_a_table_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert main([*COMMAND, "--bits", "4", "--prefill", "both", "--segment", "40", "--plot", str(picture)]) == 0
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split()[:2] == ["cache", "prefill"]
    assert rows.pop().split()[:5] == ["turboquant", "segments", "of", "40", "4/4"]
    assert [row.split()[:3] for row in rows] == [
        [cache, prefill, f"{bits}/{bits}"]
        for prefill in ("exact", "streaming")
        for cache, bits in (("mlx-lm", 8), ("mlx-lm", 4), ("turboquant", 4))
    ]
    assert len({len(row) for row in [head, *rows]}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Baseline] = []

    def measure_one(model: Any, samples: Any, baselines: list[Baseline], **_: Any) -> Any:
        asked.extend(baselines)
        return measure(model, samples, baselines[:1])

    monkeypatch.setattr(drift, "measure", measure_one)
    assert main([*COMMAND, "--all-pairs", "--mlx-kv-bits"]) == 0
    pairs = {(baseline.key_bits, baseline.value_bits) for baseline in asked}
    assert len(pairs) == len(asked) == 36


def test_questions_are_asked_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--question", "Who was present?", "--question", "What was decided about the roof?"]
    assert main([*COMMAND, *asked, "--answer-tokens", "6", "--bits", "4", "--mlx-kv-bits", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["positions"] > 12
    assert row["kl_stderr"] > 0


def test_a_text_that_is_too_short(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("One two three.")
    assert main(["--model", MODEL, "--text", str(text), "--context", "100", "--continuation", "20"]) == 2
    assert "tokens, and 120 are needed" in capsys.readouterr().err


def test_more_than_the_model_was_made_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND[:4], "--context", "20000"]) == 2
    assert "exceeds the model's limit of 16384" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--question", "When?", "--answer-tokens", "300"], ["--continuation", "600"]])
def test_a_model_without_room_for_a_context(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "model"
    shutil.copytree(MODEL, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    assert main(["--model", str(small), *COMMAND[2:4], *more]) == 2
    assert re.fullmatch(
        rf"error: a context of 64 tokens, with \d+ more .* limit of 512: lower {more[-2]}\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--text", "absent.txt"], "absent.txt: cannot be read"),
        (["--model", "absent/folder/of/a/model"], "neither a model's folder"),
        (["--sinks", "-1"], "cannot be negative"),
        (["--coding", "trellis", "--prefill", "streaming", "--model", "absent/model"], "use --prefill exact"),
        (["--layer-bits", "40:8"], "layer_bits names layer 40, but the model has 5 layers"),
        (["--plot", "picture.nonsense"], "must end in one of"),
        (["--plot", "absent/picture.png"], "no such folder"),
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], wrong: list[str], message: str) -> None:
    assert main([*COMMAND, *wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--bits", "7"], "'7': give bits of"),
        (["--bits", "4/"], "'4/': give bits of"),
        (["--layer-bits", "x:8"], "x:8: give LAYER:BITS"),
        (["--layer-bits", "8"], "give bits of"),
        (["--context", "0"], "'0': give a whole number, at least 1"),
        (["--continuation", "1"], "'1': give a whole number, at least 2"),
        (["--segment", "some"], "'some': give a whole number, at least 1"),
    ],
)
def test_arguments_that_do_not_parse(wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*COMMAND, *wrong])
    assert message in capsys.readouterr().err


def test_a_picture_needs_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main([*COMMAND, "--plot", "picture.png"]) == 2
    assert "pip install" in capsys.readouterr().err
