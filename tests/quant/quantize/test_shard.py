"""Shards: cut and put together by llama-gguf-split, and believed only after every tensor was compared."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from quant.core.errors import CheckError, InputError, ToolError
from quant.llama import toolchain
from quant.llama.gguf import read_header, read_headers
from quant.llama.toolchain import Toolchain
from quant.quantize.shard import find_changed_tensors, merge_shards, split_file
from tests.gguf_files import LLAMA, Tensor, key, write

Fake = Callable[..., Toolchain]
LARGE = [Tensor(f"blk.{n}.ffn_down.weight", (256, 300), "F32") for n in range(12)]  # 307 kB each


def test_the_same_digests_are_no_change(tmp_path: Path) -> None:
    assert list(find_changed_tensors({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, tmp_path)) == []


def test_every_tensor_that_changed_came_or_went_is_told() -> None:
    found = list(find_changed_tensors({"a": "1", "b": "2"}, {"a": "9", "c": "3"}, Path("f")))
    assert found == [
        "f: tensor a: expected sha256 1, found 9",
        "f: tensor b: expected sha256 2, found None",
        "f: tensor c: expected sha256 None, found 3",
    ]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_file_that_fits_gets_a_second_name(fake_tools: Fake, tmp_path: Path, work: Path) -> None:
    path = write(tmp_path / "f.gguf")
    facts = split_file(path, None, fake_tools(), work / "M-V.x")
    assert [p.name for p in work.iterdir()] == ["M-V.x.gguf"]
    assert (work / "M-V.x.gguf").samefile(path)
    assert facts["tensors"] == read_header(path).hash_tensors()


def test_a_tensor_larger_than_a_shard_is_refused(
    fake_tools: Fake, tmp_path: Path, work: Path
) -> None:
    path = write(tmp_path / "f.gguf", [Tensor("large", (256, 1000)), Tensor("small")])
    with pytest.raises(
        InputError, match="tensor large: expected at most 1M a shard, found 1024000 bytes"
    ):
        split_file(path, "1M", fake_tools(), work / "M")


def pair(folder: Path, tensors: list[list[Tensor]], count: int = 2) -> None:
    folder.mkdir()
    for n, part in enumerate(tensors):
        keys = [key("split.no", n), key("split.count", count)]
        write(folder / f"M-{n + 1:05d}-of-{count:05d}.gguf", part, keys)


@pytest.mark.parametrize(
    ("second", "error", "said"),
    [
        (Tensor("b", (32,), data=bytes(128)), CheckError, "tensor b: expected sha256"),
        (Tensor("c", (32,)), CheckError, "tensor b: expected sha256 .*, found None"),
        (None, InputError, "M-00002-of-00002.gguf: missing"),
    ],
)
def test_shards_that_are_not_the_file_are_refused(
    fake_tools: Fake,
    tmp_path: Path,
    work: Path,
    second: Tensor | None,
    error: type[Exception],
    said: str,
) -> None:
    tensors = [Tensor("a", (32,)), Tensor("b", (32,))]
    path = write(tmp_path / "f.gguf", tensors)
    pair(tmp_path / "made", [[tensors[0]], *([[second]] if second else [])])
    with pytest.raises(error, match=said):
        split_file(path, "1M", fake_tools(llama_gguf_split=f"cp {tmp_path}/made/* ."), work / "M")


def test_a_tool_that_writes_nothing_is_not_believed(
    fake_tools: Fake, tmp_path: Path, work: Path
) -> None:
    with pytest.raises(CheckError, match="expected shards, found none"):
        split_file(write(tmp_path / "f.gguf"), "1M", fake_tools(), work / "M")


def test_merging_is_refused_when_a_tensor_changed_and_leaves_nothing(
    fake_tools: Fake, tmp_path: Path
) -> None:
    pair(tmp_path / "in", [[Tensor("a", (32,))], [Tensor("b", (32,))]])
    wrong = write(
        tmp_path / "wrong.gguf", [Tensor("a", (32,)), Tensor("b", (32,), data=bytes(128))]
    )
    tools = fake_tools(llama_gguf_split=f'cp {wrong} "$3"')
    with pytest.raises(CheckError, match=r"tensor b: expected sha256"):
        merge_shards(tmp_path / "in" / "M-00001-of-00002.gguf", tmp_path / "out" / "M.gguf", tools)
    assert list((tmp_path / "out").iterdir()) == []


def test_merging_a_whole_file_is_refused(fake_tools: Fake, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the first shard of a split"):
        merge_shards(write(tmp_path / "f.gguf"), tmp_path / "out.gguf", fake_tools())


def test_merging_never_writes_over_a_file(fake_tools: Fake, tmp_path: Path) -> None:
    pair(tmp_path / "in", [[Tensor("a", (32,))], [Tensor("b", (32,))]])
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        merge_shards(tmp_path / "in" / "M-00001-of-00002.gguf", tmp_path / "out.gguf", fake_tools())
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_merging_is_refused_where_there_is_no_room_and_the_shards_stay(
    fake_tools: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path / "in", [[Tensor("a", (32,))], [Tensor("b", (32,))]])
    monkeypatch.setattr("quant.core.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        InputError,
        match=r"M\.gguf: expected [\d,]+ bytes free for the merged file beside its shards, found 100",
    ):
        merge_shards(
            tmp_path / "in" / "M-00001-of-00002.gguf", tmp_path / "new" / "M.gguf", fake_tools()
        )
    assert len(list((tmp_path / "in").iterdir())) == 2 and not (tmp_path / "new").exists()


def test_a_failing_merge_is_quoted_and_leaves_nothing(fake_tools: Fake, tmp_path: Path) -> None:
    pair(tmp_path / "in", [[Tensor("a", (32,))], [Tensor("b", (32,))]])
    tools = fake_tools(llama_gguf_split='echo half > "$3"; echo "no more room"; exit 1')
    with pytest.raises(ToolError, match="no more room"):
        merge_shards(tmp_path / "in" / "M-00001-of-00002.gguf", tmp_path / "out" / "M.gguf", tools)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.tools
def test_llama_gguf_split_cuts_and_merges_without_a_change(tmp_path: Path, work: Path) -> None:
    path = write(tmp_path / "f.gguf", LARGE, LLAMA)
    tools = toolchain.find_toolchain()
    facts = split_file(path, "1M", tools, work / "M-V")
    names = sorted(p.name for p in work.glob("*.gguf"))
    assert names == [f"M-V-{n:05d}-of-00004.gguf" for n in range(1, 5)]
    assert all(p.stat().st_size <= 10**6 for p in work.glob("*.gguf"))
    assert [t.name for h in read_headers(work / names[0]) for t in h.tensors] == [
        str(t.name) for t in LARGE
    ]

    receipt = merge_shards(work / names[0], tmp_path / "merged" / "M.gguf", tools)

    merged = read_header(tmp_path / "merged" / "M.gguf")
    assert receipt.path == "M.gguf"
    assert merged.hash_tensors() == facts["tensors"] == read_header(path).hash_tensors()
    assert {k: v for k, v in merged.metadata.items() if not k.startswith("split.")} == read_header(
        path
    ).metadata
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["M.gguf"]


@pytest.mark.tools
def test_a_shard_with_a_flipped_byte_of_its_head_cannot_be_merged(
    tmp_path: Path, work: Path
) -> None:
    tools = toolchain.find_toolchain()
    split_file(write(tmp_path / "f.gguf", LARGE, LLAMA), "1M", tools, work / "M")
    second = work / "M-00002-of-00004.gguf"
    raw = bytearray(second.read_bytes())
    raw[raw.index(b"split.no") + len(b"split.no") + 4] ^= 4
    second.write_bytes(raw)
    with pytest.raises(
        InputError, match=r"M-00002-of-00004.gguf: split.no, split.count: expected \(1, 4\), found"
    ):
        merge_shards(work / "M-00001-of-00004.gguf", tmp_path / "out.gguf", tools)
