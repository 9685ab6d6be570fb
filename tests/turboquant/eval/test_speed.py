"""``python -m turboquant.bench``: what it prints, and what it refuses; the figures themselves are the machine's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from turboquant import bench
from turboquant.eval import speed

SMALL = ["--tokens", "200", "300", "--rows", "1", "3", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "ROUNDS", 1)


def test_every_way_at_every_length_and_number_of_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.png"
    assert bench.main([*SMALL, "--bits", "4", "3/2", "--json", "--plot", str(picture)]) == 0
    speeds = json.loads(capsys.readouterr().out)
    ways = ["full precision, float32", "mlx-lm, 4 bits", "turboquant 4/4", "turboquant 3/2"]
    expected = [(way, tokens, rows) for tokens in (200, 300) for rows in (1, 3) for way in ways]
    assert [(speed["way"], speed["tokens"], speed["rows"]) for speed in speeds] == expected
    full = next(speed for speed in speeds if speed["tokens"] == 300)
    assert full["nbytes"] == 2 * 2 * 300 * 64 * 4
    assert full["relative"] == 1
    assert all(speed["microseconds"] > 0 for speed in speeds)
    assert [speed["milliseconds_to_encode"] is None for speed in speeds] == [True, True, False, False] * 4
    assert picture.stat().st_size > 1000


def test_a_table_says_which_machine_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--bits", "4"]) == 0
    machine, _, head, first, *_ = capsys.readouterr().out.splitlines()
    assert machine == "CPU: NumPy and BLAS on compressed K/V, 4 query and 2 K/V heads of 64"
    assert head.split()[:2] == ["tokens", "rows"]
    assert "1.00x" in first


@pytest.mark.parametrize(("head_dim", "mlx_lm"), [(96, True), (80, False)])
def test_heads_that_mlx_lm_cannot_quantise_are_measured_without_it(
    head_dim: int, mlx_lm: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--tokens", "64", "--rows", "1", "--heads", "4", "--kv-heads", "2", "--head-dim", str(head_dim)]
    assert bench.main([*sizes, "--bits", "4", "--json"]) == 0
    printed = capsys.readouterr()
    ways = [speed["way"] for speed in json.loads(printed.out)]
    assert ways == ["full precision, float32", *["mlx-lm, 4 bits"] * mlx_lm, "turboquant 4/4"]
    assert ("left out: it cannot hold heads of 80" in printed.err) is not mlx_lm


def test_the_machine_is_asked_about_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "on_cpu", lambda: False)
    assert speed.machine([(4, 4)], 192).endswith(": MLX operations on compressed K/V")
    monkeypatch.setattr(speed.attention_gpu, "usable", lambda codec, head_dim: (codec.key_bits, head_dim) == (4, 64))
    assert speed.machine([(4, 4)], 64).endswith(": a kernel on compressed K/V")
    assert speed.machine([(4, 4), (3, 3)], 64).endswith(": a kernel and MLX operations on compressed K/V")
    assert speed.machine([(4, 4)], 128).endswith(": MLX operations on compressed K/V")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "7"], "'7': give bits of"),
        (["--bits", "4/3/2"], "'4/3/2': give bits of"),
        (["--tokens", "0"], "'0': give a whole number, at least 1"),
        (["--head-dim", "1"], "'1': give a whole number, at least 2"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4"),
        (["--plot", "speed.pgn"], "the name must end in one of"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
