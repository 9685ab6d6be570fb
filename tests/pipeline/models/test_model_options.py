"""What a job may say of its model: an adapter, a revision, and whether code that comes with it is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ModelError
from tests import ROOT
from tests.pipeline.command_line import error_of, hub_settings, invoke
from tests.pipeline.workplace import Workplace


def write_adapter(folder: Path, model: Path, rank: int = 4) -> Path:
    """An adapter as mlx-lm's training writes one, untrained and without zeros."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": rank, "scale": 20.0, "dropout": 0.0}
    loaded = load(str(model))[0]
    loaded.freeze()
    linear_to_lora_layers(loaded, 2, parameters)
    mx.random.seed(1)
    leaves: Any = tree_flatten(loaded.trainable_parameters())
    weights = {name: mx.random.normal(leaf.shape, scale=0.05) for name, leaf in leaves}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ---- adapters


def test_an_adapter_is_part_of_the_weights(workplace: Workplace) -> None:
    workplace.run()
    plain = workplace.answers()
    write_adapter(workplace.folder / "adapter", workplace.model)
    workplace.save(adapter="adapter")
    report = workplace.run()
    assert (report.rows_kept, report.prefixes_built) == (0, 3)
    adapted = workplace.answers()
    assert all(adapted[pair] != plain[pair] for pair in plain)
    assert workplace.run().rows_kept == 9
    del workplace.tree["adapter"]
    report = workplace.run()
    assert (report.rows_kept, report.prefixes_restored) == (0, 3)
    assert workplace.answers() == plain


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_a_changed_adapter_is_another(workplace: Workplace, name: str) -> None:
    adapter = write_adapter(workplace.folder / "adapter", workplace.model)
    workplace.run(f"adapter={adapter}")
    content = (adapter / name).read_bytes()
    changed = content.replace(b"20.0", b"10.0") if name.endswith("json") else content[:-1] + bytes([content[-1] ^ 1])
    (adapter / name).write_bytes(changed)
    assert workplace.run(f"adapter={adapter}").rows_kept == 0


def test_an_adapter_on_quantised_weights(workplace: Workplace) -> None:
    import mlx.core as mx
    from mlx_lm import convert

    from pipeline.models.loading import load_model

    quantised = workplace.folder / "quantised"
    convert(str(workplace.model), str(quantised), quantize=True, q_group_size=64, q_bits=8)
    adapter = write_adapter(workplace.folder / "adapter", workplace.model)
    tokens = mx.array([[5, 6, 7]])
    logits = [load_model(model, adapter=adapter).model(tokens) for model in (quantised, workplace.model)]
    bare = load_model(workplace.model).model(tokens)
    assert mx.abs(logits[0] - logits[1]).max() < 0.1 * mx.abs(bare - logits[1]).max()
    assert workplace.run(f"model={quantised}", f"adapter={adapter}").rows_answered == 9


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 4, "q_group_size": 32},
        {"q_bits": 8, "q_group_size": 64},
        {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
        {"quant_predicate": "mixed_3_4", "q_group_size": 32},
        {"quant_predicate": "mixed_4_6", "q_group_size": 32},
        # A size for each layer in the config, as distillation (DWQ) writes it.
        {"quant_predicate": lambda path, _: {"bits": 8 if "embed" in path else 4, "group_size": 32, "mode": "affine"}},
    ],
    ids=["4 bits", "8 bits", "mxfp4", "mixed 3 and 4", "mixed 4 and 6", "each layer its own"],
)
def test_a_quantised_model_answers_alike_in_batches_and_from_the_store(
    workplace: Workplace, options: dict[str, Any]
) -> None:
    from mlx_lm import convert

    quantised = workplace.folder / "quantised"
    convert(str(workplace.model), str(quantised), quantize=True, **options)
    assert "quantization" in json.loads((quantised / "config.json").read_text())
    assert "of memory" in invoke("plan", workplace.save(model=str(quantised))).stdout
    workplace.run()
    answers = workplace.answers()
    assert all(row["status"] == "ok" for row in workplace.rows().values())
    workplace.output.unlink()
    report = workplace.run("generation.batch_size=1")
    assert (report.prefixes_restored, report.rows_answered) == (3, 9)
    assert workplace.answers() == answers


@pytest.mark.parametrize("name", ["run", "plan"])
def test_a_folder_that_holds_no_adapter(workplace: Workplace, name: str) -> None:
    (workplace.folder / "bare").mkdir()
    error = error_of(invoke(name, workplace.save(adapter="bare")))
    assert error.startswith(f"adapter {workplace.folder}/bare: no adapter_config.json; give the folder that ")


