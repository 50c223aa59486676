"""The model card: front matter that the hub reads, and tables in which nothing breaks."""

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from quant.core.format import human_bytes
from quant.plan.recipe import CardRecipe, ModelRecipe, PublishRecipe, Replacement, TemplatePatch
from quant.release import card
from quant.release.card import render_card, summarize_smoke
from quant.release.manifest import (
    BaseFiguresRecord,
    DominanceRecord,
    MemoryRecord,
    ScenarioRecord,
    SourceRecord,
    TemplateRecord,
)
from tests.quant.release.manifests import (
    PASSED,
    SHARDS,
    TINY,
    make_evaluation,
    make_figures,
    make_manifest,
    make_variant,
)

PATCH = TemplatePatch("tiny", "A fix.", (Replacement("It\nbroke.", "a", "b"),))
PATCHED = TemplateRecord(original_sha256="a", sha256="b", patch=PATCH)


def render(model: ModelRecipe = TINY, **changes: Any) -> str:
    return render_card(model, make_manifest(**({"chat_template": PATCHED} | changes)))


def front_matter(model: ModelRecipe) -> dict[str, Any]:
    data: Any = ModelCard(render(model)).data
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


def test_a_model_without_a_base_model_names_none() -> None:
    model = replace(TINY, card=replace(TINY.card, base_model=None))
    assert not {"base_model", "base_model_relation"} & set(front_matter(model))


def table(text: str, number: int = 1) -> list[list[str]]:
    """Return the rows of a table, which must stand without a gap."""
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in tables[number].splitlines()
    ]


def test_every_variant_is_a_row_of_one_table() -> None:
    head, rule, *rows = table(render())
    assert len(head) == len(rule) == 8
    unsplit = "[UD-TQ1_0](M-UD-TQ1_0.gguf)|1.0 MB|4.50|1|5.1 MB|4.6 MB + 500.0 kB"
    sharded = "[Q](Q)|3.0 MB|4.50|3|7.1 MB|6.6 MB + 500.0 kB"
    assert rows[1:] == [
        [*unsplit.split("|"), "UD-TQ1_0 is for tests.", "passed"],
        [*sharded.split("|"), "Q is for tests.", "passed"],
    ]


def test_a_summary_with_bars_and_line_ends_stays_in_its_cell() -> None:
    variant = make_variant("Q", "Q.gguf", summary="this | that\nand more")
    rows = table(render(variants=(variant,)))
    assert {len(row) for row in rows} == {8}
    assert rows[2][6] == r"this \| that and more"


def test_a_rule_with_a_bar_stays_in_its_cell() -> None:
    assert table(render(), 2)[2] == [r"`a\|b`", "Q4_K", "It is so."]


def test_figures_have_columns_and_charts_only_where_they_were_measured() -> None:
    dominated = DominanceRecord(
        file="Q",
        by="R",
        ladder=False,
        kld_mean=0.1,
        kld_mean_low=0.1,
        kld_mean_high=0.1,
        said="Q is dominated: so it is",
    )
    evaluation = make_evaluation(
        texts={"code": "0"}, too_short=("maths", "json"), beaten=(dominated,)
    )
    figures = make_figures(domains={"code": make_figures()})
    text = render(variants=(make_variant("Q", *SHARDS, evaluation=figures),), evaluation=evaluation)
    head, _, row = table(text)
    assert dict(zip(head, row, strict=True)) | {
        "PPL": "12.34",
        "KLD": "0.0123 ± 0.0010",
        "top-1": "93.1 %",
    } == dict(zip(head, row, strict=True))
    assert "](pictures/kld-by-size.svg)" in text and "- Note: Q is dominated: so it is." in text
    assert "Not measured, for lack of held-out text: maths, json." in text
    assert not {"KLD", "PPL"} & set(table(render())[0]) and "pictures/" not in render()


def test_a_release_of_the_base_alone_has_no_chart_of_errors() -> None:
    base = make_variant("BF16", *SHARDS, rules=(), evaluation=make_figures(kld_mean=0.0))
    text = render(
        variants=(base,),
        evaluation=make_evaluation(base=BaseFiguresRecord(ppl=11.0, domains={})),
    )
    assert re.findall(r"pictures/[a-z-]+\.svg", text) == ["pictures/bits.svg"]


def test_a_plan_claims_no_measurement() -> None:
    text = render(variants=(make_variant("Q", *SHARDS, smoke=()),))
    assert "The files do not exist yet, and nothing was measured." in text
    assert "smoke" not in text


