"""The model card: front matter that the hub reads, and a table in which nothing breaks."""

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from quant.core.format import human_bytes
from quant.plan.load import load_model
from quant.plan.recipe import CardRecipe, ModelRecipe, PublishRecipe
from quant.release.card import render_card

TINY, _ = load_model("tiny-glm")
RULE = {"tensors": "a|b", "type": "Q4_K", "why": "It is\nso.", "depth": None}


def variant(
    name: str, *paths: str, split: bool = True, rules: tuple[Any, ...] = (RULE,), **more: Any
) -> dict[str, Any]:
    files = [{"path": p, "sha256": "0" * 64, "bytes": 10**6} for p in paths]
    return {
        "name": name,
        "summary": f"{name} is for tests.",
        "bytes": len(files) * 10**6,
        "bpw": 4.5,
        "bytes_by_type": {"Q4_K": 900, "F32": 100, "Q8_0": 1},
        "memory": {"weights": len(files) * 10**6, "experts": 500_000},
        "recipe": {"split": split, "rules": rules},
        "decided": list(range(len(rules))),
        "files": files,
        "smoke": [{"name": "4 turns", "kind": "protocol", "passed": True}],
    } | more


SHARDS = tuple(f"Q/M-Q-{n:05d}-of-00003.gguf" for n in (1, 2, 3))
MANIFEST: dict[str, Any] = {
    "variants": [
        variant("BF16", *SHARDS, rules=()),
        variant("UD-TQ1_0", "M-UD-TQ1_0.gguf", split=False),
        variant("Q", *SHARDS),
    ],
    "source": {"folder": "tiny-glm"},
    "chat_template": {
        "sha256": "a",
        "original_sha256": "b",
        "patch": {"replacements": [{"why": "It\nbroke."}]},
    },
    "kv_bytes_per_token": 1000,
    "ollama_template": "",
    "llama.cpp": "0.5.0 (abc)",
    "imatrix": {"path": "imatrix_tiny-glm.gguf"},
    "calibration": {"set": "embedded", "documents": 321, "sha256": "0"},
}


def made(model: ModelRecipe = TINY, **changes: Any) -> str:
    return render_card(model, MANIFEST | changes)


def front_matter(model: ModelRecipe) -> dict[str, Any]:
    data: Any = ModelCard(made(model)).data
    return dict(data.to_dict())


def test_the_hub_reads_the_front_matter() -> None:
    model = replace(
        TINY,
        card=CardRecipe("mit", ("en", "zh"), "zai-org/GLM-4.6"),
        publish=PublishRecipe("somebody/GLM-4.6-GGUF"),
    )
    assert front_matter(model) == {
        "base_model": "zai-org/GLM-4.6",
        "base_model_relation": "quantized",
        "language": ["en", "zh"],
        "library_name": "gguf",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "imatrix", "conversational"],
        "quantized_by": "somebody",
    }


def test_a_model_of_nobody_has_no_base() -> None:
    model = replace(TINY, card=replace(TINY.card, base_model=None))
    assert not {"base_model", "base_model_relation"} & set(front_matter(model))


