"""Peak resident memory of runs of few and many documents, of one huge row group, and of tables of queries.

    python benches/memory.py [--documents 10 1000] [--megabytes 300] [--joined 1000] [--kilobytes 100]

Jobs with a tiny model are run by the command line; what is printed is VmHWM of its process and of the model's. The
documents are short. Those of the huge row group are ten short ones and many of 100 kB of blanks, which are read and
answered by an error; it is written with pages of 16 rows, as tables.py advises, and of pyarrow's 1,024. Linux only.

Those that are joined have 100 kB of text each, or as many as are asked for, in one row group, of which the model reads
the beginning, and twenty queries of their own, shuffled in another row group of as many bytes. That job is run
undisturbed, then killed when a third of it is done and run again, which must give the same bytes, in the order of the
documents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benches.tiny import QUERIES, SCHEMA, Place, text_of  # noqa: E402

SENTENCES = 8
BLANKS = 100_000
QUERIES_A_DOCUMENT = 20
SECONDS_BETWEEN_LOOKS = 0.02


def main() -> None:
    """Print a line of JSON for each job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[10, 1000])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[300], help="of text in one row group")
    parser.add_argument("--joined", type=int, nargs="*", default=[1000], help="documents with queries of their own")
    parser.add_argument("--kilobytes", type=int, default=100, help="of text in each of those")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for count in arguments.documents:
            place = Place(Path(folder) / f"{count}", model)
            place.write({f"d{number}": text_of(number, SENTENCES) for number in range(count)}, max_tokens=2)
            show(f"{count:,} documents", place)
        for megabytes in arguments.megabytes:
            for rows_a_page in 16, 1024:
                place = Place(Path(folder) / f"{megabytes}MB-{rows_a_page}", model)
                place.write(max_tokens=2)
                write_row_group(place.folder / "documents.parquet", megabytes << 20, rows_a_page)
                show(f"{megabytes:,} MB in pages of {rows_a_page:,}", place)
        for count in arguments.joined:
            show_joined(count, arguments.kilobytes, Path(folder) / f"joined-{count}", model)


def make_model(folder: Path) -> Path:
    """Write the model in a process of its own, so that this one is small."""
    code = "import sys; from pathlib import Path; from benches.tiny import write_model; write_model(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    return folder


def write_row_group(path: Path, size: int, rows_a_page: int) -> None:
    """One row group of ten short documents and ``size`` bytes of blank ones."""
    texts = [text_of(number, SENTENCES) for number in range(10)] + [" " * BLANKS] * (size // BLANKS)
    table = pa.table({"id": [f"d{number}" for number in range(len(texts))], "text": texts}, schema=SCHEMA)
    pq.write_table(
        table,
        path,
        row_group_size=len(texts),
        compression=None,
        use_dictionary=False,
        write_batch_size=rows_a_page,
        write_statistics=False,
    )


def show_joined(count: int, kilobytes: int, folder: Path, model: Path) -> None:
    """Run a job of documents with queries of their own, then again with a kill; the results must be the same."""
    queries = {"path": "queries.parquet", "document_id": "document"}
    documents = {"path": "documents.parquet", "too_long": "truncate"}
    place = Place(folder, model, {"keep": "job"}, {"queries": queries, "documents": documents})
    place.write(max_tokens=2)
    write_joined(place, count, kilobytes)
    name = f"{count:,} x {QUERIES_A_DOCUMENT} joined"
    show(name, place)
    undisturbed = place.output.read_bytes()
    rows = pq.read_table(place.output, columns=["document_id", "status"])
    assert rows["document_id"].to_pylist() == [f"d{n}" for n in range(count) for _ in range(QUERIES_A_DOCUMENT)]
    assert set(rows["status"].to_pylist()) == {"ok"}
    place.output.unlink()
    show(f"{name}, killed", place, kill_at=count // 3)
    show(f"{name}, resumed", place)
    assert place.output.read_bytes() == undisturbed


def write_joined(place: Place, count: int, kilobytes: int) -> None:
    """A row group of long documents, and one of their queries in no order."""
    text = text_of(0, 14 * kilobytes)
    texts = [f"{number}. {text}" for number in range(count)]
    table = pa.table({"id": [f"d{number}" for number in range(count)], "text": texts}, schema=SCHEMA)
    options = {"row_group_size": count * QUERIES_A_DOCUMENT, "compression": None, "use_dictionary": False}
    pq.write_table(table, place.folder / "documents.parquet", write_batch_size=16, **options)
    pairs = [(number, query) for number in range(count) for query in range(QUERIES_A_DOCUMENT)]
    random.Random(0).shuffle(pairs)
    columns = {
        "document": [f"d{number}" for number, _ in pairs],
        "id": [f"q{query}" for _, query in pairs],
        "text": [f"{QUERIES[query % 2]} {query}" for _, query in pairs],
        "notes": [text[: len(text) // QUERIES_A_DOCUMENT]] * len(pairs),
    }
    pq.write_table(pa.table(columns), place.folder / "queries.parquet", **options)


def show(name: str, place: Place, kill_at: int | None = None) -> None:
    """Run a job, killed when so many documents are done, and print its peaks."""
    started = time.monotonic()
    parent, child = peaks(place, kill_at)
    megabytes = {"parent_MB": round(parent / 1024, 1), "model_MB": round(child / 1024, 1)}
    print(json.dumps({"job": name, **megabytes, "seconds": round(time.monotonic() - started, 1)}), flush=True)


def peaks(place: Place, kill_at: int | None) -> tuple[int, int]:
    """Peak resident kilobytes of a run's two processes."""
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.folder / "job.yaml"), "--quiet"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    seen: dict[int, int] = {}
    while process.poll() is None:
        for number in (process.pid, *children(process.pid)):
            seen[number] = max(seen.get(number, 0), high_water(number))
        if kill_at is not None and len(list(place.parts.glob("*/*.parquet"))) >= kill_at:
            process.kill()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode != -signal.SIGKILL if kill_at else process.returncode not in (0, 3):  # 3: blank documents
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    parent = seen.pop(process.pid)
    return parent, max(seen.values())


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def high_water(process: int) -> int:
    """VmHWM in kilobytes; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
