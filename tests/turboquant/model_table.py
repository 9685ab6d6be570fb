"""The table of docs/models.md, made from the sources of the installed mlx-lm.

    python -m tests.turboquant.model_table > docs/models.md

Reads which caches each model file makes and where its attention is defined; what is done with the keys and values is
taken from turboquant/mlx_lm/families.py, which test_patch_sources.py holds against the same sources.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx_lm.models
from mlx_lm.utils import MODEL_REMAPPING

from tests.turboquant.tiny_models import NOT_BUILT
from turboquant.mlx_lm.families import BATCHING, COMPRESSIBLE, reason
from turboquant.mlx_lm.internals import MODELS

FOLDER = Path(mlx_lm.models.__path__[0])
INTRODUCTION = """\
# Models

What turboquant does with each architecture of mlx-lm, by `model_type` (others that mlx-lm loads with the same file in
brackets). Written by `python -m tests.turboquant.model_table > docs/models.md` from the sources of mlx-lm; a test
fails where they no longer agree.

- **compressed**: the keys and values of every layer.
- **partial**: the keys and values of plain attention layers. The layers named in the last column are not compressed. A
  model without such layers, as most llamas are, is compressed whole.
- **none**: nothing is compressed. The model runs with mlx-lm's own caches, which are as large as in mlx-lm. They are
  stored, shared and restored like compressed ones (those of deepseek_v41 are not stored).

The column **in batches** says which queries share a batch with mlx-lm's code for this architecture:

- **together**: all, whatever their lengths.
- **equal lengths**: only queries of equal length on one document. If lengths differ, mlx-lm computes with the padding.
- **one by one**: none. mlx-lm's batches fail, or mix up rows and heads.

A run batches in this way by itself. A warning, `plan` and the report say so. Architectures that are not compressed
whole are also tried when they are loaded. A test builds a tiny model of every architecture that can be built, and
compares its answers alone and in batches, fresh and restored, prefilled exactly and in segments.

COUNTS

A model held by another, such as a vision model's language model, is treated as it would be by itself.
`turboquant.mlx_lm.families.explain(model)` says the same of a loaded model, layer by layer.

"""
SPLIT = """
## Split over ranks

What mlx-lm can split over processes that hold the model between them (`scale.ranks`), where they divide its heads:
"""


def document() -> str:
    """The whole of docs/models.md."""
    rows = [row(file) for file in model_files()]
    lines = ["| model type | status | in batches | kept as it is, and why |", "| --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(each)} |" for each in rows]
    lines += ["", *(f"[^{file}]: {why}." for file, why in NOT_BUILT.items())]
    introduction = INTRODUCTION.replace("COUNTS", counts(rows))
    split = [file for file in model_files() if functions(file, "shard")]
    return introduction + "\n".join(lines) + "\n" + SPLIT + ", ".join(split) + ".\n"


def model_files() -> list[str]:
    """The files that define a model mlx-lm can load."""
    files = sorted(path.stem for path in FOLDER.glob("*.py"))
    return [file for file in files if "\nclass Model(" in source(file) or "Model" in imported(file)]


def counts(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """How many architectures there are of each kind, and that none is answered otherwise in a batch."""
    status, batching = (Counter(each[column] for each in rows) for column in (1, 2))
    return (
        f"Of {len(rows)} architectures, {status['compressed']} are compressed whole, {status['partial']} in part, "
        f"{status['none']} not at all, and {status['as its language model']} as\nits language model is. "
        f"{batching['together']} answer correctly in any batch, {batching['equal lengths']} in batches of equal "
        f"length, and {batching['one by one']} only one\nby one. Batched like this, each of these "
        f"{len(rows) - len(NOT_BUILT)} answers as it does alone."
    )


def row(file: str) -> tuple[str, str, str, str]:
    """Model type, status, which rows share a batch, and what is kept as it is."""
    others = sorted(name for name, home in MODEL_REMAPPING.items() if home == file)
    name = f"{file} ({', '.join(others)})" if others else file
    homes = attention_files(file)
    known: str = next((BATCHING[each] for each in (file, *homes) if each in BATCHING), "together")
    batching = f"not tested[^{file}]" if file in NOT_BUILT else known
    if len(homes) > 1:
        return name, "as its language model", batching, ", ".join(homes)
    (home,), kinds = homes, caches(file)
    can = f"{MODELS}.{home}" in COMPRESSIBLE and "KVCache" in kinds
    kept = [kind for kind in kinds if not can or kind != "KVCache"]
    reasons = ", ".join(f"{reason(home, kind)} ({kind})" for kind in kept)
    return name, "none" if not can else "partial" if kept else "compressed", batching, reasons


def source(file: str) -> str:
    """The source of a model file."""
    return (FOLDER / f"{file}.py").read_text(encoding="utf-8")


@functools.cache
def tree(file: str) -> ast.Module:
    """The parsed source of a model file."""
    return ast.parse(source(file))


def functions(file: str, name: str) -> list[ast.FunctionDef]:
    """The file's functions and methods of that name."""
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef) and node.name == name]


def called(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """The name of what is called, and the call, for all calls within a node."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            if isinstance(call.func, ast.Name):
                yield call.func.id, call
            elif isinstance(call.func, ast.Attribute):
                yield call.func.attr, call


def model_class(file: str) -> ast.ClassDef | None:
    """The class mlx-lm instantiates, None where the file has none of its own."""
    return next((node for node in tree(file).body if isinstance(node, ast.ClassDef) and node.name == "Model"), None)


def imported(file: str) -> dict[str, str]:
    """Names taken from other model files: the file each comes from. A file imported whole goes by its own name."""
    found = {}
    for node in tree(file).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {alias.asname or alias.name: node.module or alias.name for alias in node.names}
    return found


def attention_files(file: str) -> list[str]:
    """The files that may define the model's attention: itself, or those of the models it holds."""
    attends = {"update_and_fetch", "scaled_dot_product_attention"} & {name for name, _ in called(tree(file))}
    if attends:
        return [file]
    others = sorted({other for other in imported(file).values() if "Model" in imported(other) or model_class(other)})
    return list(dict.fromkeys(home for other in others for home in attention_files(other))) or [file]


def caches(file: str) -> list[str]:
    """The classes of the caches that the file's model makes, one a layer."""
    makers = functions(file, "make_cache")
    kinds = sorted({kind for maker in makers for kind in made(maker)})
    if kinds:
        return kinds
    model = model_class(file)
    bases = [node.id for base in model.bases for node in ast.walk(base) if isinstance(node, ast.Name)] if model else []
    inherited = [imported(file)[name] for name in (bases if model else ["Model"]) if name in imported(file)]
    if makers:  # it asks the model it holds
        inherited = attention_files(file)
    return caches(inherited[0]) if inherited else ["KVCache"]


def made(maker: ast.FunctionDef) -> set[str]:
    """The classes of cache a ``make_cache`` constructs, but for those that go into a CacheList."""
    inside: set[int] = set()
    for name, call in called(maker):
        if name == "CacheList":
            names = {argument.id for argument in call.args if isinstance(argument, ast.Name)}
            inside |= {id(argument) for argument in call.args} | {id(value) for value in assigned(maker, names)}
    constructed = {name for name, call in called(maker) if id(call) not in inside}
    return {name for name in constructed if name.endswith("Cache") or name == "CacheList"}


def assigned(function: ast.FunctionDef, names: set[str]) -> list[ast.expr]:
    """What is assigned to these names in a function."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    return [node.value for node in nodes if isinstance(node.targets[0], ast.Name) and node.targets[0].id in names]


if __name__ == "__main__":
    print(document(), end="")
