"""The layout of a release: where files go, and what Ollama is told."""

import json
from dataclasses import replace
from pathlib import Path

from quant.core.files import Receipt
from quant.llama.model_file import ModelFile
from quant.plan.load import load_model
from quant.plan.plan import Plan
from quant.plan.recipe import Variant
from quant.quantize.shard import VariantFile
from quant.release.card import smoke_words
from quant.release.package import ollama_params, place_files, render_modelfile, variants_table

TINY, _ = load_model("tiny-glm")


def sharded(*names: str) -> VariantFile:
    variant = Variant("Q4", "For tests.", "Q4_K_M")
    receipts = tuple(Receipt(n, "0", 5) for n in names)
    return VariantFile(
        Plan(variant, ()), ModelFile(tuple(Path("/store/key") / n for n in names), receipts), {}
    )


def test_one_file_goes_to_the_root() -> None:
    assert place_files(sharded("M-Q4.gguf")) == {"M-Q4.gguf": Path("/store/key/M-Q4.gguf")}


def test_shards_go_into_a_folder_of_their_variant() -> None:
    made = sharded("M-Q4-00001-of-00002.gguf", "M-Q4-00002-of-00002.gguf")
    assert list(place_files(made)) == ["Q4/M-Q4-00001-of-00002.gguf", "Q4/M-Q4-00002-of-00002.gguf"]
    assert made.bytes == 10
    assert made.name == "Q4"


def test_ollama_is_told_everything_as_json() -> None:
    assert json.loads(json.dumps(ollama_params(TINY))) == {
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "num_ctx": 4096,
        "stop": ["<|user|>", "<|observation|>", "<|endoftext|>"],
    }


def test_a_modelfile_says_the_same_line_by_line() -> None:
    assert render_modelfile(TINY, "M-UD-TQ1_0.gguf").splitlines() == [
        "FROM ./M-UD-TQ1_0.gguf",
        "PARAMETER temperature 1.0",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 40",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER num_ctx 4096",
        'PARAMETER stop "<|user|>"',
        'PARAMETER stop "<|observation|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]


def test_a_system_prompt_is_kept_with_its_lines() -> None:
    model = replace(TINY, ollama=replace(TINY.ollama, system="Be brief.\nBe kind."))
    assert render_modelfile(model, "f.gguf").endswith('SYSTEM """Be brief.\nBe kind."""\n')


def test_a_verdict_in_a_few_words() -> None:
    fine = {"name": "4 turns", "passed": True}
    off = {"name": "answers", "passed": False}
    assert smoke_words([fine]) == "passed"
    assert smoke_words([fine, off, off | {"name": "template"}]) == "passed; off: answers, template"


def test_a_release_at_a_glance() -> None:
    entry = {
        "name": "Q4",
        "bytes": 1234567,
        "bpw": 4.567,
        "files": [{}, {}],
        "smoke": [],
        "evaluation": None,
    }
    told = {
        "ppl": 9.0,
        "kld_mean": 0.0123,
        "kld_mean_low": 0.0113,
        "kld_mean_high": 0.0133,
        "top1": 0.931,
    }
    assert variants_table({"variants": [entry, entry | {"evaluation": told}]}) == [
        ("Q4", "1,234,567", "4.57", "2", "-", "-", "passed"),
        ("Q4", "1,234,567", "4.57", "2", "0.0123 ± 0.0010", "93.1 %", "passed"),
    ]
