"""Every figure of README and docs again, by one command: each bench with the arguments that gave it.

    python -m benches.all OUT --model SMOLLM2 --data CUAD [--gpu] [--only NAME ...] [--list]

What a bench prints goes to OUT/NAME.txt, beneath the version of the code and what ``pipeline doctor`` says of the
machine. SMOLLM2 is a folder that ``pipeline smollm2`` wrote, CUAD one with contracts.jsonl.gz and questions.json. The
benches of a CPU take a night, those of a GPU (``--gpu``) an hour; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = str(ROOT / "jobs" / "demo" / "model")


@dataclass(frozen=True)
class Figures:
    """``page`` has what these commands print: scripts, or modules as ``python -m`` runs them."""

    name: str
    page: str
    commands: tuple[str, ...]
    gpu: bool = False


# {out}, {model}, {data}: folders, of the command line; {contract}: a text; {demo}: the demo's model; {job}: the name.
BENCH = "pipeline.cli bench {out}/jobs/{job}/job.yaml --json "
ON_GPU = "benches.big {out}/jobs/{job} --queries 32 --max-tokens 128 --tokens "
IN_OUT = "--set cache.dir={out}/jobs/{job}/cache --set output.path={out}/jobs/{job}/answers.parquet"
ALL = (
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
            "pipeline.cli run {out}/jobs/{job}/job.yaml --quiet",
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
    Figures("prefill", "performance.md", ("benches.prefill --model {model} --text {contract}",)),
    Figures("schemas", "performance.md", ("benches.constraints --model {model}", "benches.constraints --model {demo}")),
    Figures("batch-sizes", "measured.md", ("benches.batch_sizes",)),
    Figures("restore", "performance.md", ("benches.restore",)),
    Figures("memory", "measured.md", ("benches.memory",)),
    Figures("plan", "performance.md", ("benches.plan",)),
    Figures("kills", "measured.md", ("benches.kills",)),
    Figures("swaps", "running.md", ("benches.swaps",)),
    Figures("spoilt-stores", "measured.md", ("benches.mutate_store", "benches.mutate_store_files")),
    Figures("many-segments", "performance.md", ("benches.many_segments",)),
    Figures("spoilt-files", "measured.md", ("benches.fuzz_files",)),
    Figures("spoilt-jobs", "measured.md", ("benches.fuzz_jobs",)),
    Figures(
        "ray-overhead",
        "scaling.md",
        ("benches.ray_overhead efficiency", "benches.ray_overhead driver", "benches.ray_overhead data"),
    ),
    Figures("ray-kills", "scaling.md", ("benches.ray_kills --set documents.limit=6",)),
    Figures("peers", "fidelity.md", ("benches.peers --model {model} --data {data} --tokens 600 --contracts 2",)),
    Figures("fidelity", "fidelity.md", ("benches.contracts --model {model} --data {data}",), gpu=True),
    Figures(
        "trellis",
        "fidelity.md",
        (
            "benches.viterbi",
            "benches.trellis --model {model} --data {data} --tokens 4000",
            "benches.trellis --model {model} --data {data} --tokens 1500",
        ),
        gpu=True,
    ),
    Figures("kernels", "kernels.md", ("turboquant.bench", "benches.metal_report"), gpu=True),
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


def run(figures: Figures, out: Path, places: dict[str, str]) -> bool:
    """Do what gives some figures; whether all of it went well."""
    with (out / f"{figures.name}.txt").open("w", encoding="utf-8") as file:
        _write(file, ["git", "-C", str(ROOT), "log", "-1", "--format=%H %cI"])
        _write(file, [sys.executable, "-m", "pipeline.cli", "doctor"])
        for command in figures.commands:
            words = [word.format(job=figures.name, **places) for word in command.split()]
            if not words[0].endswith(".py"):
                words.insert(0, "-m")
            print(f"\n$ python {' '.join(words)}", file=file, flush=True)
            started = time.monotonic()
            if _write(file, [sys.executable, *words]) not in (0, 3):  # some rows of a run may fail
                return False
            print(f"({time.monotonic() - started:.0f} s)", file=file, flush=True)
    return True


def _write(file: object, command: list[str]) -> int:
    return subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode  # type: ignore[call-overload,no-any-return]


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
    for figures in chosen:
        print(figures.name, file=sys.stderr, flush=True)
        if not run(figures, out, {name: str(place) for name, place in places.items()}):
            print(f"{figures.name} failed: see {out / figures.name}.txt", file=sys.stderr)


if __name__ == "__main__":
    main()
