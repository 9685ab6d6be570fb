"""Find a model and load it with its tokenizer and its adapter.

It knows mlx-lm's loader, the layout of a model folder and the Hugging Face cache. It does not know jobs,
prompts or caches of K/V. MLX and mlx-lm (two seconds) are imported only where something is loaded.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import ModelError, one_line
from pipeline.models.ranks import SINGLE, RankGroup

if TYPE_CHECKING:
    from turboquant.quant.cache_codec import CacheCodec

WEIGHTS = "model*.safetensors"  # what mlx-lm loads; a folder may hold other copies of the weights besides

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_length")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_LIMIT = 10**9  # transformers writes 1e30 where a tokenizer states no limit

_TRUST = "; where you trust the code that comes with it, set `trust_remote_code: true` in the job"

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoadedModel:
    """An mlx-lm model ready to run, its tokenizer (mlx-lm's wrapper), its config.json and its folder."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    path: Path


def load_model(
    name: str | Path,
    revision: str | None = None,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
    ranks: RankGroup = SINGLE,
) -> LoadedModel:
    """Load a model folder or a Hugging Face repo, in a form that suits the device.

    revision: of the repo. adapter: a folder that mlx-lm's training wrote. trust_remote_code: run code that comes with
    the model, where it needs that. ranks: those that hold the model between them, of which each loads its part.

    On a GPU weights stay as they are. On a CPU they become float32, quantized layers included: MLX computes
    half precision there at 2 to 5 GFLOP/s and quantized layers at 2, float32 at the speed of the BLAS.

    Raises ModelError where the model can't be found, read or understood.
    """
    path = resolve_model(name, revision)
    _require_files(path)
    if adapter is not None:
        _require_whole(adapter_files(adapter)[1])
    from mlx_lm import load

    from turboquant.runtime.device import settle_weights

    def loaded() -> Any:
        return load(
            str(path),
            tokenizer_config={"trust_remote_code": trust_remote_code},
            adapter_path=None if adapter is None else str(adapter),
            lazy=True,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )

    model, tokenizer, config = _explain_failure(path, loaded)
    if ranks.count > 1:
        _require_parts(path, model, config, ranks.count)
    _explain_failure(path, lambda: settle_weights(model, ranks.group))
    return LoadedModel(model, tokenizer, config, path)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """mlx-lm's tokenizer of a model folder, for work that needs no weights."""
    config = read_config(path)
    _require_vocabulary(path)
    from mlx_lm.utils import load_tokenizer

    options = {"trust_remote_code": trust_remote_code}
    return _explain_failure(path, lambda: load_tokenizer(path, options, eos_token_ids=config.get("eos_token_id")))


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or a repo id's local snapshot, downloaded where there is none.

    revision: a branch, a tag or a commit of the repo.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"revision {revision}: is for models from Hugging Face, and {name} is a folder")
        return path.resolve()
    if path.exists():
        raise ModelError(f"model {name}: is a file; give the folder that holds config.json and the weights")
    if not isinstance(name, str) or not _REPO_ID.fullmatch(name):
        raise ModelError(
            f"model {name}: no such folder, and not a Hugging Face repo id (owner/name) either; "
            "a relative path counts from the job file"
        )
    return _snapshot(name, revision)


def adapter_files(adapter: Path) -> tuple[Path, Path]:
    """The config and the weights of an adapter. Raises ModelError where a folder lacks them."""
    files = adapter / "adapter_config.json", adapter / "adapters.safetensors"
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"adapter {adapter}: no {missing[0]}; give the folder that `mlx_lm.lora --adapter-path` wrote "
            "(other formats must be converted)"
        )
    return files


