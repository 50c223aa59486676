"""The manifest: read and written without loss, refused with every problem, and described."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quant.core.errors import InputError
from quant.release import manifest as manifests
from quant.release.manifest import FORMAT, SCHEMA, Manifest, make_schema, read_schema
from tests.quant.release.manifests import (
    make_domain_figures,
    make_evaluation,
    make_figures,
    make_manifest,
    make_variant,
)

ROOT = Path(__file__).parents[3]
OLD = ROOT / "tests" / "golden" / "release" / "manifest.json"
"""Of a release that version 0.1.0 made, with two of its variants and six tensors of each."""
PAGE = ROOT / "docs" / "release-format.md"


def problems(document: Any) -> list[str]:
    with pytest.raises(InputError) as e:
        Manifest.from_json(json.dumps(document), "m")
    return list(e.value.problems)


def change(path: str, value: Any) -> Any:
    """Return the old manifest with another value at ``variants.0.bytes``; None removes the key."""
    document = json.loads(OLD.read_text())
    *parents, key = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = document
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return document


def test_a_release_made_before_is_read_and_written_to_the_same_bytes() -> None:
    manifest = Manifest.read(OLD)
    assert manifest.to_json() == OLD.read_text()
    assert [v.name for v in manifest.variants] == ["UD-TQ1_0", "IQ4_NL"]
    assert manifest.single_file == manifest.variants[0]
    assert manifest.tested


def test_a_new_manifest_is_read_and_written_to_the_same_bytes() -> None:
    figures = make_figures(domains={"code": make_domain_figures()})
    variant = make_variant("Q", "Q.gguf", evaluation=figures)
    manifest = make_manifest(evaluation=make_evaluation(), variants=(variant,))
    assert Manifest.from_json(manifest.to_json(), "m") == manifest


@pytest.mark.parametrize(
    "path",
    ["scenarios", "chat_template.waived", "evaluation.too_short", "variants.0.evaluation.errors"],
)
def test_keys_that_the_format_once_lacked_may_be_absent_and_stay_absent(path: str) -> None:
    document = change(path, None)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    assert Manifest.from_json(text, "m").to_json() == text


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("base", None, "m: base: missing"),
        ("variants.0.files.0.sha256", None, "m: variants[0].files[0].sha256: missing"),
        ("variants.1.bytes", "7", "m: variants[1].bytes: expected integer, found '7'"),
        ("vision", 7, "m: vision: expected object, found 7"),
        ("evaluation.ppl", 1.0, "m: evaluation.ppl: unknown key; "),
        (
            "recipe.sampling.temprature",
            1.0,
            "m: recipe.sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        (
            "variants.0.smoke.0.kind",
            "odd",
            "m: variants[0].smoke[0].kind: expected 'protocol' or 'quality', found 'odd'",
        ),
        (
            "variants.0.recipe.rules.0.depth",
            [0.5],
            "m: variants[0].recipe.rules[0].depth: expected",
        ),
        ("variants.0.tensors", ["a"], "m: variants[0].tensors: expected object, found ['a']"),
    ],
)
def test_a_problem_is_one_line_with_its_field(path: str, value: Any, problem: str) -> None:
    (line,) = problems(change(path, value))
    assert line.startswith(problem)


def test_all_problems_are_reported_at_once() -> None:
    document = change("base", None)
    document["model"] = 1
    document["variants"][0]["smoke"] = None
    assert len(problems(document)) == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "m: expected JSON, found something else"),
        ("[1]", f"m: format: expected {FORMAT!r}, found [1]"),
        ("{}", f"m: format: expected {FORMAT!r}, found None"),
        (
            '{"format": "gguf-foundry release 2"}',
            f"m: format: expected {FORMAT!r}, found 'gguf-foundry release 2'",
        ),
        ('{"format": ["' + "x" * 10**6 + '"]}', f"m: format: expected {FORMAT!r}, found ['xxx"),
    ],
)
def test_a_text_of_another_format_is_refused_before_its_keys_are_read(
    text: str, problem: str
) -> None:
    with pytest.raises(InputError) as e:
        Manifest.from_json(text, "m")
    (line,) = e.value.problems
    assert line.startswith(problem)
    assert len(line) < 200


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the manifest of a release, found none"):
        Manifest.read(tmp_path / "manifest.json")


def test_the_schema_is_the_dataclasses(pytestconfig: pytest.Config) -> None:
    path = Path(manifests.__file__).with_name(SCHEMA)
    if pytestconfig.getoption("update_golden"):
        path.write_text(json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n")
        read_schema.cache_clear()
    Draft202012Validator.check_schema(read_schema())
    hint = f"{SCHEMA} is old: pytest --update-golden writes it"
    assert dict(list_keys(read_schema())) == dict(list_keys(make_schema())), hint


def test_the_page_describes_every_key_of_the_schema_and_no_other() -> None:
    keys = {path: set(keys) for path, keys in list_keys(read_schema())}
    assert read_page() == keys


def list_keys(
    schema: dict[str, Any], node: dict[str, Any] | None = None, path: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object of a schema: its path, and each key's type and whether it is required."""
    node = schema if node is None else node
    for option in node.get("anyOf", ()):
        yield from list_keys(schema, option, path)
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if properties := node.get("properties"):
        required = node.get("required", ())
        yield (
            path or "manifest.json",
            {k: (describe(v), k in required) for k, v in properties.items()},
        )
        for key, child in properties.items():
            yield from list_keys(schema, child, f"{path}.{key}" if path else key)
    elif isinstance(node.get("items"), dict):
        yield from list_keys(schema, node["items"], f"{path}[]")
    elif isinstance(node.get("additionalProperties"), dict):
        yield from list_keys(schema, node["additionalProperties"], f"{path}{{}}")


def describe(node: dict[str, Any]) -> Any:
    """Return the type of a key without the names of classes and their descriptions."""
    options = node.get("anyOf", [node])
    return sorted("object" if "$ref" in o else str(o.get("type", o.get("const"))) for o in options)


def read_page() -> dict[str, set[str]]:
    """Return the keys that the page describes, by the paths in its headings."""
    described: dict[str, set[str]] = {}
    for section in re.split(r"^#+ ", PAGE.read_text(), flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        keys = set(re.findall(r"^\| `([^`]+)` \|", body, re.MULTILINE))
        for path in re.findall(r"`([^`]+)`", heading):
            described[path] = keys
    return described
