"""``python -m turboquant.fidelity`` measures how a compressed cache changes a model's predictions on a text.

    python -m turboquant.fidelity --model MODEL --text FILE --bits 4 3 4/3
    python -m turboquant.fidelity --model MODEL --text CONTRACT --question "When does it end?" --json

The model reads the text with its full-precision cache and with compressed caches, and its predictions are compared
token by token. The measurement itself is in eval/divergence.py, which can be used from Python too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant.eval import plot
from turboquant.eval.arguments import bits, count
from turboquant.eval.columns import aligned
from turboquant.mlx_lm.loading import is_repo_id, load_lazily, prepare_weights
from turboquant.quant import CODINGS, SUPPORTED_BITS
from turboquant.runtime.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline, Fidelity, Sample

LONGEST = 8192  # the most tokens of context, unless --context is given
SHORTEST = 64
MARGIN = 256  # tokens that stay free behind a context, for a question and the template around it
PROBES = ("What", "1", "(x)", "\n-")  # the context ends where the prompts of these questions differ


class UsageError(Exception):
    """The command line asks for something impossible; the message says what to change."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a wrong command line, 130 after Ctrl-C, 1 for other errors."""
    given = sys.argv[1:] if arguments is None else arguments
    # argparse takes an argument like `-1:8` for an option, unless it has a space in it.
    options = _parser().parse_args([f" {argument}" if re.match(r"-\d+:", argument) else argument for argument in given])
    load_tuned_blas()
    try:
        _run(options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder or a Hugging Face repo, in a form that suits the device.

    See `prepare_weights`. Raises UsageError if there is no such folder.
    """
    if not Path(name).is_dir() and (Path(name).exists() or not is_repo_id(name)):
        raise UsageError(f"--model {name}: neither a model's folder nor a Hugging Face repo id (owner/name)")
    model, tokenizer, _ = load_lazily(name)

    prepare_weights(model)
    return model, tokenizer


def text_sample(tokenizer: Any, text: str, context: int, continuation: int) -> Sample:
    """Return the text's first ``context`` tokens, continued by its next ``continuation`` tokens."""
    from turboquant.eval.results import Sample

    tokens = tokenizer.encode(text)
    return Sample(tuple(tokens[:context]), (tuple(tokens[context : context + continuation]),))


def chat_sample(tokenizer: Any, text: str, context: int, questions: Sequence[str], system: str | None = None) -> Sample:
    """Return the text's first ``context`` tokens, rendered by the chat template and continued by each question.

    The context of the sample is the common beginning of all prompts. Raises UsageError if there is no chat template.
    """
    from turboquant.eval.results import Sample

    if not getattr(tokenizer, "has_chat_template", True):
        raise UsageError("--question: this model has no chat template")
    document = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:context])
    prompts: list[list[int]] = []
    for question in (*questions, *PROBES):
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": f"{document}\n\n{question}"})
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(rendered, add_special_tokens=False))
    columns = zip(*prompts, strict=False)
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)) - 1)
    return Sample(tuple(prompts[0][:shared]), tuple(tuple(p[shared:]) for p in prompts[: len(questions)]))


def table(rows: Sequence[Fidelity]) -> str:
    """Return the figures as a table of text."""
    columns = [[title, *map(render, rows)] for title, render in _COLUMNS]
    lines = list(zip(*(column for column in columns if any(column[1:])), strict=True))
    legend = [
        f"{rows[0].positions} positions; perplexity in full precision {rows[0].perplexity_full:.4g}.",
        "KL divergence from the predictions in full precision, in nats: mean, standard error, 99th percentile, worst.",
        "Effective bits count everything that is held of the context. The ratio compares with 16 bits.",
    ]
    differences = [row.batch_difference for row in rows if row.batch_difference is not None]
    if differences:
        legend.append(
            f"Exact caches give the same logits once loaded; in a batch they differ by {max(differences):.2g} at most."
        )
    return "\n".join([aligned(lines, left={0, 1}), "", *legend])


