"""The commands about importance matrices: defaults, exit codes, and nothing is overwritten."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quant.calibration.imatrix_file import load_imatrix, save_imatrix
from quant.chat.families import load_family
from quant.chat.stub_model import write_stub_model
from quant.cli.options import quant
from quant.core.errors import InputError
from tests.quant.calibration.test_imatrix_file import EXPERTS, legacy, matrix

GLM = load_family("glm")
GLM_TOKENS = GLM.special_tokens, GLM.control_tokens


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(quant, ["imatrix", *map(str, args)])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "a.gguf", tmp_path / "b.gguf")
    for n, path in enumerate(paths):
        save_imatrix(matrix(n), path)
    return paths


def test_compute_is_the_default_command() -> None:
    for words in (("compute", "--help"), ("base.gguf", "--help"), ("--out", "x", "--help")):
        assert "imatrix compute [OPTIONS] BASE" in call(*words).output
    assert "merge" in call("--help").output


def test_parts_are_merged_and_a_dat_file_is_converted(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "all.gguf"
    assert call("merge", *two, "-o", out).exit_code == 0
    assert load_imatrix(out).counts()[EXPERTS][1] == sum(
        load_imatrix(p).counts()[EXPERTS][1] for p in two
    )
    assert call("merge", *two, "-o", out).exit_code == 2  # never over a file
    (tmp_path / "old.dat").write_bytes(legacy(("blk.0.a.weight", 7, [1, 2, 3])))
    assert (
        call("convert", tmp_path / "old.dat", tmp_path / "new.gguf", "--context", "100").exit_code
        == 0
    )
    assert load_imatrix(tmp_path / "new.gguf").counts() == {"blk.0.a.weight": (700,)}


def test_show_exits_with_1_if_an_expert_saw_no_token(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    shown = call("show", two[0], "--svg", tmp_path / "map.svg")
    assert shown.exit_code == 1
    assert (
        "layer 1: expected 1 tokens for every expert, found fewer for 0 (0); ffn_up_exps"
        in shown.output
    )
    assert (tmp_path / "map.svg").read_text().startswith("<svg ")
    options = json.loads(call("show", two[0], "--json").stdout)
    assert options["tokens"][EXPERTS] == list(matrix().counts()[EXPERTS])
    assert len(options["missed"]) == 1


@pytest.mark.parametrize("options", ["40", "a:b", "4:0", "-1:4", ":"])
def test_a_range_is_two_numbers(options: str, tmp_path: Path) -> None:
    assert (
        "--range: expected FIRST:COUNT"
        in call(tmp_path / "b.gguf", "-o", tmp_path / "o", f"--range={options}").output
    )


@pytest.mark.tools
def test_a_matrix_is_computed_and_ranges_from_other_machines_add_up_to_it(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    write_stub_model(
        base, "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", *GLM_TOKENS
    )
    lines = [
        {"id": f"{n}", "messages": [{"role": "user", "content": f"{n * n} bottles of beer"}]}
        for n in range(400)
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--calibration", tmp_path / "set.jsonl", "--context", "32", "--expert-tokens", "0")
    whole = call(base, "-o", tmp_path / "whole.gguf", "--chunks", "80", *options)
    assert whole.exit_code == 0, whole.output
    for name, part in (("a", "0:40"), ("b", "40:40")):
        assert call(base, "-o", tmp_path / f"{name}.gguf", "--range", part, *options).exit_code == 0
    parts = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    assert call("merge", *parts, "-o", tmp_path / "sum.gguf", "--context", "32").exit_code == 0
    assert (tmp_path / "sum.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.gguf",
        "b.gguf",
        "base.gguf",
        "set.jsonl",
        "sum.gguf",
        "whole.gguf",
    ]
    assert call(base, "-o", tmp_path / "whole.gguf", *options).exit_code == 2
    assert isinstance(
        call(base, "-o", tmp_path / "c.gguf", "--range", "9000:1", *options).exception, InputError
    )
