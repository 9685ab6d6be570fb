"""Find a model, load it with its tokenizer, and tell by content whether two folders hold the same one.

It knows mlx-lm's loader, the layout of a model folder and the Hugging Face cache. It does not know jobs,
prompts or caches of K/V. MLX and mlx-lm (two seconds) are imported only where something is loaded; the
fingerprints need neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import ModelError, one_line
from turboquant.blas import load_tuned_blas

if TYPE_CHECKING:
    from turboquant.codec import CacheCodec

WEIGHTS = "model*.safetensors"  # what mlx-lm loads; a folder may hold other copies of the weights besides

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_length")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_LIMIT = 10**9  # transformers writes 1e30 where a tokenizer states no limit
_MEMO_FORMAT = 1

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoadedModel:
    """An mlx-lm model ready to run, its tokenizer (mlx-lm's wrapper), its config.json and its folder."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    path: Path


def load_model(name: str | Path) -> LoadedModel:
    """Load a model folder or a Hugging Face repo, in a form that suits the device.

    On a GPU weights stay as they are. On a CPU they become float32, quantized layers included: MLX computes
    half precision there at 2 to 5 GFLOP/s and quantized layers at 2, float32 at the speed of the BLAS.

    Raises ModelError where the model can't be found, read or understood.
    """
    path = resolve_model(name)
    _require_files(path)
    load_tuned_blas()
    from mlx_lm import load

    from turboquant.device import settle_weights

    model, tokenizer, config = _explain_failure(path, lambda: load(str(path), lazy=True, return_config=True))
    _explain_failure(path, lambda: settle_weights(model))
    return LoadedModel(model, tokenizer, config, path)


def load_tokenizer(path: Path) -> Any:
    """mlx-lm's tokenizer of a model folder, for work that needs no weights."""
    config = read_config(path)
    _require_vocabulary(path)
    load_tuned_blas()
    from mlx_lm.utils import load_tokenizer

    return _explain_failure(path, lambda: load_tokenizer(path, eos_token_ids=config.get("eos_token_id")))


def resolve_model(name: str | Path) -> Path:
    """The folder of a model: `name` itself, or a repo id's local snapshot, downloaded where there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ModelError(f"model {name}: is a file; give the folder that holds config.json and the weights")
    if not isinstance(name, str) or not _REPO_ID.fullmatch(name):
        raise ModelError(
            f"model {name}: no such folder, and not a Hugging Face repo id (owner/name) either; "
            "a relative path counts from the job file"
        )
    return _snapshot(name)


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


def weights_fingerprint(path: Path, memo: Path, remember: bool = True) -> str:
    """SHA-256 over the configs and the content of every weight file: same name, other weights, other print.

    Hashing many gigabytes takes a while, so each file's digest is remembered in the JSON file `memo` under
    its resolved path, for as long as size, times and inode stay. A broken memo is ignored.
    Without `remember` it is read and not written.
    """
    remembered = _read_memo(memo)
    digests = {file: _content_digest(file, remembered) for file in _weight_files(path)}
    if remember and any(remembered.get(key) != value for key, value in digests.values()):
        _write_memo(memo, remembered | dict(digests.values()))
    names = ("config.json", "generation_config.json", "hf_quant_config.json")  # the second has stop tokens
    configs = [file for name in names if (file := path / name).exists()]
    parts = [(file.name, file.read_bytes()) for file in configs]
    parts += [(file.name, bytes.fromhex(value["sha256"])) for file, (_, value) in digests.items()]
    return _digest("weights", parts)


def tokenizer_fingerprint(path: Path, template_arguments: Mapping[str, Any] | None = None) -> str:
    """SHA-256 over everything that turns text into tokens: vocabulary, chat template and its arguments."""
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)})
    parts = [(file.name, file.read_bytes()) for file in files]
    arguments = json.dumps(template_arguments or {}, sort_keys=True, ensure_ascii=True)
    return _digest("tokenizer", [*parts, ("template arguments", arguments.encode())])


# ---- finding and checking


def _snapshot(repo: str) -> Path:
    """Local first: a job must give the same answers tomorrow, whatever was pushed to the hub since."""
    load_tuned_blas()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    try:
        return Path(snapshot_download(repo, allow_patterns=DEFAULT_ALLOW_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"model {repo}: neither a folder here nor to be had from Hugging Face ({one_line(error)}); "
            "check the name and the network, log in if the repo is gated, or give a local folder"
        ) from error


def _require_files(path: Path) -> None:
    read_config(path)
    _require_vocabulary(path)
    for file in _weight_files(path):
        _require_whole(file)


def _require_vocabulary(path: Path) -> None:
    if not any(any(path.glob(pattern)) for pattern in _VOCABULARIES):
        raise ModelError(f"model {path}: no tokenizer (tokenizer.json); copy it from the original model")


def _weight_files(path: Path) -> list[Path]:
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


def _explain_failure(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """mlx-lm and transformers raise whatever comes to hand; the reason is in the text."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"model {path}: mlx-lm can't load it ({one_line(error)})") from error


def prefix_bytes(codec: CacheCodec, config: Mapping[str, Any], tokens: int) -> int:
    """About what a prefix of so many tokens takes on disk, were all layers of the model compressed."""
    text = config.get("text_config") or config
    if not all(name in text for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")):
        return 0
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    return layers * kv_heads * codec.nbytes(tokens, head_dim)


# ---- fingerprints


def _digest(kind: str, parts: Iterable[tuple[str, bytes]]) -> str:
    """Every name and content is preceded by its length, so that no two lists of parts look the same."""
    digest = hashlib.sha256()
    for name, content in [("kind", kind.encode()), *parts]:
        for field in (name.encode(), content):
            digest.update(len(field).to_bytes(8, "little") + field)
    return digest.hexdigest()


Memo = dict[str, dict[str, Any]]


def _content_digest(file: Path, remembered: Memo) -> tuple[str, dict[str, Any]]:
    """A memo entry for `file`: its resolved path, what `stat` says, and the SHA-256 of its content."""
    real = file.resolve()
    state = real.stat()  # before hashing: a change meanwhile makes the entry stale, not wrong
    # Unlike mtime, ctime can't be set back by whoever copies or touches the file.
    entry = {"size": state.st_size, "inode": state.st_ino}
    entry |= {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    known = remembered.get(str(real), {})
    digest = str(known.get("sha256"))
    if _SHA256.fullmatch(digest) and known == {**entry, "sha256": digest}:
        return str(real), known
    return str(real), {**entry, "sha256": _hash_file(real)}


def _hash_file(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _read_memo(memo: Path) -> Memo:
    try:
        content = json.loads(memo.read_bytes())
        files = content["files"] if content["format"] == _MEMO_FORMAT else {}
        return {path: entry for path, entry in files.items() if isinstance(entry, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_memo(memo: Path, files: Memo) -> None:
    """Atomic, so that a reader never meets half a memo. Not being able to write one only costs time."""
    temporary = memo.with_name(f"{memo.name}.{os.getpid()}.tmp")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": _MEMO_FORMAT, "files": files}, indent=1))
        temporary.replace(memo)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
