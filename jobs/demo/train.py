"""Trains the demo's model from scratch on minutes that `minutes.py` makes up as it goes.

    python jobs/demo/train.py --seconds 480

makes jobs/demo/model/, a Llama that `mlx_lm.load` reads. It is meant for a GPU; the learning rate and the
length of the documents follow the clock, so that a run ends properly on any machine, though badly taught on a
slow one. A course can be given in parts: `--end 0.3`, then `--begin 0.3`. What the model is worth it doesn't
know: that is `evaluate.py`'s business.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama
from muon import Groups, Weights, first_moments, grouped, stacked, unstacked, updated
from samples import (
    ANSWER_WEIGHT,
    END,
    FIRST_ANSWER_WEIGHT,
    Batch,
    Encoder,
    make_batch,
    save_tokenizer,
    tokenizer_texts,
    train_tokenizer,
)
from tokenizers import Tokenizer

MODEL = Path(__file__).parent / "model"
WEIGHTS = "model.safetensors"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 5,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 16384,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# (share of the course from which on, the lengths to draw from, tokens a step)
CURRICULUM: tuple[tuple[float, tuple[int, ...], int], ...] = (
    (0.00, (384,), 32_768),
    (0.08, (384, 512), 32_768),
    (0.16, (512,), 32_768),
    (0.22, (1024,), 32_768),
    (0.36, (2048,), 32_768),
    (0.46, (4096,), 32_768),
    (0.60, (4096, 6144, 6144, 8192), 32_768),
    (0.75, (4096, 6144, 6144, 6144, 8192, 11264), 34_000),
)
HELD_OUT_LENGTHS = (2048, 6144, 11264)


def learning_rate(course: float) -> float:
    """A share of the peak rate: up in the first hundredth of the course, down to nothing from 45 % on."""
    return min(1.0, course / 0.01, (1 - course) / 0.55) + 1e-3


def losses(model: llama.Model, groups: Groups, stacks: Weights, tokens: mx.array, token_weights: mx.array) -> mx.array:
    """The weighted mean cross-entropy of the next token, computed in bfloat16 from float32 weights."""
    model.update(tree_unflatten(unstacked(stacks, groups, mx.bfloat16)))
    logits = model(tokens[:, :-1]).astype(mx.float32)
    each = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none")
    return (each * token_weights).sum() / token_weights.sum()


class Course:
    """Where the training is: a share of the whole course, by the clock, which starts at the first step's end."""

    def __init__(self, seconds: float, begin: float, end: float) -> None:
        self.seconds, self.begin, self.end = seconds, begin, end
        self.started: float | None = None

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def at(self) -> float:
        return self.begin + (self.end - self.begin) * min(1.0, self.elapsed / self.seconds)


