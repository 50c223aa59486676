"""The grid types: their tables and bytes, compared with digests, without ggml's slow tables."""

import ctypes
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.core.errors import InputError
from quant.llama import ggml
from quant.llama.types import TYPES
from quant.quantize.kernels import Kernels
from quant.quantize.kernels.library import NativeLibrary, load_library

NATIVE = load_library()
GRID_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
NEVER_WITHOUT = frozenset({"IQ1_S", "IQ2_XS", "IQ2_XXS"})
SERVED = [(i, t) for i in NATIVE.sets for t in GRID_TYPES if NATIVE.has(i, TYPES[t])]
EVERY_KERNEL = pytest.mark.parametrize(("instructions", "name"), SERVED)

TABLES = {
    "IQ2_XXS": "b0e864ea374c91695f3dad070a04327fd1f5de23af847a6e984cbdebcf571511",
    "IQ2_XS": "3d6cd4b7d1a769ba23dbcad6a299d252a18304115c332628f20700df154909ca",
    "IQ2_S": "7f909b1de07826b02bf2aec1d36186bda1ed9f84beac2510fbf04c54d7ff357f",
    "IQ1": "aa02ef5aed1973009b62331ac9eb27ac9bd89955ab3b23a6956f09386832c650",
    "IQ3_XXS": "d47db84b106d9a32975b4b7f2a49e7bba9e52daf24e5bb5aff74e4f0ead3929f",
    "IQ3_S": "01b437fdd5d4f04816078f4f466dc4e1a99940d429179a74585c6fbee455967f",
}
"""Digests of ggml's tables, in the order of native/grids.h.

ggml does not export them. Its ggml-quants.c was compiled into a program that builds them and walks
through ``iq2_data`` and ``iq3_data``, for every code with no level above the highest.
"""

BYTES: dict[tuple[str, str], str] = {
    ("IQ1_S", "with"): "8c5c353dca4f550e898215ccc325c7f63f9451074e784b321101121c7b9e822f",
    ("IQ1_M", "with"): "ca96b6d664a044dc989111b0cef258cdf912ef1f77ea55752b3b5bfc34246ed8",
    ("IQ1_M", "without"): "4722aee04dffeacb9b2843ad4e54012a37a1ee8c2babf085ffe9f890bd4ef2f7",
    ("IQ2_XXS", "with"): "76c1ae94de46c67083154fceda7ae3aff4fa57264545edb882ef0a2b97cdbb85",
    ("IQ2_XS", "with"): "a35abd929ac3a2b6f324077791e0b165403402bcdd594ab5c39714144fbe14c5",
    ("IQ2_S", "with"): "2fe3021968127b0ef368a6c116b4a75d935a3881f2a4055fb2beaafbe3f1cd8e",
    ("IQ2_S", "without"): "19adb8d69dc171748dfd94014269eb36d8ab13834509c6e8d596c36c1a4b4281",
    ("IQ3_XXS", "with"): "9b6420b5081b94e3fd45080fb444d0b8142c1e5241b827206ed5a7b9ac7e029a",
    ("IQ3_XXS", "without"): "82a40ad9dd562554c2a7b596d07a7f7bc6dadf0ebc40f7bde1625b413d5079f6",
    ("IQ3_S", "with"): "2bbeebf92f2f7a955d4d39b6b8e792d68e516e63daafe1c0739f8671a8183393",
    ("IQ3_S", "without"): "d047bf0ec89fe9b63d0a78b76cf9c533f0de4888d42ce38b49678ed930077a6b",
}
"""Digests of what ggml writes for the rows below; a test compares them with the installed ggml."""


def rows() -> NDArray[np.float32]:
    """Return rows of several distributions, made of integers: the same on every machine."""
    raw = np.random.PCG64(7).random_raw(32 * 768 * 2).view(np.uint8).reshape(32, 768, 16)
    x = raw[:, :, :12].astype(np.int64).sum(axis=2) - 1530  # about normal, with a deviation of 256
    x[4:8] = x[4:8] ** 3 >> 14
    x[8:11] += 700
    x[11:14] = x[11:14] // 200 * 200
    x[14:17] *= np.where(raw[14:17, :, 12] < 3, 100, 1)
    x[17:20] <<= np.repeat(raw[17:20, ::32, 13] % 16, 32, axis=1)
    x[20, 256:320] = 0
    x[21, 40:] = 0
    x[22:24] = np.abs(x[22:24])
    scaled: NDArray[np.float32] = (x / 8192).astype(np.float32)
    return scaled


def columns() -> NDArray[np.float32]:
    some = np.random.PCG64(8).random_raw(768).view(np.uint8).reshape(768, 8).astype(np.int64)
    return (some[:, 0] * some[:, 1] * (some[:, 2] > 20) / 64).astype(np.float32)


def weightings(name: str) -> dict[str, NDArray[np.float32] | None]:
    """Return the column weights to try. Some types that need an imatrix in llama-quantize do without."""
    return {"with": columns()} if name in NEVER_WITHOUT else {"with": columns(), "without": None}


