"""Find a model, check its files, and load it with its tokenizer and its adapter.

The parent process of a run imports this module too, so MLX and mlx-lm, which take two seconds, are imported only in the
functions that load something.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, one_line
from pipeline.models.ranks import SINGLE, RankGroup
from turboquant.io.safetensors_header import read_header
from turboquant.mlx_lm.loading import is_repo_id, load_lazily, prepare_weights

if TYPE_CHECKING:
    import mlx.core as mx

    from pipeline.job.job import Job
    from turboquant.mlx_lm.families import Batching
    from turboquant.mlx_lm.kernels_ahead import Quantized
    from turboquant.quant.cache_codec import CacheCodec

WEIGHTS = "model*.safetensors"  # the files that mlx-lm loads; a folder may hold other copies of the weights

_log = logging.getLogger(__name__)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx", "seq_length")
_LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
_NO_LIMIT = 10**9  # transformers writes 1e30 if a tokenizer states no limit

_TRUST_HINT = "; if you trust the code that comes with it, set `trust_remote_code: true` in the job"


@dataclass(frozen=True)
class LoadedModel:
    """An mlx-lm model that is ready to run, its tokenizer (mlx-lm's wrapper) and its config.json.

    batching: which rows can be decoded together. known_tokens: the number of token ids that the model has vectors for,
    from 0 on; None if its tokenizer makes no others, or if the number is not known.
    """

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    batching: Batching = "together"
    known_tokens: int | None = None


def load_model(
    name: str | Path,
    revision: str | None = None,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
    ranks: RankGroup = SINGLE,
    codec: CacheCodec | None = None,
) -> LoadedModel:
    """Load a model folder or a Hugging Face repo, in a form that suits the device.

    revision: a branch, a tag or a commit of the repo. adapter: a folder that mlx-lm's training wrote.
    trust_remote_code: run code that comes with the model, if the model needs it. ranks: the group that holds the model
    between its processes; each of them loads its part.
    codec: of the caches that the model will be given. The kernels of a GPU for it are compiled while weights are read.

    On a GPU, weights keep their dtypes. On a CPU they become float32, and quantized layers are dequantized: there MLX
    computes half precision with 2 to 5 GFLOP/s, quantized layers with 2, and float32 as fast as the BLAS.

    Raises ModelError if the model cannot be found, read or loaded, or lacks a layer that `codec` has bits for.
    """
    path = resolve_model(name, revision)
    stated = read_config(path)
    if codec is not None:
        prepare_kernels(stated, codec)
    _require_vocabulary(path)
    for file in weight_files(path):
        _require_whole(file)
    if adapter is not None:
        _require_whole(adapter_files(adapter)[1])
    with _explained_failure(path):
        model, tokenizer, config = load_lazily(path, adapter, trust_remote_code)
    for token in stated["eos_token_id"]:  # mlx-lm takes those of one file only
        tokenizer.add_eos_token(str(token))
    if ranks.count > 1:
        _require_whole_heads(path, model, config, ranks.count)

    from pipeline.models.batch_trial import find_batching
    from pipeline.models.mlx_lm_internals import embedding_rows, hugging_face_tokenizer
    from turboquant.mlx_lm.families import explain

    with _explained_failure(path):
        if codec is not None:
            check_layer_bits(codec, path, len(explain(model).layers))
        prepare_weights(model, ranks.group)
        known, used = embedding_rows(model), 1 + max(hugging_face_tokenizer(tokenizer).get_vocab().values())
        batching = find_batching(model, min(known or used, used))
    return LoadedModel(model, tokenizer, config, batching, None if known is None or used <= known else known)


def prepare_kernels(config: Mapping[str, Any], codec: CacheCodec) -> None:
    """Have a GPU's kernels looked up or compiled from now on, where the model's sizes and dtype are known.

    This does not import mlx-lm, which takes seconds, so a process calls it before it does. Later calls do nothing.
    config: the model's config.json.
    """
    from turboquant.attention import dispatch
    from turboquant.kernels.mlx_modules import own_folder
    from turboquant.mlx_lm import kernels_ahead

    own_folder()  # before MLX compiles anything
    text = config.get("text_config") or config
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    dtype = _stated_dtype(config)
    if dtype is not None and heads and width:
        head_dim = int(text.get("head_dim") or width // heads)
        kernels_ahead.start(dtype, head_dim, quantizations(config))
        dispatch.prepare_kernels(codec, head_dim, dtype)


def _stated_dtype(config: Mapping[str, Any]) -> mx.Dtype | None:
    """Return the dtype of a model's weights that its config.json states, or None."""
    import mlx.core as mx

    text = config.get("text_config") or config
    dtype = getattr(mx, str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")), None)
    return dtype if isinstance(dtype, mx.Dtype) else None


def quantizations(config: Mapping[str, Any]) -> tuple[Quantized, ...]:
    """Return the ways in which a model's weights are quantised, by its config.json: of most layers, and of others.

    Ways that are not stated as mlx-lm does are left out; mlx-lm refuses them.
    """
    from turboquant.mlx_lm.kernels_ahead import Quantized

    stated = config.get("quantization")
    ways = [stated, *stated.values()] if isinstance(stated, dict) else []
    stated_as = [
        (way.get("group_size"), way.get("bits"), way.get("mode", "affine")) for way in ways if isinstance(way, dict)
    ]
    found = [
        Quantized(size, bits, mode)
        for size, bits, mode in stated_as
        if isinstance(size, int) and isinstance(bits, int) and isinstance(mode, str)
    ]
    return tuple(dict.fromkeys(found))


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """Load mlx-lm's tokenizer wrapper from a model folder, for work that needs no weights. Raises ModelError."""
    config = read_config(path)
    _require_vocabulary(path)
    from pipeline.models.mlx_lm_internals import load_tokenizer_only

    with _explained_failure(path):
        return load_tokenizer_only(path, config.get("eos_token_id"), trust_remote_code)


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: `name` itself, or the local snapshot of a repo, which is downloaded if missing.

    revision: a branch, a tag or a commit of the repo. Raises ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"revision {revision}: a revision is for models from Hugging Face, and {name} is a folder")
        return path.resolve()
    if path.exists():
        raise ModelError(f"model {name}: is a file; give the folder that holds config.json and the weights")
    if not isinstance(name, str) or not is_repo_id(name):
        raise ModelError(
            f"model {name}: there is no such folder, and it is not a Hugging Face repo id (owner/name) either; "
            "a relative path starts at the job file's folder"
        )
    return _snapshot(name, revision)


def model_folder(job: Job) -> Path:
    """Return the folder of a job's model, at the job's revision. Raises ModelError."""
    return resolve_model(job.model, job.revision)


def adapter_files(adapter: Path) -> tuple[Path, Path]:
    """Return the config file and the weight file of an adapter. Raises ModelError if the folder lacks one of them."""
    files = adapter / "adapter_config.json", adapter / "adapters.safetensors"
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"adapter {adapter}: no {missing[0]}; give the folder that `mlx_lm.lora --adapter-path` wrote "
            "(other formats must be converted)"
        )
    return files


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's config.json, with the stop tokens of all configs as a list in `eos_token_id`.

    Raises ModelError if one of the files cannot be read.
    """
    config = _read_object(path / "config.json")
    generation = path / "generation_config.json"
    parts = [config, config.get("text_config") or {}, _read_object(generation) if generation.exists() else {}]
    stated = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    tokens = [token for stop in stated for token in (stop if isinstance(stop, list) else [stop])]
    config["eos_token_id"] = sorted({token for token in tokens if type(token) is int})
    return config


def max_context(config: Mapping[str, Any], tokenizer: Any = None) -> int | None:
    """Return how many tokens the model reads at most, or None if neither its config nor its tokenizer states a limit.

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
    """Return the folder of a repo's snapshot, of which only what is missing is downloaded.

    A job must give the same answers tomorrow, even if the repo has changed on the hub since. Another program may have
    fetched a few files of the snapshot only, for example the config and the tokenizer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from pipeline.models.mlx_lm_internals import DEFAULT_ALLOW_PATTERNS

    download = partial(snapshot_download, repo, allow_patterns=DEFAULT_ALLOW_PATTERNS)
    path = None
    with suppress(LocalEntryNotFoundError, HFValidationError):
        path = Path(download(revision=revision, local_files_only=True))
        if not _missing_files(path) and (_has_chat_template(path) or _is_compared(path)):
            return path
    reason = "it may not be asked"
    try:
        path = Path(download(revision=path.name if path else revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = one_line(error)
        if path is None:
            at = f" at revision {revision}" if revision else ""
            raise ModelError(
                f"model {repo}{at}: neither a folder here nor a repo that Hugging Face provides ({reason}); "
                "check the name and the network, log in if the repo is gated, or give a local folder"
            ) from error
    if not _is_compared(path):
        if missing := _missing_files(path):
            raise ModelError(
                f"model {repo}: its snapshot {path} lacks {', '.join(missing)}, and Hugging Face gives nothing now "
                f"({reason}); run it again with a network, and the rest is downloaded"
            )
        if not _has_chat_template(path):
            _log.warning(
                "model %s: its snapshot has no chat template, and Hugging Face cannot be asked now whether the model "
                "has one; prompts are plain text, which is right only if it has none",
                repo,
            )
    return path


def _is_compared(path: Path) -> bool:
    """Return whether huggingface_hub has the list of all files of a snapshot, with which it compares the snapshot."""
    return (path.parent.parent / "trees" / f"{path.name}.json").exists()


def _missing_files(path: Path) -> list[str]:
    """Return the names of the files that a snapshot lacks, as far as its other files tell."""
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not _has_vocabulary(path):
        missing.append("tokenizer.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_read_object(index).get("weight_map", {}).values())
        return missing + sorted(name for name in shards if not (path / name).is_file())
    return missing if any(file.is_file() for file in path.glob(WEIGHTS)) else [*missing, WEIGHTS]


def _has_chat_template(path: Path) -> bool:
    config = path / "tokenizer_config.json"
    return any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")) or (
        config.is_file() and "chat_template" in _read_object(config)
    )


def _has_vocabulary(path: Path) -> bool:
    return any(file.is_file() for pattern in _VOCABULARIES for file in path.glob(pattern))


def _require_vocabulary(path: Path) -> None:
    if not _has_vocabulary(path):
        raise ModelError(f"model {path}: no tokenizer (tokenizer.json); copy it from the original model")


def weight_files(path: Path) -> list[Path]:
    """Return a model's weight files, sorted by name.

    Raises ModelError if there are none, or if the index names a file that is missing.
    """
    files = sorted(file for file in path.glob(WEIGHTS) if file.is_file())  # not what an incomplete snapshot links to
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
    """Check a weight file's header and length: a download that was interrupted is found before MLX reads it."""
    try:
        with file.open("rb") as stream:
            read_header(stream, any_dtype=True)
    except ValueError as error:
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


