"""Quantising: one call for all variants, nothing done twice, and what was written is compared with the plan."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quant.calibration import imatrix
from quant.calibration.imatrix import ImportanceMatrix
from quant.core import files
from quant.core.store import Store, StoredResult
from quant.errors import CheckError, InputError
from quant.llama import toolchain
from quant.llama.gguf import read_header
from quant.llama.model_file import ModelFile
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import Rule, Variant
from quant.quantize.engine import run
from quant.quantize.engine.job import EngineJob, TypeRequest
from quant.quantize.variants import (
    QuantizeTarget,
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
MADE = [Tensor("a.weight", (256, 2), "Q4_K"), Tensor("b.weight", (64, 2), "Q8_0"), BASE[2]]


def made(tmp_path: Path, tensors: list[Tensor], cut: int = 0, extra: bytes = b"") -> list[str]:
    planned = make_plan(RULES, read_header(write_file(tmp_path / "base.gguf", BASE)).tensors)
    path = write_file(tmp_path / "made.gguf", tensors, cut=cut)
    path.write_bytes(path.read_bytes() + extra)
    expected_bytes = len(content(MADE))
    return [
        line.removeprefix(f"{path}: ")
        for line in find_differences(planned, [read_header(path)], expected_bytes)
    ]


def test_a_file_as_planned_has_no_differences(tmp_path: Path) -> None:
    assert made(tmp_path, MADE) == []


def test_another_order_of_tensors_is_told(tmp_path: Path) -> None:
    assert made(tmp_path, MADE[::-1]) == [
        "order of tensors: expected a.weight, found n_norm.weight"
    ]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            [MADE[0], BASE[1], MADE[2]],
            "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 2), 'BF16')",
        ),
        (
            [MADE[0], Tensor("b.weight", (64, 4), "Q8_0"), MADE[2]],
            "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 4), 'Q8_0')",
        ),
        (MADE[:2], "tensor n_norm.weight: expected ((7,), 'F32'), found None"),
        ([*MADE, Tensor("x")], "tensor x: expected None, found ((32, 2), 'F32')"),
    ],
)
def test_every_tensor_that_is_not_as_planned_is_told(
    tmp_path: Path, tensors: list[Tensor], said: str
) -> None:
    assert said in made(tmp_path, tensors)


def test_a_file_of_another_length_is_told(tmp_path: Path) -> None:
    [longer] = made(tmp_path, MADE, extra=b"more")
    assert re.fullmatch(r"expected \d+ bytes, found \d+", longer)
    [shorter] = made(tmp_path, MADE, cut=4)  # of the padding
    assert re.fullmatch(r"expected \d+ bytes, found \d+", shorter)


def test_shards_are_compared_as_one(tmp_path: Path) -> None:
    planned = make_plan(RULES, read_header(write_file(tmp_path / "base.gguf", BASE)).tensors)
    shards = [
        read_header(write_file(tmp_path / f"{n}.gguf", [tensor])) for n, tensor in enumerate(MADE)
    ]
    assert list(find_differences(planned, shards)) == []
    assert [line.split(": ")[1] for line in find_differences(planned, shards[:2])] == [
        "tensor n_norm.weight"
    ]


# ---- the stage, with ggml's own library


SMALL = Variant("S", "x", "Q4_K_M", (Rule(".*", "Q4_K", "x", narrow="Q8_0"),))
OTHER = replace(SMALL, name="O", rules=(Rule(r"output\.weight", "Q6_K", "x"), *SMALL.rules))
BF16 = Variant("BF16", "x", "BF16")
WHOLE = "50G"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """A model in BF16."""
    path = write_base(tmp_path_factory.mktemp("base") / "base.gguf", LARGE)
    return ModelFile((path,), (files.make_receipt(path, path.parent),))


@pytest.fixture(scope="module")
def matrix(base: ModelFile) -> ImportanceMatrix:
    """Its importance matrix."""
    return imatrix.read_imatrix(write_matrix(base.path.parent / "imatrix.gguf", base.path))


def planned(base: ModelFile, matrix: ImportanceMatrix, *variants: Variant) -> list[Plan]:
    return [make_plan(v, base.header.tensors, matrix.covered) for v in variants]


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, nobody may quantise."""

    def start(*_: object) -> None:
        raise AssertionError("work that was done is done again")

    monkeypatch.setattr("quant.quantize.engine.run._start", start)