def as_json(rows: Sequence[Fidelity]) -> str:
    """Return the figures as a JSON list of objects."""
    return json.dumps([{**asdict(row), "perplexity_change": row.perplexity_change} for row in rows], indent=1)


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m turboquant.fidelity",
        description="Compare a model's predictions over compressed caches with those over its full-precision cache.",
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a Hugging Face repo id")
    add("--text", required=True, action="append", type=Path, metavar="FILE", help="a text file; may be repeated")
    add("--context", type=count, metavar="N", help=f"tokens of context (default: as many as fit, at most {LONGEST})")
    add("--continuation", type=partial(count, least=2), default=256, metavar="N",
        help="tokens fed after the context (default: 256)")  # fmt: skip
    add("--question", action="append", metavar="TEXT", help="feed a question and the model's answer; may be repeated")
    add("--system", metavar="TEXT", help="system text before the document (with --question)")
    add("--answer-tokens", type=count, default=32, metavar="N", help="most tokens of an answer (default: 32)")
    add("--answers-only", action="store_true", help="compare only predictions of the answers (with --question)")
    add("--bits", nargs="+", type=bits, default=[(8, 8), (4, 4), (3, 3), (2, 2)], metavar="BITS",
        help="bits of keys and values: 4, or 4/3 (default: 8 4 3 2)")  # fmt: skip
    add("--all-pairs", action="store_true", help="measure every pair of bits for keys and values")
    add(
        "--layer-bits", nargs="+", type=_layer, default=[], metavar="LAYER:BITS", help="bits of layers, like 0:8 -1:8/4"
    )
    add("--sinks", type=int, metavar="N", help="first tokens kept as 16-bit floats")
    add("--window", type=int, metavar="N", help="last tokens kept finer (streaming: in full precision)")
    add("--extra-bits", type=float, metavar="BITS", help="the most that finer tokens may cost, in bits for one value")
    add("--coding", nargs="+", choices=CODINGS, default=["scalar"],
        help="codes of tokens that are not finer; trellis is for 2 to 4 bits (default: scalar)")  # fmt: skip
    add("--prefill", choices=("exact", "streaming", "both"), default="exact",
        help="compress the finished context, or while it is read (default: exact)")  # fmt: skip
    add("--segment", type=count, metavar="N", help="also prefill N tokens at a time, as a streaming job")
    add("--mlx-kv-bits", nargs="*", type=int, choices=(2, 3, 4, 5, 6, 8), default=[8, 4], metavar="BITS",
        help="bits of mlx-lm's own quantised cache, for comparison (default: 8 4; no value for none)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE", help="draw divergence against effective bits (needs matplotlib)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def _layer(text: str) -> tuple[int, int, int]:
    layer, _, pair = text.strip().partition(":")
    if not re.fullmatch(r"-?\d+", layer):
        raise argparse.ArgumentTypeError(f"{text.strip()}: give LAYER:BITS, for example 0:8 or -1:8/4")
    return (int(layer), *bits(pair))


# ---- what it does


def _run(options: argparse.Namespace) -> None:
    texts = [_read(path) for path in options.text]
    if options.plot and (reason := plot.why_not(options.plot)):
        raise UsageError(reason)
    baselines = _baselines(options)
    model, tokenizer = load_model(options.model)
    from turboquant.eval.divergence import measure
    from turboquant.mlx_lm.families import explain
    from turboquant.quant.cache_codec import CacheCodec

    support = explain(model)
    try:
        CacheCodec(layer_bits=tuple(options.layer_bits)).check_layers(len(support.layers))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if support.message:
        _say(support.message)
    rows = measure(
        model,
        [_sample(options, model, tokenizer, path, text) for path, text in zip(options.text, texts, strict=True)],
        baselines,
        answer_tokens=options.answer_tokens if options.question else 0,
        stop=tokenizer.eos_token_ids,
        answers_only=options.answers_only and bool(options.question),
        on_step=_say,
    )
    if options.plot:
        plot.write_picture(options.plot, rows)
    print(as_json(rows) if options.json else table(rows))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _sample(options: argparse.Namespace, model: Any, tokenizer: Any, path: Path, text: str) -> Sample:
    limit = getattr(getattr(model, "args", None), "max_position_embeddings", None) or sys.maxsize
    found = len(tokenizer.encode(text))
    context = _context_length(options, limit, path, found)
    if not options.question:
        return text_sample(tokenizer, text, context, options.continuation)
    if context < found:
        _say(f"{path}: the first {context} of its {found} tokens are the context")
    return chat_sample(tokenizer, text, context, options.question, options.system)


def _context_length(options: argparse.Namespace, limit: int, path: Path, found: int) -> int:
    """Return how many tokens of a text of ``found`` tokens are the context: as asked, or as many as fit.

    limit: the most tokens that the model takes. Raises UsageError if too few fit into the model or are in the text.
    """
    least: int = options.context or SHORTEST
    if options.question:
        flag, behind, within = "--answer-tokens", options.answer_tokens + MARGIN, 0
    else:
        flag, behind, within = "--continuation", options.continuation, options.continuation
    if least + behind > limit:
        lower = f"--context or {flag}" if options.context else flag
        message = f"a context of {least} tokens, with {behind} more behind it, exceeds the model's limit of {limit}"
        raise UsageError(f"{message}: lower {lower}")
    if found < least + within:
        raise UsageError(f"--text {path}: too short: it has {found} tokens, and {least + within} are needed")
    return least if options.context else min(LONGEST, found - within, limit - behind)


def _baselines(options: argparse.Namespace) -> list[Baseline]:
    from turboquant.eval.baselines import affine, exact, in_segments, streaming
    from turboquant.quant.cache_codec import CacheCodec

    pairs = [(k, v) for k in SUPPORTED_BITS for v in SUPPORTED_BITS] if options.all_pairs else options.bits
    names = ("sinks", "window", "extra_bits")
    kept = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        codecs = [
            CacheCodec(k, v, layer_bits=tuple(options.layer_bits), coding=coding, **kept)
            for coding in dict.fromkeys(options.coding)
            for k, v in dict.fromkeys(pairs)
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.prefill == "streaming" and "trellis" in options.coding and not options.segment:
        raise UsageError("--coding trellis: a streaming cache has scalar codes alone: use --prefill exact or --segment")
    modes = ("exact", "streaming") if options.prefill == "both" else (options.prefill,)
    rows = []
    for mode in modes:
        rows += [affine(each, mode) for each in options.mlx_kv_bits]
        rows += [exact(codec) for codec in codecs if mode == "exact"]
        rows += [streaming(codec) for codec in codecs if mode == "streaming" and codec.coding == "scalar"]
    return rows + [in_segments(codec, options.segment) for codec in codecs if options.segment]


# ---- the table

_COLUMNS: list[tuple[str, Callable[[Fidelity], str]]] = [
    ("cache", lambda row: row.cache),
    ("prefill", lambda row: row.prefill),
    ("bits K/V", lambda row: f"{row.key_bits:g}/{row.value_bits:g}"),
    ("effective", lambda row: f"{row.effective_bits:.2f}"),
    ("ratio", lambda row: f"{row.compression:.1f}x"),
    ("B/token", lambda row: f"{row.bytes_per_token:.0f}"),
    ("KL", lambda row: f"{row.kl:.2g}"),
    ("+-", lambda row: "" if row.kl_stderr is None else f"{row.kl_stderr:.1g}"),
    ("p99", lambda row: f"{row.kl_p99:.2g}"),
    ("worst", lambda row: f"{row.kl_worst:.2g}"),
    ("top-1", lambda row: f"{row.top1:.1%}"),
    ("perplexity", lambda row: f"{row.perplexity:.4g}"),
    ("change", lambda row: f"{row.perplexity_change:+.2%}"),
    ("cosine", lambda row: f"{row.cosine:.5f}"),
]


if __name__ == "__main__":
    sys.exit(main())
