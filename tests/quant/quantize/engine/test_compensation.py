"""The engine with error compensation: rows are refined where a Hessian is known, else ggml's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quant.calibration.hessian_file import FORM, Hessians
from quant.llama.gguf import read_header
from quant.quantize.engine.job import EngineSettings
from quant.quantize.engine.run import run_engine
from quant.quantize.gptq.descent import refine_rows
from quant.quantize.gptq.hessian import Hessian
from tests.quant.quantize.engine.models import job as make_job
from tests.quant.quantize.engine.models import types, write_base, write_matrix

pytestmark = pytest.mark.tools
KNOWN, EXPERTS, UNKNOWN = (
    "blk.0.attn_q.weight",
    "blk.0.ffn_up_exps.weight",
    "blk.0.attn_output.weight",
)
EMBEDDING = "token_embd.weight"
UNSEEN = 2
"""An expert that too few tokens reached."""
Model = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a base, its imatrix, and Hessians of two of its tensors."""
    folder = tmp_path_factory.mktemp("feedback")
    base, rng = write_base(folder / "base.gguf"), np.random.default_rng(4)
    inputs = (
        rng.standard_normal((6, 400, 60)) @ rng.standard_normal((6, 60, 512))
        + rng.standard_normal((6, 400, 512)) / 2
    )
    sums = np.asarray(inputs.transpose(0, 2, 1) @ inputs, np.float32)
    counts = np.full(5, 400)
    counts[UNSEEN] = 3
    tensors = {
        KNOWN: sums[5],
        f"{KNOWN}.counts": np.array([400]),
        EXPERTS: sums[:5].copy(),
        f"{EXPERTS}.counts": counts,
    }
    save_file(tensors, folder / "m.safetensors", {"moments": json.dumps({"form": FORM})})
    return base, write_matrix(folder / "imatrix.gguf", base), folder / "m.safetensors"


def quantize(
    model: Model, folder: Path, *, compensated: bool, **settings: int
) -> tuple[Path, dict[str, Any]]:
    """Return a variant of Q4_K, and the records of its tensors."""
    base, matrix, hessians = model
    out = folder / f"{'compensated' if compensated else 'plain'}.gguf"
    job = replace(
        make_job(base, matrix, {out: types(base, "Q4_K")}), settings=EngineSettings(**settings)
    )
    (record,) = run_engine(
        replace(job, hessians=hessians if compensated else None), folder / "work"
    ).values()
    return out, record["tensors"]


def rows(path: Path, name: str) -> NDArray[np.uint8]:
    """Return the stored rows of a tensor, of all experts."""
    header = read_header(path)
    tensor = header.by_name[name]
    start = header.data_start + tensor.offset
    data = np.frombuffer(path.read_bytes()[start : start + tensor.bytes], np.uint8)
    return data.reshape(-1, tensor.type.bytes(tensor.shape[0]))


def test_rows_with_a_known_hessian_are_ggmls_refined_with_gptq(
    model: Model, tmp_path: Path
) -> None:
    (plain, before), (refined, after) = (
        quantize(model, tmp_path, compensated=c) for c in (False, True)
    )
    assert refined.stat().st_size == plain.stat().st_size
    source = (rows(model[0], KNOWN).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    mean = Hessians.open(model[2]).read_mean(KNOWN)
    assert mean is not None
    expected = refine_rows(
        read_header(plain).by_name[KNOWN].type,
        source,
        rows(plain, KNOWN).reshape(-1),
        Hessian(mean),
    )
    same = (rows(refined, KNOWN) == expected.reshape(len(source), -1)).all(1)
    assert (
        same.mean() > 0.95
    )  # this process may multiply in another order, and then a level may be another
    assert (rows(refined, KNOWN) != rows(plain, KNOWN)).any(1).all()
    assert (rows(refined, UNKNOWN) == rows(plain, UNKNOWN)).all()
    assert after[KNOWN]["error"] < before[KNOWN]["error"] / 2
    assert after[UNKNOWN] == before[UNKNOWN]


def test_an_expert_that_too_few_tokens_reached_keeps_ggmls_rows(
    model: Model, tmp_path: Path
) -> None:
    plain, refined = (
        rows(quantize(model, tmp_path, compensated=c)[0], EXPERTS).reshape(5, 45, -1)
        for c in (False, True)
    )
    changed = (plain != refined).any((1, 2))
    assert [*np.flatnonzero(~changed)] == [UNSEEN]


def test_the_embedding_is_refined_with_the_identity_as_hessian(
    model: Model, tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    (plain, _), (refined, _) = (quantize(model, tmp_path, compensated=c) for c in (False, True))
    source = (rows(model[0], EMBEDDING).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = GGMLQuantizationType(read_header(plain).by_name[EMBEDDING].type.id)
    errors = [
        float(np.square(dequantize(rows(path, EMBEDDING), kind) - source).sum())
        for path in (plain, refined)
    ]
    assert errors[1] < errors[0]


def test_threads_and_memory_change_no_byte(model: Model, tmp_path: Path) -> None:
    (one, _) = quantize(model, tmp_path / "one", compensated=True, jobs=1)
    (three, _) = quantize(model, tmp_path / "three", compensated=True, jobs=3, memory=2**30)
    assert one.read_bytes() == three.read_bytes()
