"""Twins load, carry the hub's tensor names, and become GGUF files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors import safe_open

from tests.models.twins import ARCHITECTURES, write_twin

pytestmark = pytest.mark.tools

CONVERT = """
import sys
from pathlib import Path

import torch
from conversion import get_model_class
from conversion.base import ModelBase, ModelType, TextModel, get_model_architecture, gguf

TextModel.get_vocab_base_pre = lambda self, tokenizer: "glm4"
folder, target = map(Path, sys.argv[1:])
with torch.inference_mode():
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    get_model_class(architecture)(folder, gguf.LlamaFileType.MOSTLY_BF16, target).write()
"""
"""llama.cpp's converter, in a process of its own: it brings its own copy of the gguf package."""

GGUF_NAMES = {
    "Glm4MoeForCausalLM": "glm4moe",
    "Glm4MoeLiteForCausalLM": "deepseek2",
    "Glm4ForCausalLM": "glm4",
    "Glm4vForConditionalGeneration": "glm4",
    "GlmMoeDsaForCausalLM": "glm-dsa",
    "LlamaForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3moe",
}
WITH_EXPERTS = [name for name in ARCHITECTURES if "Moe" in name]


def tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in all of a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_twin_loads_back_and_predicts(architecture: str, tmp_path: Path) -> None:
    folder = write_twin(tmp_path, architecture)
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values())
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        "def f(x):", return_tensors="pt"
    ).input_ids
    logits = model(input_ids=tokens).logits
    assert logits.shape == (*tokens.shape, 4096)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_experts_are_named_one_by_one_as_on_the_hub(architecture: str, tmp_path: Path) -> None:
    names = tensors(write_twin(tmp_path, architecture))
    for expert in range(8):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.1.mlp.experts.{expert}.{part}.weight" in names
    assert not any("gate_up" in name for name in names)


def test_weights_are_bf16_and_the_routers_bias_is_f32(tmp_path: Path) -> None:
    types = {
        name: type_
        for name, (_, type_) in tensors(write_twin(tmp_path, "Glm4MoeForCausalLM")).items()
    }
    wide = {name for name, type_ in types.items() if type_ == "F32"}
    assert wide == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    assert set(types.values()) == {"BF16", "F32"}


@pytest.mark.parametrize(
    "architecture", ["Glm4MoeForCausalLM", "Glm4ForCausalLM", "LlamaForCausalLM"]
)
def test_every_row_takes_every_type(architecture: str, tmp_path: Path) -> None:
    matrices = [
        shape for shape, _ in tensors(write_twin(tmp_path, architecture)).values() if len(shape) > 1
    ]
    assert all(shape[-1] % 256 == 0 for shape in matrices)


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    weights = [
        (
            write_twin(tmp_path / name, "LlamaForCausalLM", seed=seed) / "model.safetensors"
        ).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_changes_reach_the_configuration_and_the_tensors(tmp_path: Path) -> None:
    folder = write_twin(tmp_path, "Glm4MoeForCausalLM", num_hidden_layers=4, n_routed_experts=4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["n_routed_experts"]) == (4, 4)
    names = tensors(folder)
    assert "model.layers.3.mlp.experts.3.up_proj.weight" in names
    assert "model.layers.3.mlp.experts.4.up_proj.weight" not in names


def test_a_small_shard_size_gives_an_index(tmp_path: Path) -> None:
    folder = write_twin(tmp_path, "LlamaForCausalLM", shard_size="3MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(folder).keys()
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_twin_becomes_a_gguf_file(architecture: str, tmp_path: Path) -> None:
    folder = write_twin(tmp_path / "twin", architecture)
    target = tmp_path / "twin.gguf"
    subprocess.run([sys.executable, "-c", CONVERT, folder, target], check=True, capture_output=True)
    reader = GGUFReader(target)
    assert reader.fields["general.architecture"].contents() == GGUF_NAMES[architecture]
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == 4096
    names = {tensor.name for tensor in reader.tensors}
    assert ("blk.1.ffn_down_exps.weight" in names) == (architecture in WITH_EXPERTS)
