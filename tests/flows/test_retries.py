from pathlib import Path

import pytest

from quant.core.errors import CheckError, InputError, QuantError, Unreachable

pytestmark = pytest.mark.prefect


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Unreachable("the hub did not deliver"), True),
        (CheckError("config.json: expected git's 00, found 01"), True),
        (InputError("org/tiny: not on the hub"), False),
    ],
)
def test_only_transient_failures_are_retried(
    error: QuantError, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from prefect.states import Failed

    from flows.quantize import is_retryable

    assert is_retryable(None, None, Failed(data=error)) is again
