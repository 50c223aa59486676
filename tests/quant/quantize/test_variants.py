"""Quantizing: one call for all variants, nothing done twice, and every file compared with its plan."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.calibration import imatrix
from quant.calibration.imatrix import ImportanceMatrix
from quant.core import files
from quant.core.errors import CheckError, InputError
from quant.core.store import Store, StoredResult
from quant.llama import gguf, toolchain
from quant.llama.gguf import Header, read_header
from quant.llama.model_file import ModelFile
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import Rule, Variant
from quant.quantize.engine import run
from quant.quantize.engine.job import EngineJob, VariantRequest
from quant.quantize.shard import VariantFile
from quant.quantize.variants import (
    QuantizeTarget,
    StageRequest,
    WriteRequest,
    find_differences,
    quantize_variants,
    write_variants,
)
from tests.gguf_files import Tensor, content
from tests.gguf_files import write as write_file
from tests.llama_quantize import llama_quantize
from tests.quant.quantize.engine.models import LARGE, write_base, write_matrix

RULES = Variant(
    "V",
    "For tests.",
    "Q4_K_M",
    (Rule(r"b\..*", "Q8_0", "For tests."), Rule(".*", "Q4_K", "For tests.")),
)
BASE = [
    Tensor("a.weight", (256, 2), "BF16"),
    Tensor("b.weight", (64, 2), "BF16"),
    Tensor("n_norm.weight", (7,), "F32"),
]
WRITTEN = [Tensor("a.weight", (256, 2), "Q4_K"), Tensor("b.weight", (64, 2), "Q8_0"), BASE[2]]


def make_rules_plan(folder: Path) -> Plan:
    return make_plan(RULES, read_header(write_file(folder / "base.gguf", BASE)).tensors)


def list_differences(
    folder: Path, tensors: list[Tensor], cut: int = 0, extra: bytes = b""
) -> list[str]:
    """Return how a file with these tensors, of that length, differs from the plan."""
    path = write_file(folder / "written.gguf", tensors, cut=cut)
    path.write_bytes(path.read_bytes() + extra)
    differences = find_differences(
        make_rules_plan(folder), [read_header(path)], len(content(WRITTEN))
    )
    return [line.removeprefix(f"{path}: ") for line in differences]


def test_a_file_as_planned_has_no_differences(tmp_path: Path) -> None:
    assert list_differences(tmp_path, WRITTEN) == []


def test_another_order_of_tensors_is_reported(tmp_path: Path) -> None:
    assert list_differences(tmp_path, WRITTEN[::-1]) == [
        "order of tensors: expected a.weight, found n_norm.weight"
    ]


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        (
            [WRITTEN[0], BASE[1], WRITTEN[2]],
            "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 2), 'BF16')",
        ),
        (
            [WRITTEN[0], Tensor("b.weight", (64, 4), "Q8_0"), WRITTEN[2]],
            "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 4), 'Q8_0')",
        ),
        (WRITTEN[:2], "tensor n_norm.weight: expected ((7,), 'F32'), found None"),
        ([*WRITTEN, Tensor("x")], "tensor x: expected None, found ((32, 2), 'F32')"),
    ],
)
def test_every_tensor_that_differs_from_the_plan_is_reported(
    tmp_path: Path, tensors: list[Tensor], line: str
) -> None:
    assert line in list_differences(tmp_path, tensors)


def test_a_file_of_another_length_is_reported(tmp_path: Path) -> None:
    [longer] = list_differences(tmp_path, WRITTEN, extra=b"more")
    assert re.fullmatch(r"expected \d+ bytes, found \d+", longer)
    [shorter] = list_differences(tmp_path, WRITTEN, cut=4)  # part of the padding
    assert re.fullmatch(r"expected \d+ bytes, found \d+", shorter)


def test_shards_are_compared_as_one_file(tmp_path: Path) -> None:
    plan = make_rules_plan(tmp_path)
    shards = [
        read_header(write_file(tmp_path / f"{n}.gguf", [tensor]))
        for n, tensor in enumerate(WRITTEN)
    ]
    assert list(find_differences(plan, shards)) == []
    assert [line.split(": ")[1] for line in find_differences(plan, shards[:2])] == [
        "tensor n_norm.weight"
    ]


# ---- The stage, with ggml's own library


SMALL = Variant("S", "x", "Q4_K_M", (Rule(".*", "Q4_K", "x", narrow="Q8_0"),))
OTHER = replace(SMALL, name="O", rules=(Rule(r"output\.weight", "Q6_K", "x"), *SMALL.rules))
BF16 = Variant("BF16", "x", "BF16")


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.gguf", LARGE)


@pytest.fixture
def base(base_path: Path) -> ModelFile:
    """Return a model in BF16, whose header is not read yet."""
    return ModelFile((base_path,), (files.make_receipt(base_path, base_path.parent),))


@pytest.fixture(scope="module")
def matrix(base_path: Path) -> ImportanceMatrix:
    return imatrix.read_imatrix(write_matrix(base_path.parent / "imatrix.gguf", base_path))


def plan_variants(base: ModelFile, matrix: ImportanceMatrix, *variants: Variant) -> list[Plan]:
    tensors = read_header(base.path).tensors
    return [make_plan(v, tensors, matrix.covered) for v in variants]


def quantize(
    base: ModelFile,
    matrix: ImportanceMatrix,
    store: Path,
    *variants: Variant,
    max_size: str = "50G",
) -> tuple[VariantFile, ...]:
    """Run the stage for these variants, with a store in that folder."""
    request = StageRequest(
        base=base,
        imatrix=matrix,
        plans=plan_variants(base, matrix, *variants),
        title="M",
        max_size=max_size,
        tools=toolchain.find_toolchain(),
    )
    return quantize_variants(request, Store(store))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function after whose call nobody may quantize."""

    def forbid() -> None:
        def run_worker(*_: object) -> None:
            raise AssertionError("finished work is done again")

        monkeypatch.setattr(run, "_run_worker", run_worker)

    return forbid


