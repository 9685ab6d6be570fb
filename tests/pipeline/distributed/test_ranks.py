"""A model that two processes hold between them, as a user runs it: what one alone answers, and what ends both."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.errors import PipelineError
from pipeline.models.ranks import RankGroup
from tests import ROOT, warm
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("every_core")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PARTS = ("exact ranks=2", "exact ranks=2 rank=1")  # the prefill of each rank's identity
LIMIT = 120  # seconds, after which processes are taken to wait for each other for ever


@pytest.fixture(scope="session")
def divisible(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("divisible"), **HEADS)


def make_place(folder: Path, model: Path) -> Workplace:
    place = Workplace(folder, model)
    place.queries.append({"id": "any", "text": "Which?", "temperature": 0.8, "seed": 3})
    place.save(scale={"ranks": 2}, generation={"max_tokens": 5, "batch_size": 6})  # some documents share a batch
    return place


@pytest.fixture
def place(tmp_path: Path, divisible: Path) -> Workplace:
    return make_place(tmp_path, divisible)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(place: Workplace, *options: str, other: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Two ranks, started as mlx.launch starts them; the second with other options besides."""
    hosts = place.folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.save()), *options]
    return [
        warm.Popen(
            [*command, *others],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
        )
        for rank, others in enumerate([(), other])
    ]


