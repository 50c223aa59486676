"""`quant merge --modelfile` and `quant ollama check`: what they print, what they write, and with which code they end."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quant import cli
from quant.core.files import hash_file
from quant.llama import toolchain
from quant.llama.gguf import read_header
from quant.quantize.shard import split_file
from tests.gguf_files import LLAMA, Tensor, write
from tests.quant.release.manifests import make_manifest, make_variant

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with arguments: its exit code, its standard output, its standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quant", *map(str, arguments)])
        try:
            code = cli._run()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return go


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "Q4_1").mkdir(parents=True)
    shards = (f"Q4_1/tiny-glm-Q4_1-0000{n}-of-00004.gguf" for n in range(1, 5))
    variants = (
        make_variant("UD-TQ1_0", "tiny-glm-UD-TQ1_0.gguf"),
        make_variant("Q4_1", *shards),
    )
    (folder / "manifest.json").write_text(make_manifest(variants=variants).to_json())
    (folder / "params").write_text('{"temperature": 0.5, "stop": ["<|user|>"]}')
    (folder / "system").write_text('Say "yes".')
    return folder


@pytest.fixture
def first(release: Path, tmp_path: Path) -> Path:
    """The first shard of a file in that release."""
    tensors = [Tensor(f"blk.{n}.ffn_down.weight", (256, 300), "F32") for n in range(12)]
    work = tmp_path / "work"
    work.mkdir()
    split_file(
        write(tmp_path / "f.gguf", tensors, LLAMA),
        "1M",
        toolchain.find_toolchain(),
        work / "tiny-glm-Q4_1",
    )
    for path in work.glob("*.gguf"):
        shutil.move(path, release / "Q4_1" / path.name)
    return min((release / "Q4_1").glob("*.gguf"))


@pytest.mark.tools
def test_merge_writes_a_modelfile_with_what_the_release_says_and_keeps_the_shards(
    run: Run, first: Path, tmp_path: Path
) -> None:
    before = {p.name: hash_file(p) for p in first.parent.glob("*.gguf")}
    out = tmp_path / "merged" / "tiny-glm-Q4_1.gguf"
    code, stdout, err = run("merge", first, out, "--modelfile")
    assert (code, stdout) == (0, "")
    assert (
        err.splitlines()[1]
        == f"{out.parent / 'Modelfile'}: ollama create tiny-glm-q4_1 -f {out.parent / 'Modelfile'}"
    )
    assert (out.parent / "Modelfile").read_text() == (
        'FROM ./tiny-glm-Q4_1.gguf\nPARAMETER temperature 0.5\nPARAMETER stop "<|user|>"\nSYSTEM """Say "yes"."""\n'
    )
    assert {p.name: hash_file(p) for p in first.parent.glob("*.gguf")} == before
    assert len(read_header(out).tensors) == 12


@pytest.mark.tools
def test_away_from_its_release_the_recipe_says_the_parameters(
    run: Run, first: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "down" / "loads"
    shutil.copytree(first.parent, elsewhere)
    assert run("merge", elsewhere / first.name, tmp_path / "a" / "x.gguf", "--modelfile")[0] == 0
    assert "PARAMETER num_ctx 4096\n" in (tmp_path / "a" / "Modelfile").read_text()
    assert (
        run(
            "merge",
            elsewhere / first.name,
            tmp_path / "b" / "x.gguf",
            "--modelfile",
            "--model",
            "glm-4.6",
        )[0]
        == 0
    )
    assert "PARAMETER num_ctx 16384\n" in (tmp_path / "b" / "Modelfile").read_text()


def test_a_modelfile_that_is_there_is_not_written_over_and_nothing_is_merged(
    run: Run, release: Path, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text("mine")
    first = release / "Q4_1" / "tiny-glm-Q4_1-00001-of-00004.gguf"
    code, _, err = run("merge", first, tmp_path / "x.gguf", "--modelfile")
    assert code == 2
    assert (
        err
        == f"error: {tmp_path / 'Modelfile'}: exists already; remove it, or name a file in another folder\n"
    )
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_of_no_model_needs_to_be_told_whose_parameters_it_has(
    run: Run, tmp_path: Path
) -> None:
    code, _, err = run(
        "merge",
        tmp_path / "a" / "b" / "mine-00001-of-00002.gguf",
        tmp_path / "x.gguf",
        "--modelfile",
    )
    assert code == 2 and "name the model with --model" in err


def test_parameters_that_ollama_would_not_take_stop_a_merge(
    run: Run, release: Path, tmp_path: Path
) -> None:
    (release / "params").write_text('{"stop": "x"}')
    code, _, err = run(
        "merge", release / "Q4_1" / "x-00001-of-00002.gguf", tmp_path / "x.gguf", "--modelfile"
    )
    assert code == 2 and "params: stop: expected an array of strings" in err


def test_check_says_what_every_file_is(run: Run, release: Path) -> None:
    code, out, err = run("ollama", "check", release)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert (
        "tiny-glm-UD-TQ1_0.gguf hf.co/OWNER/NAME:UD-TQ1_0 the tag, in upper or lower case" in text
    )
    assert (
        "Q4_1/tiny-glm-Q4_1-00001-of-00004.gguf not pulled the hub refuses the tag of a split model"
        in text
    )
    assert "without a tag: the hub's choice among UD-TQ1_0" in text


def test_check_as_json_is_one_document_and_a_fault_ends_with_1(run: Run, release: Path) -> None:
    (release / "params").write_text('{"stop": "x"}')
    code, out, _ = run("ollama", "check", release, "--json")
    assert code == 1
    assert json.loads(out).keys() == {"passed", "files", "default", "beside", "faults"}
    code, _, err = run("ollama", "check", release)
    assert code == 1 and err.startswith("error: ") and "expected an array of strings" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["nowhere"], "nowhere"), (["RELEASE", "--repo", "no-owner"], "expected OWNER/NAME")],
)
def test_what_is_not_there_is_wrong_input(
    run: Run, release: Path, arguments: list[str], text: str
) -> None:
    code, out, err = run(
        "ollama", "check", *(str(release) if a == "RELEASE" else a for a in arguments)
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and text in err
