"""The entries of a store, and the order in which they are evicted."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.entries import Entry, eviction_order, list_entries, remove_entry, size_of
from turboquant.io.identity import FORMAT_VERSION
from turboquant.io.json_file import seal
from turboquant.io.segment_file import MANIFEST, TENSORS


def key(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


def entry(name: str, used: float = 1.0, parent: str | None = None, start: int = 0, problem: str | None = None) -> Entry:
    manifest = {"parent": parent and key(parent), "start": start, "tokens": 5, "about": {"label": name}}
    return Entry(Path("/store") / key(name), 10, used, None if problem else manifest, problem)


def order(*found: Entry, needed: str = "") -> list[str]:
    labels = set(needed.split())
    removable = eviction_order(found, lambda one: one.label in labels)
    return [bytes.fromhex(one.key).rstrip(b"\0").decode() for one in removable]


def test_unusable_entries_go_first_then_the_least_recently_used() -> None:
    found = [entry("a", 3), entry("b", 1), entry("c", 2), entry("bad", problem="checksum")]
    assert order(*found) == ["bad", "b", "c", "a"]


def test_needed_entries_stay() -> None:
    assert order(entry("a", 3), entry("b", 1), entry("c", 2), needed="b c") == ["a"]


def test_a_parent_goes_after_its_children_whatever_the_clock_says() -> None:
    chain = [entry("p", 1), entry("q", 9, "p", 5), entry("r", 5, "q", 10), entry("x", 7)]
    assert order(*chain) == ["r", "x", "q", "p"]


def test_a_parent_of_a_needed_entry_stays() -> None:
    chain = [entry("p", 1), entry("q", 2, "p", 5), entry("r", 3, "q", 10), entry("s", 3, "p", 5)]
    assert order(*chain, needed="q") == ["r", "s"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 9), st.booleans()), min_size=1, max_size=10))
def test_no_needed_entry_and_no_parent_before_its_child_is_evicted(rows: list[tuple[int, int, bool]]) -> None:
    found, depth = [], [0] * len(rows)
    for number, (used, parent, _) in enumerate(rows):
        above = parent if 0 <= parent < number else None
        depth[number] = 0 if above is None else depth[above] + 1
        found.append(entry(str(number), used, None if above is None else str(above), depth[number]))
    needed = {str(number) for number, (_, _, wanted) in enumerate(rows) if wanted}
    going = order(*found, needed=" ".join(needed))
    assert not needed & set(going)
    parents = {one.label: bytes.fromhex(one.parent).rstrip(b"\0").decode() for one in found if one.parent}
    left = {one.label for one in found}
    for name in going:
        assert not [child for child, parent in parents.items() if parent == name and child in left]
        left.remove(name)
    kept = set(needed)
    for name in needed:  # only needed entries and their parents stay
        while name in parents:
            name = parents[name]
            kept.add(name)
    assert left == kept


def test_only_folders_with_the_names_of_segments_are_entries(tmp_path: Path) -> None:
    def segment(name: str, **changes: object) -> Path:
        folder = tmp_path / key(name)[:2] / key(name)
        folder.mkdir(parents=True)
        (folder / TENSORS).write_bytes(bytes(100))
        manifest = {"format_version": FORMAT_VERSION, "identity": {}, "about": {"label": name}, **changes}
        text = json.dumps({**manifest, "manifest_checksum": seal(manifest, "manifest_checksum")})
        (folder / MANIFEST).write_text(text)
        return folder

    good, old, part = segment("good"), segment("old", format_version=1), segment("part")
    (part / MANIFEST).unlink()
    (tmp_path / "rejected" / f"{key('x')}-3").mkdir(parents=True)
    for other in ("ab/notes/a.txt", "xy/letter.txt", f"zz/{key('zz')}x/a", "rejected/mine/a", "deep/er/file"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("a user's own")
    found = {one.folder: one.problem for one in list_entries(tmp_path)}
    assert found == {
        good: None,
        old: f"format version 1, expected {FORMAT_VERSION}",
        part: "written in part",
        tmp_path / "rejected" / f"{key('x')}-3": "rejected",
    }
    before = size_of(tmp_path)
    sizes = {one.folder: one.bytes for one in list_entries(tmp_path)}
    for one in list(list_entries(tmp_path)):
        remove_entry(one)
    assert list(list_entries(tmp_path)) == []
    assert size_of(tmp_path) == before - sum(sizes.values())
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5
    assert list(list_entries(tmp_path / "absent")) == []
    assert size_of(tmp_path / "absent") == 0
