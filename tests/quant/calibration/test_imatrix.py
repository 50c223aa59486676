"""The importance matrix is computed in ranges that survive a kill, until experts are covered."""

import logging
import os
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant.calibration import imatrix, imatrix_file
from quant.calibration.imatrix import (
    ImatrixRun,
    ImportanceMatrix,
    Span,
    check_span,
    compute_covering_imatrix,
    make_q8_base,
    split_chunks,
)
from quant.calibration.text import CalibrationText
from quant.core import files, process, progress
from quant.core.errors import InputError
from quant.core.store import Store
from quant.llama import toolchain
from quant.llama.gguf import TensorSpec, read_header
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import Tokenizer
from quant.llama.types import TYPES
from quant.plan.plan import make_plan
from quant.plan.recipe import CoverageRule, ImatrixRecipe, Rule, Variant
from tests.models import twins
from tests.models.conversion import convert

CONTEXT = 64
SETTINGS = ImatrixRecipe(
    context=CONTEXT, chunks=12, range_chunks=4, coverage=CoverageRule(expert_tokens=0)
)
LAYER, EXPERT = 1, 5
"""Position of the dead expert."""


@pytest.mark.parametrize(
    ("first", "last", "size", "tokens", "expected"),
    [
        (0, 80, 40, 10_000, [(0, 40), (40, 40)]),
        (0, 90, 40, 10_000, [(0, 40), (40, 40), (80, 10)]),
        (0, 81, 40, 8100, [(0, 40), (40, 41)]),  # the last chunk cannot be a range of its own
        (0, 82, 40, 8201, [(0, 40), (40, 40), (80, 2)]),
        (0, 82, 40, 8200, [(0, 40), (40, 42)]),  # no token behind the last chunk
        (0, 2, 40, 200, [(0, 2)]),
        (80, 100, 40, 10_001, [(80, 20)]),
        (80, 81, 40, 8150, []),
        (80, 80, 40, 10_000, []),
    ],
)
def test_ranges_cover_the_chunks_and_begin_where_llama_imatrix_can(
    first: int, last: int, size: int, tokens: int, expected: list[tuple[int, int]]
) -> None:
    assert split_chunks(first, last, size=size, tokens=tokens, context=100) == tuple(
        Span(*e) for e in expected
    )


def text_of(path: Path, tokens: int) -> CalibrationText:
    return CalibrationText(path, files.make_receipt(path, path.parent), path.stem, 1, tokens, {})


def test_a_text_that_is_shorter_than_two_chunks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(
        InputError, match=r"t.txt: expected at least two chunks of 64 tokens, found 127 tokens"
    ):
        check_span(Span(0, 1), text_of(tmp_path / "t.txt", 127), SETTINGS)


