"""What was compiled is kept whole, verified, and made anew where it is damaged, another's or of an older version."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from turboquant.kernels.compiled_files import SUFFIX, CompiledFiles, compiled_files, key_of

CODE = bytes(range(256)) * 40
KEY = key_of("text", "sm_90a", "13.0")


@pytest.fixture
def files(tmp_path: Path) -> CompiledFiles:
    found = CompiledFiles(tmp_path / "not" / "yet")
    found.write("attend", KEY, CODE, {"architecture": "sm_90a"})
    return found


def the_file(files: CompiledFiles) -> Path:
    (path,) = files.folder.iterdir()
    return path


def test_what_was_written_is_read(files: CompiledFiles) -> None:
    found = files.read("attend", KEY)
    assert found is not None
    assert found[0] == CODE
    assert found[1]["architecture"] == "sm_90a"
    assert files.read("attend", key_of("another text", "sm_90a", "13.0")) is None
    assert files.keys("attend") == [KEY]


@pytest.mark.parametrize("place", [0, 5, 30, 200, -1, -4000])
def test_one_changed_byte_is_noticed(files: CompiledFiles, place: int) -> None:
    content = bytearray(the_file(files).read_bytes())
    content[place] ^= 1
    the_file(files).write_bytes(content)
    found = files.read("attend", KEY)
    assert found is None or found == (CODE, found[1])  # words about it, such as the date, may change


@pytest.mark.parametrize("length", [0, 1, 100, 300, 5000])
def test_a_file_that_ends_early_is_noticed(files: CompiledFiles, length: int) -> None:
    the_file(files).write_bytes(the_file(files).read_bytes()[:length])
    assert files.read("attend", KEY) is None


@pytest.mark.parametrize("field", ["format", "name", "key", "checksum"])
def test_a_file_of_another_version_or_of_something_else_is_noticed(files: CompiledFiles, field: str) -> None:
    header, _, content = the_file(files).read_bytes().partition(b"\n")
    changed = json.dumps({**json.loads(header), field: 0}).encode()
    the_file(files).write_bytes(changed + b"\n" + content)
    assert files.read("attend", KEY) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"null\nx", b"\x7fELF\2\1\1", b"{}\n" + CODE])
def test_foreign_files_are_noticed(files: CompiledFiles, content: bytes) -> None:
    the_file(files).write_bytes(content)
    assert files.read("attend", KEY) is None
    files.write("attend", KEY, CODE, {})
    assert files.read("attend", KEY) is not None


def test_processes_may_write_the_same_file_at_once(files: CompiledFiles) -> None:
    def write_and_read(_: int) -> bool:
        files.write("attend", KEY, CODE, {})
        found = files.read("attend", KEY)
        return found is not None and found[0] == CODE

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(200)))
    assert [path.name for path in files.folder.iterdir()] == [f"attend-{KEY}{SUFFIX}"]


def test_a_file_that_is_removed_after_it_was_read_is_no_error(
    files: CompiledFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest = the_file(files), xxhash.xxh3_128_hexdigest

    def digest_and_remove(content: bytes) -> str:
        path.unlink()
        return digest(content)

    monkeypatch.setattr("xxhash.xxh3_128_hexdigest", digest_and_remove)
    found = files.read("attend", KEY)
    assert found is not None
    assert found[0] == CODE


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    files = CompiledFiles(tmp_path / "file")
    files.write("attend", KEY, CODE, {})
    assert files.read("attend", KEY) is None


def test_files_that_nobody_uses_are_removed(files: CompiledFiles) -> None:
    (files.folder / ".half").write_bytes(CODE)
    files.write("merge", KEY, CODE, {})
    long_ago = time.time() - 200 * 86400
    os.utime(files.folder / f"attend-{KEY}{SUFFIX}", (long_ago, long_ago))
    os.utime(files.folder / ".half", (long_ago, long_ago))
    files.remove_unused()
    assert [path.name for path in files.folder.iterdir()] == [f"merge-{KEY}{SUFFIX}"]


def test_the_folder_is_the_user_s_for_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_files.cache_clear()
    assert compiled_files().folder == tmp_path / "turboquant" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    compiled_files.cache_clear()
    assert compiled_files().folder == tmp_path / ".cache" / "turboquant" / "kernels"
    compiled_files.cache_clear()
