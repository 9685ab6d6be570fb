"""Load a model with mlx-lm, and tell a Hugging Face repo id from the path of a folder."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

# huggingface_hub has a check of its own, but importing it takes a quarter of a second, and it lets `gpt2` pass, which
# a job file more likely means as a folder.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name: str) -> bool:
    """Return whether a name has the form of a Hugging Face repo id, `owner/name`.

    >>> is_repo_id("mlx-community/SmolLM2-135M-Instruct"), is_repo_id("../models/smollm2")
    (True, False)
    """
    return _REPO_ID.fullmatch(name) is not None


def load_lazily(
    name: str | Path, adapter: Path | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model folder or a Hugging Face repo with mlx-lm.

    Its weights are read when they are first used, or by `prepare_weights`.

    adapter: a folder that mlx-lm's training wrote. trust_remote_code: run code that comes with the model.

    Returns the model, mlx-lm's wrapper of its tokenizer, and its config.json. Raises what mlx-lm raises.
    """
    from turboquant.mlx_lm.internals import load

    with _without_wildcards(name) as path:
        model, tokenizer, config = load(
            path,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            adapter_path=None if adapter is None else str(adapter),
            lazy=True,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
    return model, tokenizer, config


def prepare_weights(model: Any, group: mx.distributed.Group | None = None) -> None:
    """Read a lazily loaded model's weights from disk; on a CPU convert all of them to float32, quantised ones too.

    On a CPU MLX computes half precision at 2 to 5 GFLOP/s, quantised layers at 2, and float32 at the speed of the BLAS.

    group: the processes that share the model; each of them keeps its part of the weights.
    """
    import mlx.core as mx

    from turboquant.mlx_lm.internals import dequantize_model
    from turboquant.runtime.device import on_cpu

    if on_cpu():
        model.set_dtype(mx.float32)  # scales before weights: dequantising in half precision would round
        dequantize_model(model)
        model.set_dtype(mx.float32)  # some formats dequantise to bfloat16 whatever their scales
    if group is not None:
        model.shard(group)
    mx.eval(model.parameters())


@contextmanager
def _without_wildcards(name: str | Path) -> Iterator[str]:
    """Yield a path or a repo id. mlx-lm looks for weights with a glob that begins with the folder's path.

    A folder with brackets, * or ? in its path is therefore reached by a temporary link. The weights can be read when
    the link is gone, because MLX has opened their files.
    """
    if not glob.has_magic(str(name)) or not os.path.isdir(name):
        yield str(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model")
        os.symlink(os.path.abspath(name), link)
        yield link