def _require_whole_heads(path: Path, model: Any, config: Mapping[str, Any], count: int) -> None:
    """Raise ModelError if `count` ranks cannot share the heads evenly: mlx-lm would cut a head in two."""
    if not hasattr(model, "shard"):
        raise ModelError(f"model {path}: mlx-lm can't split a {config.get('model_type')}; set scale.ranks to 1")
    text = config.get("text_config") or config
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = text.get(name)
        if isinstance(heads, int) and heads % count:
            raise ModelError(
                f"model {path}: {count} ranks can't share its {heads} {name} evenly; set scale.ranks to a divisor"
            )


@contextmanager
def _explained_failure(path: Path) -> Iterator[None]:
    """Raise ModelError for the exceptions of mlx-lm and transformers, which are of many kinds and name the reason."""
    try:
        yield
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
        hint = _TRUST_HINT if "trust_remote_code" in str(error) else ""
        raise ModelError(f"model {path}: mlx-lm can't load it ({one_line(error)}){hint}") from error


def check_layer_bits(codec: CacheCodec, path: Path, layers: int | None = None) -> None:
    """Raise ModelError if a codec has bits for a layer that the model in a folder does not have.

    layers: of the model, if it is loaded. Its config.json may count layers that keep no keys and values, too.
    """
    if layers is None and codec.layer_bits:
        config = _read_object(path / "config.json")
        text = config.get("text_config") or config
        layers = next((text[key] for key in _LAYER_KEYS if isinstance(text.get(key), int)), None)
    try:
        if layers is not None:
            codec.check_layers(layers)
    except ValueError as error:
        raise ModelError(f"model {path}: cache.{error}") from error


