"""`quantize_model`: quantizing without a build. tests/quant/cli/test_stages.py runs it as a command."""

from pathlib import Path

import pytest

from quant.core.errors import InputError
from quant.llama.gguf import read_header
from quant.plan.recipe import Rule, Variant
from quant.quantize.standalone import QuantizeRequest, quantize_model
from tests.quant.quantize.engine.models import LARGE, write_base

Q8 = Variant("Q8", "x", "Q8_0", (Rule(".*", "Q8_0", "x"),))
BASE = Variant("BF16", "x", "BF16")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "M-BF16.gguf", LARGE)


def test_a_variant_without_rules_is_refused(base: Path, tmp_path: Path) -> None:
    request = QuantizeRequest(base=base, variants=[Q8, BASE], out=tmp_path / "out")
    with pytest.raises(InputError, match="variant BF16: expected rules to quantize by"):
        quantize_model(request)


def test_a_shard_is_refused_as_a_base(base: Path, tmp_path: Path) -> None:
    shard = base.rename(base.with_name("M-00001-of-00002.gguf"))
    request = QuantizeRequest(base=shard, variants=[Q8], out=tmp_path / "out")
    with pytest.raises(InputError, match="expected the whole file, found a shard of one"):
        quantize_model(request)


@pytest.mark.parametrize("name", ["M-Q8.gguf", "M-Q8-00001-of-00003.gguf"])
def test_files_of_others_are_not_overwritten(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    request = QuantizeRequest(base=base, variants=[Q8], out=tmp_path / "out")
    with pytest.raises(InputError, match=f"{name}: exists already"):
        quantize_model(request)
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.tools
def test_the_variants_are_returned_with_digests_and_errors(base: Path, tmp_path: Path) -> None:
    request = QuantizeRequest(base=base, variants=[Q8], out=tmp_path / "out", max_size="1M")
    [variant] = quantize_model(request)
    assert variant.name == "Q8" and len(variant.paths) > 1
    digests = {n: d for p in variant.paths for n, d in read_header(p).hash_tensors().items()}
    assert digests == dict(variant.tensor_digests)
    assert 0 < variant.errors["output.weight"] < 1e-3
