"""Gold answers from files as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.evaluation.gold import Gold, Span, read_gold

ROWS: list[dict[str, Any]] = [
    {"document_id": "a", "query_id": "q", "answer": ["x", "y"]},
    {"document_id": "b", "query_id": "q", "answer": ["z"]},
    {"document_id": "a", "query_id": "q", "answer": ["w"]},
]


def write_lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_lists_and_several_rows_are_all_right_answers(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "gold.parquet")
    gold = {"a": {"q": Gold(["x", "y", "w"])}, "b": {"q": Gold(["z"])}}
    assert read_gold(str(tmp_path / "gold.parquet")) == gold
    assert read_gold(write_lines(tmp_path / "gold.jsonl", *ROWS)) == gold


def test_numbers_and_ids_of_numbers_are_texts(tmp_path: Path) -> None:
    rows = [{"document_id": 7, "query_id": 1, "answer": 1250}, {"document_id": 7, "query_id": 2, "answer": True}]
    gold = read_gold(write_lines(tmp_path / "gold.jsonl", *rows))
    assert gold == {"7": {"1": Gold(["1250"]), "2": Gold(["true"])}}


def test_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "gold.csv").write_text('\ufeffdocument_id,query_id,label\na,q,"x, y"\na,r,\n', encoding="utf-8")
    gold = read_gold(str(tmp_path / "gold.csv"), {"answer": "label"})
    assert gold == {"a": {"q": Gold(["x, y"]), "r": Gold()}}


def test_evidence_is_texts_or_places(tmp_path: Path) -> None:
    own = {"document_id": "a", "query_id": "q", "answer": None}
    places = [{"start": 3, "end": 9, "quote": "kept out"}]
    gold = read_gold(write_lines(tmp_path / "places.jsonl", {**own, "evidence": places}))
    assert gold == {"a": {"q": Gold(None, [Span(3, 9)])}}
    gold = read_gold(write_lines(tmp_path / "texts.jsonl", {**own, "evidence": "ends in May"}))
    assert gold == {"a": {"q": Gold(None, [Span(-1, -1, "ends in May")])}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"document_id": None}, "the column 'document_id' in line 1 of"),
        ({"answer": {"a": 1}}, "the column 'answer' in line 1 of"),
        ({"answer": "half \ud800"}, "the column 'answer' in line 1 of"),
        ({"evidence": [{"start": 4}]}, "expected texts or spans"),
        ({"evidence": [{"start": 4, "end": 4}]}, "has a span from 4 to 4"),
        ({"evidence": ["a", {"start": 4, "end": 5}]}, "both texts and spans"),
    ],
)
def test_a_value_that_cannot_be_gold_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_lines(tmp_path / "gold.jsonl", {"document_id": "a", "query_id": "q", "answer": "x"} | change)
    with pytest.raises(InputError, match="--gold") as error:
        read_gold(path)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["gold.jsonl", "gold.csv"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "gold.csv").write_text("document_id,query_id,answers\na,q,x\n")
    write_lines(tmp_path / "gold.jsonl", {"document_id": "a", "query_id": "q", "answers": "x"})
    with pytest.raises(InputError, match=r"needs the column 'answer', which .* lacks; did you mean 'answers'\?"):
        read_gold(str(tmp_path / name))


@pytest.mark.parametrize("name", ["gold.jsonl", "gold.csv", "gold.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--gold"):
        read_gold(str(tmp_path / name))


def test_a_file_in_another_encoding_is_to_be_saved_as_utf_8(tmp_path: Path) -> None:
    (tmp_path / "gold.jsonl").write_bytes('{"document_id": "a", "query_id": "q", "answer": "ä"}'.encode("cp1252"))
    with pytest.raises(InputError, match=r"column 'answer' in line 1 .*; save it as UTF-8$"):
        read_gold(str(tmp_path / "gold.jsonl"))
