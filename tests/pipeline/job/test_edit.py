"""Keys that are set in the text of a job file: everything else in it stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import JobError
from pipeline.job.edit import set_cache_keys
from pipeline.job.job_file import load_job

_HEAD = '# mine\nmodel: {model}\ndocuments: {{path: docs}}  # here\nqueries: ["What?"]\noutput: {{path: out.parquet}}\n'
_VALUES = {"key_bits": 5, "value_bits": 3, "extra_bits": 0.4, "layer_bits": {0: 8, 3: 5}}
_AFTER = "key_bits: 5, value_bits: 3, extra_bits: 0.4, layer_bits: {0: 8, 3: 5}"


def _write(folder: Path, cache: str) -> Path:
    path = folder / "job.yaml"
    (folder / "model").mkdir()
    path.write_bytes(_HEAD.format(model=folder / "model").encode() + cache.encode())
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"cache: {{{_AFTER}}}\n"),
        ("cache: {} # all\n", f"cache: {{{_AFTER}}} # all\n"),
        ("cache: {dir: c} # all\n", f"cache: {{dir: c, {_AFTER}}} # all\n"),
        (
            "cache: {key_bits: 4, dir: c}\n",
            "cache: {key_bits: 5, dir: c, value_bits: 3, extra_bits: 0.4, layer_bits: {0: 8, 3: 5}}\n",
        ),
        (
            "cache:\n  # the store\n  dir: c   # here\n  key_bits: 4  # of keys\n\nretries: 2\n",
            "cache:\n  # the store\n  value_bits: 3\n  extra_bits: 0.4\n  layer_bits: {0: 8, 3: 5}\n  dir: c   # here\n"
            "  key_bits: 5  # of keys\n\nretries: 2\n",
        ),
        (
            "cache:\n  layer_bits:\n    0: 4  # first\n    1: 4\n  # end\nretries: 2\n",
            "cache:\n  key_bits: 5\n  value_bits: 3\n  extra_bits: 0.4\n  layer_bits:\n    {0: 8, 3: 5}\n  # end\n"
            "retries: 2\n",
        ),
    ],
)
def test_the_text_around_the_values_stays(tmp_path: Path, before: str, after: str) -> None:
    path = _write(tmp_path, before)
    head = path.read_text().removesuffix(before)
    job = load_job(path)
    set_cache_keys(path, _VALUES)
    assert path.read_text() == head + after
    assert load_job(path) == job.model_copy(update={"cache": job.cache.model_copy(update=_VALUES)})
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["job.yaml"]


@pytest.mark.parametrize(
    "text",
    ["name: &n {dir: c}\n", "cache: &c {dir: c}\nscale: *c\n"],
    ids=["no job at all", "an alias of another section"],
)
def test_a_file_that_is_no_job_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path, text)
    before = path.read_bytes()
    with pytest.raises(JobError):
        set_cache_keys(path, _VALUES)
    assert path.read_bytes() == before


def test_values_that_an_alias_shares_are_to_be_written_by_hand(tmp_path: Path) -> None:
    path = _write(tmp_path, "cache: {key_bits: &bits 4, value_bits: *bits}\n")
    before = path.read_bytes()
    with pytest.raises(JobError, match=r"by hand: key_bits: 5$"):
        set_cache_keys(path, {"key_bits": 5})
    assert path.read_bytes() == before


def test_a_link_stays_a_link_and_rights_stay(tmp_path: Path) -> None:
    path = _write(tmp_path, "cache: {dir: c}\n")
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to("job.yaml")
    set_cache_keys(link, {"key_bits": 5})
    assert link.is_symlink()
    assert load_job(link).cache.key_bits == 5
    assert os.stat(path).st_mode & 0o777 == 0o640
