"""The comparison that `quant evaluate` makes: its document, and the difference of two files."""

from pathlib import Path

import pytest

import quant.evaluate
from quant.core.errors import InputError
from quant.evaluate.request import Comparison
from quant.evaluate.scores import Evaluation
from quant.evaluate.texts import name_domains
from quant.llama.model_file import ModelFile
from tests.quant.evaluate.conftest import MakeScores


def compare(make_scores: MakeScores, *klds: float) -> Comparison:
    paths = [Path(f"{n}.gguf") for n in range(len(klds))]
    return Comparison(
        base=ModelFile((Path("base.gguf"),)),
        files=tuple(ModelFile((p,)) for p in paths),
        evaluations=tuple(
            Evaluation(p, 9, {"chat": make_scores(kld)}) for p, kld in zip(paths, klds, strict=True)
        ),
    )


def test_two_files_have_a_difference_and_any_other_number_has_none(
    make_scores: MakeScores,
) -> None:
    assert compare(make_scores, 0.1).difference is None
    assert compare(make_scores, 0.1, 0.2, 0.3).difference is None
    gap = compare(make_scores, 0.1, 0.2).difference
    assert gap and 0 < gap.low < gap.value < gap.high


def test_the_document_has_a_difference_only_where_there_is_one(make_scores: MakeScores) -> None:
    assert compare(make_scores, 0.1).json().keys() == {"base", "files"}
    document = compare(make_scores, 0.1, 0.2).json()
    assert document["base"] == "base.gguf"
    assert [f["file"] for f in document["files"]] == ["0.gguf", "1.gguf"]
    assert document["difference"].keys() == {"kld_mean", "low", "high"}


def test_texts_are_named_by_their_domains_and_no_two_alike() -> None:
    assert name_domains((Path("a/code.txt"),)) == {"code": Path("a/code.txt")}
    with pytest.raises(InputError, match="expected texts with different names"):
        name_domains((Path("a/code.txt"), Path("b/code.md")))


@pytest.mark.parametrize("name", quant.evaluate.__all__)
def test_the_package_exports_what_a_notebook_needs(name: str) -> None:
    assert getattr(quant.evaluate, name).__module__.startswith("quant.evaluate.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"quant\.evaluate.*'nothing'"):
        quant.evaluate.nothing  # noqa: B018 (the access is the test)
