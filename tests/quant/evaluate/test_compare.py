"""Evaluation: figures with intervals, held against llama-perplexity, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quant import cli
from quant.core.store import Store
from quant.errors import InputError
from quant.evaluate.compare import (
    EvaluationSettings,
    Reading,
    bootstrap_interval,
    compute_figures,
    difference,
    evaluate_files,
)
from quant.evaluate.scorer import divergence
from quant.llama import toolchain
from tests.quant.quantize.engine.models import write_base

RNG = np.random.default_rng(1)


def reading(kld: float, base_nll: float = 1.0, chunks: int = 40) -> Reading:
    values = RNG.gamma(1, kld, (chunks, 255)).astype(np.float32)
    nll = np.full(values.shape, base_nll, np.float32)
    return Reading(values, nll, nll, values < kld)


def test_the_interval_of_a_mean_is_as_wide_as_its_noise() -> None:
    values = RNG.normal(1, 0.1, (100, 255))
    found = bootstrap_interval(values)
    expected = 2 * 1.96 * values.mean(1).std() / 10
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(expected, rel=0.2)


def test_figures_are_those_of_all_tokens() -> None:
    r = reading(0.01)
    told = compute_figures(r)
    assert told["kld_mean"] == pytest.approx(float(r.kld.mean()), rel=1e-5)
    assert told["kld_median"] <= told["kld_p99"] <= told["kld_p999"] <= told["kld_max"]
    assert told["ppl"] == pytest.approx(np.e)
    assert told["top1"] == pytest.approx(float(r.same_top.mean()))


def test_two_files_are_compared_on_the_same_chunks() -> None:
    first = reading(0.01)
    better = Reading(first.kld * 0.98, first.nll, first.base_nll, first.same_top)
    gap = difference(first, better)
    assert gap.high < 0  # though both intervals overlap by far
    assert bootstrap_interval(better.kld).high > bootstrap_interval(first.kld).low
    with pytest.raises(InputError, match="on the same text of the same base"):
        difference(first, reading(0.01, base_nll=2.0))


def test_words_that_are_not_kept_count_as_one_and_change_little() -> None:
    p = np.log(RNG.dirichlet(np.full(500, 0.05), 64) + 1e-12)
    q = p + RNG.normal(0, 0.3, p.shape)
    p, q = ((x - np.log(np.exp(x).sum(1, keepdims=True))).astype(np.float32) for x in (p, q))
    whole = divergence(p, q, whole=True)
    best = np.argsort(-p, axis=1)[:, :100]
    part = divergence(np.take_along_axis(p, best, 1), np.take_along_axis(q, best, 1), whole=False)
    assert (part <= whole + 1e-5).all()
    assert part.mean() == pytest.approx(whole.mean(), rel=0.05)


def test_a_model_is_no_distance_from_itself() -> None:
    p = np.log(RNG.dirichlet(np.ones(50), 8)).astype(np.float32)
    assert (divergence(p, p, whole=True) == 0).all()


# ---- with llama.cpp


@pytest.mark.tools
def test_it_agrees_with_llama_perplexity(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, quantised, text = tiny
    # All words are kept: llama-perplexity keeps all as well.
    [found] = evaluate_files(
        base, [quantised], {"code": text}, Store(tmp_path), EvaluationSettings(chunks=6, threads=1)
    )
    tool = [
        str(toolchain.find_toolchain().path("llama-perplexity")),
        "-c",
        "512",
        "-b",
        "512",
        "-t",
        "1",
        "--chunks",
        "6",
    ]
    tool += ["-f", str(text), "--kl-divergence-base", str(tmp_path / "kld")]
    subprocess.run([*tool, "-m", base], check=True, capture_output=True)
    for _ in range(5):  # now and then it loses its last lines
        done = subprocess.run(
            [*tool, "-m", quantised, "--kl-divergence"], check=True, capture_output=True, text=True
        )
        said = re.search(r"Mean\s+KLD:\s+([\d.]+)[\s\S]*Same top p:\s+([\d.]+)", done.stdout)
        if said:
            break
    assert said
    told = compute_figures(found.whole)
    assert told["chunks"] == 6
    assert told["kld_mean"] == pytest.approx(float(said[1]), rel=5e-3)
    assert 100 * told["top1"] == pytest.approx(float(said[2]), abs=0.1)


@pytest.mark.tools
def test_the_base_is_nothing_away_from_itself_and_what_half_of_the_words_hide_is_little(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, quantised, text = tiny
    store = Store(tmp_path)
    few = evaluate_files(
        base,
        [base, quantised],
        {"code": text},
        store,
        EvaluationSettings(chunks=4, threads=1, top=2048),
    )
    assert float(few[0].whole.kld.max()) == 0
    assert few[0].whole.same_top.all()
    assert few[0].json()["ppl"] == few[0].json()["ppl_base"]
    [whole] = evaluate_files(
        base, [quantised], {"code": text}, store, EvaluationSettings(chunks=4, threads=1)
    )
    assert few[1].whole.kld.mean() == pytest.approx(whole.whole.kld.mean(), rel=0.06)
    assert few[1].whole.kld.mean() <= whole.whole.kld.mean()  # what is left out can only hide
    assert np.array_equal(few[1].whole.nll, whole.whole.nll)


@pytest.mark.tools
def test_a_text_that_is_too_short_is_told_with_how_much_would_do(
    tiny: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, quantised, _ = tiny
    (tmp_path / "short.txt").write_text("def double(x):\n    return 2 * x\n" * 80)
    with pytest.raises(
        InputError,
        match=r"expected at least 4 chunks of 512 tokens, found \d: .* a text of [\d,]+ bytes would do",
    ):
        evaluate_files(
            base,
            [quantised],
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
        evaluate_files(base, [other], {"x": tmp_path / "none.txt"}, Store(tmp_path / "store"))


@pytest.mark.tools
def test_the_command_tells_one_document(
    tiny: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, quantised, text = tiny
    options = ["--text", str(text), "--chunks", "4", "--threads", "1", "--json"]
    monkeypatch.setattr(
        sys, "argv", ["quant", "evaluate", str(base), str(quantised), str(base), *options]
    )
    assert cli._run() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["base"] == base.name
    assert {"file", "bytes", "ppl", "kld_mean", "kld_p999", "top1"} <= told["files"][0].keys()
    assert told["files"][0]["bytes"] == quantised.stat().st_size
    assert told["difference"]["high"] < 0  # the base is better than the file


@pytest.mark.tools
def test_a_page_shows_files_and_peers_by_marks_of_their_own(
    tiny: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, quantised, text = tiny
    tools = toolchain.find_toolchain()
    tools.run(
        "llama-quantize",
        [base, tmp_path / "peer.gguf", "Q8_0", "1"],
        cwd=tmp_path,
        log=tmp_path / "log",
    )
    options = ["--text", text, "--chunks", "4", "--threads", "1", "--peer", tmp_path / "peer.gguf"]
    command = ["quant", "evaluate", base, quantised, *options, "--html", tmp_path / "page.html"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    assert cli._run() == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('<circle class="dot"') == page.count('<path class="peer"') == 1
    assert re.search(r'<tr class="peer"><td title="[\d,]+ bytes; KLD .*">peer</td>', page)
    assert re.search(r'<tr><td title="[\d,]+ bytes; KLD .*">q</td>', page)
    assert (
        "error-by-class" not in page and "squares lost" not in page
    )  # nobody knows what these files lost
