"""The entries of a store, and the order in which they are evicted."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.entries import Entry, read_entry, remove_entry, size_of
from pipeline.cache.index import Index
from turboquant.io.identity import FORMAT_VERSION, Identity
from turboquant.io.json_file import sealed
from turboquant.io.segment_file import CHECKSUM, MANIFEST, TENSORS, Manifest


def key(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


def name_of(key: str) -> str:
    return bytes.fromhex(key).rstrip(b"\0").decode()


def write_entry(store: Path, name: str, used: float = 1.0, parent: str | None = None, start: int = 0) -> Entry:
    """A segment without tensors, whose label is its name."""
    folder = store / key(name)[:2] / key(name)
    folder.mkdir(parents=True)
    (folder / TENSORS).write_bytes(bytes(100))
    identity = Identity("w", "t", "c", "exact")
    manifest = Manifest(
        FORMAT_VERSION, key(name), parent and key(parent), start, 5, identity, {"label": name}, [], 100, "", {}, ""
    )
    (folder / MANIFEST).write_text(json.dumps(sealed(asdict(manifest), CHECKSUM)))
    os.utime(folder / MANIFEST, (used, used))
    entry = read_entry(store, folder.parent.name, folder.name)
    assert entry is not None
    return entry


def entries_of(store: Path) -> list[Entry]:
    index = Index(store, "make")
    index.sync()
    found = list(index.entries())
    index.close()
    return found


def order(store: Path, needed: str = "") -> list[str]:
    """The names of all entries that may be removed, in the order of their removal."""
    labels, names = set(needed.split()), []
    index = Index(store)
    index.sync()
    while (entry := index.next_to_evict(lambda one: one.label in labels)) is not None:
        names.append(name_of(entry.key))
        remove_entry(store, entry)
        index.forget(entry)
    index.close()
    return names


def test_unusable_entries_go_first_then_the_least_recently_used(tmp_path: Path) -> None:
    for name, used in {"a": 3, "b": 1, "c": 2, "bad": 1}.items():
        write_entry(tmp_path, name, used)
    (tmp_path / key("bad")[:2] / key("bad") / MANIFEST).write_text("{}")
    assert order(tmp_path) == ["bad", "b", "c", "a"]


def test_needed_entries_stay(tmp_path: Path) -> None:
    for name, used in {"a": 3, "b": 1, "c": 2}.items():
        write_entry(tmp_path, name, used)
    assert order(tmp_path, needed="b c") == ["a"]


def test_a_segment_that_was_used_since_it_was_indexed_goes_later(tmp_path: Path) -> None:
    a, b = write_entry(tmp_path, "a", 1), write_entry(tmp_path, "b", 2)
    index = Index(tmp_path)
    index.sync()
    os.utime(a.folder(tmp_path) / MANIFEST, (3, 3))
    index.sync()
    found = index.next_to_evict(lambda one: False)
    index.close()
    assert found == b


def test_a_parent_goes_after_its_children_whatever_the_clock_says(tmp_path: Path) -> None:
    for name, used, parent, start in (("p", 1, None, 0), ("q", 9, "p", 5), ("r", 5, "q", 10), ("x", 7, None, 0)):
        write_entry(tmp_path, name, used, parent, start)
    assert order(tmp_path) == ["r", "x", "q", "p"]


def test_a_parent_of_a_needed_entry_stays(tmp_path: Path) -> None:
    for name, used, parent, start in (("p", 1, None, 0), ("q", 2, "p", 5), ("r", 3, "q", 10), ("s", 3, "p", 5)):
        write_entry(tmp_path, name, used, parent, start)
    assert order(tmp_path, needed="q") == ["r", "s"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9), st.booleans()), min_size=1, max_size=10))
def test_no_needed_entry_and_no_parent_before_its_child_is_evicted(rows: list[tuple[int, int, bool]]) -> None:
    depth, parents = [0] * len(rows), {}
    needed = {str(number) for number, (_, _, wanted) in enumerate(rows) if wanted}
    with tempfile.TemporaryDirectory() as folder:
        for number, (used, parent, _) in enumerate(rows):
            above = parent if 0 <= parent < number else None
            if above is not None:
                depth[number], parents[str(number)] = depth[above] + 1, str(above)
            write_entry(Path(folder), str(number), used, None if above is None else str(above), depth[number])
        going = order(Path(folder), needed=" ".join(needed))
    assert not needed & set(going)
    left = {str(number) for number in range(len(rows))}
    for name in going:
        assert not [child for child, parent in parents.items() if parent == name and child in left]
        left.remove(name)
    kept = set(needed)
    for name in needed:  # only needed entries and their parents stay
        while name in parents:
            name = parents[name]
            kept.add(name)
    assert left == kept


@pytest.mark.parametrize("version", ["\ud800", "\x1b]0;owned\x07", "x" * 100_000, [[1]], 1e300])
def test_any_version_of_a_manifest_can_be_indexed(tmp_path: Path, version: object) -> None:
    manifest = write_entry(tmp_path, "a").folder(tmp_path) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": version}))
    (entry,) = entries_of(tmp_path)
    assert len(entry.problem) < 60
    assert entry.problem.isprintable()


def test_only_folders_with_the_names_of_segments_are_entries(tmp_path: Path) -> None:
    good, old, part = (write_entry(tmp_path, name).folder(tmp_path) for name in ("good", "old", "part"))
    text = (old / MANIFEST).read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1')
    (old / MANIFEST).write_text(text)
    (part / MANIFEST).unlink()
    (tmp_path / "rejected" / f"{key('x')}-3").mkdir(parents=True)
    for other in ("ab/notes/a.txt", "xy/letter.txt", f"zz/{key('zz')}x/a", "rejected/mine/a", "deep/er/file"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("a user's own")
    found = {one.folder(tmp_path): one.problem for one in entries_of(tmp_path)}
    assert found == {
        good: "",
        old: f"format version 1, expected {FORMAT_VERSION}",
        part: "written in part",
        tmp_path / "rejected" / f"{key('x')}-3": "rejected",
    }
    before = size_of(tmp_path)
    sizes = [one.bytes for one in entries_of(tmp_path)]
    for one in entries_of(tmp_path):
        remove_entry(tmp_path, one)
    assert entries_of(tmp_path) == []
    assert size_of(tmp_path) == before - sum(sizes)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5
    assert entries_of(tmp_path / "absent") == []
    assert size_of(tmp_path / "absent") == 0