@pytest.mark.tools
def test_all_variants_but_the_base_come_out_of_one_call(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, no_work: Any
) -> None:
    written = quantize(base, matrix, tmp_path, BF16, SMALL, OTHER)
    assert [(v.name, [p.name for p in v.paths]) for v in written] == [
        ("S", ["M-S.gguf"]),
        ("O", ["M-O.gguf"]),
    ]
    for v in written:
        assert read_header(v.paths[0]).hash_tensors() == dict(v.tensor_digests)
        assert files.hash_file(v.paths[0]) == v.receipts[0].sha256
        expected = llama_quantize(
            base.path, matrix.path, v.plan.types(), "Q4_K_M", tmp_path / f"{v.name}.gguf"
        )
        assert v.paths[0].read_bytes() == expected.read_bytes()
    no_work()
    assert quantize(base, matrix, tmp_path, BF16, SMALL, OTHER) == written


@pytest.mark.tools
def test_the_headers_of_base_and_imatrix_are_read_once_however_many_variants_there_are(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[Path] = Counter()

    def count_reads(path: Path) -> Header:
        reads[path] += 1
        return read_header(path)

    plans = plan_variants(base, matrix, SMALL, OTHER)
    monkeypatch.setattr(gguf, "read_header", count_reads)
    request = StageRequest(
        base=base,
        imatrix=matrix,
        plans=plans,
        title="M",
        max_size="50G",
        tools=toolchain.find_toolchain(),
    )
    quantize_variants(request, Store(tmp_path))
    assert (reads[base.path], reads[matrix.path]) == (1, 1)
    quantize_variants(request, Store(tmp_path))
    assert (reads[base.path], reads[matrix.path]) == (1, 2)  # the base is the same object


@pytest.mark.tools
def test_a_run_that_ended_between_two_variants_continues_with_the_second(
    base: ModelFile,
    matrix: ImportanceMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_work: Any,
) -> None:
    committed: list[str] = []
    real = Store.commit

    def commit(
        store: Store, stage: str, inputs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> StoredResult:
        if committed:
            raise KeyboardInterrupt
        committed.append(inputs["name"])
        return real(store, stage, inputs, facts)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(Store, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            quantize(base, matrix, tmp_path, SMALL, OTHER)
    no_work()  # both were written
    written = quantize(base, matrix, tmp_path, SMALL, OTHER)
    assert [v.name for v in written] == ["S", "O"] and committed == ["M-S"]


@pytest.mark.tools
def test_after_a_change_of_a_recipe_only_changed_tensors_are_quantized(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(base, matrix, tmp_path / "a", SMALL)
    jobs: list[EngineJob] = []
    real = run._run_worker

    def run_worker(job: EngineJob, folder: Path) -> None:
        jobs.append(job)
        real(job, folder)

    monkeypatch.setattr(run, "_run_worker", run_worker)
    changed = replace(OTHER, name="S")
    [reusing] = quantize(base, matrix, tmp_path / "a", changed, max_size="1M")
    [job] = jobs
    assert [f.path.name for f in job.reusable] == ["M-S.gguf"]
    assert len(reusing.paths) > 1  # shards are filled from a whole file as well
    [alone] = quantize(base, matrix, tmp_path / "b", changed, max_size="1M")
    assert [p.read_bytes() for p in reusing.paths] == [p.read_bytes() for p in alone.paths]


@pytest.mark.tools
def test_a_tensor_that_fits_no_shard_is_refused_before_any_work(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path
) -> None:
    large = replace(SMALL, rules=(Rule(".*", "BF16", "x"),))
    with pytest.raises(InputError) as caught:
        quantize(base, matrix, tmp_path, large, max_size="1M")
    line = "tensor output.weight: expected at most 1M a shard, found 1536000 bytes"
    assert line in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.tools
def test_a_file_that_is_not_as_planned_is_an_error(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [small, other] = plan_variants(base, matrix, SMALL, OTHER)
    path = tmp_path / "V.gguf"
    monkeypatch.setattr(QuantizeTarget, "request", VariantRequest(path, other.types(), "Q4_K_M"))
    request = WriteRequest(
        base=base,
        targets=[QuantizeTarget(small, path)],
        identity="x",
        tools=toolchain.find_toolchain(),
        imatrix=ModelFile.open(matrix.path),
    )
    with pytest.raises(CheckError, match=r"tensor output\.weight: expected .*Q4_K.*, found .*Q6_K"):
        write_variants(request, tmp_path / "work")
