"""Answers that follow JSON schemas: what the command line does with them, and what a batch of them gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel, Field

from pipeline.errors import ModelError
from pipeline.job.job import Query, Settings
from pipeline.job.job_file import load_job
from pipeline.models.output_parser import OutputParser
from tests import ROOT, warm
from tests.pipeline.command_line import invoke
from tests.pipeline.workplace import Workplace

pytestmark = pytest.mark.usefixtures("here")


def _object(**properties: Any) -> dict[str, Any]:
    """All of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


OWNER = _object(owner={"type": "string", "maxLength": 12}, sure={"type": "boolean"})
AMOUNT = {"type": "integer", "minimum": 100, "maximum": 999}
SCHEMAS: list[dict[str, Any]] = [
    OWNER,
    AMOUNT,
    {"enum": ["yes", "no", None, 3]},
    {"type": "array", "items": AMOUNT, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"anyOf": [{"type": "null"}, _object(code=AMOUNT)]},
    _object(on={"type": "string", "format": "date"}),
    {
        "$defs": {"line": _object(name={"const": 'Élan "A"'}, sure={"type": "boolean"})},
        **_object(lines={"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 2}),
    },
]


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Commands set the level of the package's log."""
    import logging

    before = logging.getLogger("pipeline").level
    yield
    logging.getLogger("pipeline").setLevel(before)


def run_without_llguidance(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command where the package is not installed; the model's process imports this main script too."""
    main = folder / "main.py"
    main.write_text(
        "import sys\nsys.modules['llguidance'] = None\n"
        "if __name__ == '__main__':\n    from pipeline.cli import main\n    main()\n"
    )
    command = [sys.executable, str(main), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.run(command, capture_output=True, text=True, check=False, env=environment)


# ---- bad input: nothing here needs the package but where it says so


@pytest.mark.parametrize("command", ["run", "plan", "bench"])
def test_without_the_package_it_says_what_to_install(workplace: Workplace, command: str) -> None:
    workplace.queries[1]["json_schema"] = OWNER
    done = run_without_llguidance(command, workplace.save(model="no/model"), folder=workplace.folder)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: queries: json_schema of query 'when': needs the package llguidance; install it with "
        "`pip install llguidance`, or this project with its extra `schemas`"
    )


def test_a_job_without_schemas_does_not_need_the_package(workplace: Workplace) -> None:
    assert run_without_llguidance("run", workplace.job_file, folder=workplace.folder).returncode == 0


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"$ref": "#/$defs/line"}, "'/$defs/line' does not exist"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
    ],
)
def test_a_schema_that_cannot_be_compiled(
    workplace: Workplace, command: str, schema: dict[str, Any], words: str
) -> None:
    pytest.importorskip("llguidance")
    workplace.queries[2]["json_schema"] = schema
    result = invoke(command, workplace.save(model="no/model"))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: queries: json_schema of query 'who': cannot be compiled: ")
    assert words in line


def _write(workplace: Workplace, text: str) -> dict[str, str]:
    (workplace.folder / "schema.json").write_text(text)
    return {"file": "schema.json"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("object", "queries.0.json_schema is not JSON (Expecting value"),
        (["object"], "queries.0.json_schema is no JSON schema, which is a mapping of keys"),
        ({"file": "nix.json"}, "nix.json: No such file or directory"),
        (
            {"const": date(2029, 9, 10)},
            "(Object of type date is not JSON serializable); put dates and the like in quotes",
        ),
        ({"maximum": float("nan")}, "queries.0.json_schema is not JSON (Out of range float values"),
        ('{"maximum": 1e999}', "queries.0.json_schema is not JSON (1e999 is too large for a number)"),
        ('{"type": "object", "type": "array"}', "queries.0.json_schema is not JSON (a mapping has a key twice)"),
        pytest.param(
            '{"items":' * 99 + "{}" + "}" * 99,
            "queries.0.json_schema is not JSON (the JSON is nested too deeply)",
            id="nested deeply",
        ),
        pytest.param(
            '{"items":' * 99_999 + "{}" + "}" * 99_999,
            "queries.0.json_schema is not JSON (the JSON is nested too",
            id="nested more deeply than Python's parser can go",
        ),
    ],
)
def test_a_schema_that_is_none(workplace: Workplace, schema: Any, words: str) -> None:
    workplace.queries[0]["json_schema"] = schema
    result = invoke("run", workplace.save())
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("text", "words"), [("{", "(Expecting"), ("[1]", ", which is a mapping of keys")])
def test_a_file_without_a_schema(workplace: Workplace, text: str, words: str) -> None:
    workplace.queries[0]["json_schema"] = _write(workplace, text)
    result = invoke("run", workplace.save())
    assert result.exit_code == 2
    assert f" in {workplace.folder}/schema.json" in result.stderr
    assert words in result.stderr


