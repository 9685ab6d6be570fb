"""Which rows RowGenerator prefills together; what it generates is compared for every architecture elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.models.loading import load_model
from pipeline.models.row_generator import ROWS_PREFILLED, Row, RowGenerator
from turboquant import CacheCodec, enabled, prefill

LENGTHS = [5 + 13 * number % 37 for number in range(50)]  # of rows, in no order


@pytest.mark.parametrize(("batch_size", "rows"), [(8, 8), (32, ROWS_PREFILLED)])
def test_rows_prefilled_together_on_a_cpu_are_few_and_about_equally_long(
    batch_size: int, rows: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model).model
    prefix = prefill(model, list(range(10, 50)), CacheCodec())
    given = [Row(prefix, [10 + (number + i) % 40 for i in range(length)], 4) for number, length in enumerate(LENGTHS)]

    def answers(size: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in given]
        with enabled(model), RowGenerator(model, "together", given, size) as generator:
            while responses := generator.next_generated():
                for response in responses:
                    found[response.row].append(response.token)
        return found

    alone, shapes, call = answers(1), list[tuple[int, ...]](), type(model).__call__

    def spy(self: Any, inputs: mx.array, *arguments: Any, **options: Any) -> Any:
        shapes.append(inputs.shape)
        return call(self, inputs, *arguments, **options)

    monkeypatch.setattr(type(model), "__call__", spy)
    assert answers(batch_size) == alone
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert max(shape[0] for shape in prefills) == rows
    if batch_size > rows:  # the first 32 rows are cut in two, by their lengths
        lengths = sorted(LENGTHS[:batch_size])
        assert [shape[1] for shape in prefills[:2]] == [lengths[rows - 1] - 1, lengths[batch_size - 1] - 1]
