"""Find the smallest cache that keeps a job's answers: settings of compression are measured against full precision.

Every setting compresses the same contexts, a few of the job's own documents, and is given the same queries, each with
the model's greedy answer in full precision. Its predictions of these answers are compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, JobError, ModelError, RowError
from pipeline.execution.fingerprint import job_identity, load_identified
from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.inputs.windows import WindowCutter
from pipeline.job.job import Cache, Job
from pipeline.models.loading import max_context

if TYPE_CHECKING:
    from turboquant.eval.results import Fidelity, Sample

SHORTEST = 256  # tokens of a context; of a shorter one, most tokens are kept uncompressed
ANSWER_TOKENS = 32  # the most tokens of an answer that are compared
PAIRS = ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 6), (8, 8))  # bits of keys and values
MORE_EXTRA_BITS = 0.4
BITS_OF_LAYERS = (2, 3, 4, 5, 6, 8)
MEANS_OF_LAYERS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0)  # bits, of settings in which layers differ
_PROBED_BITS = 3
# Student's t for a one-sided 95 % limit, by the number of documents less one; that of ten serves for more.
_STUDENT_95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)


@dataclass(frozen=True)
class Setting:
    """Values of the keys of a job's `cache` that `tune` chooses. layer_bits: of layers that differ from the others."""

    key_bits: int
    value_bits: int
    extra_bits: float
    layer_bits: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in tables, such as `4/3`."""
        if not self.layer_bits:
            return f"{self.key_bits}/{self.value_bits}"
        return f"{min(self.layer_bits.values())} to {max(self.layer_bits.values())} by layer"

    def changes(self, cache: Cache) -> dict[str, Any]:
        """Return the keys of a job's cache that it changes, with their new values."""
        return {key: value for key, value in asdict(self).items() if value != getattr(cache, key)}


@dataclass(frozen=True)
class Measured:
    """What a setting costs, and how far it moves answers.

    kl: mean Kullback-Leibler divergence from the prediction in full precision, in nats; kl_error: its standard error
    over documents, None of one document. kl_most: the upper end of its one-sided 95 % interval over documents, by
    Student's t. top1: share of the answers' tokens that stay the likeliest. answers: share of greedy answers that stay
    the same. bits: of one value, with everything counted. seconds: to compress all contexts.
    """

    setting: Setting
    kl: float
    kl_error: float | None
    kl_most: float
    top1: float
    answers: float
    bits: float
    bytes_per_token: float
    seconds: float

    def keeps(self, bounds: Bounds) -> bool:
        """Return whether it keeps all bounds. Its divergence does so up to the end of its interval."""
        return (
            (bounds.kl is None or self.kl_most <= bounds.kl)
            and (bounds.top1 is None or self.top1 >= bounds.top1)
            and (bounds.answers is None or self.answers >= bounds.answers)
        )


@dataclass(frozen=True)
class Bounds:
    """The most divergence, and the least shares of tokens and of answers that stay the same. None: any."""

    kl: float | None = None
    top1: float | None = None
    answers: float | None = None


@dataclass(frozen=True)
class Tuning:
    """All settings that were measured, by size, and the smallest that keeps the bounds, if one does.

    documents, tokens: of the contexts. answers: how many were compared. full_bytes_per_token: in full precision.
    """

    settings: list[Measured]
    chosen: Measured | None
    bounds: Bounds
    documents: int
    tokens: int
    answers: int
    full_bytes_per_token: float


