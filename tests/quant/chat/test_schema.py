"""Values against JSON schemas, and schemas that are none."""

from typing import Any

import pytest

from quant.chat.schema import find_schema_faults, find_schema_problems

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string"},
        "c": {"type": "object", "required": ["d"]},
        "zone": {"enum": ["UTC", "CET"]},
        "names": {"type": "array", "items": {"type": "string"}},
        "days": {"type": "number", "minimum": 1},
        "either": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
    },
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ({"a": 1}, []),
        ({"a": 1, "b": "x", "c": {"d": None}}, []),
        ({"a": 1, "zone": "CET", "names": ["x"], "days": 1, "either": None}, []),
        ([], ["v: expected object, found []"]),
        ({"a": "1"}, ["v.a: expected integer, found '1'"]),
        ({"a": True}, ["v.a: expected integer, found True"]),
        ({"a": 1.0}, ["v.a: expected integer, found 1.0"]),
        (
            {"b": 2, "z": 1},
            ["v: a: missing", "v: z: not in the schema", "v.b: expected string, found 2"],
        ),
        ({"a": 1, "c": {}}, ["v.c: d: missing"]),
        ({"a": 1, "zone": "PST"}, ['v.zone: expected enum ["UTC", "CET"], found \'PST\'']),
        ({"a": 1, "names": ["x", 2]}, ["v.names[1]: expected string, found 2"]),
        ({"a": 1, "days": 0}, ["v.days: expected minimum 1, found 0"]),
        (
            {"a": 1, "either": "x"},
            ['v.either: expected anyOf [{"type": "null"}, {"type": "integer"}], found \'x\''],
        ),
    ],
)
def test_a_value_that_does_not_match_is_reported_with_its_place(
    value: Any, faults: list[str]
) -> None:
    assert list(find_schema_faults(value, SCHEMA, "v")) == faults


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, None),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1}, None),
        ({"type": "objct"}, "s.type: expected a JSON schema, found 'objct' ("),
        (
            {"properties": {"a": {"type": 5}}},
            "s.properties.a.type: expected a JSON schema, found 5",
        ),
        ({"pattern": "("}, "s.pattern: expected a JSON schema, found '('"),
        ({"$ref": "#/$defs/b"}, "s: expected references within the schema, found '#/$defs/b'"),
        ({"$ref": "https://x.y/z"}, "s: expected references within the schema, found 'https"),
        ({"$schema": ["x"]}, "s.$schema: expected the address of a draft, found ['x']"),
    ],
)
def test_a_schema_that_cannot_be_used_is_reported(
    schema: dict[str, Any], problem: str | None
) -> None:
    problems = list(find_schema_problems(schema, "s"))
    assert not problems if problem is None else [p.startswith(problem) for p in problems] == [True]
