"""The model card: front matter that the hub reads, and a table in which nothing breaks."""

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from quant.card import card, human_bytes
from quant.recipe import Card, Model, load_model

TINY, _ = load_model("tiny-glm")


def variant(name: str, *paths: str, **more: Any) -> dict[str, Any]:
    files = [{"path": p, "sha256": "0" * 64, "bytes": 10**6} for p in paths]
    return {
        "name": name,
        "summary": f"{name} is for tests.",
        "bytes": len(files) * 10**6,
        "bpw": 4.5,
        "files": files,
    } | more


SHARDS = tuple(f"Q/M-Q-{n:05d}-of-00003.gguf" for n in (1, 2, 3))
MANIFEST: dict[str, Any] = {
    "variants": [variant("UD-TQ1_0", "M-UD-TQ1_0.gguf"), variant("Q", *SHARDS)],
    "chat_template": {"sha256": "a", "original_sha256": "b"},
    "llama.cpp": "0.5.0 (abc)",
    "calibration": {"set": "embedded", "documents": 321, "sha256": "0"},
}


def made(model: Model = TINY, **changes: Any) -> str:
    return card(model, MANIFEST | changes)


def front_matter(model: Model) -> dict[str, Any]:
    data: Any = ModelCard(made(model)).data
    return dict(data.to_dict())


def test_the_hub_reads_the_front_matter() -> None:
    model = replace(TINY, card=Card("mit", ("en", "zh"), "zai-org/GLM-4.6"))
    assert front_matter(model) == {
        "base_model": "zai-org/GLM-4.6", "base_model_relation": "quantized", "language": ["en", "zh"],
        "library_name": "gguf", "license": "mit", "pipeline_tag": "text-generation",
        "tags": ["gguf", "imatrix", "conversational"],
    }  # fmt: skip


def test_a_model_of_nobody_has_no_base() -> None:
    model = replace(TINY, card=replace(TINY.card, base_model=None))
    assert not {"base_model", "base_model_relation"} & set(front_matter(model))


def table(text: str) -> list[list[str]]:
    """The rows of the first table, which must stand without a gap."""
    match = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert match
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in match[0].splitlines()]


def test_every_variant_is_a_row_of_one_table() -> None:
    head, rule, *rows = table(made())
    assert len(head) == len(rule) == 4
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["[UD-TQ1_0](M-UD-TQ1_0.gguf)", "1.0 MB", "4.50", "UD-TQ1_0 is for tests."],
        ["[Q](Q) (3 shards)", "3.0 MB", "4.50", "Q is for tests."],
    ]


def test_a_summary_with_bars_and_lines_stays_in_its_cell() -> None:
    rows = table(made(variants=[variant("Q", "Q.gguf", summary="this | that\nand more")]))
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows[2][3].strip() == r"this \| that and more"


def test_the_tag_for_ollama_is_explained_when_there_is_one() -> None:
    text = made()
    assert "## Ollama" in text
    assert "llama-gguf-split --merge Q/M-Q-00001-of-00003.gguf tiny-glm-Q.gguf" in text
    assert "## Ollama" not in made(variants=[variant("Q", *SHARDS)])


def test_only_a_patched_template_is_called_patched() -> None:
    assert "which was patched" in made()
    assert "which was patched" not in made(chat_template={"sha256": "a", "original_sha256": "a"})
    assert "which was patched" not in made(chat_template=None)


def test_settings_counts_and_versions_are_said() -> None:
    text = made()
    assert "temperature 1.0, top_p 0.95, top_k 40, min_p 0.0" in text
    assert "over 321 documents" in text
    assert "llama.cpp 0.5.0 (abc)" in text
    assert f"over {len(TINY.smoke)} turns" in text


def test_the_same_inputs_make_the_same_card() -> None:
    assert made() == made()
    assert made().endswith(".\n")


def test_a_manifest_that_lacks_something_is_our_own_mistake() -> None:
    with pytest.raises((UndefinedError, KeyError)):
        made(variants=[{"name": "Q", "files": [{}]}])


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0.0 kB"),
        (999, "1.0 kB"),
        (10**6, "1.0 MB"),
        (2_650_000, "2.6 MB"),
        (10**9, "1.0 GB"),
        (135_200_000_000, "135.2 GB"),
    ],
)
def test_sizes_are_told_in_powers_of_a_thousand(size: int, said: str) -> None:
    assert human_bytes(size) == said
