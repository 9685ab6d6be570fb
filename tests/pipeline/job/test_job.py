from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import JobError
from pipeline.job.job import Generation, Query, Settings
from pipeline.job.job_file import load_job

MINIMAL = """\
model: owner/name
documents: {path: docs.parquet}
queries:
  - {id: summary, text: Summarize.}
cache: {dir: .cache}
output: {path: ../out/answers.parquet}
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "minutes.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults(job_file: Path) -> None:
    job = load_job(job_file)
    assert job.name == "minutes"
    assert (job.documents.id, job.documents.text) == ("id", "text")
    assert job.prompt.context == "{{ text }}"
    assert job.generation == Generation(max_tokens=256, temperature=0.0, top_p=1.0, seed=0, batch_size=16)
    cache = job.cache
    assert (cache.key_bits, cache.value_bits, cache.sinks, cache.window) == (4, 4, 16, 128)
    assert cache.prefill == "exact"


def test_paths_are_relative_to_the_job_file(job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    job = load_job(job_file)
    assert job.documents.path == str(tmp_path / "jobs" / "docs.parquet")
    assert job.cache.dir == tmp_path / "jobs" / ".cache"
    assert job.result_file == tmp_path / "out" / "answers.parquet"


def test_paths_of_overrides_are_relative_to_the_current_directory(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    job = load_job(job_file, ["output.path=a.parquet", "documents={path: d/*.parquet}", "cache.dir=~/c"])
    assert job.result_file == tmp_path / "here" / "a.parquet"
    assert job.documents.path == str(tmp_path / "here" / "d" / "*.parquet")
    assert job.cache.dir == tmp_path / "c"


@pytest.mark.parametrize("section", ["", "cache: {dir: elsewhere}", "cache: {key_bits: 2}"])
def test_a_store_that_no_key_names_is_beside_the_job_file(job_file: Path, tmp_path: Path, section: str) -> None:
    job_file.write_text(job_file.read_text().replace("cache: {dir: .cache}", section))
    cache = load_job(job_file, ["cache={key_bits: 3, value_bits: 3}"]).cache
    assert (cache.dir, cache.key_bits, cache.value_bits) == (tmp_path / "jobs" / ".cache", 3, 3)
    assert load_job(job_file, ["cache.sinks=7"]).cache.sinks == 7


def test_environment_variables_are_not_expanded(job_file: Path, tmp_path: Path) -> None:
    assert load_job(job_file, ["cache.dir=$HOME/c"]).cache.dir.parts[-2] == "$HOME"


def test_the_model_is_a_folder_if_there_is_one(job_file: Path, tmp_path: Path) -> None:
    assert load_job(job_file).model == "owner/name"
    (tmp_path / "jobs" / "owner" / "name").mkdir(parents=True)
    assert load_job(job_file).model == str(tmp_path / "jobs" / "owner" / "name")


@pytest.mark.parametrize("model", ["../nowhere", "gpt2", "/no/such/folder", "./owner/name"])
def test_a_model_that_is_neither_folder_nor_repo_names_the_folder_tried(job_file: Path, model: str) -> None:
    text = message(job_file, f"model={model}")
    assert "there is no folder /" in text
    assert f"'{model}'" in text


def test_a_query_overrides_the_defaults() -> None:
    defaults = Generation(max_tokens=10, seed=3)
    assert Query(id="a", text="b").settings(defaults) == Settings(10, 0.0, 1.0, 3)
    query = Query(id="a", text="b", max_tokens=5, temperature=0.0, top_p=0.5, seed=0)
    assert query.settings(defaults) == Settings(5, 0.0, 0.5, 0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "generation.max_token=3",
            "unknown key 'generation.max_token'; did you mean 'max_tokens'?",
        ),
        ("queries.0.txt=x", "unknown key 'queries.0.txt'; did you mean 'text'?"),
        ("quries=[]", "unknown key 'quries'; did you mean 'queries'?"),
        ("cache.budget=much", "cache.budget expected a size such as 20GB, 500MiB or 10%, got 'much'"),
        ("generation.max_tokens=many", "generation.max_tokens: expected a whole number, got 'many'"),
        ("generation.max_tokens=true", "generation.max_tokens: expected a whole number, got true"),
        ("generation.max_tokens=1.5", "generation.max_tokens: expected a whole number, got 1.5"),
        ("generation.max_tokens=0", "generation.max_tokens: expected at least 1, got 0"),
        ("generation.batch_size=0", "generation.batch_size: expected at least 1, got 0"),
        ("generation.temperature=hot", "generation.temperature: expected a number, got 'hot'"),
        ("generation.temperature=.nan", "generation.temperature: expected"),
        ("generation.top_p=0", "generation.top_p: expected more than 0, got 0"),
        ("generation.top_p=1.1", "generation.top_p: expected at most 1, got 1.1"),
        ("cache.key_bits=7", "cache.key_bits: expected 2, 3, 4, 5, 6, 8 or 16, got 7"),
        ("cache.value_bits=four", "cache.value_bits: expected 2, 3, 4, 5, 6, 8 or 16, got 'four'"),
        ("cache.window=-1", "cache.window: expected at least 0, got -1"),
        ("cache.prefill=fast", "cache.prefill: expected 'exact' or 'streaming', got 'fast'"),
        ("cache.segment=100", "cache.segment: expected at least 512, got 100"),
        ("cache.dir=3", "cache.dir: expected a path, got 3"),
        ("cache.dir=s3://bucket/x", "cache.dir: expected a path on this machine, got the URL"),
        ("queries=[]", "queries: expected at least one, got an empty list"),
        ("queries=all", "queries: expected a list, got 'all'"),
        ("queries.0=3", "queries.0: expected a mapping of keys, got 3"),
        ("queries={path: q.parquet, txt: x}", "unknown key 'queries.txt'; did you mean 'text'?"),
        ("queries={id: x}", "the required key 'queries.path' is missing"),
        ("documents.too_long=cut", "documents.too_long: expected 'error', 'truncate' or 'split', got 'cut'"),
        ("output.path=' '", "output.path is empty"),
        ("output.path=" + "a" * 300, "output.path is not a valid path: [Errno 36] File name too long"),
        ('cache.dir="a\\0"', "line 1, column 1: \\0 is a NUL character, which no text has"),
        (
            "generation.seed=0x" + "f" * 6000,
            "generation.seed: expected at most 9.22337e+18, got a number of",
        ),
        ("queries.0.id=no", "queries.0.id: expected text, got false; put it in quotes"),
        ("queries.0.id=2024-01-01", "queries.0.id: expected text, got 2024-01-01; put it in quotes"),
        ("queries.0.text=' '", "queries.0.text is empty"),
        ("prompt=", "prompt: expected a mapping of keys, got nothing"),
        ("documents.path=", "documents.path: expected text, got nothing"),
        ("queries=[{id: a, text: x}, {id: a, text: y}]", "queries: the id 'a' is given 2 times"),
        ("queries.1.text=x", "'queries' is a list of 1: use queries.0 to queries.0"),
        ("queries.first.text=x", "'queries' is a list of 1: use queries.0 to queries.0"),
        ("model.name=x", "'model' is 'owner/name' and has no keys"),
        ("generation.max_tokens", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=3", "expected key.path=value"),
        ("documents.path=*.parquet", "put a value that starts with {{ or * in quotes"),
        ("scale.workers=0", "scale.workers: expected at least 1, got 0"),
        ("scale.num_gpus=1.5", "scale.num_gpus is 1.5; above 1 Ray takes whole numbers only"),
        ("scale.resources={mac: 0}", "scale.resources.mac: expected more than 0, got 0"),
        ("scale.resources={GPU: 1}", "scale.resources has GPU, which is one of Ray's own; write scale.num_cpus or"),
        ("prompt.context={{ text }}", "put a value that starts with {{ or * in quotes"),
    ],
)
def test_a_wrong_override_is_one_clear_line(job_file: Path, override: str, expected: str) -> None:
    text = message(job_file, override)
    assert expected in text
    # What is about the job as a whole is said of the file.
    assert text.startswith((f"--set {override}: ", f"{job_file}: queries: the id"))


def test_overrides_reach_into_sections_that_the_file_leaves_out(job_file: Path) -> None:
    job = load_job(job_file, ["generation.max_tokens=7", "queries.0.text=Why = how?", "prompt.system=null"])
    assert job.generation.max_tokens == 7
    assert job.queries[0].text == "Why = how?"
    assert job.prompt.system is None


def test_a_path_that_is_overridden_need_not_exist(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    job_file.write_text(re.sub("^model: .*", "model: ../gone", job_file.read_text(), flags=re.MULTILINE))
    assert "model: there is no folder" in message(job_file)
    assert load_job(job_file, [f"model={tmp_path / 'model'}"]).model == str(tmp_path / "model")


def test_the_last_override_of_a_key_wins(job_file: Path) -> None:
    assert load_job(job_file, ["generation.seed=1", "generation.seed=2"]).generation.seed == 2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("output: {path: ../out/answers.parquet}\n", "", "the required key 'output' is missing"),
        ("{id: summary, text: Summarize.}", "{id: summary}", "the required key 'queries.0.text' is missing"),
        # Misspelt and so missing: what was written is named.
        ("documents:", "document:", "unknown key 'document'; did you mean 'documents'?"),
        ("cache: ", "model: ", "line 5, column 1: the key 'model' is given twice"),
        ("queries:", "queries: [", "line "),
        ("{dir: .cache}", "{dir: {{ x }}}", "put a value that starts with {{ or * in quotes"),
        ("model: owner/name", "model: 2024-13-45", "not YAML"),
        ("model: owner/name", '"mo\\ndel": x', "unknown key 'mo del'"),
        ("Summarize.", '"\\n\\ud83d"', "line 4, column 25: \\ud83d is half a character"),
        ("Summarize.", '"\\ude00\\ud83d"', "line 4, column 25: \\ude00 is half a character"),
        ("Summarize.", r'"a\0b"', r"line 4, column 25: \0 is a NUL character"),
        ("cache: ", '"\\udc80": ', "line 5, column 1: \\udc80 is half a character"),
        ("{dir: .cache}", "&a {dir: .cache, x: *a}", "a mapping contains itself"),
        ("{dir: .cache}", "{dir: .cache, 1: 2}", "cache.1: expected text as a key, got 1"),
    ],
)
def test_a_wrong_file_is_one_clear_line(job_file: Path, old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    job_file.write_text(MINIMAL.replace(old, new))
    text = message(job_file)
    assert text.startswith(f"{job_file}: ")
    assert expected in text


@pytest.mark.parametrize("content", [b"", b"- a\n", b"just text", b"\xff\xfe\xfa", b"a: \x00", b"[" * 1000])
def test_a_file_that_is_no_job_is_one_clear_line(job_file: Path, content: bytes) -> None:
    job_file.write_bytes(content)
    assert message(job_file).startswith(f"{job_file}: ")


def test_a_missing_file_names_its_neighbour(job_file: Path) -> None:
    assert "no such job file; did you mean 'minutes.yaml'?" in message(job_file.with_name("minute.yaml"))
    assert "no such job file" in message(job_file.parent / "no" / "such.yaml")
    assert "cannot be read" in message(job_file.parent)


@pytest.mark.parametrize(
    ("documents", "refused"),
    [
        ("d/a.parquet", True),
        ("d", True),
        ("d/*.parquet", True),
        ("**/*.parquet", True),
        ("**", True),
        ("**/*.md", False),
        ("d/b.parquet", False),
        ("*.parquet", False),
        ("d/b*.parquet", False),
        ("e", False),
    ],
)
def test_a_result_that_would_become_input_is_refused(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, documents: str, refused: bool
) -> None:
    monkeypatch.chdir(job_file.parent)
    overrides = [f"documents.path='{documents}'", "output.path=d/a.parquet"]
    if refused:
        assert "would be read as documents" in message(job_file, *overrides)
    else:
        load_job(job_file, overrides)


def test_an_emoji_as_json_writes_it_is_one_character(job_file: Path) -> None:
    queries = [{"id": "😀", "text": "What does 😀 mean?"}]
    job_file.write_text(json.dumps(yaml.safe_load(MINIMAL) | {"queries": queries}))
    assert "\\ud83d\\ude00" in job_file.read_text()
    assert [(query.id, query.text) for query in load_job(job_file).queries] == [("😀", "What does 😀 mean?")]


def test_a_plain_text_is_a_query_with_an_id_made_of_it(job_file: Path) -> None:
    long = "Who are the parties, and where does each of them live?"
    texts = ["Who signed?", long, "契約の期間は?", "???", {"id": "own", "text": "Why?", "seed": 3}]
    job_file.write_text(yaml.safe_dump(yaml.safe_load(MINIMAL) | {"queries": texts}, allow_unicode=True))
    queries = {query.id: query.text for query in load_job(job_file).queries}
    ids = ["who-signed", "who-are-the-parties-and-where-doe-ddf475", "契約の期間は", "query-a03b22", "own"]
    assert list(queries) == ids
    assert list(queries.values()) == [*texts[:4], "Why?"]
    assert load_job(job_file, ['queries=["Who signed?"]']).queries[0].id == "who-signed"
    assert "the id 'who-signed' is given 2 times" in message(job_file, 'queries=["Who signed?", who signed]')
    assert "queries.0: expected" in message(job_file, "queries=[3]")
    assert "queries.0: expected" in message(job_file, "queries=[' ']")


def test_a_store_is_beside_the_job_file_unless_the_job_names_another(job_file: Path) -> None:
    default = job_file.parent / ".cache"
    for old, new in (("cache: {dir: .cache}\n", ""), ("{dir: .cache}", "{key_bits: 3}")):
        job_file.write_text(MINIMAL.replace(old, new))
        assert load_job(job_file).cache.dir == default
    assert load_job(job_file, ["cache.value_bits=2"]).cache.dir == default


def test_scientific_notation_is_a_number(job_file: Path) -> None:
    assert load_job(job_file, ["generation.temperature=1e-1"]).generation.temperature == 0.1


def test_a_url_of_documents_is_kept(job_file: Path) -> None:
    assert load_job(job_file, ["documents.path=s3://b/x.parquet"]).documents.path == "s3://b/x.parquet"
    assert load_job(job_file, ["documents.path=file:///d/x.parquet"]).documents.path == "/d/x.parquet"


def test_a_result_at_a_url_is_written_in_the_store_first(job_file: Path) -> None:
    job, other = (load_job(job_file, ["cache.dir=/c", f"output.path=s3://b/{name}/a.parquet"]) for name in "xy")
    assert job.result_url == "s3://b/x/a.parquet"
    assert (job.result_file.parents[1], job.result_file.name) == (Path("/c/outputs"), "a.parquet")
    assert job.result_file != other.result_file
    assert "would be read as documents" in message(
        job_file, "output.path=s3://b/d/a.parquet", "documents.path=s3://b/d/"
    )
    inner = ["cache.dir=/c", "documents.path=/c/**/*.parquet"]
    assert "/a.parquet would be read as documents" in message(job_file, "output.path=s3://b/a.parquet", *inner)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
_keys = [
    "name",
    "model",
    "documents",
    "prompt",
    "queries",
    "generation",
    "cache",
    "output",
    "queries.0",
    "cache.dir",
]


@given(key=st.sampled_from(_keys), value=_values)
def test_any_value_anywhere_is_accepted_or_a_job_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(MINIMAL)
    with suppress(JobError):
        load_job(path, [f"{key}={yaml.safe_dump(value)}"])


def test_loading_a_job_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.job.job; print(*{'pyarrow', 'mlx', 'transformers', 'jinja2'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
