"""Results in other formats and layouts, with columns of the documents, written by runs and by ``pipeline export``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.files.writers import table_writer
from pipeline.job.job import Documents
from pipeline.output.export import CarriedColumns
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

YEARS = [2019, None, 2024]


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """Documents with more columns, of which one is of several types."""
    rows = [
        {"id": name, "text": text, "title": f'The "{name}", a title', "year": year, "notes": notes}
        for (name, text), year, notes in zip(workplace.documents.items(), YEARS, ["a", 3, {"b": [1]}], strict=True)
    ]
    (workplace.folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    workplace.tree["documents"] = {"path": "docs.jsonl"}
    return workplace


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.NDJSON", "wide.parquet"])
def test_the_suffix_of_the_output_says_the_format_and_a_second_run_keeps_all_rows(place: Workplace, name: str) -> None:
    place.run()
    rows = pq.read_table(place.output).to_pylist(maps_as_pydicts="strict")
    place.save(output={"path": f"out/{name}", "columns": ["title"] if name == "wide.parquet" else []})
    assert invoke("run", place.job_file).exit_code == 0
    written = place.folder / "out" / name
    first = written.read_bytes()
    if name.endswith(".csv"):
        with written.open(newline="") as file:
            read: list[dict[str, Any]] = list(csv.DictReader(file))
        assert [(row["document_id"], row["query_id"], row["answer"]) for row in read] == [
            (row["document_id"], row["query_id"], row["answer"]) for row in rows
        ]
    elif name == "wide.parquet":
        assert [row.pop("title") for row in pq.read_table(written).to_pylist()] == [
            f'The "{row["document_id"]}", a title' for row in rows
        ]
    else:
        assert [json.loads(line) for line in written.read_text().splitlines()] == rows
    assert pq.read_table(f"{written}.rows.parquet").to_pylist(maps_as_pydicts="strict") == rows
    again = json.loads(invoke("run", place.job_file, "--json").stdout)
    assert again["rows_kept"] == again["rows"] == 9
    assert written.read_bytes() == first


def test_wide_has_a_row_for_each_document_and_columns_of_its_input(place: Workplace) -> None:
    place.queries[0] |= {"choices": ["yes", "no"]}
    place.documents["d2"] = ""
    rows = [{"id": name, "text": text, "year": 7} for name, text in place.documents.items()]
    (place.folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    place.save(output={"path": "out/a.parquet", "layout": "wide", "columns": "all"})
    assert invoke("run", place.job_file).exit_code == 3
    table = pq.read_table(place.output)
    own = [f"{query}{end}" for query in ("what", "when", "who") for end in ("", "_confidence", "_error")]
    assert table.column_names == ["document_id", "year", *own]
    first, _, blank = table.to_pylist()
    assert first["document_id"] == "d0"
    assert first["year"] == 7
    assert first["what"] in ("yes", "no")
    assert 0.5 <= first["what_confidence"] <= 1
    assert 0 < first["who_confidence"] <= 1
    assert first["who_error"] is None
    assert blank["what"] is None
    assert blank["what_confidence"] is None
    assert blank["what_error"].startswith("EmptyDocument: ")
    long = pq.read_table(f"{place.output}.rows.parquet").to_pylist(maps_as_pydicts="strict")
    assert first["what_confidence"] == max(long[0]["choice_probabilities"].values())


def test_export_writes_what_a_run_with_these_settings_writes(place: Workplace) -> None:
    place.run()
    wide = place.folder / "wide.csv"
    told = invoke("export", place.job_file, "--to", wide, "--layout", "wide", "--column", "title", "--column", "year")
    assert told.stdout == f"{wide}: 3 rows\n"
    place.save(output={"path": "other/a.csv", "layout": "wide", "columns": ["title", "year"]})
    assert invoke("run", place.job_file).exit_code == 0
    assert (place.folder / "other/a.csv").read_bytes() == wide.read_bytes()
    with wide.open(newline="") as file:
        assert [(row["title"], row["year"]) for row in csv.DictReader(file)] == [
            ('The "d0", a title', "2019"),
            ('The "d1", a title', ""),
            ('The "d2", a title', "2024"),
        ]


def test_export_of_a_result_file_alone_keeps_its_order_and_metadata(place: Workplace) -> None:
    place.run()
    copy = place.folder / "copy.parquet"
    assert invoke("export", place.output, "--to", copy).exit_code == 0
    assert pq.read_table(copy).equals(pq.read_table(place.output), check_metadata=True)
    message = error_of(invoke("export", place.output, "--to", copy, "--column", "all"))
    assert message == "columns of the documents are known by a job file only; name it in place of the result file"


def test_export_in_the_form_of_a_batch_leaves_the_jobs_columns_out(place: Workplace) -> None:
    place.run_with(output={"path": "out/a.csv", "columns": ["title"]})
    to = place.folder / "batch.jsonl"
    assert invoke("export", place.job_file, "--to", to, "--layout", "batch").exit_code == 0
    assert len(to.read_text().splitlines()) == 9
    message = error_of(invoke("export", place.job_file, "--to", to, "--layout", "batch", "--column", "title"))
    assert message == "layout batch has no place for columns of the documents; leave them out"


def test_export_shows_the_part_of_a_job_that_is_done(place: Workplace) -> None:
    place.save()
    assert invoke("run", place.job_file, "--limit", "1").exit_code == 0
    place.documents = dict(reversed(place.documents.items()))
    to = place.folder / "part.jsonl"
    invoke("export", place.job_file, "--to", to, "--layout", "wide", "--column", "all")
    (row,) = [json.loads(line) for line in to.read_text().splitlines()]
    assert (row["document_id"], row["year"], row["notes"]) == ("d0", 2019, "a")


def test_values_of_several_types_are_json_texts(place: Workplace) -> None:
    place.run_with(output={"path": "out/b.parquet", "columns": ["year", "notes"]})
    table = pq.read_table(place.folder / "out/b.parquet")
    assert table.schema.field("year").type == pa.int64()
    assert table.column("notes").to_pylist()[::3] == ["a", "3", '{"b": [1]}']


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, "a"], ["1", "a"]),
        ([2.5, "n/a"], ["2.5", "n/a"]),
        ([1, True], ["1", "true"]),
        ([2**70, "1"], [f"{2**70}", "1"]),
    ],
)
def test_a_number_may_come_before_a_value_of_another_type(tmp_path: Path, values: list[Any], texts: list[str]) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(f"{json.dumps({'id': str(n), 'text': 'x', 'c': c})}\n" for n, c in enumerate(values)))
    carried = CarriedColumns(Documents(path=str(file)), ["c"])
    assert carried.arrays([row for _, row in carried.rows()])[0].to_pylist() == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_number_that_is_not_finite_is_null_in_json(tmp_path: Path, name: str) -> None:
    numbers = [float("nan"), 1.5, float("-inf")]
    table = pa.table({"one": numbers, "list": [numbers] * 3, "nested": [{"x": [{"y": numbers}]}] * 3})
    with table_writer(tmp_path / name, name, table.schema) as writer:
        writer.write_table(table)
    with (tmp_path / name).open(newline="") as file:
        if name.endswith(".csv"):
            rows = [{key: json.loads(row[key]) for key in ("list", "nested")} for row in csv.DictReader(file)]
        else:
            rows = list(map(json.loads, file))
            assert [row.pop("one") for row in rows] == [None, 1.5, None]
    assert rows == [{"list": [None, 1.5, None], "nested": {"x": [{"y": [None, 1.5, None]}]}}] * 3


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"path": "out/a.xlsx"}, "ends in .xlsx; results are written as Parquet (*.parquet), CSV (*.csv) and JSON Lin"),
        ({"path": "out/a.csv", "columns": ["titel"]}, "output.columns names the column 'titel', which"),
        ({"path": "out/a.csv", "layout": "tall"}, "output.layout"),
        ({"path": "out/a.jsonl", "layout": "batch", "columns": ["title"]}, "layout batch has no place for columns of"),
        ({"path": "out/a.csv", "layout": "wide", "columns": ["what_evidence"]}, "would be called 'what_evidence'; ren"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_wrong_output_is_an_error_before_anything_is_answered(
    place: Workplace, output: dict[str, Any], message: str, command: str
) -> None:
    place.queries[0]["evidence"] = True
    rows = [{"id": name, "text": "x", "title": "y", "what_evidence": "z"} for name in place.documents]
    (place.folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    place.save(output=output)
    assert message in error_of(invoke(command, place.job_file))
    assert not place.cache.exists()


def test_a_column_that_the_result_has_is_an_error(place: Workplace) -> None:
    rows = [{"id": name, "text": text, "status": "new"} for name, text in place.documents.items()]
    (place.folder / "docs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    place.save(output={"path": "out/a.csv", "columns": "all"})
    message = error_of(invoke("plan", place.job_file))
    assert message == "two columns of the result would be called 'status'; rename one, or leave it out"


def test_rows_of_an_earlier_run_are_not_replaced_by_another_layout(place: Workplace) -> None:
    place.run()
    place.save(output={"path": "out/a.parquet", "layout": "wide"})
    message = error_of(invoke("run", place.job_file))
    assert message.endswith(f"to go on with them: mv {place.output} {place.output}.rows.parquet")
    place.output.rename(f"{place.output}.rows.parquet")
    report = json.loads(invoke("run", place.job_file, "--json").stdout)
    assert report["rows_kept"] == 9


def test_shards_are_merged_into_the_form_that_the_job_asks_for(place: Workplace) -> None:
    place.save(output={"path": "out/a.csv", "layout": "wide", "columns": ["title"]})
    for shard in ("1/2", "2/2"):
        invoke("run", place.job_file, "--shard", shard)
    assert invoke("merge", place.job_file).exit_code == 0
    merged = (place.folder / "out/a.csv").read_bytes()
    assert invoke("run", place.job_file).exit_code == 0
    assert (place.folder / "out/a.csv").read_bytes() == merged


@pytest.fixture
def written(place: Workplace) -> Path:
    """A wide Parquet file, and the same result as a long CSV file."""
    place.run_with(output={"path": "out/a.parquet", "layout": "wide", "columns": ["title", "year"]})
    invoke("export", place.job_file, "--to", place.folder / "long.csv", "--layout", "long")
    return place.folder


def test_results_load_in_pandas(written: Path) -> None:
    pandas = pytest.importorskip("pandas")
    wide, long = pandas.read_parquet(written / "out/a.parquet"), pandas.read_csv(written / "long.csv")
    assert list(wide["year"].fillna(0)) == [2019, 0, 2024]
    assert len(long) == 9
    assert list(long[long.query_id == "what"]["answer"].fillna("")) == list(wide["what"].fillna(""))


def test_results_load_in_polars(written: Path) -> None:
    polars = pytest.importorskip("polars")
    wide, long = polars.read_parquet(written / "out/a.parquet"), polars.read_csv(written / "long.csv")
    assert wide.shape == (3, 12)
    assert long.filter(polars.col("query_id") == "what")["answer"].to_list() == wide["what"].to_list()


def test_results_load_in_duckdb(written: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(f"select document_id, year from '{written}/out/a.parquet' where who_error is null order by 1")
    assert rows.fetchall() == [("d0", 2019), ("d1", None), ("d2", 2024)]
    assert duckdb.sql(f"select count(*) from '{written}/long.csv'").fetchall() == [(9,)]


def test_results_load_in_hugging_face_datasets(written: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.Dataset.from_parquet(str(written / "out/a.parquet"), cache_dir=str(written / "cache-of-datasets"))
    assert loaded["title"][0] == 'The "d0", a title'