def outcomes(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """The ranks' exit codes, and what they said on stderr."""
    try:
        said = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def run(place: Workplace, *options: str) -> list[tuple[int, str]]:
    return outcomes(start(place, *options))


def ended_well(found: list[tuple[int, str]]) -> bool:
    return [code for code, _ in found] == [0, 0] or pytest.fail(str(found))


def segments_of(place: Workplace, prefill: str) -> dict[str, Path]:
    """The segments of an identity, by document."""
    manifests = {folder: json.loads((folder / "segment.json").read_text()) for folder in place.segments()}
    return {m["about"]["document"]: f for f, m in manifests.items() if m["identity"]["prefill"] == prefill}


def test_two_ranks_answer_as_one_process_does(place: Workplace) -> None:
    assert place.run("scale.ranks=1").rows_answered == 12
    alone = place.answers()
    assert ended_well(run(place, "--quiet"))
    assert place.answers() == alone
    assert place.report()["rows_answered"] == 12  # none kept of those that one process answered
    whole, *parts = (segments_of(place, prefill) for prefill in ("exact", *PARTS))
    for document in place.documents:  # whose codes are those of its heads, whichever rank has them
        one, *two = (mx.load(str(each[document] / "segment.safetensors")) for each in (whole, *parts))
        for name in (name for name in one if name.endswith("codes")):
            together = mx.concatenate([part[name] for part in two])
            assert (together == one[name]).mean() > 0.99, name
    built = place.output.read_bytes()

    place.output.unlink()
    shutil.rmtree(segments_of(place, PARTS[1])["d1"])
    assert ended_well(run(place, "--quiet"))
    assert [place.report()[f"prefixes_{how}"] for how in ("built", "restored")] == [1, 2]
    assert [len(segments_of(place, part)) for part in PARTS] == [3, 3]
    assert place.output.read_bytes() == built

    assert ended_well(run(place, "--quiet"))  # nothing is left to do
    assert place.report()["rows_kept"] == 12
    assert "12: 12 done, 0 failed, 0 left\n" in invoke("status", place.job_file).stdout


def test_segments_windows_and_schemas_are_shared_too(place: Workplace) -> None:
    place.documents |= {"long": " ".join(f"Clause {number} of the lease." for number in range(250))}
    place.queries += [{"id": "json", "text": "Which?", "json_schema": {"type": "integer", "maximum": 99}}]
    place.save(
        documents={"path": "docs.parquet", "too_long": "split"},
        prompt={"system": "Answer from the paper. " * 60},
        cache={"dir": "cache", "prefill": "streaming", "segment": 512, "key_bits": 3},
    )
    place.run("scale.ranks=1")
    alone = place.answers()
    assert ended_well(run(place, "--quiet"))
    assert place.report()["documents_split"] == 1
    assert place.answers() == alone


def parts(place: Workplace) -> int:
    return len(list(Path(f"{place.output}.parts").glob("??/[!.]*")))


def stopped(place: Workplace, stops: Sequence[tuple[int, signal.Signals]]) -> list[tuple[int, str]]:
    """A run of which ranks are sent signals when a document more is done; mlx.launch ends who is left by SIGTERM."""
    before = parts(place)
    ranks = start(place, "--quiet")
    deadline = time.monotonic() + LIMIT
    while parts(place) == before:
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for number, stop in stops:
        ranks[number].send_signal(stop)
        if stop == signal.SIGKILL:
            time.sleep(0.5)  # in which MLX may fail, hang, or give anything
            ranks[1 - number].terminate()
    return outcomes(ranks)


def test_a_run_that_is_cut_off_goes_on(place: Workplace) -> None:
    place.documents |= {f"e{number}": f"Paper {number} says {number * 7}. " * 40 for number in range(5)}
    place.save(generation={"max_tokens": 5, "batch_size": 3})
    for killed in (0, 1):
        code, said = stopped(place, [(killed, signal.SIGKILL)])[1 - killed]
        # MLX writes lines of its own in pieces, between which this one may stand.
        told = re.findall("error: .*; what was committed is kept, and the same command resumes$", said, re.MULTILINE)
        ended = killed == 0 and code == -signal.SIGTERM  # as a follower may be before it has said anything
        assert code == 1 or ended, said
        assert len(told) == 1 or ended, said
        assert "Traceback" not in said
    found = stopped(place, [(0, signal.SIGINT), (1, signal.SIGINT)])  # as a terminal does
    assert [code for code, _ in found] == [130, 0], found
    assert ended_well(run(place, "--quiet"))
    assert 4 * 3 <= place.report()["rows_kept"] < 4 * 8
    disturbed = place.output.read_bytes()
    place.output.unlink()
    shutil.rmtree(place.cache)
    assert ended_well(run(place, "--quiet"))
    assert place.output.read_bytes() == disturbed


def test_whatever_mlx_gives_when_a_rank_is_lost_is_noticed() -> None:
    ranks = RankGroup(2)  # of this process alone, in which MLX's sum over all ranks is what this one gives
    for call in (
        lambda: ranks.all_true(True),
        lambda: ranks.broadcast("x"),
        lambda: ranks.check_interrupted(lambda: None),
    ):
        with pytest.raises((RuntimeError, PipelineError), match="another rank is lost"):
            call()


def test_mlx_launch_starts_them(place: Workplace) -> None:
    launch = Path(sys.executable).with_name("mlx.launch")
    command = [str(launch), "-n", "2", "--backend", "ring", "--starting-port", str(free_ports(1)[0]), "--"]
    command += [sys.executable, "-m", "pipeline.cli", "run", str(place.save())]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # which it waits for
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    shown, said = process.communicate(timeout=LIMIT)
    assert "12 answered, 0 kept, 0 failed of 12 (3 documents)" in shown, said
    assert shown.count("rows ") == 1


# ---- what is refused


def test_a_rank_alone_is_refused(place: Workplace) -> None:
    line = error_of(invoke("run", place.job_file))
    assert line.startswith("scale.ranks: 2 processes are to hold the model between them, and this one is alone")
    assert "mlx.launch -n 2 -- pipeline run " in line
    assert "one process" in error_of(invoke("bench", place.job_file))


def test_a_job_of_one_process_is_not_run_by_several(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    line = error_of(invoke("run", workplace.job_file))
    assert "set scale.ranks" in line
    assert "--shard" in line
    assert not workplace.output.parent.exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scale": {"ranks": 0}}, "scale.ranks: expected at least 1, got 0"),
        ({"adapter": "adapters"}, "adapter: mlx-lm splits no model with an adapter"),
        ({"cache": {"dir": "cache", "keep": "job"}}, "cache.keep: job is for a model in one process"),
    ],
)
def test_what_ranks_cannot_do_is_refused(place: Workplace, changed: dict[str, Any], words: str) -> None:
    place.save(**changed)
    assert words in error_of(invoke("run", place.job_file))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "2 ranks can't share its 1 num_key_value_heads evenly"),
        (HEADS, "scale.ranks: 3, but mlx.launch has started 2"),
    ],
)
def test_what_cannot_be_split_is_refused(
    place: Workplace, write_model: Callable[..., Path], config: dict[str, Any], words: str
) -> None:
    place.save(model=str(write_model(place.folder / "other", **config)))
    options = ["--set", "scale.ranks=3"] if config else []
    (code, said), _ = run(place, *options)
    assert code == 2
    assert words in said


def test_another_job_on_the_other_rank_is_refused(place: Workplace) -> None:
    ranks = start(place, other=["--set", "cache.key_bits=3"])
    said = ranks[1].communicate(timeout=LIMIT)[1]
    ranks[0].terminate()  # as mlx.launch does then
    ((code, ended),) = outcomes(ranks[:1])
    assert ranks[1].returncode == 2
    assert "rank 1: its codec is not the first rank's" in said
    assert code == 1
    assert "error: " in ended.splitlines()[-1]  # MLX may be amid a line of its own


def test_what_is_wrong_on_the_first_rank_is_told_once(place: Workplace) -> None:
    (code, said), follower = run(place, "--set", "documents.id=name")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert follower == (0, "")