def tune(
    job: Job,
    documents: int,
    queries: int,
    bounds: Bounds,
    by_layer: bool,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Tuning:
    """Measure settings on the job's first documents, each with its first queries.

    by_layer: also settings that give each layer bits by its own effect. on_step: is told how many measurements are done
    and how many there are in all. Raises JobError, InputError and ModelError.
    """
    if job.scale.ranks > 1:
        raise JobError("scale.ranks: tune measures with one process; --set scale.ranks=1")
    loaded = load_identified(job, job_identity(job))
    samples = _samples(job, loaded, documents, queries)
    bench = _Bench(job, loaded, samples)
    extra_bits = job.cache.extra_bits
    candidates = [Setting(keys, values, extra_bits) for keys, values in PAIRS]
    if extra_bits < MORE_EXTRA_BITS:
        candidates += [Setting(keys, values, MORE_EXTRA_BITS) for keys, values in PAIRS if 3 <= min(keys, values) <= 4]
    layers = bench.compressible_layers if by_layer else []
    total = len(samples) * (len(candidates) + (len(layers) + 1 + len(MEANS_OF_LAYERS) if by_layer else 0))
    if by_layer:
        probes = [Setting(16, 16, extra_bits, {layer: _PROBED_BITS}) for layer in layers]
        probes.append(Setting(16, 16, extra_bits))  # differs from full precision by rounding only
        *found, rounding = [each.kl for each in bench.measure(probes, lambda done: on_step(done, total))]
        effects = [max(kl - rounding, 0.0) for kl in found]
        given = [allocate(effects, mean) for mean in MEANS_OF_LAYERS]
        candidates += [_by_layer(dict(zip(layers, bits, strict=True)), extra_bits) for bits in given]
    before = len(samples) * (len(layers) + 1) if by_layer else 0
    measured = bench.measure(candidates, lambda done: on_step(before + done, total))
    measured.sort(key=lambda each: each.bytes_per_token)
    chosen = next((each for each in measured if each.keeps(bounds)), None)
    full = measured[0].bytes_per_token * 16 / measured[0].bits
    tokens = sum(len(sample.context) for sample in samples)
    answers = sum(len(sample.continuations) for sample in samples)
    return Tuning(measured, chosen, bounds, len(samples), tokens, answers, full)


def allocate(effects: Sequence[float], mean: float) -> list[int]:
    """Return the bits of each layer, ``mean`` on average at most, for the least divergence in all.

    effects: the divergence that each layer causes by itself at some number of bits. The divergence of a layer is taken
    to fall fourfold with each bit, as the squared error of its codes does, and divergences of layers to add up. Bits
    are given one step at a time to the layer whose divergence falls most for each bit.

    >>> allocate([1.0, 1.0, 16.0], 4)
    [3, 3, 6]
    """
    levels = [0] * len(effects)
    left = mean * len(effects) - BITS_OF_LAYERS[0] * len(effects)

    def gain(layer: int) -> float:
        now, then = BITS_OF_LAYERS[levels[layer]], BITS_OF_LAYERS[levels[layer] + 1]
        return effects[layer] * (4.0**-now - 4.0**-then) / (then - now)

    while True:
        open_ = [
            layer
            for layer, level in enumerate(levels)
            if level + 1 < len(BITS_OF_LAYERS) and BITS_OF_LAYERS[level + 1] - BITS_OF_LAYERS[level] <= left
        ]
        if not open_:
            return [BITS_OF_LAYERS[level] for level in levels]
        best = max(open_, key=gain)
        left -= BITS_OF_LAYERS[levels[best] + 1] - BITS_OF_LAYERS[levels[best]]
        levels[best] += 1


def _by_layer(bits: dict[int, int], extra_bits: float) -> Setting:
    """Return a setting with these bits, of which the most frequent are those of all layers without an entry."""
    common = max(sorted(set(bits.values())), key=list(bits.values()).count)
    return Setting(common, common, extra_bits, {layer: own for layer, own in bits.items() if own != common})


class _Bench:
    """The contexts and the model on which settings are measured."""

    def __init__(self, job: Job, loaded: Any, samples: Sequence[Sample]) -> None:
        from turboquant.mlx_lm.families import explain

        self._job, self._loaded, self._samples = job, loaded, samples
        support = explain(loaded.model)
        if support.status == "none":
            raise ModelError(support.message)
        self.compressible_layers = [layer for layer, yes in enumerate(support.layers) if yes]

    def measure(self, settings: Sequence[Setting], on_step: Callable[[int], None]) -> list[Measured]:
        """Measure settings, in their order. on_step: is told how many pairs of document and setting are done."""
        from turboquant.eval.divergence import measure
        from turboquant.eval.results import FidelityError

        seconds = dict.fromkeys(range(len(settings)), 0.0)
        baselines = [self._baseline(number, setting, seconds) for number, setting in enumerate(settings)]
        done = 0

        def on_baseline(text: str) -> None:
            nonlocal done
            if not text.endswith("full precision"):
                done += 1
                on_step(done)

        try:
            found = measure(
                self._loaded.model,
                self._samples,
                baselines,
                answer_tokens=ANSWER_TOKENS,
                stop=self._loaded.tokenizer.eos_token_ids,
                verify=False,
                answers_only=True,
                on_step=on_baseline,
            )
        except FidelityError as error:
            raise ModelError(f"nothing can be measured: {error}") from error
        return [
            _measured(setting, figures, len(self._samples), seconds[number])
            for number, (setting, figures) in enumerate(zip(settings, found, strict=True))
        ]

    def _baseline(self, number: int, setting: Setting, seconds: dict[int, float]) -> Any:
        """Return how a context is compressed with a setting. The time that it takes is added to seconds[number]."""
        from pipeline.cache.codec import job_codec
        from turboquant.eval.baselines import exact, in_segments

        cache = self._job.cache
        codec = job_codec(cache.model_copy(update=asdict(setting)))
        baseline = exact(codec) if cache.prefill == "exact" else in_segments(codec, cache.segment)

        def fill(context: Any) -> Any:
            start = perf_counter()
            filled = baseline.fill(context)
            seconds[number] += perf_counter() - start
            return filled

        return replace(baseline, fill=fill)


def _measured(setting: Setting, figures: Fidelity, documents: int, seconds: float) -> Measured:
    error = figures.kl_stderr
    return Measured(
        setting,
        kl=figures.kl,
        kl_error=error,
        kl_most=figures.kl if error is None else figures.kl + error * _STUDENT_95[min(documents - 1, 10) - 1],
        top1=figures.top1,
        answers=figures.answers,
        bits=figures.effective_bits,
        bytes_per_token=figures.bytes_per_token,
        seconds=seconds,
    )


def _samples(job: Job, loaded: Any, documents: int, queries: int) -> list[Sample]:
    """Return the contexts of the job's first documents that the model can read, each with its first queries."""
    from turboquant.eval.results import Sample

    renderer, cutter = Renderer(job.prompt, job.documents), WindowCutter(job)
    tokenizer = PromptTokenizer(loaded.tokenizer, bool(job.generation.thinking), job.prompt.special_tokens)
    limit = max_context(loaded.config, loaded.tokenizer)
    samples: list[Sample] = []
    for document in Inputs(job).stream():
        try:
            rendered = cutter.windows(document, renderer.render(document), tokenizer, limit, lambda: None)[0]
            tokens = tokenizer.tokenise(rendered, [query.text for query in document.queries[:queries]])
        except RowError:
            continue
        runs = tuple(tuple(suffix) for suffix in tokens.suffixes if len(suffix) > 1)
        longest = len(tokens.context) + max(map(len, runs), default=0) + ANSWER_TOKENS
        if len(tokens.context) >= SHORTEST and runs and (limit is None or longest <= limit):
            samples.append(Sample(tuple(tokens.context), runs))
        if len(samples) == documents:
            break
    if not samples:
        raise InputError(
            f"documents.path: there is no document to tune with: none has {SHORTEST} tokens and fits into the model"
        )
    return samples