def read_config(path: Path) -> dict[str, Any]:
    """The model's config.json, with the stop tokens of generation_config.json where those differ."""
    config = _read_object(path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists() and (stop := _read_object(generation).get("eos_token_id")):
        config["eos_token_id"] = stop
    return config


def max_context(config: Mapping[str, Any], tokenizer: Any = None) -> int | None:
    """Most tokens the model was made for, or None where neither its config nor its tokenizer tells.

    >>> max_context({"max_position_embeddings": 8192})
    8192
    """
    stated = [config, config.get("text_config") or {}]
    limits = [part[key] for part in stated for key in _CONTEXT_KEYS if isinstance(part.get(key), int)]
    if not limits and isinstance(length := getattr(tokenizer, "model_max_length", None), int | float):
        limits = [int(length)] if 0 < length < _NO_LIMIT else []
    return limits[0] if limits else None


# ---- finding and checking


def _snapshot(repo: str, revision: str | None) -> Path:
    """Local first: a job must give the same answers tomorrow, whatever was pushed to the hub since."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    download = partial(snapshot_download, repo, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS)
    try:
        return Path(download(local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(download())
    except (OSError, ValueError, HfHubHTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model {repo}{at}: neither a folder here nor to be had from Hugging Face ({one_line(error)}); "
            "check the name and the network, log in if the repo is gated, or give a local folder"
        ) from error


def _require_files(path: Path) -> None:
    read_config(path)
    _require_vocabulary(path)
    for file in weight_files(path):
        _require_whole(file)


def _require_vocabulary(path: Path) -> None:
    if not any(any(path.glob(pattern)) for pattern in _VOCABULARIES):
        raise ModelError(f"model {path}: no tokenizer (tokenizer.json); copy it from the original model")


def weight_files(path: Path) -> list[Path]:
    """The weight files by name, all those that the index names, if there is an index."""
    files = sorted(path.glob(WEIGHTS))
    index = path / "model.safetensors.index.json"
    named = set(_read_object(index).get("weight_map", {}).values()) if index.exists() else set()
    if missing := sorted(named - {file.name for file in files}):
        raise ModelError(f"model {path}: lacks {', '.join(missing)}, named in {index.name}; download it again")
    if not files:
        raise ModelError(
            f"model {path}: no weights ({WEIGHTS}); convert other formats with "
            f"`mlx_lm.convert --hf-path {path} --mlx-path NEW_FOLDER`"
        )
    return files


def _require_whole(file: Path) -> None:
    """Compare the length a safetensors header implies with the file's: what a broken download gets wrong."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        implied = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        if implied != size:
            raise ValueError(f"it holds {size} bytes and should hold {implied}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file}: damaged weights ({one_line(error)}); download it again") from error


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"model {file.parent}: no {file.name}; is this the model's folder?") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a JSON object")
    return content


# ---- loading


def _require_parts(path: Path, model: Any, config: Mapping[str, Any], count: int) -> None:
    """Heads are not cut, though mlx-lm would try: each rank has as many, and the keys and values of its own."""
    if not hasattr(model, "shard"):
        raise ModelError(f"model {path}: mlx-lm can't split a {config.get('model_type')}; set scale.ranks to 1")
    text = config.get("text_config") or config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = text.get(name)
        if isinstance(heads, int) and heads % count:
            raise ModelError(
                f"model {path}: {count} ranks can't share its {heads} {name} evenly; set scale.ranks to a divisor"
            )


def _explain_failure(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """mlx-lm and transformers raise whatever comes to hand; the reason is in the text."""
    try:
        return load()
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        AssertionError,
    ) as error:
        hint = _TRUST if "trust_remote_code" in str(error) else ""
        raise ModelError(f"model {path}: mlx-lm can't load it ({one_line(error)}){hint}") from error


def prefix_bytes(codec: CacheCodec, config: Mapping[str, Any], tokens: int) -> int:
    """About what a prefix of so many tokens takes on disk, were all layers of the model compressed."""
    text = config.get("text_config") or config
    if not all(name in text for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")):
        return 0
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    return layers * kv_heads * codec.nbytes(tokens, head_dim)
