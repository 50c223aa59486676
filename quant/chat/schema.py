"""Compare JSON values with a JSON schema, by the library ``jsonschema``."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def find_schema_faults(value: Any, schema: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield where a JSON value does not match a schema.

    Args:
        value: The value, as ``json.loads`` returns it.
        schema: A schema that :func:`find_schema_problems` has no problem with.
        name: The value's name in faults.
    """
    errors = _make_validator(schema).iter_errors(value)
    # By place in the value, as a reader looks for it; jsonschema's order is that of the schema.
    for error in sorted(errors, key=lambda e: [str(part) for part in e.absolute_path]):
        place = name + "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path
        )
        yield from _describe(error, place)


def find_schema_problems(schema: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield what is wrong with a schema itself: no schema, or a reference that leads nowhere."""
    from jsonschema import SchemaError

    if not isinstance(draft := schema.get("$schema", ""), str):
        yield f"{name}.$schema: expected the address of a draft, found {draft!r}"
        return
    try:
        _make_validator(schema).check_schema(schema)
    except SchemaError as e:
        place = "".join(f".{part}" for part in e.absolute_path)
        yield f"{name}{place}: expected a JSON schema, found {e.instance!r} ({e.message})"
        return
    yield from _find_reference_problems(schema, name)


def _make_validator(schema: Mapping[str, Any]) -> Any:
    """The validator of the schema's draft.

    JSON Schema takes 1.0 for an integer. Here it is none: clients that decode arguments into typed
    structures (Go, Rust, pydantic's strict mode) refuse it.
    """
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    draft = validators.validator_for(schema, default=Draft202012Validator)
    checker = draft.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    # An empty registry: the default one fetches references over the network.
    extend: Any = validators.extend
    return extend(draft, type_checker=checker)(schema, registry=Registry())


def _describe(error: Any, place: str) -> Iterator[str]:
    """One line for an error: the keyword of the schema that fails, and the value."""
    if error.validator == "type":
        kinds = error.validator_value
        expected = kinds if isinstance(kinds, str) else " or ".join(kinds)
        yield f"{place}: expected {expected}, found {error.instance!r}"
    elif error.validator == "required":
        # jsonschema reports each missing key by an error of its own, and names it only in its
        # message.
        yield from (
            f"{place}: {key}: missing"
            for key in error.validator_value
            if error.message.startswith(f"{key!r} ")
        )
    elif error.validator == "additionalProperties" and error.validator_value is False:
        known = error.schema.get("properties", {})
        yield from (
            f"{place}: {key}: not in the schema" for key in error.instance if key not in known
        )
    else:
        expected = json.dumps(error.validator_value, ensure_ascii=False)
        yield f"{place}: expected {error.validator} {expected}, found {error.instance!r}"


def _find_reference_problems(schema: Any, name: str) -> Iterator[str]:
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    # An empty registry here too: a reference to the network must fail, not be fetched.
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for reference in _list_references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            yield f"{name}: expected references within the schema, found {reference!r}"


def _list_references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            else:
                yield from _list_references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _list_references(item)