def digest(data: NDArray[np.uint8]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()


@pytest.mark.parametrize(("number", "name"), list(enumerate(TABLES)))
def test_the_tables_have_the_digests_of_ggmls(
    native: NativeLibrary, number: int, name: str
) -> None:
    sha = hashlib.sha256()
    points = (ctypes.c_int32 * 2048)()
    for code in range(4096 if name.startswith("IQ3") else 6561):
        n = native.dll.quant_grid(number, code, points)
        sha.update((",".join(map(str, points[:n])) + "\n").encode())
    assert sha.hexdigest() == TABLES[name]


@EVERY_KERNEL
def test_bytes_are_what_ggml_wrote(
    library: ggml.Library, native: NativeLibrary, instructions: str, name: str
) -> None:
    kernel = native.kernel(library, instructions, TYPES[name])
    for how, w in weightings(name).items():
        data, counts = kernel(rows(), w)
        assert (digest(data), counts.odd) == (BYTES[name, how], 0), how


@pytest.mark.tools
@pytest.mark.parametrize("name", GRID_TYPES)
def test_ggml_writes_those_bytes(library: ggml.Library, name: str) -> None:
    for how, w in weightings(name).items():
        assert digest(library.kernel(TYPES[name])(rows(), w)) == BYTES[name, how]


@pytest.mark.parametrize("instructions", NATIVE.sets)
@pytest.mark.parametrize(("name", "tries"), [("IQ3_XXS", 31), ("IQ3_S", 19)])
def test_weights_on_the_edge_between_two_levels_are_ggmls(
    library: ggml.Library, native: NativeLibrary, instructions: str, name: str, tries: int
) -> None:
    """Grid neighbors that cannot be nearest are skipped; on an edge, rounding may make them nearest."""
    kernel, t = native.kernel(library, instructions, TYPES[name]), TYPES[name]
    for seed in (1, 3):
        x = on_the_edge(tries, seed)
        assert (kernel(x, None)[0] == library.kernel(t)(x, None)).all()


def on_the_edge(tries: int, seed: int) -> NDArray[np.float32]:
    """Return weights within a few ulps of where their level changes, for one of the scales tried."""
    random = np.random.default_rng(seed)
    scales = 15 + 0.2 * (random.integers(0, tries, (400, 24, 1)) - tries // 2)
    edges = (2 * random.integers(0, 8, (400, 24, 32)) + 2) / scales
    x = np.minimum(edges * (1 + random.integers(-4, 5, edges.shape) * 2.0**-24), 1)
    x[..., 0] = 1
    x *= random.lognormal(0, 1, (400, 24, 1)) * random.choice([-1, 1], x.shape)
    rows: NDArray[np.float32] = x.reshape(400, 768).astype(np.float32)
    return rows


@EVERY_KERNEL
def test_tiny_or_huge_numbers_are_not_left_to_ggml(
    library: ggml.Library, native: NativeLibrary, instructions: str, name: str
) -> None:
    kernel = native.kernel(library, instructions, TYPES[name])
    for size in (1e-40, 1e-30, 1e-10, 1e8):
        assert kernel((rows() * size).astype(np.float32), columns())[1].odd == 0


@EVERY_KERNEL
@pytest.mark.parametrize("spoil", [np.nan, np.inf, 1e30])
def test_rows_on_which_ggml_would_abort_are_an_error(
    library: ggml.Library, native: NativeLibrary, instructions: str, name: str, spoil: float
) -> None:
    kernel = native.kernel(library, instructions, TYPES[name])
    x = rows()
    x[3, 100] = spoil
    with pytest.raises(InputError, match=f"1 of 96 blocks cannot be made {name}"):
        kernel(x, columns())
    w = columns()
    w[5] = np.nan
    with pytest.raises(InputError, match=f"32 of 96 blocks cannot be made {name}"):
        kernel(rows(), w)


def test_the_error_does_not_name_the_tensor_which_the_engine_does(
    library: ggml.Library, native: NativeLibrary
) -> None:
    kernels = Kernels(library, native)
    x = rows()
    x[3, 100] = np.inf
    with (
        kernels.attribute_to("blk.0.ffn_up.weight"),
        pytest.raises(InputError, match=r"^1 of 96 blocks cannot be made IQ3_XXS"),
    ):
        kernels.kernel(TYPES["IQ3_XXS"])(x, columns())


@EVERY_KERNEL
def test_types_that_need_an_imatrix_are_refused_without_one(
    library: ggml.Library, native: NativeLibrary, instructions: str, name: str
) -> None:
    kernel = native.kernel(library, instructions, TYPES[name])
    if name in NEVER_WITHOUT:
        with pytest.raises(InputError, match="96 of 96"):
            kernel(rows(), None)
    else:
        assert kernel(rows(), None)[1].odd == 0


@pytest.mark.tools
@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ3_S"])
def test_ggml_does_abort_where_distances_overflow(
    library: ggml.Library, native: NativeLibrary, name: str
) -> None:
    with pytest.raises(InputError, match="cannot be made"):
        native.kernel(library, native.sets[0], TYPES[name])(rows() * np.float32(1e16), None)
    program = (
        "import sys, numpy as np; from pathlib import Path; from quant.llama import ggml; from quant.llama.types import TYPES\n"
        "from tests.quant.quantize.kernels.test_grids import rows\n"
        "ggml.load_ggml(Path(sys.argv[1])).kernel(TYPES[sys.argv[2]])(rows() * np.float32(1e16), None)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, library.path, name], capture_output=True, check=False
    )
    assert ended.returncode < 0
    assert b"GGML_ASSERT(grid_index >= 0) failed" in ended.stderr


@pytest.mark.parametrize("instructions", NATIVE.sets)
def test_blocks_that_meet_the_fault_of_iq3_s_are_counted(
    library: ggml.Library, native: NativeLibrary, instructions: str
) -> None:
    kernel = native.kernel(library, instructions, TYPES["IQ3_S"])
    x = rows()[:4]
    x[0, 32:64] = 0  # zeros before other weights
    x[1, 224:256] = 0  # zeros at the end
    x[2, 512:768] = 0  # a whole superblock of zeros
    assert kernel(x, columns())[1].faulty == 1
