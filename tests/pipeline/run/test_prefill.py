"""What a job's owner is told of layers that cannot be compressed."""

from __future__ import annotations

import pytest

from pipeline.run.prefill import warn_of_uncompressed_layers
from turboquant.mlx_lm.families import Support


@pytest.mark.parametrize(
    ("support", "told"),
    [
        (Support((True, True), ()), []),
        (
            Support((True, False), ("recurrent state (1 ArraysCache)",)),
            ["1 of 2 layers are kept uncompressed: recurrent state (1 ArraysCache)"],
        ),
    ],
)
def test_layers_kept_uncompressed_are_told_with_the_reason(
    support: Support, told: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.run.prefill.explain", lambda model: support)
    warn_of_uncompressed_layers(object())
    assert caplog.messages == told
