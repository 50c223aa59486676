"""The error compensator's imports: the engine's process loads it, so it has to stay light."""

import subprocess
import sys


def test_importing_error_compensation_loads_neither_texts_nor_the_release() -> None:
    code = "import sys, quant.quantize.gptq.compensator; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"quant.calibration.text", "quant.plan.recipe", "pydantic"} & {*names}
    assert not [name for name in names if name.startswith("quant.release")]
