"""Structured output: what is JSON of the right form, and what only looks like it."""

import contextlib
import json
import socket
import threading

import pytest

from rlsys.rewards import orms

pytestmark = pytest.mark.processes

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def fits_person():
    return orms["json_schema"](schema=PERSON, valid_json=0.25)


@pytest.mark.parametrize(
    "completion",
    [
        '{"name": "Ada", "age": 36}',
        ' \n{"age": 36, "name": "Ada"}\n',
        '```json\n{"name": "Ada", "age": 36}\n```',
        'Here it is:\n```\n{"name": "Ada",\n "age": 36}\n```\nDone.',
        '<think>{"name"</think>{"name": "\\u00c5sa \\ud83d\\ude00", "age": 0}',
        '{"name": "", "age": 1.0}',
    ],
)
def test_json_that_fits_scores_1(fits_person, completion):
    assert fits_person([completion]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    [
        '{"name": "Ada"}',
        '{"name": "Ada", "age": "36"}',
        '{"name": "Ada", "age": -1}',
        '{"name": "Ada", "age": 36, "x": 1}',
        "[]",
        "null",
        "36",
    ],
)
def test_other_json_scores_valid_json(fits_person, completion):
    assert fits_person([completion]) == [0.25]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Ada, 36",
        '{"name": "Ada", "age": 36',
        'Sure! {"name": "Ada", "age": 36}',
        '{"name": "Ada", "age": 36} {"name": "Ada", "age": 36}',
        '```json\n{"name": "Ada", "age": 36}\n```\n```json\n{}\n```',
        '{"name": "Ada", "age": 1, "age": 36}',
        '{"name": "Ada", "age": NaN}',
        '{"name": "Ada", "age": 1e999}',
        "{'name': 'Ada', 'age': 36}",
        '<think>{"name": "Ada", "age": 36}',
        "[" * 100_000,
        "[" * 40_000 + "]" * 40_000,
        '{"a":' * 20_000,
        "1" * 50_000,
        '"' + "x" * 200_000 + '"',
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_not_json_scores_0(fits_person, completion):
    assert fits_person([completion]) == [0.0]


def test_the_schema_may_come_with_the_row_as_object_or_text():
    reward = orms["json_schema"]()
    schemas = [PERSON, json.dumps({"type": "array"}), {"$ref": "#/$defs/x", "$defs": {"x": {}}}]
    assert reward(["[]"] * 3, schema=schemas) == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="needs a schema"):
        reward(["[]"])


@pytest.mark.parametrize("schema", [{"type": "objekt"}, "{", "[]", "true", {"minimum": "1"}])
def test_an_invalid_schema_is_refused(schema):
    with pytest.raises(ValueError, match="not a usable JSON schema"):
        orms["json_schema"](schema=schema)


def test_a_remote_ref_is_refused_and_never_fetched():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []
        server.settimeout(0.5)

        def accept():
            with contextlib.suppress(TimeoutError):
                connections.append(server.accept())

        thread = threading.Thread(target=accept)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        with pytest.raises(ValueError, match="nothing is ever fetched"):
            orms["json_schema"](schema={"$ref": address})
        relative = {"$id": address.replace("schema", "base"), "$ref": "schema.json"}
        with pytest.raises((ValueError, RuntimeError), match="nothing is ever fetched"):
            orms["json_schema"](schema=relative)(["1"])
        thread.join()
    assert connections == []


def test_a_pattern_that_backtracks_is_stopped():
    reward = orms["json_schema"](schema={"pattern": "^(a+)+$"}, time_limit_s=0.5)
    assert reward(['"' + "a" * 60 + 'b"', '"aa"']) == [0.0, 1.0]


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 308 + "1"])
def test_a_number_beyond_all_floats_ends_no_run(number):
    reward = orms["json_schema"](schema={"type": "number", "multipleOf": 0.01})
    assert reward([number, "0.5"]) == [0.0, 1.0]


@pytest.mark.parametrize("value", [-0.1, 1.0, 2])
def test_other_json_must_pay_less_than_json_that_fits(value):
    with pytest.raises(ValueError, match="valid_json must be"):
        orms["json_schema"](schema={}, valid_json=value)


@pytest.mark.parametrize(
    ("completion", "expected", "share"),
    [
        ('{"a": 1, "b": [1, {"c": null}]}', {"a": 1, "b": [1, {"c": None}]}, 1.0),
        ('{"a": 1.0, "b": "x"}', '{"a": 1, "b": "y"}', 0.5),
        ('{"a": 1}', {"a": 1, "b": 2}, 0.5),
        ('{"a": true}', {"a": 1}, 0.0),
        ('{"a": "1"}', {"a": 1}, 0.0),
        ('{"a": 1, "extra": 1}', {"a": 1}, 0.0),
        ('[{"a": 1}]', {"a": 1}, 0.0),
        ('{"a": 2, "a": 1}', {"a": 1}, 0.0),
        ("", {"a": None}, 0.0),
        ("{}", {"a": None}, 0.0),
    ],
)
def test_fields_that_are_right(completion, expected, share):
    assert orms["json_match"]()([completion], expected=[expected]) == [share]
    strict = orms["json_match"](all_or_nothing=True)
    assert strict([completion], expected=[expected]) == [float(share == 1.0)]


@pytest.mark.parametrize("expected", [{}, [], None, "x", "{}", 1])
def test_a_row_without_fields_is_an_error(expected):
    with pytest.raises(ValueError, match="must be an object with fields"):
        orms["json_match"]()(["{}"], expected=[expected])
