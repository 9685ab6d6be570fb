"""``pipeline demo``: write the demo (a job, twelve documents and a small model) to a folder of the user's.

The files are those of ``jobs/`` in a checkout; a wheel carries a copy of them inside the package.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import JobError, OutputError, one_line

JOB = "summarize.yaml"
_PACKAGE = Path(__file__).parents[1]


def write_demo(folder: Path) -> Path:
    """Write the demo to a folder, all of it or nothing, and return its job file.

    Raises JobError if something else is in the folder, OutputError if it cannot be written.
    """
    source = next((path for path in (_PACKAGE / "jobs", _PACKAGE.parent / "jobs") if (path / JOB).is_file()), None)
    if source is None:
        raise JobError("this installation lacks the demo's files; install turboquant-pipeline from a wheel again")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"{folder}: exists already; name another folder")
    text = (source / JOB).read_text(encoding="utf-8")
    text = re.sub(
        r"\A(#.*\n)+", "# The demo: fifteen questions on each of twelve meeting minutes, all made up.\n", text
    )
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.absolute().parent) as work:
            shutil.copytree(source / "demo" / "model", Path(work) / "demo" / "model")
            shutil.copy(source / "demo" / "minutes.parquet", Path(work) / "demo")
            (Path(work) / "demo" / JOB).write_text(
                text.replace("demo/", "").replace("../", ""), encoding="utf-8"
            )  # there the job stood beside the folder `demo`
            os.replace(Path(work) / "demo", folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {one_line(error)}; the demo needs 25 MB") from error
    return folder / JOB
