"""`quant plan`: output, exit codes, and that it needs no weights, no torch and no network."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from quant import cli
from quant.llama.gguf import TensorSpec
from quant.plan.inventory import list_tensors
from quant.plan.load import RECIPES, load_model
from tests.gguf_files import LLAMA, Tensor, write

Run = Callable[..., tuple[int, str, str]]
TENSOR, MISSPELT = "blk.3.ffn_down_exps.weight", "blk.3.ffn_down_exp.weight"
TINY = list_tensors(load_model("tiny-glm")[0].architecture)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with arguments: its exit code, its standard output, its standard error."""

    def go(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quant", "plan", *map(str, arguments)])
        try:
            code = cli._run()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return go


def recipe(path: Path, *changes: tuple[str, str], model: str = "tiny-glm") -> Path:
    """A shipped recipe with some of its text replaced."""
    text = (RECIPES / "models" / f"{model}.toml").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def base(path: Path, tensors: Sequence[TensorSpec] = TINY, kind: str | None = None) -> Path:
    """A file that holds a model's tensors, all matrices of one type if it is named."""
    kinds = {t.name: kind if kind and len(t.shape) > 1 else t.type.name for t in tensors}
    return write(path, [Tensor(t.name, t.shape, kinds[t.name]) for t in tensors], LLAMA)


def test_without_a_variant_there_is_a_line_for_each(run: Run) -> None:
    code, out, err = run("glm-4.6")
    assert (code, err) == (0, "")
    for name in load_model("glm-4.6")[0].variants:
        assert f" {name} " in out
    assert "1,759 tensors, 356,785,898,816 weights." in out


def test_with_one_variant_its_classes_of_tensors_are_shown(run: Run) -> None:
    code, out, _ = run("glm-4.6", "-v", "UD-Q2_K_XL")
    assert code == 0
    [line] = [line for line in out.splitlines() if "ffn_down_exps" in line and "IQ3_S" in line]
    assert line.split() == ["ffn_down_exps", "89", "IQ3_S", "48,119,808,000", "35.7", "%"]


def test_the_document_has_the_keys_that_scripts_read(run: Run) -> None:
    code, out, err = run("glm-4.6", "-v", "UD-Q2_K_XL", "-v", "BF16", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["model", "parameters", "variants"]
    assert (document["model"], document["parameters"]) == ("glm-4.6", 356_785_898_816)
    assert [v["name"] for v in document["variants"]] == ["UD-Q2_K_XL", "BF16"]
    for variant in document["variants"]:
        assert set(variant) == {"name", "bytes", "bpw", "shards", "tensors"}
        assert len(variant["tensors"]) == 1759
        assert {"name", "type", "shape", "bytes"} == set(variant["tensors"][0])
        assert 0 <= variant["bytes"] - sum(t["bytes"] for t in variant["tensors"]) < 10_000_000
    assert (document["variants"][0]["shards"], document["variants"][1]["shards"]) == (3, 15)


def test_a_variant_that_is_named_twice_is_planned_once(run: Run) -> None:
    document = json.loads(run("tiny-glm", "-v", "Q8_0", "-v", "Q8_0", "--json")[1])
    assert len(document["variants"]) == 1


def test_the_context_length_changes_the_memory(run: Run) -> None:
    short, long = (run("glm-4.6", "-v", "Q8_0", "--context", str(n))[1] for n in (1024, 131072))
    assert "GiB at 1,024" in short
    assert "GiB at 131,072" in long
    assert short.splitlines()[-3].split()[-4] != long.splitlines()[-3].split()[-4]


def test_explain_names_the_rule_that_decides_in_every_variant(run: Run) -> None:
    code, out, _ = run(
        "glm-4.6", "--explain", "blk.92.attn_q.weight", "-v", "UD-Q2_K_XL", "-v", "BF16"
    )
    assert code == 0
    assert "rules[3]" in out
    assert "MTP block" in out
    assert "no rule: it keeps its type" in out


def test_explain_shows_the_fallback_type_where_it_is_used(run: Run) -> None:
    document = json.loads(
        run("glm-5", "--explain", "blk.3.attn_k_b.weight", "-v", "UD-Q2_K_XL", "--json")[1]
    )
    assert list(document) == ["model", "tensor", "variants"]
    [decision] = document["variants"]
    assert list(decision) == ["variant", "rule", "type", "pattern", "why"]
    assert decision["type"] == "Q8_0"


def test_explain_of_a_tensor_that_keeps_its_type_says_so(run: Run) -> None:
    assert (
        "no rule: it keeps its type"
        in run("glm-4.6", "--explain", "blk.3.attn_norm.weight", "-v", "Q8_0")[1]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["glm-46"], ["error: model 'glm-46' is not known: did you mean 'glm-4.6'?"]),
        (["nothing-alike"], ["error: model 'nothing-alike' is not known: known are glm-4.6, "]),
        (["nowhere.toml"], ["error: nowhere.toml: cannot be read (No such file or directory)"]),
        (
            ["glm-46", "-v", "UD-Q2KXL", "-v", "Q8"],
            [
                "error: model 'glm-46' is not known: did you mean 'glm-4.6'?",
                "error: variant 'UD-Q2KXL' is not known: did you mean 'UD-Q2_K_XL'?",
                "error: variant 'Q8' is not known: ",
            ],
        ),
        (
            ["glm-4.6", "--explain", MISSPELT],
            [f"error: tensor {MISSPELT!r} is not in this model: did you mean {TENSOR!r}?"],
        ),
        (
            ["glm-4.6", "--explain", "hello"],
            ["error: tensor 'hello' is not in this model: known are blk.0.attn_k.bias, "],
        ),
        (
            ["tiny-glm", "--gguf", "nowhere.gguf"],
            ["error: nowhere.gguf: cannot be read (No such file or directory)"],
        ),
    ],
)
def test_all_problems_of_a_call_are_reported_at_once_with_exit_code_2(
    arguments: list[str], said: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == len(said)
    for line, expected in zip(lines, said, strict=True):
        assert line.startswith(expected)
        assert len(line) < 900


def test_an_unknown_class_of_tensor_is_answered_with_names_of_one_block(run: Run) -> None:
    assert run("glm-4.6", "--explain", "hello")[2].count("blk.") < 40


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["glm-4.6", "--context", "0"],
        ["glm-4.6", "--context", "much"],
        ["glm-4.6", "--gguf", "/"],
    ],
)
def test_a_usage_error_ends_with_2(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


def test_all_wrong_values_of_an_architecture_are_reported_at_once(run: Run, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "broken.toml",
        ("hidden_size = 256\n", ""),
        ("num_hidden_layers = 4\n", "num_hidden_layers = 0\n"),
        ("vocab_size = 4096\n", 'vocab_size = "4096"\n'),
        ("attention_bias = true\n", "attention_bias = 1\n"),
    )
    code, out, err = run(path)
    assert (code, out) == (2, "")
    assert [line.split(": ")[3] for line in err.splitlines()] == [
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "attention_bias",
    ]


def test_a_recipe_without_an_architecture_asks_for_the_file(run: Run, tmp_path: Path) -> None:
    text = (RECIPES / "models" / "tiny-glm.toml").read_text()
    start, end = text.index("[architecture]"), text.index("[sampling]")
    path = tmp_path / "bare.toml"
    path.write_text(text[:start] + text[end:])
    code, _, err = run(path)
    assert code == 2
    assert (
        "architecture: missing, so there is nothing to plan with; name the BF16 file with --gguf"
        in err
    )
    assert run(path, "--gguf", base(tmp_path / "f.gguf"))[0] == 0


def test_a_variant_that_does_not_fit_the_model_is_reported_tensor_by_tensor(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text(
        'name = "bad"\nsummary = "x"\nfile_type = "IQ1_S"\n'
        '[[rules]]\ntensors = ".*"\ntype = "IQ1_S"\nwhy = "x"\n'
    )
    code, out, err = run("glm-4.6v-flash", "-v", tmp_path / "bad.toml")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 42  # 40 narrow rows, and the two ends without imatrix data
    assert "tensor token_embd.weight: IQ1_S needs imatrix data" in err


def test_a_tensor_larger_than_a_shard_is_reported_before_any_work(run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path / "small.toml", ('max_shard_size = "3M"', 'max_shard_size = "1M"'))
    code, _, err = run(path, "-v", "Q8_0")
    assert code == 2
    assert (
        "variant Q8_0: tensor output.weight: expected at most 1M a shard, found 1114112 bytes"
        in err
    )
    assert run(path, "-v", "UD-TQ1_0")[0] == 0  # it is never cut


def test_with_the_converted_file_sizes_are_exact(run: Run, tmp_path: Path) -> None:
    path = base(tmp_path / "tiny-glm-BF16.gguf")
    document = json.loads(run("tiny-glm", "-v", "BF16", "-v", "Q8_0", "--gguf", path, "--json")[1])
    size = {v["name"]: v["bytes"] for v in document["variants"]}
    assert size["BF16"] == path.stat().st_size
    assert 0 < size["Q8_0"] - sum(t["bytes"] for t in document["variants"][1]["tensors"]) < 10_000


def of(name: str) -> dict[str, Any]:
    return load_model(name)[0].architecture


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        (TINY, "Q8_0", "expected unquantized weights (BF16), found Q8_0"),
        (
            list_tensors(of("tiny-glm") | {"num_hidden_layers": 3}),
            None,
            "19 of 74 tensors, first blk.3.attn_norm.weight: expected (256,), found None",
        ),
        (
            list_tensors(of("tiny-glm") | {"vocab_size": 4000}),
            None,
            "2 of 74 tensors, first token_embd.weight: expected (256, 4096), found (256, 4000)",
        ),
    ],
)
def test_the_file_of_another_model_is_refused(
    tensors: Sequence[TensorSpec], kind: str | None, said: str, run: Run, tmp_path: Path
) -> None:
    code, out, err = run("tiny-glm", "--gguf", base(tmp_path / "other.gguf", tensors, kind))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'other.gguf'}: ")
    assert err.endswith(f"{said}\n")
    assert err.count("\n") == 1


def test_a_file_may_have_an_mtp_block_that_the_recipe_lacks(run: Run, tmp_path: Path) -> None:
    tensors = list_tensors(of("tiny-glm") | {"num_nextn_predict_layers": 1})
    assert (
        run("tiny-glm", "-v", "UD-Q2_K_XL", "--gguf", base(tmp_path / "mtp.gguf", tensors))[0] == 0
    )


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from quant.cli import main\n"
        "try: main()\nfinally: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "glm-4.6", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["model"] == "glm-4.6"
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "quant" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "prefect",
        "huggingface_hub",
        "datasets",
        "numpy",
        "gguf",
        "httpx",
    }
