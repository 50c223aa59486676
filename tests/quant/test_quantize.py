"""Quantising: what llama-quantize is told, and that what it wrote is compared with the plan."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quant import quantize, toolchain
from quant.errors import CheckFailed, InputError, ToolError
from quant.ggml_types import TYPES
from quant.header import read_header
from quant.plan import plan
from quant.quantize import differences, type_file, write_variant
from quant.recipe import Rule, Variant
from quant.toolchain import Toolchain
from tests.gguf_files import Key, Tensor, content, key, write

RULES = Variant("V", "For tests.", "Q4_K_M", (Rule(r"b\..*", "Q8_0", "For tests."), Rule(".*", "Q4_K", "For tests.")))
BASE = [Tensor("a.weight", (256, 2), "BF16"), Tensor("b.weight", (64, 2), "BF16"), Tensor("n_norm.weight", (7,), "F32")]
MADE = [Tensor("a.weight", (256, 2), "Q4_K"), Tensor("b.weight", (64, 2), "Q8_0"), BASE[2]]


def test_names_are_escaped_and_anchored() -> None:
    lines = type_file({"blk.1.ffn_down.weight": "Q4_K", "a+b[0].weight": "IQ2_XXS"}).splitlines()
    assert lines == [r"^blk\.1\.ffn_down\.weight$=q4_k", r"^a\+b\[0\]\.weight$=iq2_xxs"]


def test_every_line_speaks_of_one_tensor_however_it_is_searched() -> None:
    names = [f"blk.{n}.ffn_{part}.weight" for n in (1, 11, 111) for part in ("up", "up_exps", "gate_up")]
    for line, name in zip(type_file(dict.fromkeys(names, "Q4_K")).splitlines(), names, strict=True):
        assert [other for other in names if re.search(line.rpartition("=")[0], other)] == [name]


def test_no_types_are_an_empty_file() -> None:
    assert type_file({}) == ""


def made(tmp_path: Path, tensors: list[Tensor], cut: int = 0, extra: bytes = b"") -> list[str]:
    planned = plan(RULES, read_header(write(tmp_path / "base.gguf", BASE)).tensors)
    path = write(tmp_path / "made.gguf", tensors, cut=cut)
    path.write_bytes(path.read_bytes() + extra)
    expected_bytes = len(content(MADE))
    return [line.removeprefix(f"{path}: ") for line in differences(planned, read_header(path), expected_bytes)]


def test_a_file_as_planned_has_no_differences(tmp_path: Path) -> None:
    assert made(tmp_path, MADE) == []


def test_another_order_of_tensors_is_told(tmp_path: Path) -> None:
    assert made(tmp_path, MADE[::-1]) == ["order of tensors: expected a.weight, found n_norm.weight"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([MADE[0], BASE[1], MADE[2]], "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 2), 'BF16')"),
        (
            [MADE[0], Tensor("b.weight", (64, 4), "Q8_0"), MADE[2]],
            "tensor b.weight: expected ((64, 2), 'Q8_0'), found ((64, 4), 'Q8_0')",
        ),
        (MADE[:2], "tensor n_norm.weight: expected ((7,), 'F32'), found None"),
        ([*MADE, Tensor("x")], "tensor x: expected None, found ((32, 2), 'F32')"),
    ],
)
def test_every_tensor_that_is_not_as_planned_is_told(tmp_path: Path, tensors: list[Tensor], said: str) -> None:
    assert said in made(tmp_path, tensors)


def test_a_file_of_another_length_is_told(tmp_path: Path) -> None:
    [longer] = made(tmp_path, MADE, extra=b"more")
    assert re.fullmatch(r"expected \d+ bytes, found \d+", longer)
    [shorter] = made(tmp_path, MADE, cut=4)  # of the padding
    assert re.fullmatch(r"expected \d+ bytes, found \d+", shorter)


def test_what_the_tool_wrote_wrongly_stops_the_work(fake_tools: Callable[..., Toolchain], tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", BASE)
    matrix = write(tmp_path / "matrix.gguf", [])
    work = tmp_path / "work"
    work.mkdir()
    tools = fake_tools(llama_quantize=f"cp {base} V.gguf")  # the copy of a file is not what was asked for
    planned = plan(RULES, read_header(base).tensors)
    with pytest.raises(CheckFailed) as caught:
        write_variant(base, matrix, planned, tools, work / "V.gguf")
    assert [p.split(": ")[1] for p in caught.value.problems[:2]] == ["tensor a.weight", "tensor b.weight"]
    assert (work / "types.txt").read_text() == "^a\\.weight$=q4_k\n^b\\.weight$=q8_0\n"


def test_a_disk_without_room_is_told_before_any_work(
    fake_tools: Callable[..., Toolchain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "RESERVE_BYTES", 2**62)
    base = write(tmp_path / "base.gguf", BASE)
    planned = plan(RULES, read_header(base).tensors)
    with pytest.raises(InputError, match=r"expected \d+ bytes free, found \d+; free some and run again"):
        write_variant(base, base, planned, fake_tools(), tmp_path / "V.gguf")
    assert not (tmp_path / "types.txt").exists()


LLAMA: list[Key] = [
    key("general.architecture", "llama"), key("llama.block_count", 1), key("llama.context_length", 32),
    key("llama.embedding_length", 256), key("llama.feed_forward_length", 256), key("llama.attention.head_count", 4),
    key("llama.attention.layer_norm_rms_epsilon", 1e-5), key("tokenizer.ggml.model", "no_vocab"),
]  # fmt: skip


def weights(name: str, rows: int, columns: int = 256) -> Tensor:
    """A BF16 tensor of random, sound weights: the upper half of each float's bytes."""
    noise = np.random.default_rng(len(name)).normal(0, 0.1, rows * columns).astype("<f4")
    return Tensor(name, (columns, rows), "BF16", data=(noise.view("<u4") >> 16).astype("<u2").tobytes())


