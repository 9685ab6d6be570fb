"""Record whether processes import NumPy and MLX before or after they load the tuned BLAS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import ROOT

# Python runs this at the start of each process that has its folder in PYTHONPATH.
RECORDER = """
import os, sys

awaited = {"numpy", "mlx.core"}

def record(event, details):
    if event == "import" and details[0] in awaited:
        awaited.discard(details[0])
        blas = sys.modules.get("turboquant.runtime.blas")
        is_loaded = bool(blas and blas.load_tuned_blas.cache_info().currsize)
        with open(os.environ["IMPORTS"], "a") as file:
            print(os.getpid(), details[0], "after" if is_loaded else "before", file=file)

sys.addaudithook(record)
"""


def imports_of(folder: Path, command: Sequence[str | Path], also: str = "") -> list[dict[str, str]]:
    """Run ``python`` with a command, which must exit with 0; return what each process that imports MLX imported.

    For each process: the modules "numpy" and "mlx.core", and whether the process imported them "before" or "after" it
    loaded the tuned BLAS. also: code that each process runs at its start besides.
    """
    (folder / "sitecustomize.py").write_text(RECORDER + also)
    imports = folder / "imports.txt"
    imports.write_text("")
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "IMPORTS": str(imports)},
    )
    assert done.returncode == 0, done.stderr
    processes: dict[str, dict[str, str]] = {}
    for line in imports.read_text().splitlines():
        process, module, order = line.split()
        processes.setdefault(process, {})[module] = order
    return [modules for modules in processes.values() if "mlx.core" in modules]
