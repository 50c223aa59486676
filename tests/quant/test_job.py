"""A build whose disk is too small is refused before it writes anything."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from quant.build import build_release
from quant.core.errors import InputError
from quant.hub.checkpoint import ModelSource
from quant.job import BuildRequest, find_disk_problems, prepare_job
from quant.plan.inventory import read_architecture
from quant.plan.load import load_model, load_variant
from quant.plan.plan import make_plan
from quant.plan.sizes import estimate_build_bytes

MODEL, _ = load_model("tiny-glm")
TENSORS = read_architecture(MODEL.architecture).tensors()
VARIANTS = [load_variant(name) for name in ("UD-Q2_K_XL", "Q4_1")]
PLANS = [make_plan(v, TENSORS) for v in VARIANTS]
BASE = sum(t.bytes for t in TENSORS)
NEEDED = BASE + sum(p.bytes for p in PLANS)
Usage = namedtuple("Usage", "total used free")


def free(monkeypatch: pytest.MonkeyPatch, found: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2 * found, found, found))


def test_a_build_takes_what_is_fetched_the_bf16_file_and_every_variant() -> None:
    assert estimate_build_bytes(TENSORS, PLANS, MODEL) == NEEDED
    fetched = replace(MODEL, source=ModelSource("somebody/tiny"))
    assert estimate_build_bytes(TENSORS, PLANS, fetched) == NEEDED + BASE
    small = replace(MODEL, imatrix=replace(MODEL.imatrix, base="Q8_0"))
    assert NEEDED + 0.5 * BASE < estimate_build_bytes(TENSORS, PLANS, small) < NEEDED + 0.6 * BASE
    whole, cut = (make_plan(load_variant("BF16"), TENSORS), replace(MODEL, max_shard_size="5M"))
    assert estimate_build_bytes(TENSORS, [whole], replace(MODEL, max_shard_size="50G")) == BASE
    assert estimate_build_bytes(TENSORS, [whole], cut) == BASE + whole.bytes


@pytest.mark.parametrize("found", [NEEDED, NEEDED - 1])
def test_a_byte_too_little_is_one_line_with_the_folder_and_both_numbers(
    found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, found)
    work = tmp_path / "out" / ".work"
    said = list(find_disk_problems(MODEL, VARIANTS, work, tmp_path / "out"))
    too_little = (
        f"{work}: expected {NEEDED:,} bytes free for what this build will write, found {found:,}; free some, name another"
        " folder with --work, or build fewer variants"
    )
    assert said == ([] if found == NEEDED else [too_little])


def test_what_stands_already_is_not_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").write_bytes(b"x" * 10**6)
    (tmp_path / "second").hardlink_to(tmp_path / "made")
    held = (tmp_path / "made").stat().st_blocks * 512
    free(monkeypatch, NEEDED - held)
    assert not list(find_disk_problems(MODEL, VARIANTS, tmp_path, tmp_path))
    free(monkeypatch, NEEDED - held - 1)
    assert len(list(find_disk_problems(MODEL, VARIANTS, tmp_path, tmp_path))) == 1


@pytest.mark.skipif(
    Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="/dev/shm and /tmp are one disk here",
)
def test_a_release_on_another_disk_is_a_copy_that_needs_room_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    said = list(
        find_disk_problems(MODEL, VARIANTS, tmp_path, Path("/dev/shm/release-that-is-not-there"))
    )
    assert [line.partition(":")[0] for line in said] == [
        str(tmp_path),
        "/dev/shm/release-that-is-not-there",
    ]
    assert f"expected {NEEDED - BASE:,} bytes free" in said[1] and "--out" in said[1]


def test_of_a_model_that_does_not_tell_its_numbers_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    assert not list(
        find_disk_problems(replace(MODEL, architecture={}), VARIANTS, tmp_path, tmp_path)
    )


@pytest.mark.tools
def test_a_build_on_a_small_disk_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare_job(BuildRequest("tiny-glm", tmp_path / "out", ["Q4_1"]))
    free(monkeypatch, 10**6)
    with pytest.raises(
        InputError, match=r"\.work/tiny-glm: expected .* bytes free for what this build will write"
    ) as e:
        build_release(job)
    assert e.value.exit_code == 2 and not (tmp_path / "out").exists()
