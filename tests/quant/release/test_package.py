"""The layout of a release: where files go, what Ollama is told, and the release as a table."""

import json
from dataclasses import replace
from pathlib import Path

from quant.core.files import Receipt
from quant.llama.model_file import ModelFile
from quant.plan.plan import Plan
from quant.plan.recipe import Variant
from quant.quantize.shard import VariantFile
from quant.release.inputs import place_files
from quant.release.ollama import make_params, render_modelfile
from quant.release.texts import list_warnings, variants_table
from tests.quant.release.manifests import TINY, make_figures, make_manifest, make_variant


def make_variant_file(*names: str) -> VariantFile:
    variant = Variant("Q4", "For tests.", "Q4_K_M")
    receipts = tuple(Receipt(n, "0", 5) for n in names)
    paths = tuple(Path("/store/key") / n for n in names)
    return VariantFile(Plan(variant, ()), ModelFile(paths, receipts), {})


def test_a_single_file_goes_to_the_root() -> None:
    placed = place_files(make_variant_file("M-Q4.gguf"))
    assert placed == {"M-Q4.gguf": Path("/store/key/M-Q4.gguf")}


def test_shards_go_into_a_folder_of_their_variant() -> None:
    variant = make_variant_file("M-Q4-00001-of-00002.gguf", "M-Q4-00002-of-00002.gguf")
    placed = list(place_files(variant))
    assert placed == ["Q4/M-Q4-00001-of-00002.gguf", "Q4/M-Q4-00002-of-00002.gguf"]
    assert variant.bytes == 10
    assert variant.name == "Q4"


def test_params_for_ollama_have_every_setting() -> None:
    assert json.loads(json.dumps(make_params(TINY))) == {
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "num_ctx": 4096,
        "stop": ["<|user|>", "<|observation|>", "<|endoftext|>"],
    }


def test_a_modelfile_has_the_same_settings_line_by_line() -> None:
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


def test_a_system_prompt_keeps_its_lines() -> None:
    model = replace(TINY, ollama=replace(TINY.ollama, system="Be brief.\nBe kind."))
    assert render_modelfile(model, "f.gguf").endswith('SYSTEM """Be brief.\nBe kind."""\n')


def test_a_release_as_a_table() -> None:
    plain = make_variant("Q4", "1.gguf", "2.gguf", bytes=1234567, bpw=4.567)
    measured = replace(plain, evaluation=make_figures())
    manifest = make_manifest(variants=(plain, measured))
    assert variants_table(manifest) == [
        ("Q4", "1,234,567", "4.57", "2", "-", "-", "passed"),
        ("Q4", "1,234,567", "4.57", "2", "0.0123 ± 0.0010", "93.1 %", "passed"),
    ]
    assert list_warnings(manifest) == []