@pytest.mark.parametrize(
    ("sizes", "choices"),
    [
        ({"UD-A": 7, "UD-B": 20}, [["8 GB", "UD-A"], ["24 GB", "UD-B"]]),
        ({"UD-A": 7, "B": 7.5}, [["8 GB", "UD-A"]]),
        ({"A": 7}, [["8 GB", "A"]]),
        ({"UD-A": 7.7, "UD-B": 15.1}, [["16 GB", "UD-B"]]),
    ],
)
def test_the_largest_file_that_fits_is_advised_for_each_memory(
    sizes: dict[str, float], choices: list[list[str]]
) -> None:
    variants = tuple(
        make_variant(
            name,
            f"{name}.gguf",
            bytes=int(gb * 1e9),
            memory=MemoryRecord(weights=int(gb * 1e9), experts=0),
        )
        for name, gb in sizes.items()
    )
    assert table(render(variants=variants), 0)[2:] == choices


def test_a_model_of_unknown_architecture_has_no_memory_in_its_card() -> None:
    text = render(kv_bytes_per_token=0)
    assert "memory in all" not in text
    assert len(table(text, 0)[0]) == 6


def test_the_file_for_ollama_is_the_unsplit_one_whatever_its_name() -> None:
    text = render()
    assert "`M-UD-TQ1_0.gguf` is one unsplit file" in text
    assert "no tensor of ggml's ternary type" in text
    unsplit = make_variant("UD-IQ1_S", "M-UD-IQ1_S.gguf", split=False)
    other = render(variants=(unsplit, make_variant("Q", *SHARDS)))
    assert "`M-UD-IQ1_S.gguf` is one unsplit file" in other
    assert "ternary" not in other
    split = make_variant("UD-TQ1_0", "M-UD-TQ1_0.gguf")
    assert "one unsplit file" not in render(variants=(split,))


def test_the_commands_show_a_quantized_variant_and_never_the_base() -> None:
    text = render()
    assert "llama-gguf-split --merge Q/M-Q-00001-of-00003.gguf M-Q.gguf" in text
    assert 'hf download OWNER/tiny-glm-GGUF --include "Q/*"' in text
    unsplit = make_variant("UD-TQ1_0", "M-UD-TQ1_0.gguf", split=False)
    assert "--merge" not in render(variants=(unsplit,))


def test_template_fixes_are_listed_with_their_reasons() -> None:
    assert "## Chat template fixes\n\n- It broke.\n" in render()
    unpatched = TemplateRecord(original_sha256="a", sha256="a", patch=None)
    assert "fixes" not in render(chat_template=unpatched)
    assert "fixes" not in render(chat_template=None)


def test_a_source_on_the_hub_is_linked_at_its_commit() -> None:
    commit = "c" * 40
    text = render(source=SourceRecord(repo="org/model", revision=commit, files=()))
    assert (
        f"from [org/model](https://huggingface.co/org/model/tree/{commit}) at commit `{commit}`"
        in text
    )


def test_settings_counts_and_versions_are_in_the_card() -> None:
    text = render()
    assert "temperature 1.0, top_p 0.95, top_k 40, min_p 0.0" in text
    assert "over 321 documents" in text
    assert "llama.cpp 0.5.0 (abc)" in text
    assert f"smoke test: {len(TINY.smoke)} turns" in text


def test_a_waived_failure_is_listed_with_its_reason_and_its_files() -> None:
    waived = ScenarioRecord(
        name="parallel tools",
        kind="protocol",
        passed=False,
        waived="the model | calls\none by one",
    )
    text = render(
        variants=(
            make_variant("A", "A.gguf", smoke=(waived,)),
            make_variant("B", "B.gguf", smoke=(waived,)),
        )
    )
    assert "## Waived" in text
    assert "- parallel tools, in A, B: the model \\| calls one by one\n" in text
    assert "Waived" not in render()


def test_a_conversation_that_the_template_renders_wrong_is_listed_if_it_was_waived() -> None:
    text = render(chat_template=replace(PATCHED, waived={"an empty answer": "nobody | sends it"}))
    assert "- an empty answer, in the chat template: nobody \\| sends it\n" in text


def test_the_same_inputs_make_the_same_card() -> None:
    assert render() == render()
    assert render().endswith(".\n") and "\n\n\n" not in render()


def test_a_value_that_the_template_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    values = card._collect_values(TINY, make_manifest())
    del values["fixes"]
    monkeypatch.setattr(card, "_collect_values", lambda *_: values)
    with pytest.raises(UndefinedError, match="fixes"):
        render()


def test_a_smoke_test_in_a_few_words() -> None:
    failed = replace(PASSED, name="answers", passed=False)
    assert summarize_smoke([PASSED]) == "passed"
    several = [PASSED, failed, replace(failed, name="template")]
    assert summarize_smoke(several) == "passed; off: answers, template"


@pytest.mark.parametrize(
    ("size", "text"),
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
def test_sizes_are_in_powers_of_a_thousand(size: int, text: str) -> None:
    assert human_bytes(size) == text


def test_a_card_says_whether_error_compensation_was_used() -> None:
    compensated = replace(TINY, imatrix=replace(TINY.imatrix, feedback=True))
    assert "Rounding used error compensation (GPTQ)" in render(compensated)
    assert "error compensation" not in render(TINY)