def test_a_schema_may_be_given_as_text() -> None:
    query = Query(id="q", text="Who?", json_schema=OWNER)
    assert Query(id="q", text="Who?", json_schema=json.dumps(OWNER)) == query
    assert Query.model_validate_json(query.model_dump_json()) == query


def test_a_query_ends_by_its_schema_or_by_stop_strings(workplace: Workplace) -> None:
    workplace.queries[0] |= {"json_schema": OWNER, "stop": ["\n"]}
    result = invoke("run", workplace.save())
    assert result.exit_code == 2
    assert "queries.0 has both stop and json_schema" in result.stderr


# ---- answers


@pytest.fixture
def structured(workplace: Workplace) -> Workplace:
    """Four documents, eight queries, each with a schema of its own: 32 rows."""
    pytest.importorskip("llguidance")
    workplace.documents["d3"] = "Paper d3. " + workplace.documents["d0"]
    workplace.queries = [
        {"id": f"q{number}", "text": f"What is number {number}?", "json_schema": schema}
        for number, schema in enumerate(SCHEMAS)
    ]
    workplace.save(generation={"max_tokens": 120, "batch_size": 32})
    return workplace


def assert_valid(workplace: Workplace) -> None:
    from jsonschema import Draft202012Validator

    validators = [Draft202012Validator(s, format_checker=Draft202012Validator.FORMAT_CHECKER) for s in SCHEMAS]
    rows = workplace.rows()
    assert len(rows) == 32
    for (_, query_id), row in rows.items():
        assert row["status"] == "ok", row
        assert row["finish_reason"] == "stop"
        assert row["answer_json"] == row["answer"]
        validators[int(query_id[1:])].validate(json.loads(row["answer_json"]))