@pytest.mark.parametrize("span", [Span(0, 11), Span(9, 1), Span(8, 3)])
def test_a_range_outside_of_the_text_is_refused(span: Span, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a")
    check_span(Span(8, 2), text_of(tmp_path / "t.txt", 641), SETTINGS)
    with pytest.raises(
        InputError,
        match=rf"range {span.first}:{span.count}: expected chunks of the 10 .* 8 at the latest",
    ):
        check_span(span, text_of(tmp_path / "t.txt", 641), SETTINGS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    root = tmp_path_factory.mktemp("tiny")
    convert([("text", twins.TINY_GLM, root / "tiny.gguf")], root)
    return ModelFile.open(root / "tiny.gguf")


@pytest.fixture(scope="module")
def text(tiny: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        "\n".join(f"{n} bottles of beer on the wall, {n * n} in all. Grüße!" for n in range(200))
    )
    return text_of(path, Tokenizer(tiny, toolchain.find_toolchain()).count(path.read_text()))


def compute(
    tiny: ModelFile, text: CalibrationText, store: Path, settings: ImatrixRecipe = SETTINGS
) -> ImportanceMatrix:
    return compute_covering_imatrix(
        tiny, text, settings, "imatrix_tiny.gguf", toolchain.find_toolchain(), Store(store)
    )


@pytest.mark.tools
def test_the_ranges_add_up_to_what_llama_imatrix_makes_of_them(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    result = compute(tiny, text, tmp_path / "store")
    for n in range(3):
        (tmp_path / f"{n}").mkdir()
        out = tmp_path / f"{n}" / "m.gguf"
        run = ImatrixRun(tiny.path, text.path, out, SETTINGS, Span(4 * n, 4))
        imatrix.run_llama_imatrix(run, toolchain.find_toolchain())
    parts = ",".join(f"{n}/m.gguf" for n in range(3))
    merge = ["-m", "none", "--in-file", parts, "-o", "all.gguf", "-c", str(CONTEXT)]
    toolchain.find_toolchain().run("llama-imatrix", merge, cwd=tmp_path, log=tmp_path / "log")
    assert result.path.read_bytes() == (tmp_path / "all.gguf").read_bytes()
    assert set(result.counts["blk.0.attn_q.weight"]) == {12 * CONTEXT}
    assert result.origin["chunks"] == 12


KILLED = """
import sys
from pathlib import Path
from quant.core import progress
from quant.llama.model_file import ModelFile
from tests.quant.calibration import test_imatrix as t
tiny, text = ModelFile.open(Path(sys.argv[1])), Path(sys.argv[2])
with progress.listen_to_progress(lambda share: print(share, file=sys.stderr, flush=True)):
    t.compute(tiny, t.text_of(text, int(sys.argv[3])), Path(sys.argv[4]))
"""


@pytest.mark.tools
def test_a_killed_run_continues_and_ends_in_the_same_bytes(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    whole = compute(tiny, text, tmp_path / "a").path.read_bytes()
    command: list[str | Path] = [
        sys.executable,
        "-c",
        KILLED,
        tiny.path,
        text.path,
        str(text.tokens),
        tmp_path / "b",
    ]
    for done in (1, 2):  # killed twice: each time one more range is there
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        ) as run:
            assert run.stderr is not None
            for line in run.stderr:
                if float(line) >= done / 3:
                    run.send_signal(signal.SIGKILL)
                    break
        finished = [
            p for p in (tmp_path / "b" / "imatrix-range").iterdir() if p.suffix != files.PARTIAL
        ]
        assert len(finished) >= done and not (tmp_path / "b" / "imatrix").exists()
    before = {p: p.stat().st_mtime_ns for p in finished}
    assert compute(tiny, text, tmp_path / "b").path.read_bytes() == whole
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.tools
def test_progress_is_reported_within_ranges_and_after_each(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "POLL_SECONDS", 0.002)
    shares: list[float] = []
    with progress.listen_to_progress(shares.append):
        compute(tiny, text, tmp_path, replace(SETTINGS, pass_chunks=1))
    assert shares == sorted(shares)
    assert {4 / 12, 8 / 12, 1} <= set(shares)
    assert [s for s in shares if 4 / 12 < s < 8 / 12]


LOG = """$ llama-imatrix -m base.gguf
0.00.223.656 I compute_imatrix: computing over 41 chunks, n_ctx=512, batch_size=2048, n_seq=4
"""
"""The log of llama-imatrix with 11 passes."""


def test_progress_within_a_range_is_estimated_from_the_first_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, pace = 100.0, imatrix.PassProgress(tmp_path / "log")
    monkeypatch.setattr("quant.calibration.imatrix.time.monotonic", lambda: now)
    pace.log.write_text(LOG)
    assert pace.estimate_fraction() == 0
    pace.log.write_text(
        LOG + "0.01.873.329 I compute_imatrix: 1.50 seconds per pass - ETA 0.27 minutes\n"
    )
    assert pace.estimate_fraction() == 1 / 11
    now += 6
    assert pace.estimate_fraction() == 5 / 11
    now += 600
    assert pace.estimate_fraction() == 0.99


@pytest.fixture(scope="module")
def dead(tiny: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The tiny model with one expert that its router never chooses."""
    path = tmp_path_factory.mktemp("dead") / "dead.gguf"
    data = bytearray(tiny.path.read_bytes())
    header = read_header(tiny.path)
    bias = header.by_name[f"blk.{LAYER}.exp_probs_b.bias"]
    struct.pack_into("<f", data, header.data_start + bias.offset + 4 * EXPERT, -1e6)
    path.write_bytes(data)
    return ModelFile.open(path)


GATED = replace(SETTINGS, chunks=4, coverage=CoverageRule(expert_tokens=1, budget=12))


@pytest.mark.tools
def test_a_dead_expert_makes_the_run_read_up_to_the_budget_and_is_reported(
    dead: ModelFile, text: CalibrationText, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "quant"):
        matrix = compute(dead, text, tmp_path, GATED)
    assert matrix.origin["chunks"] == 12
    assert sum("do not cover every expert" in r.getMessage() for r in caplog.records) == 2
    unvisited = matrix.json()["coverage"]["unvisited"]
    assert unvisited == {
        f"blk.{LAYER}.ffn_{kind}_exps.weight": [EXPERT] for kind in ("down", "gate", "up")
    }
    doubt = matrix.make_coverage_policy(read_header(dead.path).tensors, GATED.coverage)
    assert set(doubt.tensors) == set(unvisited)
    assert all(
        f"layer {LAYER}: expected 1 tokens" in why and f"{EXPERT} (0)" in why
        for why in doubt.tensors.values()
    )


@pytest.mark.tools
def test_more_text_is_read_only_until_every_expert_is_covered(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    matrix = compute(tiny, text, tmp_path, GATED)
    assert matrix.origin["chunks"] == 8
    assert min(map(min, matrix.counts.values())) >= 1
    assert (
        min(map(min, compute(tiny, text, tmp_path, replace(SETTINGS, chunks=4)).counts.values()))
        == 0
    )


VARIANT = Variant(
    "V", "For tests.", "Q2_K", (Rule(".*_exps.*", "IQ2_S", "x"), Rule(".*", "Q6_K", "x"))
)


@pytest.mark.tools
def test_the_plan_raises_or_refuses_undercovered_tensors(
    dead: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    matrix, tensors = compute(dead, text, tmp_path, GATED), read_header(dead.path).tensors
    rule = GATED.coverage
    raised = make_plan(
        VARIANT, tensors, matrix.covered, matrix.make_coverage_policy(tensors, rule)
    ).types()
    for layer, kind in ((LAYER, "Q4_K"), (2, "IQ2_S")):
        assert raised[f"blk.{layer}.ffn_up_exps.weight"] == kind
    with pytest.raises(InputError) as caught:
        make_plan(
            VARIANT,
            tensors,
            matrix.covered,
            matrix.make_coverage_policy(tensors, replace(rule, otherwise="refuse")),
        )
    assert len(caught.value.problems) == 3
    assert all(f"{EXPERT} (0)" in p and f"blk.{LAYER}." in p for p in caught.value.problems)
    unvisited = make_plan(
        VARIANT,
        tensors,
        matrix.covered,
        matrix.make_coverage_policy(tensors, replace(rule, otherwise="report")),
    ).types()
    assert unvisited[f"blk.{LAYER}.ffn_up_exps.weight"] == "IQ2_S"


def test_the_coverage_policy_has_trunk_tensors_without_data_and_no_mtp_blocks() -> None:
    names = (
        "blk.0.attn_q",
        "blk.0.ffn_up_exps",
        "blk.1.attn_q",
        "blk.2.attn_q",
        "blk.2.nextn.eh_proj",
        "token_embd",
    )
    tensors = tuple(TensorSpec(f"{name}.weight", (256, 4), TYPES["BF16"]) for name in names)
    counts = {
        "blk.0.attn_q.weight": (100,),
        "blk.0.ffn_up_exps.weight": (40, 3),
        "blk.1.attn_q.weight": (0,),
    }
    matrix = ImportanceMatrix(Path("m"), files.Receipt("m", "", 0), counts)
    doubt = matrix.make_coverage_policy(tensors, CoverageRule())
    assert set(doubt.tensors) == {"blk.0.ffn_up_exps.weight", "blk.1.attn_q.weight"}
    assert doubt.tensors["blk.1.attn_q.weight"] == "no data at all"
    assert matrix.covered == {"blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"}


@pytest.mark.tools
def test_a_q8_0_base_can_be_used_and_is_made_once(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    small = make_q8_base(tiny, toolchain.find_toolchain(), store)
    assert small.path.name == "tiny-Q8_0.gguf" and small == make_q8_base(
        tiny, toolchain.find_toolchain(), store
    )
    assert "Q8_0" in {t.type.name for t in read_header(small.path).tensors}
    one = replace(SETTINGS, chunks=4)
    a, b = compute(tiny, text, tmp_path, one), compute(small, text, tmp_path, one)
    assert a.receipt.sha256 != b.receipt.sha256 and a.counts.keys() == b.counts.keys()
    sums = [imatrix_file.load_imatrix(m.path).entries["blk.0.attn_q.weight"].sums for m in (a, b)]
    assert abs(sums[0] - sums[1]).sum() < 0.01 * sums[0].sum()


@pytest.mark.tools
def test_the_file_has_no_path_of_this_machine(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    data = compute(tiny, text, tmp_path).path.read_bytes()
    assert b"calibration.txt" in data
    assert os.fsencode(tmp_path) not in data and os.fsencode(tiny.path.parent) not in data


@pytest.mark.tools
def test_a_matrix_of_another_model_or_an_old_form_is_refused(
    tiny: ModelFile, text: CalibrationText, tmp_path: Path
) -> None:
    path = compute(tiny, text, tmp_path).path
    tensors = read_header(tiny.path).tensors
    assert imatrix.read_imatrix(path, tensors).covered == imatrix.read_imatrix(path).covered
    with pytest.raises(InputError, match="of another model"):
        imatrix.read_imatrix(path, tensors[:10])
    (tmp_path / "old.dat").write_bytes(struct.pack("<iiciif", 1, 1, b"a", 1, 1, 1.0))
    with pytest.raises(InputError, match=r"older .dat; `quant imatrix convert`"):
        imatrix.read_imatrix(tmp_path / "old.dat")
