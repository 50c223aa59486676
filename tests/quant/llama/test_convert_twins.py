"""Small twins of the real models are converted, measured, quantized and served."""

import base64
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from quant.calibration import documents, hessians, imatrix
from quant.calibration.text import render_document
from quant.chat.template import patch_template
from quant.hub import checkpoint as source
from quant.llama import toolchain
from quant.llama.convert import FileMetadata, write_vision
from quant.llama.gguf import Header, read_header
from quant.llama.model_file import ModelFile
from quant.llama.server import ServerSettings, serve_model
from quant.plan.load import list_recipes, load_variant
from quant.plan.plan import make_plan
from quant.plan.recipe import ImatrixRecipe, Variant
from quant.plan.sizes import forecast_file_bytes, forecast_shard_bytes
from quant.quantize.shard import split_file
from quant.quantize.variants import QuantizeTarget, WriteRequest, write_variants
from tests.llama_quantize import type_file
from tests.models import twins
from tests.models.checkpoints import add_prediction, dequantised, in_fp8
from tests.models.conversion import convert, dry_run
from tests.models.twins import write_twin

pytestmark = pytest.mark.tools

# Not 8 experts: llama-quantize's presets have special cases for Mixtral's number.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-4.6": ("Glm4MoeForCausalLM", {"n_routed_experts": 6}),
    "glm-4.7-flash": ("Glm4MoeLiteForCausalLM", {"n_routed_experts": 6}),
    "glm-4": ("Glm4ForCausalLM", {}),
    "glm-4.6v-flash": ("Glm4vForConditionalGeneration", {}),
    "glm-5": ("GlmMoeDsaForCausalLM", {"n_routed_experts": 6}),
}
OWN_EMBEDDING = {"glm-4.6": False, "glm-4.7-flash": True, "glm-5": False}
VARIANTS = [name for name in list_recipes("variants") if name != "BF16"]


@dataclass(frozen=True)
class ConvertedModel:
    """What every variant of a model is made from."""

    checkpoint: Path
    base: Path
    matrix: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConvertedModel]:
    """Return every twin, and the tiny model: converted, with an imatrix of a few documents."""
    root = tmp_path_factory.mktemp("twins")
    folders = {"tiny-glm": twins.TINY_GLM}
    for name, (architecture, changes) in MODELS.items():
        folders[name] = write_twin(root / name, architecture, **changes)
        if name in OWN_EMBEDDING:
            add_prediction(folders[name], own_embedding=OWN_EMBEDDING[name])
    convert([("text", folder, root / f"{name}.gguf") for name, folder in folders.items()], root)
    template = patch_template(
        (twins.TINY_GLM / "chat_template.jinja").read_text(), None, "template"
    )
    text = root / "text.txt"
    text.write_text(
        "\n".join(
            render_document(document, template)
            for document in documents.load_documents("embedded")[:12]
        )
    )
    for name in folders:
        (root / "matrices" / name).mkdir(parents=True)
        settings, out = ImatrixRecipe(context=256, chunks=4), root / "matrices" / name / "m.gguf"
        run = imatrix.ImatrixRun(root / f"{name}.gguf", text, out, settings)
        imatrix.run_llama_imatrix(run, toolchain.find_toolchain())
    return {
        n: ConvertedModel(folders[n], root / f"{n}.gguf", root / "matrices" / n / "m.gguf")
        for n in folders
    }


def make_request(model: ConvertedModel, target: QuantizeTarget) -> WriteRequest:
    return WriteRequest(
        base=ModelFile.open(model.base),
        targets=[target],
        identity="twin",
        tools=toolchain.find_toolchain(),
        imatrix=ModelFile.open(model.matrix),
    )


