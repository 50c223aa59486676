import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from quant.core import files
from quant.core.errors import CheckError, InputError
from quant.release.deliver import deliver_release, is_delivered
from quant.release.manifest import MANIFEST
from quant.release.package import Release
from tests.quant.release.manifests import make_manifest

CONTENT: Mapping[str, bytes] = {
    "README.md": b"# tiny\n",
    "UD-Q2_K_XL/tiny-UD-Q2_K_XL-00001-of-00002.gguf": b"first",
    "UD-Q2_K_XL/tiny-UD-Q2_K_XL-00002-of-00002.gguf": b"second",
}


def packaged(folder: Path, content: Mapping[str, bytes] = CONTENT, version: int = 1) -> Release:
    """A release as the packaging leaves it in the store."""
    manifest = make_manifest(parameters=version)
    for name, data in {**content, MANIFEST: manifest.to_json().encode()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    receipts = tuple(
        files.make_receipt(p, folder) for p in sorted(folder.rglob("*")) if p.is_file()
    )
    return Release(folder, "tiny", manifest, receipts)


def held(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return packaged(tmp_path / "store")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_release_stands_under_its_name_with_every_file_and_nothing_beside_it(
    release: Release, out: Path
) -> None:
    delivered = deliver_release(release, out)
    assert (delivered.folder, delivered.fresh) == (out / "tiny", True)
    assert held(out / "tiny") == held(release.folder)
    assert sorted(p.name for p in out.iterdir()) == ["tiny", "tiny.digests.json"]


def test_the_same_release_is_left_alone(release: Release, out: Path) -> None:
    deliver_release(release, out)
    before = {
        p: (p.stat().st_ino, p.stat().st_ctime_ns)
        for p in [out / "tiny", *(out / "tiny").rglob("*")]
    }
    assert deliver_release(release, out).fresh is False
    assert {p: (p.stat().st_ino, p.stat().st_ctime_ns) for p in before} == before


@pytest.mark.parametrize("damage", ["missing", "shorter", "other manifest"])
def test_a_damaged_release_is_delivered_again(release: Release, out: Path, damage: str) -> None:
    deliver_release(release, out)
    path = out / "tiny" / (MANIFEST if damage == "other manifest" else "README.md")
    data = path.read_bytes()
    path.unlink()  # never in place: it may be a second name of the store's file
    if damage != "missing":
        path.write_bytes(
            data[:-1]
            if damage == "shorter"
            else data.replace(b'"parameters": 1', b'"parameters": 2')
        )
    assert not is_delivered(release, out / "tiny")
    assert deliver_release(release, out).fresh is True
    assert held(out / "tiny") == held(release.folder)


def test_an_older_release_is_replaced_and_nothing_of_it_stays(
    release: Release, out: Path, tmp_path: Path
) -> None:
    deliver_release(
        packaged(tmp_path / "older", {**CONTENT, "Q4_1.gguf": b"dropped since"}, version=0), out
    )
    assert deliver_release(release, out).fresh is True
    assert held(out / "tiny") == held(release.folder)
    assert sorted(p.name for p in out.iterdir()) == ["tiny", "tiny.digests.json"]


@pytest.mark.parametrize(
    "foreign",
    [
        {"thesis.tex": b"x"},
        {"thesis.tex": b"x", MANIFEST: b'{"manifest_version": 3}'},
        {MANIFEST: b"["},
    ],
)
def test_a_folder_that_is_no_release_is_refused_and_kept(
    release: Release, out: Path, foreign: Mapping[str, bytes]
) -> None:
    (out / "tiny").mkdir(parents=True)
    for name, data in foreign.items():
        (out / "tiny" / name).write_bytes(data)
    with pytest.raises(
        InputError, match="expected a release or nothing, found something else; name another folder"
    ):
        deliver_release(release, out)
    assert held(out / "tiny") == foreign


def test_a_file_in_the_place_of_the_release_is_refused_and_kept(
    release: Release, out: Path
) -> None:
    out.mkdir()
    (out / "tiny").write_text("mine")
    with pytest.raises(InputError, match="found something else"):
        deliver_release(release, out)
    assert (out / "tiny").read_text() == "mine"


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_a_byte_that_flipped_in_the_store_is_found_before_anything_is_delivered(
    release: Release, out: Path, name: str
) -> None:
    path = release.folder / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(CheckError) as e:
        deliver_release(release, out)
    message = (
        f"{path}: its bytes are not those that were packaged; delete {release.folder} and run again"
    )
    assert e.value.problems == (message,)
    assert list(out.iterdir()) == []


def test_a_flipped_byte_leaves_the_older_release_standing(
    release: Release, out: Path, tmp_path: Path
) -> None:
    older = packaged(tmp_path / "older", version=0)
    deliver_release(older, out)
    (release.folder / "README.md").write_bytes(b"# Tiny\n")
    with pytest.raises(CheckError):
        deliver_release(release, out)
    assert held(out / "tiny") == held(older.folder)


@pytest.mark.parametrize("older", [False, True], ids=["first release", "replacement"])
def test_a_release_is_whole_or_absent_wherever_delivering_is_cut(
    release: Release, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """Every call that changes a name is refused once, as if the machine had stopped there."""
    whole = [held(release.folder)]
    if older:
        earlier = packaged(tmp_path / "older", version=0)
        whole.append(held(earlier.folder))
    steps = 0
    while True:
        if older and not is_delivered(earlier, out / "tiny"):
            deliver_release(earlier, out)
        with monkeypatch.context() as patch:
            left = _stop_after(patch, steps)
            try:
                deliver_release(release, out)
                break
            except KeyboardInterrupt:
                assert left == [0]
        assert not (out / "tiny").exists() or held(out / "tiny") in whole
        steps += 1
    assert held(out / "tiny") == whole[0]
    assert {p.name for p in out.iterdir()} - {"tiny.digests.json"} == {"tiny"}
    assert steps >= (7 if older else 5)


def _stop_after(patch: pytest.MonkeyPatch, steps: int) -> list[int]:
    left = [steps]

    def guarded(call: object) -> object:
        def guard(*args: object, **kw: object) -> object:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return call(*args, **kw)  # type: ignore[operator]

        return guard

    for name in ("link", "rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, guarded(getattr(os, name)))
    return left


def test_where_no_second_name_is_possible_the_bytes_are_copied(
    release: Release, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    deliver_release(release, out)
    assert held(out / "tiny") == held(release.folder)
    assert (out / "tiny" / "README.md").stat().st_ino != (
        release.folder / "README.md"
    ).stat().st_ino


def test_a_folder_that_cannot_be_written_is_named(
    release: Release, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(out / "tiny.partial"))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match=r"tiny\.partial: no space left; free some and run again"):
        deliver_release(release, out)
