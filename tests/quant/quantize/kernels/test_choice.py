"""A kernel serves only where it writes what the loaded ggml writes; otherwise ggml does, and the reason is told."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.errors import InputError
from quant.llama import ggml
from quant.llama.ggml import Bytes, Rows
from quant.llama.types import TYPES, GGMLType
from quant.quantize.kernels import KernelChoice, Kernels, trial
from quant.quantize.kernels.library import CountedKernel, KernelCounts, NativeLibrary, load_library

X = np.random.default_rng(9).normal(0, 0.02, (4, 512)).astype(np.float32)
W = np.linspace(1, 2, 512, dtype=np.float32)
Q4 = TYPES["Q4_K"]


class Wrong(NativeLibrary):
    """The library, but the last byte of every result is another."""

    def kernel(
        self, library: ggml.Library, instructions: str, ggml_type: GGMLType
    ) -> CountedKernel:
        right = super().kernel(library, instructions, ggml_type)

        def quantize(rows: Rows, weights: NDArray[np.float32] | None) -> tuple[Bytes, KernelCounts]:
            data, counts = right(rows, weights)
            data[-1] ^= 1
            return data, counts

        return quantize


def test_the_fastest_kernel_that_passes_serves(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    assert kernels.served(Q4) == KernelChoice(native.sets[0])
    assert kernels.kernel(Q4)(X, W).tobytes() == library.kernel(Q4)(X, W).tobytes()


def test_a_type_whose_kernel_writes_other_bytes_is_left_to_ggml(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, Wrong(**vars(native)))
    served = kernels.served(Q4)
    assert served.by == "ggml"
    assert (
        f"{native.sets[-1]}: 1 of 120 blocks with weights of the columns are not as" in served.why
    )
    assert kernels.kernel(Q4)(X, W).tobytes() == library.kernel(Q4)(X, W).tobytes()


def test_a_type_without_a_kernel_is_left_to_ggml(
    library: ggml.Library, native: NativeLibrary
) -> None:
    assert Kernels(library, native).served(TYPES["Q8_0"]) == KernelChoice(
        "ggml", "there is no kernel for Q8_0"
    )


def test_what_a_trial_found_is_kept(
    library: ggml.Library, native: NativeLibrary, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernels(library, native).served(Q4)
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["difference"] == ""
    monkeypatch.setattr(trial, "find_kernel_difference", lambda *_: pytest.fail("tried again"))
    assert Kernels(library, native).served(Q4).by == native.sets[0]


def test_an_outcome_that_cannot_be_read_or_kept_is_found_anew(
    library: ggml.Library, native: NativeLibrary, cache: Path
) -> None:
    Kernels(library, native).served(Q4)
    (kept,) = cache.iterdir()
    kept.write_text("{")
    assert Kernels(library, native).served(Q4).by == native.sets[0]
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert Kernels(library, native).served(Q4).by == native.sets[0]


def test_a_type_that_takes_ggml_long_waits_for_its_first_use(
    library: ggml.Library, native: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SLOW", frozenset({"Q4_K", "Q8_0"}))
    kernels = Kernels(library, native)
    assert (
        kernels.waiting(Q4)
        and not kernels.waiting(TYPES["Q8_0"])
        and not kernels.waiting(TYPES["Q6_K"])
    )
    kernels.served(Q4)
    assert not kernels.waiting(Q4)


def test_ggml_can_be_asked_for(library: ggml.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_KERNELS", "ggml")
    assert Kernels(library, load_library.__wrapped__()).served(Q4) == KernelChoice(
        "ggml", "QUANT_KERNELS says ggml"
    )


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_an_instruction_set_can_be_asked_for(
    library: ggml.Library, native: NativeLibrary, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions not in native.sets:
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setenv("QUANT_KERNELS", instructions)
    assert Kernels(library, load_library.__wrapped__()).served(Q4) == KernelChoice(instructions)


def test_an_instruction_set_that_is_not_there_is_told(
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
    assert kernels.served(Q4).by == "ggml"
    assert "built without a C++ compiler" in kernels.served(Q4).why
    (tmp_path / "broken.so").write_text("no library")
    assert (
        "cannot be loaded" in Kernels(library, load_library(tmp_path / "broken.so")).served(Q4).why
    )


def test_odd_blocks_are_ggmls_and_counted_by_type(
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
    assert kernels.report()["served"]["Q4_K"] == {"by": native.sets[0], "why": ""}


def test_a_fault_of_ggmls_is_reported_with_the_tensor_that_met_it(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    x = X.copy()
    x[2, 256 + 32 : 256 + 64] = 0
    kernel = kernels.kernel(TYPES["IQ3_S"])
    with kernels.at("blk.0.ffn_down.weight"):
        assert kernel(x, W).tobytes() == library.kernel(TYPES["IQ3_S"])(x, W).tobytes()
    with kernels.at("blk.1.ffn_down.weight"):
        kernel(X, W)
    assert kernels.report()["faulty"] == {"IQ3_S": {"blk.0.ffn_down.weight": 1}}


def test_threads_share_kernels(library: ggml.Library, native: NativeLibrary) -> None:
    kernels = Kernels(library, native)
    expected = {
        name: library.kernel(TYPES[name])(X, W).tobytes()
        for name in ("Q2_K", "Q6_K", "IQ4_XS", "Q5_1")
    }
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(
            lambda name: (name, kernels.kernel(TYPES[name])(X, W).tobytes()), [*expected] * 20
        )
    assert all(expected[name] == data for name, data in made)


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
plainly, before = kernel(x, w)[0].tobytes(), native.flushes()
ctypes.CDLL(sys.argv[1])
print(before, native.flushes(), kernel(x, w)[0].tobytes() == plainly)
kernels.Kernels(library)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, fast, library.path], capture_output=True, text=True
    )
    assert done.stdout == "False True True\n"
    assert "takes denormal numbers for zero" in done.stderr