def batches(pool: multiprocessing.pool.Pool, course: Course) -> Iterator[Batch]:
    """Batches from the workers, without end; their lengths follow the curriculum."""
    rng = random.Random()
    run = f"{rng.getrandbits(64):x}"
    waiting: deque[multiprocessing.pool.AsyncResult[Batch]] = deque()
    for count in itertools.count():
        _, lengths, tokens = [stage for stage in CURRICULUM if stage[0] <= course.at][-1]
        length = rng.choice(lengths)
        waiting.append(pool.apply_async(_work, (f"train-{run}-{count}", tokens // length, length)))
        if len(waiting) > 60:
            yield waiting.popleft().get()


def exact(model: llama.Model, batch: Batch) -> tuple[int, int, int, int]:
    """Answers that greedy decoding would give exactly: (right, all, right first ones, first ones)."""
    counts = [0, 0, 0, 0]
    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        predicted = np.array(mx.argmax(model(mx.array(tokens[None, :-1])), axis=-1))[0]
        answer = (weights >= ANSWER_WEIGHT).astype(np.int8)
        edges = np.diff(np.concatenate([[0], answer, [0]]))
        for begin, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            right = bool((predicted[begin:end] == tokens[begin + 1 : end + 1]).all())
            is_first = bool(weights[begin] == FIRST_ANSWER_WEIGHT)
            counts[0] += right
            counts[1] += 1
            counts[2] += right and is_first
            counts[3] += is_first
    return counts[0], counts[1], counts[2], counts[3]


def train(folder: Path, course: Course, limit: float, workers: int) -> None:
    called = time.monotonic()
    mx.set_cache_limit(16 << 30)
    if course.begin == 0:
        save_tokenizer(train_tokenizer(tokenizer_texts()), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id(END)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = first_weights(model) if course.begin == 0 else saved_weights(folder)
    groups = grouped(weights)
    stacks = stacked(weights, groups)
    moments = first_moments(stacks)
    gradient = mx.value_and_grad(partial(losses, model, groups))

    @mx.compile
    def advance(
        stacks: Weights, moments: Weights, tokens: mx.array, scale: mx.array, rate: mx.array, step: mx.array
    ) -> tuple[mx.array, Weights, Weights]:
        loss, gradients = gradient(stacks, tokens, scale)
        return loss, *updated(stacks, gradients, moments, rate, step)

    def measure() -> None:
        mx.save_safetensors(
            str(folder / WEIGHTS), dict(unstacked(stacks, groups, mx.bfloat16)), metadata={"format": "mlx"}
        )
        model.update(tree_unflatten(unstacked(stacks, groups, mx.bfloat16)))
        for length, batch in held_out.items():
            right, count, right_first, first = exact(model, batch)
            print(f"  held out, {length}: {right / count:.3f} of {count}, first turn {right_first}/{first}")

    seen, waited, next_measure = 0, 0.0, course.seconds / 5
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (str(folder),)) as pool:
        held_out = {
            length: pool.apply(_work, ("held-out", max(3, 16_384 // length), length, True))
            for length in HELD_OUT_LENGTHS
        }
        before = mx.array(0.0)
        source = batches(pool, course)
        for step in itertools.count(1):
            asked = time.monotonic()
            batch = next(source)
            waited += time.monotonic() - asked
            loss, stacks, moments = advance(
                stacks,
                moments,
                mx.array(batch.tokens),
                mx.array(batch.weights),
                mx.array(learning_rate(course.at)),
                mx.array(float(step)),
            )
            mx.async_eval(loss, stacks, moments)
            # One step ahead of the device and no more, or the memory of many steps piles up.
            mx.eval(before)
            before = loss
            seen += batch.weights.size
            if step == 2:
                course.started = time.monotonic()
                print(f"the second step began {course.started - called:.0f} s after the call", flush=True)
            if step % 100 == 0:
                print(
                    f"{course.elapsed:4.0f} s  step {step}  length {batch.weights.shape[1]}"
                    f"  loss {loss.item():.4f}  {seen / 1e6:.0f}M tokens  waited {waited:.0f} s for data"
                    f"  {mx.get_peak_memory() / 1e9:.0f} GB",
                    flush=True,
                )
            if course.elapsed > next_measure:
                next_measure += course.seconds / 5
                measure()
            if course.elapsed >= course.seconds or time.monotonic() - called > limit:
                break
    measure()
    facts = {"steps": step, "tokens": seen, "seconds": round(course.elapsed), "course": round(course.at, 3)}
    print(json.dumps(facts), flush=True)


def saved_weights(folder: Path) -> Weights:
    loaded = mx.load(str(folder / WEIGHTS))
    assert isinstance(loaded, dict)
    return loaded


def first_weights(model: llama.Model) -> Weights:
    weights = dict(tree_flatten(model.parameters()))
    for name, value in weights.items():
        if "embed" in name:
            weights[name] = 0.02 * mx.random.normal(value.shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = mx.zeros_like(value)
    return weights


_encoder: dict[str, Encoder] = {}


def _start_worker(folder: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder["encode"] = Encoder(Tokenizer.from_file(f"{folder}/tokenizer.json"))


def _work(seed: str, rows: int, length: int, for_demo: bool = False) -> Batch:
    return make_batch(_encoder["encode"], seed, rows, length, for_demo)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's model.")
    parser.add_argument("--seconds", type=float, default=480, help="how long to train")
    parser.add_argument("--limit", type=float, default=1e9, help="stop this many seconds after the call anyway")
    parser.add_argument("--begin", type=float, default=0.0, help="where in the course to begin; 0 starts anew")
    parser.add_argument("--end", type=float, default=1.0, help="where in the course to end")
    parser.add_argument("--folder", type=Path, default=MODEL)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    arguments = parser.parse_args()
    course = Course(arguments.seconds, arguments.begin, arguments.end)
    train(arguments.folder, course, arguments.limit, arguments.workers)


if __name__ == "__main__":
    main()
