"""mlx-lm caches over a compressed past.

    Fork        one layer of one query's cache: an encoded past, shared, and a full-precision suffix of its own
    BatchForks  one layer of several forks in a batch, as mlx-lm's BatchGenerator makes it by ``merge``

They know mlx-lm's cache contract, and neither how the past was encoded (prefix.py, streaming.py) nor files. The model
must be made to call ``attend`` (dispatch.py); ``update_and_fetch`` hands back the suffix only. None has an attribute
``bits``: mlx-lm would take it for its own quantised cache.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from turboquant.attention.dispatch import attend_past, attend_past_and_own, backend
from turboquant.attention.reference import Partial, finish, merge
from turboquant.quant.layer import DenseLayer, EncodedLayer

Mask = mx.array | str | None


class _Watched:
    """Notices a model that is run without ``enabled``: it asks for masks and adds tokens, but calls no ``attend``."""

    _asked = _missed = False

    def _mask_asked(self, compressed: bool) -> None:
        if self._missed:
            raise RuntimeError(
                "attention missed the compressed past: run the model inside `with turboquant.enabled(model):`"
            )
        self._asked = compressed

    def _tokens_added(self) -> None:
        self._missed = self._asked

    def _attention_called(self) -> None:
        self._asked = self._missed = False


class Fork(_Watched):
    """One layer of one query's cache: encoded past, shared and immutable, and a full-precision suffix.

    ``layer`` is None while nothing is compressed (in a ``TurboQuantKVCache`` that is still short).
    """

    def __init__(self, layer: EncodedLayer | DenseLayer | None) -> None:
        self.layer = layer
        self.suffix = KVCache()

    @property
    def offset(self) -> int:
        """Tokens before the next one: its position."""
        return self._past + int(self.suffix.offset)

    @property
    def _past(self) -> int:
        return self.layer.tokens if self.layer is not None else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (1, n_kv_heads, L, head_dim) to the suffix and return the suffix."""
        self._tokens_added()
        fetched: tuple[mx.array, mx.array] = self.suffix.update_and_fetch(keys, values)
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of queries (1, n_heads, L, head_dim) over the encoded past and the suffix given."""
        self._attention_called()
        if self.layer is not None:
            return attend_past_and_own(queries, self.layer, keys, values, scale, mask, sinks)
        return finish(backend().attend_dense(queries, keys, values, scale, mask), sinks, queries.dtype)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """A mask over the suffix; every query sees the whole encoded past.

        Raises RuntimeError where the model that asks has not called ``attend`` for the tokens added last.
        """
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        self._mask_asked(self.layer is not None)
        mask: Mask = self.suffix.make_mask(length, return_array=return_array, window_size=None)
        return mask

    @property
    def state(self) -> Any:
        """The suffix's arrays; the encoded past never changes."""
        return [] if self.suffix.empty() else self.suffix.state

    @property
    def nbytes(self) -> int:
        """Bytes of the suffix: the encoded past is shared."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """Tokens held, past and suffix."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing is held at all."""
        return self.layer is None and bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffix can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens, of the suffix at most; returns how many."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> Fork:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.suffix = copy.deepcopy(self.suffix, memo)
        return copied

    @classmethod
    def merge(cls, caches: Sequence[Fork]) -> BatchForks:
        """A batch whose rows are the forks'. Raises TypeError where a cache is no fork."""
        if any(type(cache) is not Fork for cache in caches):
            raise TypeError("only forks can share a batch with forks")
        return BatchForks([cache.layer for cache in caches], BatchKVCache.merge([cache.suffix for cache in caches]))


class BatchForks(_Watched):
    """One layer of a batch: each row's encoded past, shared where rows have the same, and a batched suffix."""

    def __init__(self, layers: list[EncodedLayer | DenseLayer | None], suffix: BatchKVCache) -> None:
        self.suffix = suffix
        self._set_layers(layers)

    def _set_layers(self, layers: Sequence[EncodedLayer | DenseLayer | None]) -> None:
        """What follows from which rows there are is worked out when they change, not at every step."""
        self.layers = list(layers)
        self._past = mx.array([layer.tokens if layer is not None else 0 for layer in layers])
        groups: dict[int, list[int]] = {}
        for row, layer in enumerate(layers):
            groups.setdefault(id(layer), []).append(row)
        self._rows_by_layer = list(groups.values())

    @property
    def offset(self) -> mx.array:
        """(B,) the position of each row's next token."""
        offset: mx.array = self.suffix.offset + self._past
        return offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, n_kv_heads, L, head_dim) to the suffixes and return them."""
        self._tokens_added()
        fetched: tuple[mx.array, mx.array] = self.suffix.update_and_fetch(keys, values)
        return fetched

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of queries (B, n_heads, L, head_dim): each distinct past is read once, for all its rows."""
        self._attention_called()
        if len(self._rows_by_layer) == 1 and self.layers[0] is not None:
            return attend_past_and_own(queries, self.layers[0], keys, values, scale, mask, sinks)
        suffix = backend().attend_dense(queries, keys, values, scale, mask)
        return finish(merge([suffix, self._attend_pasts(queries, scale, values.shape[-1])]), sinks, queries.dtype)

    def _attend_pasts(self, queries: mx.array, scale: float, value_dim: int) -> Partial:
        parts, order = [], []
        for rows in self._rows_by_layer:
            layer, some = self.layers[rows[0]], queries[mx.array(rows)]
            parts.append(_nothing(some, value_dim) if layer is None else attend_past(some, layer, scale))
            order += rows
        back = mx.array(sorted(range(len(order)), key=order.__getitem__))
        return Partial(
            mx.concatenate([part.output for part in parts])[back],
            mx.concatenate([part.logsumexp for part in parts])[back],
        )

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """A mask (B, 1, L, T) over the suffixes; every query sees its row's whole encoded past.

        Raises RuntimeError where the model that asks has not called ``attend`` for the tokens added last.
        """
        if window_size is not None:
            raise ValueError("a sliding-window layer cannot run on a compressed cache")
        self._mask_asked(any(layer is not None for layer in self.layers))
        mask: mx.array = self.suffix.make_mask(length)
        return mask

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce padding; see mlx-lm's BatchKVCache."""
        self.suffix.prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)

    def finalize(self) -> None:
        """Move right padding to the left; see mlx-lm's BatchKVCache."""
        self.suffix.finalize()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the rows given."""
        self._set_layers([self.layers[row] for row in batch_indices])
        self.suffix.filter(batch_indices)

    def extend(self, other: BatchForks) -> None:
        """Add the other batch's rows behind these."""
        self._set_layers(self.layers + other.layers)
        self.suffix.extend(other.suffix)

    def extract(self, row: int) -> Fork:
        """The row as a fork; its past stays shared."""
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
        """Bytes of the suffixes."""
        return int(self.suffix.nbytes)

    def size(self) -> int:
        """The longest row's tokens in the suffix."""
        return int(self.suffix.size())

    def empty(self) -> bool:
        """Whether no suffix holds anything."""
        return bool(self.suffix.empty())

    def is_trimmable(self) -> bool:
        """The suffixes can be trimmed."""
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every suffix; returns how many."""
        return int(self.suffix.trim(n))

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchForks:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.suffix = copy.deepcopy(self.suffix, memo)
        return copied


def _nothing(queries: mx.array, value_dim: int) -> Partial:
    """Attention over no tokens at all."""
    return Partial(mx.zeros((*queries.shape[:-1], value_dim)), mx.full(queries.shape[:-1], -mx.inf))