@pytest.mark.tools
def test_all_variants_come_out_of_one_call_and_the_base_is_none_of_them(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, store = planned(base, matrix, BF16, SMALL, OTHER), Store(tmp_path)
    made = quantize_variants(base, matrix, plans, "M", WHOLE, toolchain.find_toolchain(), store)
    assert [(m.name, [p.name for p in m.paths]) for m in made] == [
        ("S", ["M-S.gguf"]),
        ("O", ["M-O.gguf"]),
    ]
    for m in made:
        assert read_header(m.paths[0]).hash_tensors() == dict(m.tensor_digests)
        assert files.hash_file(m.paths[0]) == m.receipts[0].sha256
        written = llama_quantize(
            base.path, matrix.path, m.plan.types(), "Q4_K_M", tmp_path / f"{m.name}.gguf"
        )
        assert m.paths[0].read_bytes() == written.read_bytes()
    no_work(monkeypatch)
    assert (
        quantize_variants(base, matrix, plans, "M", WHOLE, toolchain.find_toolchain(), store)
        == made
    )


@pytest.mark.tools
def test_a_run_that_ended_between_two_variants_goes_on_with_the_second(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = planned(base, matrix, SMALL, OTHER)
    settled: list[str] = []
    real = Store.commit

    def settle(
        store: Store, stage: str, inputs: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> StoredResult:
        if settled:
            raise KeyboardInterrupt
        settled.append(inputs["name"])
        return real(store, stage, inputs, facts)

    with monkeypatch.context() as broken:
        broken.setattr(Store, "commit", settle)
        with pytest.raises(KeyboardInterrupt):
            quantize_variants(
                base, matrix, plans, "M", WHOLE, toolchain.find_toolchain(), Store(tmp_path)
            )
    no_work(monkeypatch)  # both were written
    made = quantize_variants(
        base, matrix, plans, "M", WHOLE, toolchain.find_toolchain(), Store(tmp_path)
    )
    assert [m.name for m in made] == ["S", "O"] and settled == ["M-S"]


@pytest.mark.tools
def test_a_changed_recipe_quantises_only_what_changed(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, began = Store(tmp_path), []
    quantize_variants(
        base, matrix, planned(base, matrix, SMALL), "M", WHOLE, toolchain.find_toolchain(), store
    )
    real = run._start

    def start(job: EngineJob, folder: Path) -> None:
        began.append(job)
        real(job, folder)

    monkeypatch.setattr(run, "_start", start)
    changed = replace(OTHER, name="S")
    [made] = quantize_variants(
        base, matrix, planned(base, matrix, changed), "M", "1M", toolchain.find_toolchain(), store
    )
    [job] = began
    assert [f.path.name for f in job.finished] == ["M-S.gguf"]
    assert len(made.paths) > 1  # a shard is filled from a whole file as well
    [alone] = quantize_variants(
        base,
        matrix,
        planned(base, matrix, changed),
        "M",
        "1M",
        toolchain.find_toolchain(),
        Store(tmp_path / "b"),
    )
    assert [p.read_bytes() for p in made.paths] == [p.read_bytes() for p in alone.paths]


@pytest.mark.tools
def test_a_tensor_that_no_shard_holds_is_refused_before_any_work(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path
) -> None:
    large = replace(SMALL, rules=(Rule(".*", "BF16", "x"),))
    with pytest.raises(InputError) as caught:
        quantize_variants(
            base,
            matrix,
            planned(base, matrix, large),
            "M",
            "1M",
            toolchain.find_toolchain(),
            Store(tmp_path),
        )
    assert "tensor output.weight: expected at most 1M a shard, found 1536000 bytes" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.tools
def test_a_file_that_is_not_as_planned_stops_the_work(
    base: ModelFile, matrix: ImportanceMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [asked] = planned(base, matrix, SMALL)
    monkeypatch.setattr(
        QuantizeTarget,
        "wanted",
        TypeRequest(tmp_path / "V.gguf", planned(base, matrix, OTHER)[0].types(), "Q4_K_M"),
    )
    with pytest.raises(CheckError, match=r"tensor output\.weight: expected .*Q4_K.*, found .*Q6_K"):
        write_variants(
            base.path,
            matrix.path,
            [QuantizeTarget(asked, tmp_path / "V.gguf")],
            "x",
            toolchain.find_toolchain(),
            tmp_path / "work",
        )