@pytest.mark.tools
def test_llama_quantize_writes_what_is_planned(tmp_path: Path) -> None:
    names = ["token_embd.weight", "output.weight", *(f"blk.{n}.ffn_down.weight" for n in (0, 1, 10, 11))]
    base = write(tmp_path / "base.gguf", [weights(n, 4) for n in names], LLAMA)
    matrix_keys = [
        key("general.type", "imatrix"), key("imatrix.datasets", ["calibration.txt"]), key("imatrix.chunk_count", 1),
        key("imatrix.chunk_size", 512),
    ]  # fmt: skip
    ones = np.ones(256, "<f4").tobytes()
    entries = [
        (f"{n}.{part}", (256, 1) if part == "in_sum2" else (1, 1), ones)
        for n in names
        for part in ("in_sum2", "counts")
    ]
    matrix = write(
        tmp_path / "m.gguf", [Tensor(n, s, "F32", data=ones[: 4 * s[0]]) for n, s, ones in entries], matrix_keys
    )
    rules = Variant("V", "x", "Q3_K_M", (
        Rule(r"token_embd\.weight", "Q2_K", "x"), Rule(r"output\.weight", "Q6_K", "x"),
        Rule(r"blk\.1\..*", "IQ4_XS", "x"), Rule(r"blk\.\d+\..*", "Q3_K", "x"),
    ))  # fmt: skip
    planned = plan(rules, read_header(base).tensors, names)
    (tmp_path / "work").mkdir()
    facts = write_variant(base, matrix, planned, toolchain.find(), tmp_path / "work" / "V.gguf", jobs=1)
    found = {t.name: t.type for t in read_header(tmp_path / "work" / "V.gguf").tensors}
    assert found["blk.1.ffn_down.weight"] == TYPES["IQ4_XS"]
    assert found["blk.11.ffn_down.weight"] == TYPES["Q3_K"]
    assert facts["file_type"] == "Q3_K_M"
    assert "imatrix.gguf" not in [p.name for p in (tmp_path / "work").iterdir()]


@pytest.mark.tools
def test_llama_quantizes_own_refusal_is_quoted(tmp_path: Path) -> None:
    base = write(tmp_path / "base.gguf", [weights("token_embd.weight", 4)], LLAMA)
    planned = plan(replace(RULES, rules=(Rule(".*", "Q4_K", "x"),)), read_header(base).tensors)
    (tmp_path / "work").mkdir()
    with pytest.raises(ToolError, match="llama-quantize exited with 1; its last words"):
        write_variant(base, base, planned, toolchain.find(), tmp_path / "work" / "V.gguf")
