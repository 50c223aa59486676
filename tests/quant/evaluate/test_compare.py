"""Comparison of files with their base, against llama-perplexity, and what is refused."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from quant.core.errors import InputError
from quant.core.store import Store
from quant.evaluate.compare import EvaluationSettings, evaluate_models
from quant.evaluate.scores import compute_figures
from quant.llama import toolchain
from quant.llama.model_file import ModelFile
from tests.quant.quantize.engine.models import write_base


@pytest.mark.tools
def test_figures_agree_with_llama_perplexity(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, quantized, text = tiny
    # All tokens are kept: llama-perplexity keeps all as well.
    [evaluation] = evaluate_models(
        ModelFile.open(base),
        [ModelFile.open(quantized)],
        {"code": text},
        Store(tmp_path),
        EvaluationSettings(chunks=6, threads=1),
    )
    tool: list[str | Path] = [toolchain.find_toolchain().path("llama-perplexity")]
    tool += ["-c", "512", "-b", "512", "-t", "1", "--chunks", "6"]
    tool += ["-f", text, "--kl-divergence-base", tmp_path / "kld"]
    subprocess.run([*tool, "-m", base], check=True, capture_output=True)
    for _ in range(5):  # now and then it loses its last lines
        done = subprocess.run(
            [*tool, "-m", quantized, "--kl-divergence"], check=True, capture_output=True, text=True
        )
        match = re.search(r"Mean\s+KLD:\s+([\d.]+)[\s\S]*Same top p:\s+([\d.]+)", done.stdout)
        if match:
            break
    assert match
    figures = compute_figures(evaluation.overall)
    assert figures["chunks"] == 6
    assert figures["kld_mean"] == pytest.approx(float(match[1]), rel=5e-3)
    assert 100 * figures["top1"] == pytest.approx(float(match[2]), abs=0.1)


@pytest.mark.tools
def test_the_base_does_not_diverge_from_itself_and_half_of_the_vocabulary_hides_little(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, quantized, text = ModelFile.open(tiny[0]), ModelFile.open(tiny[1]), tiny[2]
    store = Store(tmp_path)
    same, half = evaluate_models(
        base,
        [base, quantized],
        {"code": text},
        store,
        EvaluationSettings(chunks=4, threads=1, top=2048),
    )
    assert float(same.overall.kld.max()) == 0
    assert same.overall.same_top.all()
    assert same.json()["ppl"] == same.json()["ppl_base"]
    [whole] = evaluate_models(
        base, [quantized], {"code": text}, store, EvaluationSettings(chunks=4, threads=1)
    )
    assert half.overall.kld.mean() == pytest.approx(whole.overall.kld.mean(), rel=0.06)
    assert half.overall.kld.mean() <= whole.overall.kld.mean()  # a lower bound
    assert np.array_equal(half.overall.nll, whole.overall.nll)


@pytest.mark.tools
def test_a_text_that_is_too_short_is_refused_with_the_length_that_would_do(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def double(x):\n    return 2 * x\n" * 80)
    problem = (
        r"expected at least 4 chunks of 512 tokens, found \d: .* a text of [\d,]+ bytes would do"
    )
    with pytest.raises(InputError, match=problem):
        evaluate_models(
            ModelFile.open(tiny[0]),
            [ModelFile.open(tiny[1])],
            {"short": tmp_path / "short.txt"},
            Store(tmp_path / "store"),
            EvaluationSettings(threads=1),
        )


def test_a_file_of_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    other = write_base(
        tmp_path / "other.gguf", {"token_embd.weight": (512, 304), "output.weight": (512, 303)}
    )
    with pytest.raises(
        InputError, match=r"other\.gguf: of another model than .*: \d+ tensors differ, first blk\.0"
    ):
        evaluate_models(
            ModelFile.open(base),
            [ModelFile.open(other)],
            {"x": tmp_path / "none.txt"},
            Store(tmp_path / "store"),
        )
