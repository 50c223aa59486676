"""Other processors: NEON under an emulator, and an x86-64 without AVX2."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quant.llama import ggml
from quant.llama.types import TYPES, GGMLType
from quant.quantize import kernels
from tests.quant.quantize.kernels import samples

NEON_ROWS = int(os.environ.get("QUANT_TEST_NEON_ROWS", "1"))
"""Rows of each distribution. With 150, each type has over 100,000 superblocks; all take an hour."""
NATIVE = Path(kernels.__file__).parent / "native"
NAMES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
)

pytestmark = pytest.mark.tools


def find_or_skip(program: str) -> str:
    path = shutil.which(program)
    if not path:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.fixture(scope="session")
def replay(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command that runs a NEON kernel over recorded cases."""
    compiler, emulator = find_or_skip("aarch64-linux-gnu-g++"), find_or_skip("qemu-aarch64")
    program = tmp_path_factory.mktemp("neon") / "replay"
    sources = [p for p in sorted(NATIVE.glob("*.cpp")) if p.name != "processor.cpp"]
    names = " ".join(f"K({name.lower()})" for name in NAMES)
    command: list[str | Path] = [
        compiler,
        "-static",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-DQUANT_NEON",
        "-DQUANT_ISA=neon",
        f"-DKERNELS={names}",
        f"-I{NATIVE}",
        Path(__file__).with_name("replay.cpp"),
        *sources,
        "-o",
        program,
    ]
    subprocess.run(command, check=True)
    return [emulator, str(program)]


def record_cases(library: ggml.Library, t: GGMLType, shape: tuple[int, int]) -> Iterator[bytes]:
    """Yield cases with ggml's bytes as replay.cpp reads them, without those on which ggml may abort."""
    for c in samples.cases(7, shape):
        if (t.name.startswith("IQ3") and c.weights in samples.EXTREME) or (
            t.needs_imatrix and c.w is None
        ):
            continue
        yield np.array([*c.x.shape, c.w is not None], np.int64).tobytes()
        yield c.x.tobytes() + (c.w.tobytes() if c.w is not None else b"")
        yield library.kernel(t)(c.x, c.w).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_neon_writes_ggmls_bytes(
    library: ggml.Library, replay: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    t = TYPES[name]
    command = [*replay, name.lower(), str(t.id), str(t.block), str(t.block_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as emulated:
        assert emulated.stdin and emulated.stdout
        for part in record_cases(library, t, (NEON_ROWS, 2304)):
            emulated.stdin.write(part)
        emulated.stdin.close()
        output = emulated.stdout.read().decode()
    with capsys.disabled():
        sys.stdout.write(f"\nneon {name}: {output}")
    assert " 0 wrong" in output
    assert emulated.returncode == 0


def test_ggml_is_chosen_on_a_processor_without_avx2(library: ggml.Library) -> None:
    script = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom quant.llama import ggml\n"
        "from quant.quantize import kernels\n"
        "from quant.llama.types import TYPES\nk = kernels.Kernels(ggml.load_ggml(Path(sys.argv[1])))\n"
        "x = np.arange(-256, 256, dtype=np.float32).reshape(2, 256)\n"
        "print(k.choice(TYPES['Q4_K']).reason, k.kernel(TYPES['Q4_K'])(x, None).sum())"
    )
    command = [
        find_or_skip("qemu-x86_64"),
        "-cpu",
        "Nehalem",
        sys.executable,
        "-c",
        script,
        str(library.path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    x = np.arange(-256, 256, dtype=np.float32).reshape(2, 256)
    expected = library.kernel(TYPES["Q4_K"])(x, None).sum()
    assert done.stdout == f"the processor has none of avx512, avx2, neon {expected}\n", done.stderr
