"""Finding, checking, loading and fingerprinting a model folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.errors import ModelError
from pipeline.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from pipeline.models.loading import load_model, load_tokenizer, max_context, quantizations, resolve_model

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random two-layer llama in half precision, with a tokenizer of eight words."""
    folder = tmp_path_factory.mktemp("tiny")
    write_weights(folder, CONFIG)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def write_weights(folder, config, quantization=None):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.utils import quantize_model

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.float16)
    if quantization:
        model, config = quantize_model(model, config, **quantization)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return model


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<end>": 1, "the": 2, "a": 3, "cat": 4, "dog": 5, "sat": 6, "ran": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "<end>",
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")


def change_one_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# ---- loading


def test_load_model_answers(folder):
    import mlx.core as mx

    loaded = load_model(folder)
    logits = loaded.model(mx.array([loaded.tokenizer.encode("the cat sat")]))
    assert logits.shape == (1, 3, 16)
    assert loaded.config["max_position_embeddings"] == 512


def test_bits_of_a_layer_that_a_loaded_model_does_not_have(folder):
    from turboquant import CacheCodec

    with pytest.raises(ModelError, match=r"cache\.layer_bits names layer -3, but the model has 2 layers"):
        load_model(folder, codec=CacheCodec(layer_bits=((-3, 8, 8),)))


def test_weights_become_float32_on_a_cpu(folder):
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model = load_model(str(folder)).model
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    kinds = {x.dtype for _, x in tree_flatten(model.parameters())}
    assert kinds == {mx.float32 if on_cpu else mx.float16}


@pytest.mark.parametrize("mode", [{"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}])
def test_quantized_layers_are_dequantized_on_a_cpu(folder, mode):
    import mlx.core as mx
    import mlx.nn as nn

    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("quantized layers stay as they are on a GPU")
    quantized = write_weights(folder, CONFIG, mode)
    loaded = load_model(folder).model
    assert not any(isinstance(module, nn.QuantizedLinear) for _, module in loaded.named_modules())
    quantized.set_dtype(mx.float32)
    tokens = mx.array([[2, 4, 6, 8]])
    assert mx.allclose(loaded(tokens), quantized(tokens), atol=1e-4).item()


def test_load_tokenizer_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(folder).encode("the cat") == [2, 4]


def test_stop_tokens_of_the_generation_config_count(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load_tokenizer(folder).eos_token_ids == {1, 3}
    assert load_model(folder).tokenizer.eos_token_ids == {1, 3}


@pytest.mark.parametrize("stated", [2, [2, 4], None])
def test_stop_tokens_of_both_configs_and_the_tokenizer_count_together(folder, stated):
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": stated, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"eos_token_id": 6}}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    expected = {1, 3, 6} | {token for token in (2, 4) if token in (stated if isinstance(stated, list) else [stated])}
    assert load_tokenizer(folder).eos_token_ids == expected
    assert load_model(folder).tokenizer.eos_token_ids == expected


# ---- errors


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such folder") as caught:
        resolve_model(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(folder / "config.json")


def test_repo_that_cannot_be_fetched(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"owner/no-such-model: neither a folder here nor .* Hugging Face"):
        resolve_model("owner/no-such-model")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights.*mlx_lm.convert"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_missing_file_is_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: b"\xff" * len(content),
        lambda content: (2).to_bytes(8, "little") + b"[]",
        lambda content: (16).to_bytes(8, "little") + b'{"a": {"b": {}}}',
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["truncated", "header only", "empty", "too long", "noise", "list", "no offsets", "lfs pointer"],
)
def test_damaged_weights_are_named(folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match="damaged weights") as caught:
        load_model(folder)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff", '{"model_type": "llama"}', '{"model_type": "nonesuch"}'])
def test_unusable_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=str(folder)):
        load_model(folder)


def test_weights_of_another_shape(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 32}))
    with pytest.raises(ModelError, match="can't load it"):
        load_model(folder)


def test_code_of_a_model_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_file": "evil.py"}))
    with pytest.raises(ModelError, match="can't load it"):
        load_model(folder)


# ---- context length


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_max_context(config, expected):
    assert max_context(config) == expected


@pytest.mark.parametrize(("stated", "expected"), [(256, 256), (int(1e30), None), (0, None)])
def test_max_context_of_the_tokenizer(stated, expected):
    class Tokenizer:
        model_max_length = stated

    assert max_context({}, Tokenizer()) == expected
    assert max_context({"max_position_embeddings": 9}, Tokenizer()) == 9


# ---- fingerprints


@pytest.fixture
def memo(tmp_path):
    return tmp_path / "cache" / "fingerprints.json"


def test_same_weights_elsewhere_have_the_same_fingerprint(folder, tmp_path, memo):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert weights_fingerprint(folder, memo) == weights_fingerprint(copy, memo)
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(copy)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_one_byte_changes_the_weights_fingerprint(folder, memo, file):
    before = weights_fingerprint(folder, memo)
    change_one_byte(folder / file)
    assert weights_fingerprint(folder, memo) != before


def test_weights_fingerprint_ignores_the_tokenizer(folder, memo):
    before = weights_fingerprint(folder, memo)
    change_one_byte(folder / "tokenizer.json")
    assert weights_fingerprint(folder, memo) == before


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_one_byte_changes_the_tokenizer_fingerprint(folder, file):
    before = tokenizer_fingerprint(folder)
    change_one_byte(folder / file)
    assert tokenizer_fingerprint(folder) != before


def test_fingerprint_without_weights(folder, memo):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        weights_fingerprint(folder, memo)


def test_memo_saves_hashing(folder, memo, monkeypatch):
    before = weights_fingerprint(folder, memo)
    monkeypatch.setattr("pipeline.models.fingerprints._hash_file", lambda file: pytest.fail(f"hashed {file} again"))
    assert weights_fingerprint(folder, memo) == before


def test_a_memo_with_one_other_digit_is_thrown_away(folder, memo):
    """One digit would make everything in the store, and all rows, those of other weights."""
    before, good = weights_fingerprint(folder, memo), memo.read_text()
    (entry,) = json.loads(good)["files"].values()
    for digit in range(64):
        digest = entry["sha256"]
        other = f"{digest[:digit]}{int(digest[digit], 16) ^ 1:x}{digest[digit + 1 :]}"
        memo.write_text(good.replace(digest, other))
        assert weights_fingerprint(folder, memo) == before
        assert memo.read_text() == good


def test_memo_does_not_hide_a_change_with_the_old_time(folder, memo):
    """What `cp -p` or `rsync -t` does: same name, size and mtime, other content."""
    file = folder / "model.safetensors"
    before, state = weights_fingerprint(folder, memo), file.stat()
    change_one_byte(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert weights_fingerprint(folder, memo) != before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 2}', '{"format": 99, "files": {}}', '{"format": 2, "files": [1]}', "[" * 10**6],
    ids=range(8),
)
def test_broken_memo_is_ignored_and_replaced(folder, memo, content):
    before = weights_fingerprint(folder, memo)
    memo.write_text(content)
    assert weights_fingerprint(folder, memo) == before
    assert str(folder / "model.safetensors") in json.loads(memo.read_text())["files"]


