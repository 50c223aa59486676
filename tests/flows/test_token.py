"""A token that was given where a name was asked for."""

from pathlib import Path

import pytest

from quant.core.errors import InputError

pytestmark = pytest.mark.prefect
TOKEN = "hf_PlantedTokenOfTheParameter"


@pytest.mark.parametrize("given", [TOKEN, "hf_short", f" {TOKEN}"])
def test_a_token_instead_of_its_blocks_name_is_refused_and_not_quoted(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows.quantize import use_token

    with pytest.raises(InputError) as caught, use_token(given):
        pass
    assert str(caught.value).startswith(
        "token_secret: expected the name of a secret block, found a token; "
    )
    assert "hf_" not in str(caught.value) and caught.value.exit_code == 2