def table(text: str, number: int = 1) -> list[list[str]]:
    """The rows of a table, which must stand without a gap."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in found[number].splitlines()
    ]


def test_every_variant_is_a_row_of_one_table() -> None:
    head, rule, *rows = table(made())
    assert len(head) == len(rule) == 8
    assert rows[1:] == [
        [
            "[UD-TQ1_0](M-UD-TQ1_0.gguf)",
            "1.0 MB",
            "4.50",
            "1",
            "5.1 MB",
            "4.6 MB + 500.0 kB",
            "UD-TQ1_0 is for tests.",
            "passed",
        ],
        [
            "[Q](Q)",
            "3.0 MB",
            "4.50",
            "3",
            "7.1 MB",
            "6.6 MB + 500.0 kB",
            "Q is for tests.",
            "passed",
        ],
    ]


def test_a_summary_with_bars_and_lines_stays_in_its_cell() -> None:
    rows = table(made(variants=[variant("Q", "Q.gguf", summary="this | that\nand more")]))
    assert {len(row) for row in rows} == {8}
    assert rows[2][6] == r"this \| that and more"


def test_a_rule_with_a_bar_stays_in_its_cell() -> None:
    assert table(made(), 2)[2] == [r"`a\|b`", "Q4_K", "It is so."]


def test_figures_have_columns_and_pictures_only_where_they_were_measured() -> None:
    told = {
        "ppl": 12.34,
        "kld_mean": 0.0123,
        "kld_mean_low": 0.0113,
        "kld_mean_high": 0.0133,
        "top1": 0.931,
    }
    shared = {
        "texts": {"code": "0"},
        "too_short": ["maths", "json"],
        "base": {"ppl": 11.0},
        "beaten": [{"said": "Q is dominated: so it is"}],
    }
    measured = variant("Q", *SHARDS, evaluation={**told, "domains": {"code": told}})
    text = made(variants=[measured], evaluation=shared)
    head, _, row = table(text)
    assert dict(zip(head, row, strict=True)) | {
        "PPL": "12.34",
        "KLD": "0.0123 ± 0.0010",
        "top-1": "93.1 %",
    } == dict(zip(head, row, strict=True))
    assert "](pictures/kld-by-size.svg)" in text and "- Note: Q is dominated: so it is." in text
    assert "Not measured, too little held-out text: maths, json." in text
    assert not {"KLD", "PPL"} & set(table(made())[0]) and "pictures/" not in made()


def test_a_release_of_nothing_but_the_base_has_no_picture_of_what_was_lost() -> None:
    told = {
        "ppl": 11.0,
        "kld_mean": 0.0,
        "kld_mean_low": 0.0,
        "kld_mean_high": 0.0,
        "top1": 1.0,
        "domains": {},
    }
    base = variant("BF16", *SHARDS, rules=(), evaluation=told)
    text = made(
        variants=[base],
        evaluation={"texts": {}, "too_short": [], "base": {"ppl": 11.0}, "beaten": []},
    )
    assert re.findall(r"pictures/[a-z-]+\.svg", text) == ["pictures/bits.svg"]


def test_a_plan_claims_no_measurement() -> None:
    text = made(variants=[variant("Q", *SHARDS, smoke=[])])
    assert "the files were not made yet, and nothing was measured" in text
    assert "smoke" not in text and "talked to" not in text


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"UD-A": 7, "UD-B": 20}, [["8 GB", "UD-A"], ["24 GB", "UD-B"]]),
        ({"UD-A": 7, "B": 7.5}, [["8 GB", "UD-A"]]),
        ({"A": 7}, [["8 GB", "A"]]),
        ({"UD-A": 7.7, "UD-B": 15.1}, [["16 GB", "UD-B"]]),
    ],
)
def test_the_largest_that_fits_is_advised_for_each_memory(
    sizes: dict[str, float], said: list[list[str]]
) -> None:
    variants = [
        variant(
            n, f"{n}.gguf", bytes=int(gb * 1e9), memory={"weights": int(gb * 1e9), "experts": 0}
        )
        for n, gb in sizes.items()
    ]
    assert table(made(variants=variants), 0)[2:] == said


def test_a_model_whose_numbers_are_not_told_has_no_memory_in_its_card() -> None:
    text = made(kv_bytes_per_token=0)
    assert "memory in all" not in text
    assert len(table(text, 0)[0]) == 6


def test_the_file_for_ollama_is_the_one_that_is_not_split_whatever_its_name() -> None:
    text = made()
    assert "`M-UD-TQ1_0.gguf` is one unsplit file" in text
    assert "no tensor of ggml's ternary type" in text
    other = made(
        variants=[variant("UD-IQ1_S", "M-UD-IQ1_S.gguf", split=False), variant("Q", *SHARDS)]
    )
    assert "`M-UD-IQ1_S.gguf` is one unsplit file" in other
    assert "ternary" not in other
    assert "one unsplit file" not in made(variants=[variant("UD-TQ1_0", "M-UD-TQ1_0.gguf")])


def test_the_commands_show_a_quantised_variant_and_never_the_unquantised_weights() -> None:
    text = made()
    assert "llama-gguf-split --merge Q/M-Q-00001-of-00003.gguf M-Q.gguf" in text
    assert 'hf download OWNER/tiny-glm-GGUF --include "Q/*"' in text
    assert "--merge" not in made(variants=[variant("UD-TQ1_0", "M-UD-TQ1_0.gguf", split=False)])


def test_what_was_mended_is_told_with_its_reason() -> None:
    assert "## What was mended in the chat template\n\n- It broke.\n" in made()
    assert "mended" not in made(
        chat_template={"sha256": "a", "original_sha256": "a", "patch": None}
    )
    assert "mended" not in made(chat_template=None)


def test_a_source_on_the_hub_is_told_with_its_commit() -> None:
    commit = "c" * 40
    text = made(source={"repo": "org/model", "revision": commit})
    assert (
        f"from [org/model](https://huggingface.co/org/model/tree/{commit}) at commit `{commit}`"
        in text
    )


def test_settings_counts_and_versions_are_said() -> None:
    text = made()
    assert "temperature 1.0, top_p 0.95, top_k 40, min_p 0.0" in text
    assert "over 321 documents" in text
    assert "llama.cpp 0.5.0 (abc)" in text
    assert f"published: {len(TINY.smoke)} turns" in text


def test_what_was_waived_is_said_with_the_reason_and_the_files() -> None:
    waived = {
        "name": "parallel tools",
        "kind": "protocol",
        "passed": False,
        "waived": "the model | calls\none by one",
    }
    text = made(
        variants=[variant("A", "A.gguf", smoke=[waived]), variant("B", "B.gguf", smoke=[waived])]
    )
    assert "## Waived" in text
    assert "- parallel tools, in A, B: the model \\| calls one by one\n" in text
    assert "Waived" not in made()


def test_a_conversation_that_the_template_gets_wrong_is_said_when_it_was_waived() -> None:
    text = made(
        chat_template=MANIFEST["chat_template"]
        | {"waived": {"an empty answer": "nobody | sends it"}}
    )
    assert "- an empty answer, in the chat template: nobody \\| sends it\n" in text


def test_the_same_inputs_make_the_same_card() -> None:
    assert made() == made()
    assert made().endswith(".\n") and "\n\n\n" not in made()


def test_a_manifest_that_lacks_something_is_our_own_mistake() -> None:
    with pytest.raises((UndefinedError, KeyError)):
        made(variants=[{"name": "Q", "files": [{}]}])


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0.0 kB"),
        (999, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (10**6, "1.0 MB"),
        (999_999_999, "1.0 GB"),
        (2_640_000, "2.6 MB"),
        (10**9, "1.0 GB"),
        (135_200_000_000, "135.2 GB"),
    ],
)
def test_sizes_are_told_in_powers_of_a_thousand(size: int, said: str) -> None:
    assert human_bytes(size) == said


def test_a_card_says_whether_rounding_was_fed_back() -> None:
    fed_back = replace(TINY, imatrix=replace(TINY.imatrix, feedback=True))
    assert "Rounding was fed back" in made(fed_back)
    assert "fed back" not in made(TINY)