def test_a_batch_of_32_rows_with_8_schemas(structured: Workplace) -> None:
    assert structured.run().rows_answered == 32
    assert_valid(structured)
    assert str(pq.read_schema(structured.output).field("answer_json").type) == "string"  # for any reader
    answers = structured.answers()
    assert len(set(answers.values())) > 8  # other documents, other answers
    for batch_size in (1, 4):
        structured.tree["output"] = {"path": f"out/{batch_size}.parquet"}
        structured.output = structured.folder / "out" / f"{batch_size}.parquet"
        structured.run(f"generation.batch_size={batch_size}")
        assert structured.answers() == answers


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_run_that_was_interrupted_gives_the_same_bytes(
    structured: Workplace, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    structured.tree["generation"]["batch_size"] = batch_size
    structured.documents = {name: structured.documents[name] for name in ("d0", "d1")}
    structured.run()
    undisturbed = structured.output.read_bytes()
    structured.output.unlink()

    from pipeline.models.output_parser import RowParser

    taken = []

    def add(row: Any, token: int, logprob: float) -> bool:
        taken.append(token)
        if len(taken) == 200:
            raise KeyboardInterrupt
        return real(row, token, logprob)

    real = RowParser.add
    with monkeypatch.context() as patch:
        patch.setattr(RowParser, "add", add)
        with pytest.raises(KeyboardInterrupt):
            structured.run()
    assert not structured.output.exists()
    assert structured.run().rows_kept == (0 if batch_size == 32 else 8)
    assert structured.output.read_bytes() == undisturbed


def test_sampled_answers_follow_their_schemas_too(structured: Workplace) -> None:
    structured.tree["generation"] |= {"temperature": 1.5, "top_p": 0.9}
    structured.run()
    assert_valid(structured)


def test_rows_without_a_schema_are_what_they_are_without_such_neighbours(workplace: Workplace) -> None:
    pytest.importorskip("llguidance")
    workplace.tree["generation"]["max_tokens"] = 20
    workplace.run()
    before = workplace.rows()
    assert {row["answer_json"] for row in before.values()} == {None}
    workplace.queries[1] |= {"json_schema": OWNER, "max_tokens": 60}
    assert workplace.run().rows_kept == 6  # the schema is part of what decides a row
    workplace.output.unlink()
    workplace.run()
    for pair, row in workplace.rows().items():
        if pair[1] == "when":
            assert json.loads(row["answer_json"]).keys() == {"owner", "sure"}
        else:
            assert row == before[pair]


def test_an_answer_that_is_cut_off_is_an_error(workplace: Workplace) -> None:
    pytest.importorskip("llguidance")
    workplace.queries[1] |= {"json_schema": OWNER, "max_tokens": 4}
    result = invoke("run", workplace.save())
    assert result.exit_code == 3
    assert "3 AnswerCutOff" in result.stdout
    row = workplace.rows()["d0", "when"]
    assert (row["answer"][0], row["answer_json"]) == ("{", None)
    assert (row["finish_reason"], row["answer_tokens"]) == ("length", 4)
    assert row["error"].startswith("the JSON is not complete after 4 tokens; raise max_tokens, or ")
    assert workplace.rows()["d0", "who"]["status"] == "ok"
    assert invoke("run", workplace.job_file, "--set", "queries.1.max_tokens=60").exit_code == 0


def test_a_row_that_llguidance_gives_up_on_takes_no_other_along(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    import mlx.core as mx

    workplace.run()
    before = workplace.answers()
    workplace.queries[1] |= {"json_schema": OWNER, "max_tokens": 60}
    from pipeline.execution import decode as answers

    def make_sampler(settings: Settings, name: str) -> Any:
        """What the schema forbids, in place of what a limit of llguidance's would do."""
        return (lambda logprobs: mx.argmin(logprobs, axis=-1)) if name == "d1\0when" else real(settings, name)

    real = answers.make_sampler
    monkeypatch.setattr(answers, "make_sampler", make_sampler)
    assert workplace.run().failures == {"GenerationFailed": 1}
    row = workplace.rows()["d1", "when"]
    assert row["error"].startswith("llguidance gave up on the grammar: ")
    assert "\n" not in row["error"]
    others = {pair: answer for pair, answer in workplace.answers().items() if pair[1] != "when"}
    assert others == {pair: before[pair] for pair in others}


def test_a_tokenizer_that_does_not_tell_its_bytes() -> None:
    pytest.importorskip("llguidance")
    from pipeline.models.constraints import Grammars

    class Slow:
        _tokenizer, eos_token_ids = object(), frozenset({1})

    with pytest.raises(ModelError, match=r"^json_schema and evidence cannot be used with this model.*: Only fast"):
        Grammars(Slow(), [json.dumps(OWNER)])


def test_json_may_end_with_the_last_token_there_is_room_for(workplace: Workplace) -> None:
    pytest.importorskip("llguidance")
    workplace.queries = [{"id": "q", "text": "Which?", "json_schema": OWNER, "max_tokens": 60}]
    workplace.run()
    longest = max(row["answer_tokens"] for row in workplace.rows().values())
    answers = workplace.answers()
    assert workplace.run(f"queries.0.max_tokens={longest}").rows_failed == 0
    assert workplace.answers() == answers
    assert workplace.run(f"queries.0.max_tokens={longest - 1}").failures.keys() == {"AnswerCutOff"}


def test_a_pydantic_model_s_schema_in_a_file_beside_the_job(workplace: Workplace) -> None:
    pytest.importorskip("llguidance")

    class Item(BaseModel):
        name: str = Field(max_length=6)
        price: int = Field(ge=0, le=9)

    class Invoice(BaseModel):
        items: list[Item] = Field(max_length=2)

    written = json.dumps(Invoice.model_json_schema(), indent=2)
    workplace.queries = [{"id": "q", "text": "What was sold?", "json_schema": _write(workplace, written)}]
    workplace.run("generation.max_tokens=80")
    for row in workplace.rows().values():
        Invoice.model_validate_json(row["answer_json"])
    assert workplace.run("generation.max_tokens=80").rows_kept == 3
    _write(workplace, written.replace('"maxItems": 2', '"maxItems": 1'))
    assert workplace.run("generation.max_tokens=80").rows_kept == 0


ONE_AMOUNT = {"type": "object", "properties": {"a": AMOUNT}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "has_others"),
    [
        ({"type": "object", "properties": {"a": AMOUNT}, "required": ["a"]}, False),
        ({"anyOf": [{"type": "object", "properties": {"properties": {"properties": {"a": AMOUNT}}}}]}, False),
        ({"type": "object", "properties": {"a": AMOUNT}, "additionalProperties": AMOUNT}, True),
        ({"type": "object", "allOf": [{"properties": {"a": AMOUNT}}, {"properties": {"b": AMOUNT}}]}, True),
        ({"$ref": "#/components/schemas/P", "components": {"schemas": {"P": ONE_AMOUNT}}}, False),
        ({"$ref": "#/x~1y/0/a%20b", "x/y": [{"a b": ONE_AMOUNT}]}, False),
        ({"anyOf": [{"$ref": "#/anyOf/1"}, ONE_AMOUNT]}, False),
        ({**ONE_AMOUNT, "properties": {"a": AMOUNT, "allOf": {"type": "boolean"}}}, False),
        ({**ONE_AMOUNT, "properties": {"a": AMOUNT, "$ref": {"enum": ["allOf"]}}, "title": "allOf"}, False),
        ({"$defs": {"P": {"type": "object", "properties": {"b": AMOUNT}}}, "$ref": "#/$defs/P", **ONE_AMOUNT}, True),
    ],
)
def test_an_object_has_no_other_properties_unless_its_schema_speaks_of_them(
    schema: dict[str, Any], has_others: bool
) -> None:
    llguidance = pytest.importorskip("llguidance")
    from pipeline.models.constraints import _grammar

    vocabulary = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(vocabulary, _grammar(json.dumps(schema)))
    text = b'{"a":123, "z":123, "y":123}'
    assert (matcher.try_consume_tokens(vocabulary.tokenize_bytes(text)) == len(text)) is has_others
    assert not matcher.is_error()


def test_keys_come_in_the_schema_s_order(workplace: Workplace) -> None:
    pytest.importorskip("llguidance")
    for names in (["b", "a"], ["a", "b"]):
        written = json.dumps(_object(**{name: {"type": "boolean"} for name in names}))
        workplace.queries = [{"id": "q", "text": "Which?", "json_schema": _write(workplace, written), "max_tokens": 30}]
        assert workplace.run().rows_kept == 0
        assert list(json.loads(workplace.answers()["d0", "q"])) == names


def test_mlx_lm_is_held_to_the_same_schemas_in_a_bench(structured: Workplace) -> None:
    structured.queries = structured.queries[:3]
    structured.tree["cache"] |= {"key_bits": 8, "value_bits": 8}
    names = [part for name in ("naive", "copied", "pipeline-cold") for part in ("--contender", name)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.cli", "bench", structured.save(), "--json", "--documents", "1", *names]
    done = warm.run(command, capture_output=True, text=True, check=False, env=environment)
    rows = {row["contender"]: row for row in json.loads(done.stdout)}
    assert rows["pipeline-cold"]["agreement"] == 1.0
    assert "holds all rows to one schema" in rows["copied"]["failed"]
    assert rows["copied"]["applies"] is False


def test_the_ready_job(tmp_path: Path) -> None:
    """On two short documents: the model has never seen JSON, which is hard on the schemas."""
    pytest.importorskip("llguidance")
    from jsonschema import Draft202012Validator

    texts = ["The pilot scheme now has Eleth Lockford as its owner.", "The open day is on 4 January 2026."]
    pq.write_table(pa.table({"id": ["a", "b"], "text": texts}), tmp_path / "documents.parquet")
    paths = {"documents.path": "documents.parquet", "cache.dir": "cache", "output.path": "out.parquet"}
    overrides = [part for key, name in paths.items() for part in ("--set", f"{key}={tmp_path / name}")]
    result = invoke("run", ROOT / "jobs" / "extract.yaml", *overrides)
    assert result.exit_code == 0, result.output
    job = load_job(ROOT / "jobs" / "extract.yaml")
    schemas = {query.id: json.loads(query.json_schema) for query in job.queries if query.json_schema}
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(rows) == 6
    for row in rows:
        if row["query_id"] in schemas:
            Draft202012Validator(schemas[row["query_id"]]).validate(json.loads(row["answer_json"]))
        else:
            assert row["answer"] in dict(row["choice_probabilities"])
        text = texts["ab".index(row["document_id"])]
        assert all(text[each["start"] : each["end"]] == each["quote"] for each in row["evidence"] or [])


@pytest.mark.parametrize(
    ("schema", "answer", "reason"),
    [
        ({"type": "object"}, '{"a":1, "a":2}', "a mapping has a key twice"),
        ({"type": "object"}, '{"a":{"b":1, "b":1}}', "a mapping has a key twice"),
        ({"type": "number"}, "1e999", "1e999 is too large for a number"),
        ({"type": "object"}, '{"a":1, "b":2}', None),
        ({"type": "number"}, "-1.5e30", None),
    ],
)
def test_an_answer_that_readers_take_differently_is_an_error(
    tokenizer: Any, schema: dict[str, Any], answer: str, reason: str | None
) -> None:
    pytest.importorskip("llguidance")
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    wrapped, text = TokenizerWrapper(tokenizer), json.dumps(schema)
    row = OutputParser(wrapped, [text]).start_row([0], Settings(99, 0.0, 1.0, 0, json_schema=text))
    assert row.constraint is not None
    tokens = mx.array([0])
    row.constraint(tokens, mx.zeros((1, 600)))
    for token in wrapped.encode(answer, add_special_tokens=False):
        row.add(token, -1.0)
        tokens = mx.concatenate([tokens, mx.array([token])])
        row.constraint(tokens, mx.zeros((1, 600)))
    if not row.constraint.is_complete:  # a number may go on until the stop token
        row.constraint(mx.concatenate([tokens, mx.array([wrapped.eos_token_id])]), mx.zeros((1, 600)))
    failure = row.answer("stop").failure
    assert failure is None if reason is None else reason in str(failure)


def test_a_reference_to_itself_comes_to_an_end() -> None:
    pytest.importorskip("llguidance")
    from pipeline.models.constraints import check_schemas

    check_schemas({json.dumps({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}): "q"})
