"""Settings of compression: bits of keys and values, and which tokens are kept uncompressed or with more bits.

codec.py compresses the vectors. Settings are written to files and to states of caches as JSON, which is not trusted
when it is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from turboquant.quant import CODINGS, trellis
from turboquant.quant.codebook import lloyd_max
from turboquant.quant.codec import Codec
from turboquant.quant.trellis import TrellisCodec

# Bits of the tokens that are kept finer, by the bits of the others.
FINE_BITS = {2: 5, 3: 6, 4: 8, 5: 8, 6: 8, 8: 8}
UNCOMPRESSED = 16  # bits that stand for floats as the model computes them


@dataclass(frozen=True)
class CacheCodec:
    """Settings by which the keys and values of attention layers are compressed.

    key_bits, value_bits: bits per coordinate, each one of ``SUPPORTED_BITS``; or both ``UNCOMPRESSED``: then all tokens
        are kept as the model computes them, in its dtype, and the settings below have no effect.
    sinks: number of tokens at the start that are not compressed. The very first tokens get most of the attention, and
        have short keys. The others are marks of a chat template, to which the marks around a question attend.
    window: largest number of tokens at the end, next to the question, that are kept finer (``FINE_BITS``).
    extra_bits: largest cost of finer tokens, in bits per value of the context. At least one half of it is for the
        tokens that the context's own queries attend to most, if the queries are known.
    query_aware: whether keys are rounded to suit the context's own queries, if these are known.
        These three are for contexts that are encoded as a whole. In caches that compress themselves as they grow
        (``TurboQuantKVCache``, ``compress``), the last ``window`` tokens stay as they are, and the other two have no
        effect.
    seed: of the rotation.
    layer_bits: other bits for some layers, as (layer, key_bits, value_bits). A negative layer counts from the last one.
    coding: ``trellis`` codes tokens of 2 to 4 bits, other than finer ones, by trellis codes (trellis.py): they lose
        a third to a half less in the same bits, and take longer to encode. Vectors whose head_dim 32 does not divide,
        and more bits, have scalar codes in any case.

    Raises ValueError for settings out of range.

    >>> CacheCodec(4, 3, layer_bits=((0, 8, 8), (-1, 8, 8))).for_layer(29, 30).key_bits
    8
    """

    key_bits: int = 4
    value_bits: int = 4
    sinks: int = 16
    window: int = 128
    extra_bits: float = 0.2
    query_aware: bool = True
    seed: int = 0
    layer_bits: tuple[tuple[int, int, int], ...] = ()
    coding: str = "scalar"

    def __post_init__(self) -> None:
        for _, key_bits, value_bits in ((0, self.key_bits, self.value_bits), *self.layer_bits):
            if (key_bits == UNCOMPRESSED) != (value_bits == UNCOMPRESSED):
                raise ValueError(f"{UNCOMPRESSED} bits are for keys and values together")
            if key_bits != UNCOMPRESSED:
                lloyd_max(key_bits)
                lloyd_max(value_bits)
        if self.sinks < 0 or self.window < 0:
            raise ValueError("sinks and window count tokens and cannot be negative")
        if not 0 <= self.extra_bits <= 16:
            raise ValueError("extra_bits must be between 0 and 16")
        if self.coding not in CODINGS:
            raise ValueError(f"coding is {' or '.join(CODINGS)}, not {self.coding!r}")

    def for_layer(self, index: int, n_layers: int) -> CacheCodec:
        """Return the codec of layer ``index`` of a model with ``n_layers`` layers; its ``layer_bits`` are empty.

        Raises ValueError as ``check_layers`` does.
        """
        self.check_layers(n_layers)
        bits_of = {layer % n_layers: bits for layer, *bits in self.layer_bits}
        key_bits, value_bits = bits_of.get(index, (self.key_bits, self.value_bits))
        return replace(self, key_bits=key_bits, value_bits=value_bits, layer_bits=())

    def check_layers(self, n_layers: int) -> None:
        """Raise ValueError if ``layer_bits`` names a layer that a model with ``n_layers`` layers does not have."""
        for layer, *_ in self.layer_bits:
            if not -n_layers <= layer < n_layers:
                count = "1 layer" if n_layers == 1 else f"{n_layers} layers"
                raise ValueError(
                    f"layer_bits names layer {layer}, but the model has {count}: "
                    f"0 to {n_layers - 1}, or -1 to {-n_layers} counted from the last one"
                )

    @property
    def is_uncompressed(self) -> bool:
        """Whether all tokens are kept as they are, in the same way as sinks."""
        return self.key_bits == UNCOMPRESSED

    @property
    def fine(self) -> CacheCodec:
        """Return the codec of the tokens that are kept finer."""
        if self.is_uncompressed:
            return self
        return replace(self, key_bits=FINE_BITS[self.key_bits], value_bits=FINE_BITS[self.value_bits], coding="scalar")

    def keys(self, head_dim: int) -> Codec:
        """Return the codec of keys with ``head_dim`` coordinates."""
        return self._codec(head_dim, self.key_bits, "keys")

    def values(self, head_dim: int) -> Codec:
        """Return the codec of values with ``head_dim`` coordinates."""
        return self._codec(head_dim, self.value_bits, "values")

    def _codec(self, head_dim: int, bits: int, of: Literal["keys", "values"]) -> Codec:
        if self.coding == "trellis" and trellis.has_code(head_dim, bits):
            return TrellisCodec(head_dim, bits, self.seed, of)
        return Codec(head_dim, min(bits, max(FINE_BITS)), self.seed)  # without compression, of no tokens

    def fine_tokens(self, tokens: int, queries_known: bool) -> tuple[int, int]:
        """Return how many of a context's ``tokens`` are kept finer: at its end, and those its queries attend to.

        With trellis codes, all others are whole blocks, so up to half a block more or fewer are finer; in short
        contexts up to a block more.
        """
        window, attended = self._fine_tokens(tokens, queries_known)
        fine = window + attended
        if self.coding == "trellis" and min(self.key_bits, self.value_bits) <= max(trellis.CODES):
            over = max(0, tokens - self.sinks - fine) % trellis.BLOCK
            fine += over if over <= trellis.BLOCK // 2 or fine < trellis.BLOCK - over else over - trellis.BLOCK
            window = min(window, fine) if queries_known else fine
        return window, fine - window

    def _fine_tokens(self, tokens: int, queries_known: bool) -> tuple[int, int]:
        added_bits = (self.fine.key_bits + self.fine.value_bits - self.key_bits - self.value_bits) / 2
        most = min(tokens - self.sinks, int(self.extra_bits * tokens / added_bits)) if added_bits else 0
        if most <= 0:
            return 0, 0
        if not queries_known:
            return min(self.window, most), 0
        window = min(self.window, most // 2)
        return window, most - window

    def nbytes(self, tokens: int, head_dim: int, float_bytes: int = 2) -> int:
        """Return the bytes that the keys and values of ``tokens`` tokens take in one KV head.

        float_bytes: of a number as the model computes it, which is what an uncompressed layer keeps.
        """
        if self.is_uncompressed:
            return head_dim * (2 * float_bytes * tokens + 8)  # the means, which are float32, are kept too
        sinks = min(tokens, self.sinks)
        fine = sum(self.fine_tokens(tokens, queries_known=True))

        def bits(codec: CacheCodec) -> float:
            return codec.keys(head_dim).effective_bits + codec.values(head_dim).effective_bits

        whole = 32 * sinks + bits(self.fine) * fine + bits(self) * (tokens - sinks - fine)
        return int(head_dim * whole / 8) + 8 * head_dim  # the means are float32

    @property
    def identity(self) -> str:
        """Name everything that decides the codes; this text is a part of a segment's key."""
        return (
            f"turboquant-2 keys={self.key_bits} values={self.value_bits} sinks={self.sinks} window={self.window} "
            f"extra={self.extra_bits} rounding={'queries' if self.query_aware else 'nearest'} seed={self.seed}"
            + (f" coding=trellis-{trellis.digest()}" if self.coding == "trellis" else "")
            + "".join(f" layer{layer}={keys}/{values}" for layer, keys, values in self.layer_bits)
        )


def dump_codec(codec: CacheCodec) -> str:
    """Write a codec as JSON.

    >>> parse_codec(json.loads(dump_codec(CacheCodec(3, 4)))) == CacheCodec(3, 4)
    True
    """
    return json.dumps(asdict(codec))


def parse_codec(content: Any) -> CacheCodec:
    """Read a codec from what ``dump_codec`` wrote, parsed. Raises ValueError for anything else."""
    default = CacheCodec()
    names = {field.name for field in fields(default)}
    if isinstance(content, dict):
        content = {"coding": "scalar", **content}  # earlier versions had no other
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"a codec's fields are {sorted(names)}")
    values = {name: _tuples(value) for name, value in content.items()}
    for name, value in values.items():
        kind = type(getattr(default, name))
        if type(value) not in ((int, float) if kind is float else (kind,)) or (type(value) is int and value < 0):
            raise ValueError(f"the codec's {name} cannot be {value!r}")
    try:
        return CacheCodec(**values)
    except TypeError as error:
        raise ValueError(f"the codec cannot be read: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
