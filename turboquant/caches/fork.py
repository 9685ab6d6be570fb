"""mlx-lm caches for queries on a compressed past.

    Fork        one layer of one query's cache: an encoded past that is shared, and a full-precision suffix of its own
    BatchForks  one layer of several forks in a batch, made by ``merge`` as mlx-lm's BatchGenerator does

The model must run inside of ``enabled`` (mlx_lm/patch.py), so that it calls ``attend``: ``update_and_fetch`` returns
only the suffix. No class here may have an attribute ``bits``: mlx-lm would take it for its own quantised cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from turboquant.attention.dispatch import attend_past, attend_past_and_suffix, backend
from turboquant.attention.reference import Partial, finish, merge
from turboquant.mlx_lm.internals import BatchKVCache, KVCache
from turboquant.quant.layer import DenseLayer, EncodedLayer

Mask = mx.array | str | None


class _BypassGuard:
    """Notices that a model runs outside of ``enabled``: it asks for masks and adds tokens, but never calls ``attend``.

    Such a model ignores the compressed past, and answers nonsense. This is noticed when the next mask is asked for, so
    one forward pass with no other behind it goes unnoticed.
    """

    _mask_was_made = _bypassed = False

    def note_mask(self, compressed: bool) -> None:
        """Note that a mask is made. Raises RuntimeError where ``attend`` was not called for the tokens added before."""
        if self._bypassed:
            raise RuntimeError(
                "attention missed the compressed past: run the model inside `with turboquant.enabled(model):`"
            )
        self._mask_was_made = compressed

    def note_tokens(self) -> None:
        """Note that tokens are added."""
        self._bypassed = self._mask_was_made

    def note_attention(self) -> None:
        """Note that the model calls ``attend``."""
        self._mask_was_made = self._bypassed = False


class _WithSuffix(_BypassGuard):
    """A suffix in full precision, of one row or of a batch, and the buffers that it was last fetched from.

    A kernel of a GPU reads whole buffers, since MLX would copy a slice of them for it.
    """

    suffix: Any
    _fetched: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, n_kv_heads, L, head_dim) to the suffix, and return the suffix."""
        self.note_tokens()
        fetched: tuple[mx.array, mx.array] = self.suffix.update_and_fetch(keys, values)
        self._fetched = fetched
        return fetched

    def take_buffers(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array] | None:
        """Return the suffix's buffers if keys and values are the slices of them that were fetched last, else None.

        The slices are forgotten: while one is held, MLX cannot update the buffer in place.
        """
        fetched, self._fetched = self._fetched, None
        if fetched is None or keys is not fetched[0] or values is not fetched[1]:
            return None
        return self.suffix.keys, self.suffix.values


