"""Every figure of README and docs again, by one command: each bench with the arguments that gave it.

    python -m benches.all OUT --model SMOLLM2 --data CUAD [--gpu] [--only NAME ...] [--list]

What a bench prints goes to OUT/NAME.txt, beneath the version of the code and what ``pipeline doctor`` says of the
machine. What it prints as JSON goes to docs/figures/NAME.json too, with the date, the machine and the versions;
``python -m docs.pictures`` draws pictures of it. SMOLLM2 is a folder that ``pipeline smollm2`` wrote, CUAD one with
contracts.jsonl.gz and questions.json. The benches of a CPU take hours, those of a GPU (``--gpu``) one; nothing else
should run meanwhile. The same command goes on where it was interrupted: it does not run a bench again whose figures
of this commit are in OUT.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from turboquant.runtime.machine import usable_cpus, usable_memory

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
DEMO_MODEL = str(ROOT / "jobs" / "demo" / "model")


@dataclass(frozen=True)
class Figures:
    """``page`` has what these commands print: scripts, or modules as ``python -m`` runs them."""

    name: str
    page: str
    commands: tuple[str, ...]
    gpu: bool = False


# {out}, {model}, {data}: folders, of the command line; {contract}: a text; {demo}: the demo's model; {job}: the name;
# {json}: a file that the bench writes its figures to.
BENCH = "pipeline.cli bench {out}/jobs/{job}/job.yaml --json "
ON_GPU = "benches.big {out}/jobs/{job} --queries 32 --max-tokens 128 --tokens "
IN_OUT = "--set cache.dir={out}/jobs/{job}/cache --set output.path={out}/jobs/{job}/answers.parquet"
ALL = (
    # On a CPU: times.
    Figures(
        "demo",
        "measured.md",
        (
            f"pipeline.cli run jobs/summarize.yaml --quiet {IN_OUT}",
            "jobs/demo/evaluate.py {out}/jobs/{job}/answers.parquet",
            "jobs/demo/evaluate.py --uncompressed",
        ),
    ),
    Figures("own-time", "performance.md", ("benches.own_time", "benches.own_time --warm")),
    Figures(
        "against-mlx-lm",
        "performance.md",
        ("benches.questions {out}/jobs/{job}", BENCH + "--documents 8 --naive-queries 1"),
    ),
    Figures(
        "against-queries",
        "performance.md",
        (
            "benches.questions {out}/jobs/{job}",
            *(f"{BENCH}--documents 2 --naive-queries 1 --queries {count}" for count in (1, 4)),
        ),
    ),
    Figures(
        "contracts-job",
        "performance.md",
        (
            "benches.contracts_job {out}/jobs/{job} --data {data} --model {model} --contracts 8 --questions 8 "
            "--tokens 2000",
            BENCH + "--documents 8 --naive-queries 1",
        ),
    ),
    Figures(
        "contracts-whole",
        "performance.md",
        (
            "benches.contracts_job {out}/jobs/{job} --data {data} --model {demo} --contracts 20",
            "pipeline.cli run {out}/jobs/{job}/job.yaml",
        ),
    ),
    Figures(
        "llama-cpp",
        "performance.md",
        (
            "benches.contracts_job {out}/jobs/{job} --data {data} --model {model} --contracts 8 --questions 8 "
            "--tokens 2000",
            "benches.llama_cpp {out}/jobs/{job}/job.yaml --rounds 3",
        ),
    ),
    Figures(
        "transformers",
        "performance.md",
        (
            "benches.contracts_job {out}/jobs/{job} --data {data} --model {model} --contracts 8 --questions 8 "
            "--tokens 2000",
            "benches.transformers_cache {out}/jobs/{job}/job.yaml",
        ),
    ),
    Figures("prefill", "performance.md", ("benches.prefill --model {model} --text {contract}",)),
    Figures(
        "step-parts",
        "performance.md",
        ("benches.step_parts --model {model}", "benches.step_parts --model {demo} --tokens 5600"),
    ),
    Figures(
        "schemas",
        "performance.md",
        (
            "benches.constraints --model {model}",
            "benches.constraints --model {demo}",
            "benches.constraints --model {model} --rows 32 --quote",
        ),
    ),
    Figures("batch-sizes", "measured.md", ("benches.batch_sizes",)),
    Figures("restore", "performance.md", ("benches.restore",)),
    Figures("memory", "measured.md", ("benches.memory",)),
    Figures("plan", "performance.md", ("benches.plan",)),
    Figures("many-segments", "running.md", ("benches.many_segments",)),
    Figures(
        "ray-overhead",
        "scaling.md",
        ("benches.ray_overhead efficiency", "benches.ray_overhead driver", "benches.ray_overhead data"),
    ),
    # On a CPU: answers, fidelity, and what survives damage.
    Figures(
        "leases",
        "trust.md",
        (
            f"pipeline.cli run jobs/leases.yaml --quiet --set model={{model}} {IN_OUT}",
            f"pipeline.cli show jobs/leases.yaml --json --set model={{model}} {IN_OUT}",
        ),
    ),
    Figures("swaps", "running.md", ("benches.swaps",)),
    Figures(
        "peers",
        "fidelity.md",
        ("benches.peers --model {model} --data {data} --tokens 600 --contracts 2 --json {json}",),
    ),
    Figures(
        "papers",
        "fidelity.md",
        ("benches.papers --model {model} --data {data} --calibration 6 --codings scalar --json {json}",),
    ),
    Figures("kills", "measured.md", ("benches.kills",)),
    Figures("spoilt-stores", "measured.md", ("benches.mutate_store", "benches.mutate_store_files")),
    Figures("spoilt-files", "measured.md", ("benches.fuzz_files",)),
    Figures("spoilt-jobs", "measured.md", ("benches.fuzz_jobs",)),
    Figures("ray-kills", "scaling.md", ("benches.ray_kills --set documents.limit=6",)),
    # On a GPU.
    Figures("fidelity", "fidelity.md", ("benches.contracts --model {model} --data {data} --json {json}",), gpu=True),
    Figures(
        "trellis",
        "fidelity.md",
        (
            "benches.contracts --model {model} --data {data} --codings --json {json}",
            "benches.contracts --model {model} --data {data} --tokens 4000 --contracts 5 --codings --key-bias 20 "
            "--json {json}",
            "benches.trellis_levels",
            "benches.trellis_encoder",
            "benches.trellis_attention",
        ),
        gpu=True,
    ),
    Figures("kernels", "kernels.md", ("turboquant.bench --json", "benches.metal_report"), gpu=True),
    Figures(
        "steps",
        "kernels.md",
        (
            "benches.big {out}/jobs/{job} --billion",
            "benches.steps --model {out}/jobs/{job}/model --tokens 4096 32768 131072 --rows 1 16",
        ),
        gpu=True,
    ),
    Figures(
        "eight-billion",
        "performance.md",
        (
            "benches.big {out}/jobs/{job} --eight-billion --queries 32 --tokens 32768",
            "benches.steps --model {out}/jobs/{job}/model --tokens 32768 --rows 1 12 32",
            "pipeline.cli run {out}/jobs/{job}/job.yaml",
        ),
        gpu=True,
    ),
    *(
        Figures(
            f"gpu-{tokens}",
            "performance.md",
            (
                f"{ON_GPU}{tokens} --documents {documents}",
                f"{BENCH}--documents {documents} --set cache.resident=packed --contender pipeline-cold "
                "--contender pipeline-warm",
                f"{BENCH}--documents 1 --contender copied --set generation.batch_size={rows}",
            ),
            gpu=True,
        )
        for tokens, documents, rows in ((16384, 8, 32), (32768, 4, 16), (65536, 2, 8))
    ),
)


def run(figures: Figures, out: Path, places: Mapping[str, str], machine: str, folder: Path = FIGURES) -> bool:
    """Run the commands of some figures and write what they print; return whether all of them succeeded.

    machine: what is said of the machine, above what the commands print.
    """
    written, unfinished, runs = out / f"{figures.name}.json", out / f"{figures.name}.part", []
    names = {"out": "OUT", "model": "SMOLLM2", "data": "CUAD", "contract": "CONTRACT", "demo": "jobs/demo/model"}
    with unfinished.open("w", encoding="utf-8") as file:
        print(machine, file=file)
        for command in figures.commands:
            whole = ("python " if command.partition(" ")[0].endswith(".py") else "python -m ") + command
            words = whole.format(job=figures.name, json=written, **places).split()
            print(f"\n$ {' '.join(words)}", file=file, flush=True)
            started = time.monotonic()
            code, printed = _output([sys.executable, *words[1:]], file)
            if code not in (0, 3):  # some rows of a run may fail
                return False
            print(f"({time.monotonic() - started:.0f} s)", file=file, flush=True)
            if written.exists():
                printed += f"\n{written.read_text(encoding='utf-8')}"
                written.unlink()
            if rows := objects(printed.replace(str(out), "OUT")):
                runs.append({"command": whole.format(job=figures.name, json="FILE", **names), "rows": rows})
    if runs:
        write(folder / f"{figures.name}.json", {"page": f"docs/{figures.page}", **about(), "runs": runs})
    unfinished.rename(out / f"{figures.name}.txt")
    return True


def objects(printed: str) -> list[dict[str, Any]]:
    """Return the JSON objects among what a command printed: one on a line, or several in a list."""
    found: list[dict[str, Any]] = []
    end = 0
    for line in re.finditer(r"^(?=[\[{])", printed, re.MULTILINE):
        if line.start() >= end:
            try:
                value, end = json.JSONDecoder().raw_decode(printed, line.start())
            except ValueError:  # a line of another kind
                continue
            found += value if isinstance(value, list) else [value]
    return found


def about() -> dict[str, Any]:
    """Return what figures depend on: the date, the code's commit, the machine and the versions."""
    machine = {
        "device": mx.device_info(mx.default_device())["device_name"],
        "cpu": mx.device_info(mx.Device(mx.cpu))["device_name"],
        "cores": usable_cpus(),
        "memory_GB": round(usable_memory() / 1e9),
    }
    commit = _commit("%H")
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"date": date.today().isoformat(), "commit": commit, "machine": machine, "versions": versions}


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, with one row of a run on a line."""
    head = json.dumps({name: value for name, value in figures.items() if name != "runs"}, ensure_ascii=False, indent=1)
    runs = [
        f'  {{"command": {json.dumps(run["command"])}, "rows": [\n   '
        + ",\n   ".join(json.dumps(row, ensure_ascii=False) for row in run["rows"])
        + "\n  ]}"
        for run in figures["runs"]
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head[:-2] + ',\n "runs": [\n' + ",\n".join(runs) + "\n ]\n}\n", encoding="utf-8")


def _commit(form: str) -> str | None:
    """The code's commit in a form of git's, or None: it may be a copy without git."""
    code, printed = _output(["git", "-C", str(ROOT), "log", "-1", f"--format={form}"])
    return printed.strip() if code == 0 else None


def _output(command: Sequence[str], file: IO[str] | None = None) -> tuple[int, str]:
    """Run a command and copy what it prints to a file meanwhile; return its exit code and what it printed."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if file:
                print(line, end="", file=file, flush=True)
    return process.returncode, "".join(lines)


