from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files.atomic import atomic_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "run.json"
    with atomic_file(target) as temporary:
        temporary.write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), atomic_file(target) as temporary:
        temporary.write_text(str(1 // 0))
    assert target.read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["run.json"]