def test_an_adapter_of_another_model(workplace: Workplace, write_model: Callable[..., Path]) -> None:
    other = write_model(workplace.folder / "other", hidden_size=64, num_attention_heads=1)
    adapter = write_adapter(workplace.folder / "adapter", other)
    assert "incompatible tensors" in error_of(invoke("run", workplace.save(adapter=str(adapter))))
    assert not workplace.output.exists()


def test_a_damaged_adapter(workplace: Workplace) -> None:
    adapter = write_adapter(workplace.folder / "adapter", workplace.model)
    weights = adapter / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"adapters\.safetensors: damaged weights"):
        workplace.run(f"adapter={adapter}")


# ---- revisions


def test_a_revision_is_the_one_that_is_asked_for(workplace: Workplace, write_model: Callable[..., Path]) -> None:
    """From a cache of Hugging Face's, without a network."""
    repo = workplace.folder / "hub" / "models--owner--name"
    for number, tag in enumerate(["v1", "v2"]):
        commit = f"{'c' * 39}{number}"
        write_model(repo / "snapshots" / commit, seed=number)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / tag).write_text(commit)
    shutil.copy(repo / "refs" / "v2", repo / "refs" / "main")
    hub = {"HF_HUB_CACHE": str(workplace.folder / "hub"), "HF_HUB_OFFLINE": "1"}
    job = workplace.save(model="owner/name", revision="v1")
    command = [sys.executable, "-m", "pipeline.cli", "run", str(job)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | hub)
    first = workplace.answers()
    with hub_settings(**hub):
        assert workplace.run(f"revision={'c' * 39}1").rows_kept == 0
        assert workplace.answers() != first
        assert workplace.run("revision=null").rows_kept == 9  # main is v2
        error = error_of(invoke("run", job, "--set", "revision=v3"))
    assert error.startswith("model owner/name at revision v3: neither a folder here nor a repo that ")


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_documents_are_cut_for_the_revision_that_is_asked_for(
    workplace: Workplace, write_model: Callable[..., Path], policy: str
) -> None:
    """The main branch is not here, so whoever asks for it fails."""
    repo = workplace.folder / "hub" / "models--owner--name"
    write_model(repo / "snapshots" / f"{'c' * 40}", max_position_embeddings=512)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text("c" * 40)
    hub = {"HF_HUB_CACHE": str(workplace.folder / "hub"), "HF_HUB_OFFLINE": "1"}
    workplace.documents["d0"] *= 4
    with hub_settings(**hub):
        documents = {"path": "docs.parquet", "too_long": policy}
        report = workplace.run_with(model="owner/name", revision="v1", documents=documents)
    assert (report.documents_truncated if policy == "truncate" else report.documents_split) > 0


def test_a_folder_has_no_revisions(workplace: Workplace) -> None:
    with pytest.raises(
        ModelError, match=r"^revision v1: a revision is for models from Hugging Face, and .* is a folder$"
    ):
        workplace.run("revision=v1")


# ---- code that comes with a model


@pytest.fixture
def own_code(workplace: Workplace) -> Path:
    """The code of a model that brings its own; it writes a file where it is run."""
    model = shutil.copytree(workplace.model, workplace.folder / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_file": "own.py"}
    (model / "config.json").write_text(json.dumps(config))
    code = model / "own.py"
    mark = workplace.folder / "was-run"
    code.write_text(f"from mlx_lm.models.llama import Model, ModelArgs\nopen({str(mark)!r}, 'w').close()\n")
    workplace.save(model="model")
    return code


def test_a_model_s_own_code_is_not_run_unasked(workplace: Workplace, own_code: Path) -> None:
    error = error_of(invoke("run", workplace.job_file))
    assert error.endswith("; if you trust the code that comes with it, set `trust_remote_code: true` in the job")
    assert invoke("plan", workplace.job_file).exit_code == 0
    assert not (workplace.folder / "was-run").exists()


def test_a_model_s_own_code_is_run_and_is_part_of_the_weights(workplace: Workplace, own_code: Path) -> None:
    assert workplace.run("trust_remote_code=true").rows_answered == 9
    assert (workplace.folder / "was-run").exists()
    assert workplace.run("trust_remote_code=true").rows_kept == 9
    own_code.write_text(own_code.read_text() + "# changed\n")
    assert workplace.run("trust_remote_code=true").rows_kept == 0


def test_a_tokenizer_s_own_code_is_not_run_unasked(workplace: Workplace, own_code: Path) -> None:
    config = own_code.parent / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Model", None]}}
    config.write_text(json.dumps(settings | {"tokenizer_class": "Own"}))
    for name in ("plan", "run"):
        invoke(name, workplace.job_file)
        assert not (workplace.folder / "was-run").exists()