def _first_contract(data: Path, out: Path) -> Path:
    """The first contract of 20,000 characters or more, as a file."""
    with gzip.open(data / "contracts.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = next(text for text in (json.loads(line)["text"] for line in lines) if len(text) >= 20_000)
    path = out / "contract.txt"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """Run the benches that are asked for, and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--gpu", action="store_true", help="the benches of a GPU, not those of a CPU")
    parser.add_argument("--only", nargs="+", choices=[figures.name for figures in ALL], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is, and which page has it")
    arguments = parser.parse_args()
    chosen = [
        figures
        for figures in ALL
        if (figures.name in arguments.only if arguments.only else figures.gpu == arguments.gpu)
    ]
    if arguments.list:
        print("\n".join(f"{figures.name:16} {figures.page}" for figures in chosen))
        return
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, data = arguments.model.resolve(), arguments.data.resolve()
    contract = _first_contract(data, out)
    places = {"out": out, "model": model, "data": data, "contract": contract, "demo": DEMO_MODEL}
    version_of_code = f"{_commit('%H %cI') or 'no commit is known'}\n"
    machine = version_of_code + _output([sys.executable, "-m", "pipeline.cli", "doctor"])[1]
    for figures in chosen:
        before = out / f"{figures.name}.txt"
        if before.exists() and before.read_text(encoding="utf-8").startswith(version_of_code):
            print(f"{figures.name}: {before} has it of this commit", file=sys.stderr)
            continue
        print(figures.name, file=sys.stderr, flush=True)
        if not run(figures, out, {name: str(place) for name, place in places.items()}, machine):
            print(f"{figures.name} failed: see {out / figures.name}.part", file=sys.stderr)


if __name__ == "__main__":
    main()
