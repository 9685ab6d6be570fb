"""Values of every Parquet type in templates, conditions and ids, by the command line."""

from __future__ import annotations

import json
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.documents import stream_documents
from pipeline.inputs.prompts import Renderer
from pipeline.job.job import Documents, Prompt
from tests.pipeline.command_line import error_of, invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")

DAY = 86_400 * 10**9  # nanoseconds
NANOSECONDS: list[tuple[Any, int, str]] = [
    (pa.timestamp("ns"), DAY + 1, "1970-01-02 00:00:00.000000001"),
    (pa.timestamp("ns"), DAY + 1000, "1970-01-02 00:00:00.000001"),
    (pa.timestamp("ns"), DAY, "1970-01-02 00:00:00"),
    (pa.timestamp("ns", "+02:00"), 5000, "1970-01-01 02:00:00.000005+02:00"),
    (pa.timestamp("ns", "+02:00"), 5001, "1970-01-01 02:00:00.000005001+0200"),
    (pa.time64("ns"), 1, "00:00:00.000000001"),
    (pa.time64("ns"), 1000, "00:00:00.000001"),
    (pa.duration("ns"), DAY + 1, "1 day, 0:00:00.000000001"),
    (pa.duration("ns"), DAY + 1000, "1 day, 0:00:00.000001"),
    (pa.duration("ns"), -1, "-1 day, 23:59:59.999999999"),
    (pa.list_(pa.timestamp("ns")), [DAY + 1], "['1970-01-02 00:00:00.000000001']"),
    (pa.struct([("at", pa.time64("ns"))]), {"at": 1}, "{'at': '00:00:00.000000001'}"),
]
OTHERS: list[tuple[Any, Any, str]] = [
    (pa.date32(), date(2024, 5, 1), "2024-05-01"),
    (pa.timestamp("ms", "UTC"), datetime(2024, 5, 1, tzinfo=timezone.utc), "2024-05-01 00:00:00+00:00"),
    (pa.time32("s"), time(1, 2, 3), "01:02:03"),
    (pa.duration("s"), timedelta(hours=1), "1:00:00"),
    (pa.decimal128(5, 2), Decimal("1.50"), "1.50"),
    (pa.list_(pa.int64()), [1, None], "[1, None]"),
    (pa.map_(pa.string(), pa.int64()), [("a", 1)], "[('a', 1)]"),
    (pa.struct([("a", pa.list_(pa.string()))]), {"a": ["b"]}, "{'a': ['b']}"),
    (pa.struct([("a", pa.string())]), None, ""),
    (pa.bool_(), True, "True"),
    (pa.binary(), b"\xff", "b'\\xff'"),
    (pa.large_list(pa.float64()), [0.5], "[0.5]"),
    (pa.dictionary(pa.int8(), pa.string()), "a", "a"),
    (pa.null(), None, ""),
]
NOT_IN_PYTHON: list[tuple[Any, Any]] = [
    (pa.date32(), 10**7),
    (pa.timestamp("s"), 10**12),
    (pa.timestamp("us", "Odd/Zone"), 5),
    (pa.timestamp("ns", "Odd/Zone"), 5),
    (pa.duration("s"), 10**15),
    (pa.list_(pa.date32()), [10**7]),
    (pa.struct([("at", pa.timestamp("s"))]), {"at": 10**12}),
]


def write(workplace: Workplace, kind: Any, values: list[Any], context: str = "{{ value }}: {{ text }}") -> Path:
    """Write documents with values of a type, and a job whose prompt has the value; the job file."""
    job = workplace.save(prompt={"context": context})
    columns = {"id": [f"d{number}" for number in range(len(values))], "text": ["The board met."] * len(values)}
    pq.write_table(pa.table({**columns, "value": as_array(kind, values)}), workplace.folder / "docs.parquet")
    return job


def as_array(kind: Any, values: list[Any]) -> Any:
    if pa.types.is_temporal(kind) and all(isinstance(value, int | None) for value in values):
        wide = pa.int32() if kind.bit_width == 32 else pa.int64()
        return pa.array(values, wide).view(kind)
    if pa.types.is_list(kind) and pa.types.is_temporal(kind.value_type):
        inner = as_array(kind.value_type, [each for value in values if value for each in value])
        offsets = [sum(len(value or ()) for value in values[:end]) for end in range(len(values) + 1)]
        mask = pa.array([value is None for value in values])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inner, mask=mask)
    if pa.types.is_struct(kind) and pa.types.is_temporal(kind.field(0).type):
        name = kind.field(0).name
        inner = as_array(kind.field(0).type, [None if value is None else value[name] for value in values])
        return pa.StructArray.from_arrays([inner], fields=[kind.field(0)])
    return pa.array(values, kind)


@pytest.mark.parametrize(("kind", "value", "shown"), [*NANOSECONDS, *OTHERS])
def test_every_type_has_a_text_without_pandas(workplace: Workplace, kind: Any, value: Any, shown: str) -> None:
    write(workplace, kind, [value])
    (document,) = stream_documents(Documents(path=str(workplace.folder / "docs.parquet")), ["value"])
    assert document.unreadable == ""
    prompt = Prompt(context="{{ value }}: {{ text }}")
    rendered = Renderer(prompt, Documents(path="docs.parquet")).render(document)
    assert rendered.context == f"{shown}: The board met."


@pytest.mark.parametrize(("kind", "value"), NOT_IN_PYTHON, ids=str)
def test_a_value_that_python_cannot_hold_is_an_error_row_that_names_the_column(
    workplace: Workplace, kind: Any, value: Any
) -> None:
    job = write(workplace, kind, [value, None])
    assert invoke("plan", job).exit_code == 0
    assert invoke("run", job, "--quiet").exit_code == 3
    rows = workplace.rows()
    assert len(rows) == 6
    row = rows["d0", "what"]
    assert row["error_type"] == "UnreadableText"
    place = f"the column 'value' in row 0 (from 0) of {workplace.folder / 'docs.parquet'} has a value of the type "
    assert row["error"].startswith(place)
    assert " that Python cannot hold: " in row["error"]
    if not pa.types.is_struct(kind) and "Odd" not in str(kind):
        assert rows["d1", "what"]["status"] == "ok"
    unused = ["--set", "prompt.context='{{ text }}'"]
    assert json.loads(invoke("run", job, "--json", *unused).stdout)["rows_failed"] == 0
    message = error_of(invoke("plan", job, *unused, "--set", "documents.where=value is not none"))
    assert message.startswith(f"documents.where: value is not none: {place}")


def test_times_with_nanoseconds_are_compared_as_texts(workplace: Workplace) -> None:
    job = write(workplace, pa.timestamp("ns"), [DAY + 1, 3 * DAY, 40 * DAY])
    where = "documents.where=value | string >= '1970-01-03'"
    assert json.loads(invoke("status", job, "--json", "--set", where).stdout)["documents"] == 2