def test_memo_that_cannot_be_written_costs_only_time(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(weights_fingerprint(folder, tmp_path / "file" / "fingerprints.json")) == 64


def test_memo_keeps_other_models(folder, tmp_path, memo):
    weights_fingerprint(folder, memo)
    weights_fingerprint(shutil.copytree(folder, tmp_path / "copy"), memo)
    assert len(json.loads(memo.read_text())["files"]) == 2
    assert [file.name for file in memo.parent.iterdir()] == [memo.name]


def test_the_ways_in_which_weights_are_quantised_are_read_from_the_config() -> None:
    from turboquant.mlx_lm.kernels_ahead import Quantized

    own = {"lm_head": {"group_size": 64, "bits": 6}, "norm": False, "embed": {"group_size": 64, "bits": 4}}
    config = {"quantization": {"group_size": 64, "bits": 4, "mode": "affine", **own}}
    assert quantizations(config) == (Quantized(64, 4), Quantized(64, 6))
    assert quantizations({}) == ()
    for odd in ("4 bits", ["q4"], {"group_size": "64", "bits": None}, {"group_size": 64, "lm_head": 4}):
        assert quantizations({"quantization": odd}) == ()
    assert quantizations({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}) == (
        Quantized(32, 4, "mxfp4"),
    )


def test_kernels_are_prepared_without_importing_mlx_lm() -> None:
    code = (
        "import sys; from pipeline.models.loading import prepare_kernels; from turboquant import CacheCodec\n"
        "prepare_kernels({'hidden_size': 64, 'num_attention_heads': 2, 'torch_dtype': 'float16'}, CacheCodec())\n"
        "print('mlx_lm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