def write_variant(model: ConvertedModel, variant: Variant, out: Path) -> Header:
    """Write a variant and return its header."""
    out.parent.mkdir()
    planned = make_plan(
        variant, read_header(model.base).tensors, imatrix.read_imatrix(model.matrix).covered
    )
    write_variants(make_request(model, QuantizeTarget(planned, out)), out.parent / "work")
    return read_header(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forecast_size_of_a_variant_is_that_of_its_file(
    name: str, models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    model, variant = models["tiny-glm"], load_variant(name)
    base = read_header(model.base)
    planned = make_plan(variant, base.tensors)
    header = write_variant(model, variant, tmp_path / "q" / "V.gguf")
    assert header.path.stat().st_size == forecast_file_bytes(
        planned, base, read_header(model.matrix)
    )
    assert header.path.stat().st_size == forecast_file_bytes(planned, base)
    assert [t.name for t in header.tensors] == [t.tensor.name for t in planned.tensors]


def test_the_forecast_size_of_the_base_is_its_own(models: dict[str, ConvertedModel]) -> None:
    for model in models.values():
        base = read_header(model.base)
        assert (
            forecast_file_bytes(make_plan(load_variant("BF16"), base.tensors), base)
            == model.base.stat().st_size
        )


@pytest.mark.parametrize("name", ["BF16", "Q8_0"])
def test_shards_are_cut_where_the_forecast_cuts_them(
    name: str, models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    model = models["tiny-glm"]
    planned = make_plan(load_variant(name), read_header(model.base).tensors)
    path = model.base
    if not planned.is_base:
        path = write_variant(model, planned.variant, tmp_path / "q" / "V.gguf").path
    (tmp_path / "s").mkdir()
    split_file(path, "3M", toolchain.find_toolchain(), tmp_path / "s" / "V")
    shards = [read_header(shard) for shard in sorted((tmp_path / "s").glob("*.gguf"))]
    sizes = tuple(header.path.stat().st_size - header.data_start for header in shards)
    assert sizes == forecast_shard_bytes(planned, 3_000_000)
    assert len(sizes) > 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_quantize_takes_every_plan_unchanged(
    name: str, variant: str, models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    model = models[name]
    planned = make_plan(
        load_variant(variant),
        read_header(model.base).tensors,
        imatrix.read_imatrix(model.matrix).covered,
    )
    table = tmp_path / "types.txt"
    table.write_text(
        type_file({t.tensor.name: t.type.name for t in planned.tensors if t.rule is not None})
    )
    types = dry_run(
        model.base,
        "--imatrix",
        model.matrix,
        "--tensor-type-file",
        table,
        model.base,
        planned.variant.file_type,
    )
    assert list(types.items()) == list(planned.types().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["IQ4_NL", "Q4_1", "Q8_0"])
def test_a_variant_named_like_a_preset_has_its_types(
    name: str, preset: str, models: dict[str, ConvertedModel]
) -> None:
    model = models[name]
    planned = make_plan(load_variant(preset), read_header(model.base).tensors)
    types = dry_run(model.base, "--imatrix", model.matrix, model.base, preset)
    assert types == planned.types()


@pytest.mark.parametrize("name", MODELS)
def test_error_compensation_changes_every_matrix_with_a_hessian(
    name: str, models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    model = models[name]
    seen = tmp_path / "moments.safetensors"
    observed = hessians.collect_hessians(
        model.base, model.base.parent / "text.txt", seen, hessians.HessianSettings(256, 4)
    )
    header, covered = read_header(model.base), imatrix.read_imatrix(model.matrix).covered
    planned = make_plan(load_variant("UD-Q2_K_XL"), header.tensors, covered)
    request = make_request(model, QuantizeTarget(planned, tmp_path / "V.gguf"))
    (facts,) = write_variants(replace(request, hessians=seen), tmp_path / "work")
    request = make_request(model, QuantizeTarget(planned, tmp_path / "P.gguf"))
    (plain,) = write_variants(request, tmp_path / "work")
    changed = {
        n for n, t in facts["tensors"].items() if t["sha256"] != plain["tensors"][n]["sha256"]
    }
    quantized = {t.tensor.name for t in planned.tensors if t.type != t.tensor.type}
    assert changed == quantized & {*observed.counts, "token_embd.weight"}
    assert covered & quantized <= {*observed.counts}


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_twin_answers(
    name: str, models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    header = write_variant(models[name], load_variant("UD-Q2_K_XL"), tmp_path / "q" / "V.gguf")
    with serve(header.path, tmp_path) as client:
        answer = client.post(
            "/completion", json={"prompt": "Hello.", "n_predict": 8, "ignore_eos": True}
        ).json()
    assert answer["tokens_predicted"] == 8
    assert answer["tokens_evaluated"] > 1


def test_a_twin_with_vision_reads_an_image(
    models: dict[str, ConvertedModel], tmp_path: Path
) -> None:
    model = models["glm-4.6v-flash"]
    vision = tmp_path / "v" / "mmproj-Twin-F16.gguf"
    vision.parent.mkdir()
    facts = write_vision(
        source.read_checkpoint(model.checkpoint),
        FileMetadata("Twin", {"general.name": "Twin"}),
        vision,
    )
    assert facts["architecture"] == "clip"
    assert read_header(vision).metadata["general.name"] == "Twin"
    picture = "data:image/png;base64," + base64.b64encode(png(56, 84)).decode()
    question = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "What is it?"},
    ]

    def prompt_tokens(content: object) -> int:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    with serve(model.base, tmp_path, "--mmproj", vision) as client:
        # 56 x 84 pixels are 4 x 6 patches of 14, of which every 2 x 2 become one token.
        assert prompt_tokens(question) - prompt_tokens(question[1:]) >= 6


def test_an_fp8_checkpoint_converts_to_its_dequantized_weights(tmp_path: Path) -> None:
    fp8 = write_twin(tmp_path / "fp8", MODELS["glm-5"][0], n_routed_experts=3, index_n_heads=3)
    add_prediction(fp8, own_embedding=False)
    stored = in_fp8(fp8)
    assert {name.split(".")[-2] for name in stored} >= {
        "q_a_proj",
        "kv_b_proj",
        "o_proj",
        "down_proj",
    }
    bf16 = dequantised(fp8, tmp_path / "bf16")
    convert(
        [("text", folder, tmp_path / f"{folder.name}.gguf") for folder in (fp8, bf16)], tmp_path
    )
    digests = [read_header(tmp_path / f"{name}.gguf").hash_tensors() for name in ("fp8", "bf16")]
    assert digests[0] == digests[1]


@contextmanager
def serve(model: Path, folder: Path, *options: str | Path) -> Iterator[httpx.Client]:
    """Yield a client of a server that has loaded this file."""
    arguments = ("-m", model, "-c", "512", "--jinja", "-t", "2", *options)
    settings = ServerSettings(arguments, folder / "server.log")
    with (
        serve_model(toolchain.find_toolchain(), settings) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client,
    ):
        yield client


def png(width: int, height: int) -> bytes:
    """Return a PNG: red grows from left to right, green from top to bottom."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(
        b"\0" + b"".join(bytes((4 * x, 3 * y, 128)) for x in range(width)) for y in range(height)
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
