"""mlx-lm's commands with compressed caches: their flags, what they print, and that nothing of them stays behind."""

from __future__ import annotations

import functools
import gc
import json
import re
import shutil
import sys
import threading
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.chat
import mlx_lm.server
import pytest
from mlx_lm.models import base, llama
from mlx_lm.models import cache as mlx_lm_cache

from tests import ROOT
from turboquant import (
    CacheCodec,
    TurboQuantKVCache,
    chat,
    enabled,
    generate,
    make_prompt_cache,
    save_prompt_cache,
    server,
)
from turboquant.generate import describe

GENERATE: Any = sys.modules["mlx_lm.generate"]
DEMO = ROOT / "jobs" / "demo" / "model"
LONG = "Who decided what? " * 60


@pytest.fixture(scope="module")
def model(build_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that mlx-lm can load: the demo model's tokenizer, and a tiny model of random weights."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    config = json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "head_dim": 64,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    args = llama.ModelArgs.from_dict(config)
    weights = dict(mlx_lm.utils.tree_flatten(llama.Model(args).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: 2 * x for name, x in weights.items()})
    return str(folder)


@pytest.fixture(autouse=True)
def _nothing_stays_replaced() -> Iterator[None]:
    modules = (GENERATE, mlx_lm.chat, mlx_lm.server, llama)
    before, arguments = [dict(vars(module)) for module in modules], list(sys.argv)
    yield
    assert [dict(vars(module)) for module in modules] == before
    assert sys.argv == arguments
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention


def stock_answer(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["mlx_lm.generate", *arguments])
        GENERATE.main()
    return capsys.readouterr().out


def test_it_prints_what_mlx_lm_prints_and_a_line_on_the_cache(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", model, "--prompt", LONG, "--max-tokens", "9", "--prefill-step-size", "100", "--temp", "0"]
    expected = stock_answer(flags, capsys, monkeypatch)
    assert generate.main([*flags, "--turbo-kv-bits", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    answer = lines.index("==========", 1)
    assert lines[:answer] == expected.splitlines()[:answer]
    assert [line.split(":")[0] for line in lines[answer + 1 :]] == ["Prompt", "Generation", "Peak memory", "Cache"]
    line = re.fullmatch(
        r"Cache: (.*) MB, (.*) bits a value; in full precision (.*) MB \(2 of 2 layers, (\d+) tokens\)", lines[-1]
    )
    assert line is not None
    assert float(line[1]) < float(line[3])
    assert float(line[3]) == pytest.approx(int(line[4]) * 2 * 2 * 2 * 64 * 4 / 1e6, abs=1e-3)
    assert generate.main([*flags, "--verbose", "False", "--turbo-kv-bits", "8"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:answer]


def test_keys_and_values_have_bits_of_their_own(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", model, "--prompt", LONG, "--max-tokens", "2", "--prefill-step-size", "64"]
    bits = []
    for turbo in ([], ["--turbo-kv-bits=2"], ["--turbo-kv-bits", "2", "--turbo-key-bits", "8"]):
        assert generate.main([*flags, *turbo]) == 0
        line = re.search(r"([\d.]+) bits a value", capsys.readouterr().out)
        assert line is not None
        bits.append(float(line[1]))
    assert bits[1] < bits[0] < bits[2]


def test_a_draft_model_may_be_used(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", model, "--prompt", LONG, "--max-tokens", "9"]
    assert generate.main([*flags, "--draft-model", model, "--prefill-step-size", "64"]) == 0
    assert "(2 of 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-bits", "4"], "use --turbo-kv-bits instead"),
        (["--kv-b=4"], "use --turbo-kv-bits instead"),
        (["--max-kv-size=100"], "--max-kv-size makes a rotating cache"),
        (["--max-kv", "100"], "--max-kv-size makes a rotating cache"),
        (["--turbo-kv-bits", "7"], "invalid choice: 7"),
        (["--turbo-kv-bit", "4"], "unrecognized arguments: --turbo-kv-bit"),
    ],
)
@pytest.mark.parametrize("command", [generate, chat, server])
def test_flags_that_cannot_be_used(
    command: Any, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(flags)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [generate, chat, server])
def test_help_has_the_flags_of_both(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "--turbo-key-bits" in printed
    assert "--prefill-step-size" in printed


def test_a_prompt_cache_file_of_ours_is_gone_on_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, metadata = str(tmp_path / "cache"), {"model": model, "tokenizer_config": "{}"}
    loaded, tokenizer = mlx_lm.load(model)
    cache = make_prompt_cache(loaded, CacheCodec(8, 8))
    tokens = tokenizer.encode(LONG)
    with enabled(loaded):
        list(GENERATE.generate_step(mx.array(tokens), loaded, prompt_cache=cache, max_tokens=0))
    save_prompt_cache(path, cache, metadata)
    flags = ["--prompt-cache-file", path, "--prompt", "And why?", "--max-tokens", "3"]
    assert generate.main(flags) == 0
    printed = capsys.readouterr().out
    prompt = re.search(r"Prompt: (\d+) tokens", printed)
    assert prompt is not None
    assert f"(2 of 2 layers, {len(tokens) + int(prompt[1]) + 3} tokens)" in printed
    assert generate.main([*flags, "--turbo-kv-bits", "4"]) == 2
    assert "leave the --turbo flags out" in capsys.readouterr().err
    save_prompt_cache(path, cache, {"model": model})
    assert generate.main(flags) == 2
    assert "save the cache with tokenizer_config in its metadata" in capsys.readouterr().err
    mlx_lm_cache.save_prompt_cache(f"{path}.safetensors", mlx_lm_cache.make_prompt_cache(loaded), metadata)
    assert generate.main(["--prompt-cache-file", f"{path}.safetensors"]) == 2
    assert "it is a prompt cache of mlx-lm: load it" in capsys.readouterr().err
    assert generate.main(["--prompt-cache-file", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    assert generate.main(["--prompt-cache-file", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .*Is a directory.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", [generate, chat])
def test_a_model_that_cannot_be_loaded(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (tmp_path, tmp_path / "absent"):
        assert command.main(["--model", str(model)]) == 2
        assert re.fullmatch(rf"error: .*{re.escape(str(model))}.*\n", capsys.readouterr().err)


def test_an_exception_leaves_nothing_replaced(model: str) -> None:
    with pytest.raises(ValueError, match="non-zero"):
        generate.main(["--model", model, "--max-tokens", "0"])


def test_a_model_may_be_dropped_while_it_is_enabled(model: str) -> None:
    """As a server does, that loads another."""
    loaded, _ = mlx_lm.load(model)
    watched = weakref.ref(loaded)
    with enabled(loaded):
        del loaded
        gc.collect()
        assert watched() is None


def test_a_cache_without_compressed_layers_is_described() -> None:
    assert describe([mlx_lm_cache.KVCache()]) == "no layer is compressed"
    assert describe([TurboQuantKVCache()]).startswith("0.000 MB, 0.00 bits")


# --- chat and server


def test_chat_answers_on_a_compressed_cache(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions, the second on the cache of the first, and a reset."""
    used: list[Any] = []
    stream = mlx_lm.chat.stream_generate

    class Screen:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.queries = iter([LONG, LONG, "r", "And why?", "q"])

        def __enter__(self) -> Screen:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def prompt(self) -> str:
            return next(self.queries)

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    def watched(*arguments: Any, **options: Any) -> Any:
        used.append(options["prompt_cache"])
        return stream(*arguments, **options)

    monkeypatch.setattr(mlx_lm.chat, "ChatUI", Screen)
    monkeypatch.setattr(mlx_lm.chat, "stream_generate", watched)
    assert chat.main(["--model", model, "--max-tokens", "3", "--turbo-kv-bits", "5"]) == 0
    assert used[0] is used[1] is not used[2]
    assert all(isinstance(cache, TurboQuantKVCache) and cache.codec.key_bits == 5 for row in used for cache in row)
    assert used[1][0].layer is not None
    monkeypatch.undo()


def serve(
    main: Callable[[], Any], requests: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[Any]]:
    """The answers of a server to groups of requests, each group sent at once; and the caches it has kept."""
    answers: list[str] = []
    kept: list[Any] = []

    def run_http_server(host: str, port: int, generator: Any) -> None:
        def handle(*arguments: Any) -> Any:
            return mlx_lm.server.APIHandler(generator, *arguments, system_fingerprint="")

        http = ThreadingHTTPServer(("127.0.0.1", 0), handle)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            for group in requests:
                with ThreadPoolExecutor(len(group)) as pool:
                    answers.extend(pool.map(functools.partial(ask, http.server_port), group))
            assert generator.model_provider.is_batchable
            cached = generator.prompt_cache
            kept.extend(cached._trie.get(*entry).prompt_cache for lru in cached._lru._lrus.values() for entry in lru)
        finally:
            http.shutdown()
            thread.join()
            http.server_close()
            generator.stop_and_join()

    with monkeypatch.context() as patch:
        patch.setattr(mlx_lm.server, "_run_http_server", run_http_server)
        main()
    return answers, kept


def ask(port: int, prompt: str) -> str:
    body = json.dumps({"prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["text"])


def test_the_server_answers_batches_on_compressed_caches(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests at once, and then one whose beginning is cached."""
    flags = ["--model", model, "--prefill-step-size", "128", "--log-level", "ERROR"]
    requests = [[LONG + "And why?", LONG + "When?", "Who?"], [LONG + "And why not?"]]

    def stock() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mlx_lm.server", *flags])
            mlx_lm.server.main()

    expected, _ = serve(stock, requests, monkeypatch)
    answers, kept = serve(lambda: server.main([*flags, "--turbo-kv-bits", "8"]), requests, monkeypatch)
    assert answers == expected
    layers = [layer for cache in kept for layer in cache]
    assert all(isinstance(layer, TurboQuantKVCache) for layer in layers)
    assert sum(layer.layer is not None for layer in layers) >= 6  # those of the three long requests
