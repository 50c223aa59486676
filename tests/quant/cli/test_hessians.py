"""`quant hessians`: messages, file, wrong input, and its former names."""

from pathlib import Path

import pytest

from quant.calibration.hessian_file import Hessians
from tests.quant.cli.conftest import Run
from tests.quant.quantize.engine.models import write_base


@pytest.mark.tools
def test_it_reports_its_memory_and_the_experts_with_too_few_tokens(
    run: Run,
    tiny: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    base, _, text = tiny
    out = tmp_path / "m.safetensors"
    options = ("--chunks", "1", "--context", "64", "--only", r"blk\.1\.ffn_(up|down)_exps\.weight")
    code, stdout, err = run("moments", base, "-f", text, "-o", out, *options)
    hessians = Hessians.open(out)
    needed = sum(4 * len(c) * (hessians.columns(n) or 0) ** 2 for n, c in hessians.counts.items())
    few = sum(int((c < 32).sum()) for c in hessians.counts.values())
    assert (code, stdout, hessians.about["context"], hessians.about["chunks"]) == (0, "", 64, 1)
    assert f"2 matrices take {needed:,} bytes of memory, and as many of disk" in err
    assert f"{few} experts saw fewer than 32 tokens: they have no Hessian" in err
    assert f"{out}: 2 matrices, 1 chunks, each token by its gradient" in err
    assert few
    alike = tmp_path / "alike.safetensors"
    code, _, err = run("moments", base, "-f", text, "-o", alike, *options, "--no-gradients")
    assert (code, f"{alike}: 2 matrices, 1 chunks, all tokens alike" in err) == (0, True)
    code, _, err = run("moments", base, "-f", text, "-o", out, *options)
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.tools
def test_a_text_without_a_whole_chunk_is_wrong_input(
    run: Run,
    tiny: tuple[Path, Path, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "short").write_text("def double(x):\n")
    code, _, err = run("moments", tiny[0], "-f", tmp_path / "short", "-o", tmp_path / "m")
    assert (
        code,
        "short: expected at least one chunk of 512 tokens, found fewer tokens" in err,
    ) == (2, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("--only", "("), "--only: expected a regular expression"),
        (("--only", "nothing"), "expected matrices called 'nothing'"),
        (("-f", "none.txt"), "none.txt: cannot be read"),
        (("--chunks", "0"), "0 is not in the range"),
        (
            ("--gradients",),
            "general.architecture: expected glm4moe, found llama; with --no-gradients all tokens count alike",
        ),
    ],
)
def test_wrong_input_is_refused(
    change: tuple[str, ...], problem: str, run: Run, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.gguf")
    (tmp_path / "text").write_text("x")
    code, _, err = run("moments", base, "-f", tmp_path / "text", "-o", tmp_path / "m", *change)
    assert (code, problem in err) == (2, True)
    assert not (tmp_path / "m").exists()


def test_the_former_name_of_the_command_works_and_is_not_listed(run: Run, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    options = ("-f", tmp_path / "none.txt", "-o", tmp_path / "m", "--chunks", "1")
    code, _, expected = run("hessians", base, *options)
    assert (code, "none.txt: cannot be read" in expected) == (2, True)
    assert run("moments", base, *options) == (2, "", expected)
    listed = run("--help")[1]
    assert "  hessians " in listed and "moments" not in listed


@pytest.mark.parametrize("command", ["quantize", "allocate", "probe"])
def test_the_former_name_of_the_option_works_and_is_not_listed(command: str, run: Run) -> None:
    assert "--hessians" in (listed := run(command, "--help")[1]) and "--moments" not in listed
    for option in ("--hessians", "--moments"):
        code, _, message = run(command, option)  # an option that is not known is another error
        assert (code, "requires an argument" in message) == (2, True)
