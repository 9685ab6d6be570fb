"""The nearest peers on PyPI, through their own caches, beside this project's and mlx-lm's: one table.

    python benches/peers.py --model SMOLLM2 --data CUAD --tokens 1500 --contracts 2 --questions 3

Each peer is installed with this project into an environment of its own (kept in --environments, if given) and
measured there, contracts and questions as in contracts.py. Their contexts go through their cache in chunks, as they
mean it; effective bits are counted from the bytes that the caches hold for the context.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benches.contracts import contract_samples, measure_contracts
from turboquant.fidelity import load_model, table
from turboquant.runtime.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.eval.results import Baseline, Fidelity
    from turboquant.eval.teacher_forcing import Context

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"turboquant-mlx-full": "0.30.0", "mlx-turboquant": "0.0.2"}
OURS = "turboquant"


def _ours() -> list[Baseline]:
    from turboquant.eval.baselines import affine, exact, streaming
    from turboquant.quant.cache_codec import CacheCodec

    codecs = [CacheCodec(keys, values) for keys, values in ((4, 4), (4, 3), (3, 3), (2, 2))]
    baseline = [affine(bits, prefill) for prefill in ("exact", "streaming") for bits in (8, 4)]
    return [*baseline, *map(exact, codecs), *map(streaming, codecs)]


def _turboquant_mlx_full() -> list[Baseline]:
    from turboquant_mlx.layers.polar_kv_cache import TurboQuantKVCache

    def make(keys: int, values: int) -> Callable[[Context], list[Any]]:
        return lambda context: [TurboQuantKVCache(k_bits=keys, v_bits=values) for _ in context.caches]

    def count(cache: Any) -> int:
        codes_and_scales = [part for kind in cache.state[:2] for part in kind]
        return sum(int(part.nbytes) for part in codes_and_scales)

    pairs = ((8, 3), (4, 4), (4, 3), (3, 3), (2, 2))
    return [_baseline("turboquant-mlx-full", *pair, make(*pair), count) for pair in pairs]


def _mlx_turboquant() -> list[Baseline]:
    from mlx_turboquant import make_prompt_cache, register

    register()

    def make(bits: int) -> Callable[[Context], list[Any]]:
        return lambda context: make_prompt_cache(context.model, kv_bits=bits)  # type: ignore[no-any-return]

    def count(cache: Any) -> int:
        halves = cache.keys_and_values()  # scales and biases have 16 bits unless a CPU widens the model
        return sum(int(codes.nbytes) + 2 * (scales.size + biases.size) for codes, scales, biases in halves)

    return [_baseline("mlx-turboquant", bits, bits, make(bits), count) for bits in (8, 4, 3, 2)]


def _baseline(
    name: str, keys: int, values: int, make: Callable[[Context], list[Any]], count: Callable[[Any], int]
) -> Baseline:
    from turboquant.caches.prefix import feed
    from turboquant.eval.results import Baseline, Filled

    def fill(context: Context) -> Filled:
        caches = make(context)
        feed(context.model, caches, context.tokens, context.chunk)
        return Filled(caches, sum(map(count, caches)))

    return Baseline(name, keys, values, "streaming", fill)


_WORKERS = {OURS: _ours, "turboquant-mlx-full": _turboquant_mlx_full, "mlx-turboquant": _mlx_turboquant}


def _work(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one package's caches, in the environment that has it."""
    model, tokenizer = load_model(arguments.model)
    samples = contract_samples(
        tokenizer, arguments.data, arguments.tokens, arguments.tokens, arguments.contracts, arguments.questions
    )
    return [asdict(row) for row in measure_contracts(model, tokenizer, samples, _WORKERS[arguments.worker]())]


def _measured(worker: str, python: Path | str, arguments: argparse.Namespace) -> list[Fidelity]:
    """The figures of one package's caches, from a process of the environment given."""
    from turboquant.eval.results import Fidelity

    command = [str(python), str(Path(__file__).resolve()), "--worker", worker]
    for name in ("model", "data", "tokens", "contracts", "questions"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Fidelity(**row) for row in json.loads(done.stdout)]


def _environment(folder: Path, peer: str) -> Path:
    """The Python of an environment that has a peer and this project, made where there is none."""
    home = folder / peer
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (home / "ready").exists():
        print(f"installing {peer} {PEERS[peer]}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        project = f"{ROOT}[cpu]" if sys.platform == "linux" else str(ROOT)
        command = [str(python), "-m", "pip", "install", "--quiet", f"{peer}=={PEERS[peer]}", "--editable", project]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (home / "ready").touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the peers' caches beside this project's.")
    parser.add_argument("--model", required=True, help="a model folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="the folder of contracts and questions")
    parser.add_argument("--tokens", type=int, default=1500, help="length of the contexts")
    parser.add_argument("--contracts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--environments", type=Path, help="where to keep the peers' environments")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--worker", choices=_WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load_tuned_blas()
    if arguments.worker:
        print(json.dumps(_work(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.environments or Path(temporary)).absolute()
        pythons = {OURS: Path(sys.executable), **{peer: _environment(folder, peer) for peer in PEERS}}
        figures = [row for worker, python in pythons.items() for row in _measured(worker, python, arguments)]
    print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in figures], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
