"""Peak resident memory of runs of few and many documents, and of one huge row group.

    python benches/memory.py [--documents 10 1000] [--megabytes 300]

Jobs with a tiny model are run by the command line; what is printed is VmHWM of its process and of the model's. The
documents are short. Those of the huge row group are ten short ones and many of 100 kB of blanks, which are read and
answered by an error; it is written with pages of 16 rows, as documents.py advises, and of pyarrow's 1,024. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benches.tiny import SCHEMA, Place, text_of  # noqa: E402

SENTENCES = 8
BLANKS = 100_000
SECONDS_BETWEEN_LOOKS = 0.02


def main() -> None:
    """Print a line a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[10, 1000])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[300], help="of text in one row group")
    arguments = parser.parse_args()
    print("job                              parent MB  model MB  seconds")
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


def show(name: str, place: Place) -> None:
    """Run a job and print its peaks."""
    started = time.monotonic()
    parent, child = peaks(place)
    print(f"{name:32} {parent / 1024:9.1f} {child / 1024:9.1f} {time.monotonic() - started:8.1f}", flush=True)


def peaks(place: Place) -> tuple[int, int]:
    """Peak resident kilobytes of a run's two processes."""
    command = [sys.executable, "-m", "pipeline.cli", "run", str(place.folder / "job.yaml"), "--quiet"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    seen: dict[int, int] = {}
    while process.poll() is None:
        for number in (process.pid, *children(process.pid)):
            seen[number] = max(seen.get(number, 0), high_water(number))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode not in (0, 3):  # 3: blank documents are errors
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