class Fork(_WithSuffix):
    """One layer of one query's cache: an encoded past, shared and immutable, and a full-precision suffix.

    layer: the past; None where nothing is compressed, as in a ``TurboQuantKVCache`` that is still short.
    """

    def __init__(self, layer: EncodedLayer | DenseLayer | None) -> None:
        self.layer = layer
        self.suffix = KVCache()

    @property
    def offset(self) -> int:
        """The number of tokens in past and suffix, which is the position of the next token."""
        return (self.layer.tokens if self.layer is not None else 0) + int(self.suffix.offset)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Return attention of queries (1, n_heads, L, head_dim) over the encoded past and the given suffix."""
        self.note_attention()
        buffers = self.take_buffers(keys, values)
        if self.layer is not None:
            return attend_past_and_suffix(queries, self.layer, keys, values, scale, mask, sinks, buffers)
        return finish(backend().attend_dense(queries, keys, values, scale, mask), sinks, queries.dtype)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return a mask over the suffix; every query sees the whole encoded past.

        Raises RuntimeError where the model did not call ``attend`` for the tokens added before, and ValueError for a
        sliding window.
        """
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        self.note_mask(self.layer is not None)
        mask: Mask = self.suffix.make_mask(length, return_array=return_array, window_size=None)
        return mask

    @property
    def state(self) -> Any:
        """The suffix's arrays; the encoded past never changes."""
        return [] if self.suffix.empty() else self.suffix.state

    @property
    def nbytes(self) -> int:
        """The bytes of the suffix; the encoded past is shared and not counted."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """The number of tokens in past and suffix."""
        return self.offset

    def empty(self) -> bool:
        """Whether past and suffix are empty."""
        return self.layer is None and bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffix can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens, at most those of the suffix, and return how many were dropped."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> Fork:
        copied = copy.copy(self)
        copied.suffix = copy.deepcopy(self.suffix, memo)
        return copied

    @classmethod
    def merge(cls, caches: Sequence[Fork]) -> BatchForks:
        """Return a batch whose rows are the forks. Raises TypeError where a cache is not a fork."""
        if any(type(cache) is not Fork for cache in caches):
            raise TypeError("only forks can share a batch with forks")
        return BatchForks([cache.layer for cache in caches], BatchKVCache.merge([cache.suffix for cache in caches]))


class BatchForks(_WithSuffix):
    """One layer of a batch of forks: each row's encoded past, which several rows may share, and a batched suffix."""

    def __init__(self, layers: list[EncodedLayer | DenseLayer | None], suffix: BatchKVCache) -> None:
        self.suffix = suffix
        self.set_layers(layers)

    def set_layers(self, layers: Sequence[EncodedLayer | DenseLayer | None]) -> None:
        """Set each row's past, and derive from them once what every step needs."""
        self.layers = list(layers)
        self._positions: tuple[mx.array, mx.array] | None = None
        self._past_tokens = mx.array([layer.tokens if layer is not None else 0 for layer in layers])
        groups: dict[int, list[int]] = {}
        for row, layer in enumerate(layers):
            groups.setdefault(id(layer), []).append(row)
        self._rows_by_layer = list(groups.values())

    @property
    def offset(self) -> mx.array:
        """The position of each row's next token, (B,). A model asks for it twice in each layer."""
        own = self.suffix.offset  # another array whenever it changes; a test holds mlx-lm to that
        if self._positions is None or self._positions[0] is not own:
            self._positions = own, own + self._past_tokens
        return self._positions[1]

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Return attention of queries (B, n_heads, L, head_dim) over each row's past and suffix.

        Each past is read only once, for all rows that share it.
        """
        self.note_attention()
        buffers = self.take_buffers(keys, values)
        if len(self._rows_by_layer) == 1 and self.layers[0] is not None:
            return attend_past_and_suffix(queries, self.layers[0], keys, values, scale, mask, sinks, buffers)
        suffix = backend().attend_dense(queries, keys, values, scale, mask)
        parts, order = [], []
        for rows in self._rows_by_layer:
            layer, group = self.layers[rows[0]], queries[mx.array(rows)]
            if layer is None:  # attention over no tokens
                shape = group.shape[:-1]
                parts.append(Partial(mx.zeros((*shape, values.shape[-1])), mx.full(shape, -mx.inf)))
            else:
                parts.append(attend_past(group, layer, scale))
            order += rows
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        past = Partial(
            mx.concatenate([part.output for part in parts])[back],
            mx.concatenate([part.logsumexp for part in parts])[back],
        )
        return finish(merge([suffix, past]), sinks, queries.dtype)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return a mask (B, 1, L, T) over the suffixes; every query sees its row's whole encoded past.

        Raises RuntimeError where the model did not call ``attend`` for the tokens added before, and ValueError for a
        sliding window.
        """
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        self.note_mask(any(layer is not None for layer in self.layers))
        mask: mx.array = self.suffix.make_mask(length)
        return mask

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce the padding of the tokens to come, as mlx-lm's BatchKVCache does."""
        self.suffix.prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)

    def finalize(self) -> None:
        """Move padding from the right to the left, as mlx-lm's BatchKVCache does."""
        self.suffix.finalize()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the rows given."""
        self.set_layers([self.layers[row] for row in batch_indices])
        self.suffix.filter(batch_indices)

    def extend(self, other: BatchForks) -> None:
        """Add the rows of another batch behind the rows of this one."""
        self.set_layers(self.layers + other.layers)
        self.suffix.extend(other.suffix)

    def extract(self, row: int) -> Fork:
        """Return one row as a fork; its past stays shared."""
        fork = Fork(self.layers[row])
        if not self.suffix.empty():
            fork.suffix = self.suffix.extract(row)
        return fork

    @property
    def state(self) -> Any:
        """The suffixes' arrays."""
        return [] if self.suffix.empty() else self.suffix.state

    @property
    def nbytes(self) -> int:
        """The bytes of the suffixes."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """The number of tokens in the longest suffix."""
        return int(self.suffix.size())

    def empty(self) -> bool:
        """Whether all suffixes are empty."""
        return bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffixes can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every suffix, and return how many were dropped."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchForks:
        copied = copy.copy(self)
        copied.suffix = copy.deepcopy(self.suffix, memo)
        return copied