def prefix_bytes(codec: CacheCodec, config: Mapping[str, Any], tokens: int) -> int:
    """Return about how many bytes a prefix of `tokens` tokens takes on disk if every layer is compressed or kept as
    `codec` says.

    config: the model's config.json; the result is 0 if it does not state the model's sizes.
    """
    import mlx.core as mx

    from turboquant.runtime.device import on_cpu

    text = config.get("text_config") or config
    if not all(name in text for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")):
        return 0
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    float_bytes = 4 if on_cpu() or _stated_dtype(config) == mx.float32 else 2
    codecs = Counter(codec.for_layer(index, layers) for index in range(layers))
    return kv_heads * sum(count * each.nbytes(tokens, head_dim, float_bytes) for each, count in codecs.items())


def weights_bytes(path: Path, config: Mapping[str, Any]) -> int:
    """Return how much memory the weights of a model take here: in float32 on a CPU, as they are stored on a GPU."""
    from turboquant.runtime.device import on_cpu

    quantization = config.get("quantization") or {}
    total = 0
    for file in weight_files(path):
        with file.open("rb") as stream:
            tensors, _ = read_header(stream, any_dtype=True)
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            if not on_cpu():
                total += tensor.stop - tensor.start
            elif f"{layer}.scales" not in tensors or kind not in ("weight", "scales", "biases"):
                total += 4 * math.prod(tensor.shape)
            elif kind == "scales":  # of a quantised layer: one for each group of weights
                own = quantization.get(layer)
                group = (own if isinstance(own, dict) else quantization).get("group_size", 64)
                total += 4 * math.prod(tensor.shape) * int(group)
    return total
