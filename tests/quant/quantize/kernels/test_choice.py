"""A kernel is chosen only if it writes the loaded ggml's bytes; otherwise ggml is, with a reason."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.core.errors import InputError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Rows
from quant.llama.types import TYPES, GGMLType
from quant.quantize.kernels import KernelChoice, Kernels, trial
from quant.quantize.kernels.library import CountedKernel, KernelCounts, NativeLibrary, load_library

X = np.random.default_rng(9).normal(0, 0.02, (4, 512)).astype(np.float32)
W = np.linspace(1, 2, 512, dtype=np.float32)
Q4 = TYPES["Q4_K"]


class WrongLibrary(NativeLibrary):
    """The library, with the last byte of every result changed."""

    def kernel(
        self, library: ggml.Library, instructions: str, ggml_type: GGMLType
    ) -> CountedKernel:
        right = super().kernel(library, instructions, ggml_type)

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> tuple[Bytes, KernelCounts]:
            data, counts = right(rows, weights)
            data[-1] ^= 1
            return data, counts

        return quantize


def test_the_fastest_kernel_that_passes_its_trial_is_chosen(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    assert kernels.choice(Q4) == KernelChoice(native.sets[0])
    assert kernels.kernel(Q4)(X, W).tobytes() == library.kernel(Q4)(X, W).tobytes()


def test_a_type_whose_kernel_writes_other_bytes_is_left_to_ggml(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, WrongLibrary(**vars(native)))
    choice = kernels.choice(Q4)
    assert choice.source == "ggml"
    assert (
        f"{native.sets[-1]}: 1 of 120 blocks with weights of the columns are not as"
        in choice.reason
    )
    assert kernels.kernel(Q4)(X, W).tobytes() == library.kernel(Q4)(X, W).tobytes()


def test_a_type_without_a_kernel_is_left_to_ggml(
    library: ggml.Library, native: NativeLibrary
) -> None:
    assert Kernels(library, native).choice(TYPES["Q8_0"]) == KernelChoice(
        "ggml", "there is no kernel for Q8_0"
    )


def test_the_outcome_of_a_trial_is_kept(
    library: ggml.Library, native: NativeLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernels(library, native).choice(Q4)
    (outcome,) = cache.iterdir()
    assert json.loads(outcome.read_text())["difference"] == ""
    monkeypatch.setattr(trial, "compare_with_ggml", lambda *_: pytest.fail("tried again"))
    assert Kernels(library, native).choice(Q4).source == native.sets[0]


def test_an_outcome_that_cannot_be_read_or_kept_leads_to_a_new_trial(
    library: ggml.Library, native: NativeLibrary, cache: Path
) -> None:
    Kernels(library, native).choice(Q4)
    (outcome,) = cache.iterdir()
    outcome.write_text("{")
    assert Kernels(library, native).choice(Q4).source == native.sets[0]
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert Kernels(library, native).choice(Q4).source == native.sets[0]


def test_a_slow_trial_is_needed_until_it_was_made(
    library: ggml.Library, native: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SLOW_TYPES", frozenset({"Q4_K", "Q8_0"}))
    kernels = Kernels(library, native)
    assert (
        kernels.needs_slow_trial(Q4)
        and not kernels.needs_slow_trial(TYPES["Q8_0"])
        and not kernels.needs_slow_trial(TYPES["Q6_K"])
    )
    kernels.choice(Q4)
    assert not kernels.needs_slow_trial(Q4)


def test_ggml_can_be_chosen_by_the_environment(
    library: ggml.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_KERNELS", "ggml")
    assert Kernels(library, load_library.__wrapped__()).choice(Q4) == KernelChoice(
        "ggml", "QUANT_KERNELS says ggml"
    )


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_an_instruction_set_can_be_chosen_by_the_environment(
    library: ggml.Library, native: NativeLibrary, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions not in native.sets:
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setenv("QUANT_KERNELS", instructions)
    assert Kernels(library, load_library.__wrapped__()).choice(Q4) == KernelChoice(instructions)


def test_an_unknown_or_missing_instruction_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, native: NativeLibrary
) -> None:
    monkeypatch.setenv("QUANT_KERNELS", "sse9")
    with pytest.raises(
        InputError, match="QUANT_KERNELS: expected one of ggml, avx512, avx2, neon, found 'sse9'"
    ):
        load_library.__wrapped__()
    foreign = "neon" if "neon" not in native.sets else "avx2"
    monkeypatch.setenv("QUANT_KERNELS", foreign)
    with pytest.raises(
        InputError, match=f"QUANT_KERNELS={foreign}: this processor has {', '.join(native.sets)}"
    ):
        load_library.__wrapped__()


def test_a_package_without_the_library_works_and_says_so(
    library: ggml.Library, tmp_path: Path
) -> None:
    kernels = Kernels(library, load_library(tmp_path / "libkernels.so"))
    assert kernels.choice(Q4).source == "ggml"
    assert "built without a C++ compiler" in kernels.choice(Q4).reason
    (tmp_path / "broken.so").write_text("no library")
    assert (
        "cannot be loaded"
        in Kernels(library, load_library(tmp_path / "broken.so")).choice(Q4).reason
    )


def test_odd_blocks_are_left_to_ggml_and_counted_by_type(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    x = X.copy()
    x[1, 300] = np.inf
    x[3, 7] = np.nan
    for name in ("Q4_K", "Q6_K", "Q4_1"):
        data = kernels.kernel(TYPES[name])(x, W)
        assert data.tobytes() == library.kernel(TYPES[name])(x, W).tobytes()
    assert kernels.odd == {"Q4_K": 2, "Q6_K": 2, "Q4_1": 2}
    assert kernels.report()["choices"]["Q4_K"] == {"source": native.sets[0], "reason": ""}


def test_a_fault_of_ggml_is_reported_with_the_tensor_that_met_it(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    x = X.copy()
    x[2, 256 + 32 : 256 + 64] = 0
    kernel = kernels.kernel(TYPES["IQ3_S"])
    with kernels.attribute_to("blk.0.ffn_down.weight"):
        assert kernel(x, W).tobytes() == library.kernel(TYPES["IQ3_S"])(x, W).tobytes()
    with kernels.attribute_to("blk.1.ffn_down.weight"):
        kernel(X, W)
    assert kernels.report()["faulty"] == {"IQ3_S": {"blk.0.ffn_down.weight": 1}}


def test_threads_share_kernels(library: ggml.Library, native: NativeLibrary) -> None:
    kernels = Kernels(library, native)
    expected = {
        name: library.kernel(TYPES[name])(X, W).tobytes()
        for name in ("Q2_K", "Q6_K", "IQ4_XS", "Q5_1")
    }
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(
            lambda name: (name, kernels.kernel(TYPES[name])(X, W).tobytes()), [*expected] * 20
        )
    assert all(expected[name] == data for name, data in results)


def test_a_process_that_flushes_denormals_is_refused_and_its_kernels_do_not(
    library: ggml.Library, native: NativeLibrary, tmp_path: Path
) -> None:
    if not (gcc := shutil.which("gcc")):
        pytest.skip("no gcc to make such a library with")
    (tmp_path / "fast.c").write_text("int nothing;\n")
    fast = tmp_path / "fast.so"
    subprocess.run(
        [gcc, "-ffast-math", "-shared", "-fPIC", "-o", fast, tmp_path / "fast.c"], check=True
    )
    script = """
import ctypes, sys
from pathlib import Path
import numpy as np
from quant.llama import ggml
from quant.quantize import kernels
from quant.llama.types import TYPES
library, native = ggml.load_ggml(Path(sys.argv[2])), kernels.load_library()
kernel = native.kernel(library, native.sets[0], TYPES["Q6_K"])
x, w = np.random.default_rng(5).normal(0, 1, (8, 512)).astype(np.float32), np.full(512, 1e-40, np.float32)
expected, before = kernel(x, w)[0].tobytes(), native.flushes_denormals()
ctypes.CDLL(sys.argv[1])
print(before, native.flushes_denormals(), kernel(x, w)[0].tobytes() == expected)
kernels.Kernels(library)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, fast, library.path], capture_output=True, text=True
    )
    assert done.stdout == "False True True\n"
    assert "takes denormal numbers for zero" in done.stderr
