"""benches/trellis_levels.py: levels get better by training, and those of the package are trained."""

from __future__ import annotations

import numpy as np
import pytest

from benches.trellis_levels import error, trained
from turboquant.quant.trellis import BLOCK, CODES


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_get_better_by_training(bits: int) -> None:
    (code, _), strings = CODES[bits], 40
    before, after = (trained(bits, code.parities, 16, iterations) for iterations in (0, 3))
    errors = [error(one, BLOCK, strings) for one in (before, after, code)]
    assert errors[1] < errors[0]
    assert errors[2] < 1.01 * errors[1]
    assert (np.diff(after.levels.mean(axis=1)) > 0).all()
