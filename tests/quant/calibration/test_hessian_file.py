"""Hessian files: what is read from one, what is refused, and what reading one does not import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quant.calibration.hessian_file import FORM, Hessians
from quant.core.errors import InputError

RNG = np.random.default_rng(1)


def write(path: Path, change: dict[str, Any] | None = None, **about: Any) -> Path:
    """Write a file with one matrix, and one of three experts; the second has too few rows."""
    x = RNG.normal(size=(3, 40, 8)).astype(np.float32)
    sums = x.swapaxes(1, 2) @ x
    tensors = {
        "a.weight": sums[0],
        "a.weight.counts": np.array([40]),
        "e.weight": sums,
        "e.weight.counts": np.array([40, 31, 32]),
    } | (change or {})
    save_file(
        {k: v for k, v in tensors.items() if v is not None},
        path,
        {"moments": json.dumps({"form": FORM} | about)},
    )
    return path


def test_means_are_read_and_an_expert_with_too_few_rows_has_none(tmp_path: Path) -> None:
    sums = np.full((3, 8, 8), 64, np.float32)
    hessians = Hessians.open(write(tmp_path / "m", {"e.weight": sums}, base="it"), "it")
    assert [*hessians.counts] == ["a.weight", "e.weight"]
    assert (hessians.columns("a.weight"), hessians.columns("other.weight")) == (8, None)
    means = [hessians.read_mean("e.weight", n) for n in range(3)]
    assert means[0] is not None and means[2] is not None
    assert means[1] is None
    assert means[0].shape == (8, 8)
    assert (means[0] == np.float32(1.6)).all() and (means[2] == 2).all()
    assert hessians.read_mean("other.weight") is None


BROKEN: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    (
        {},
        {"base": "other"},
        "of another model: expected Hessians of the base it, found those of other",
    ),
    ({}, {"form": "quant-moments-9"}, "form: expected quant-moments-1, found quant-moments-9"),
    ({"a.weight.counts": None}, {}, "a.weight.counts: expected 1 numbers in I64, found None"),
    (
        {"e.weight.counts": np.array([40, 40])},
        {},
        r"e.weight.counts: expected 3 numbers in I64, found \(\[2\], 'I64'\)",
    ),
    ({"a.weight": None}, {}, "a.weight.counts: expected a matrix a.weight, found none"),
    (
        {"a.weight": np.ones((8, 7), np.float32)},
        {},
        r"a.weight: expected square matrices in F32, found \[8, 7\] in F32",
    ),
    (
        {"a.weight": np.ones((8, 8))},
        {},
        r"a.weight: expected square matrices in F32, found \[8, 8\] in F64",
    ),
)


@pytest.mark.parametrize(("change", "about", "problem"), BROKEN)
def test_a_file_of_another_model_or_format_is_refused(
    change: dict[str, Any], about: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        Hessians.open(write(tmp_path / "m", change, **{"base": "it"} | about), "it")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", base="it").read_bytes()
    for name, data in (("short", whole[:-4]), ("gguf", b"GGUF" * 99), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            InputError,
            match=f"{name}: expected a Hessian file, found another or a damaged",
        ):
            Hessians.open(tmp_path / name)
    save_file({"x": np.ones(2)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="form: expected quant-moments-1, found None"):
        Hessians.open(tmp_path / "foreign")
    with pytest.raises(InputError, match="none: cannot be read"):
        Hessians.open(tmp_path / "none")


def test_nan_is_reported_with_its_tensor(tmp_path: Path) -> None:
    sums = np.ones((8, 8), np.float32)
    sums[3, 4] = np.nan
    hessians = Hessians.open(write(tmp_path / "m", {"a.weight": sums}))
    with pytest.raises(InputError, match=r"m: a\.weight: expected finite numbers, found NaN"):
        hessians.read_mean("a.weight")


def test_reading_hessians_loads_neither_texts_nor_recipes() -> None:
    """The quantizer imports this module; computing Hessians needs much more."""
    code = "import sys, quant.calibration.hessian_file; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"quant.calibration.text", "quant.plan.recipe", "pydantic", "gguf", "torch"}
    assert not heavy & {*names}
    assert not [name for name in names if name.startswith("quant.release")]
