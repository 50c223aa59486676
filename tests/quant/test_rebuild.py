"""What a rebuild excuses: packages, prose of another version, figures within a margin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant.core.errors import CheckError
from quant.core.files import hash_file
from quant.rebuild import RebuildResult, compare_releases, find_changed_figures
from quant.release.folder import CHECKSUMS, PROVENANCE
from quant.release.manifest import MANIFEST, Manifest
from quant.release.provenance import PROJECT, make_statement
from tests.quant.release.manifests import make_evaluation, make_figures, make_manifest, make_variant

FILES = {
    "Modelfile": "FROM ./M.gguf\n",
    "M.gguf": "weights",
    "README.md": "# A card\n",
    "imatrix_M.gguf": "importance",
    "params": "{}",
    "pictures/bits.svg": "<svg/>",
    "report.html": "<html/>",
    "template": "{{ . }}",
}
PROSE = ("README.md", "pictures/bits.svg", "report.html")


def write_release(folder: Path, version: str, **texts: str) -> Path:
    """Write a release made by that version, with some texts replaced (`/` and `.` as `_`)."""
    names = {name.replace("/", "_").replace(".", "_"): name for name in FILES}
    content = FILES | {names[key]: text for key, text in texts.items()}
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    manifest = make_manifest()
    (folder / MANIFEST).write_text(manifest.to_json())
    sums = {name: hash_file(folder / name) for name in content}
    statement = make_statement(manifest, sums, {"numpy": "2.0"}, version, {})
    (folder / PROVENANCE).write_text(json.dumps(statement))
    sums[PROVENANCE] = hash_file(folder / PROVENANCE)
    (folder / CHECKSUMS).write_text("".join(f"{sha}  {n}\n" for n, sha in sums.items()))
    return folder


def compare(old: Path, new: Path, figures: tuple[str, ...] = ()) -> RebuildResult:
    names = [p.relative_to(old).as_posix() for p in old.rglob("*") if p.is_file()]
    return compare_releases(old, {n: hash_file(old / n) for n in names}, new, figures)


def test_the_same_release_is_the_same_in_every_file(tmp_path: Path) -> None:
    old, new = (write_release(tmp_path / name, "0.2.0") for name in ("old", "new"))
    result = compare(old, new)
    assert result.compared == tuple(sorted({*FILES, CHECKSUMS, PROVENANCE, MANIFEST}))
    assert (result.reworded, result.packages, result.figures) == ((), (), ())


def test_another_version_may_word_card_report_and_charts_otherwise_and_they_are_named(
    tmp_path: Path,
) -> None:
    old = write_release(tmp_path / "old", "0.1.0")
    new = write_release(
        tmp_path / "new",
        "0.2.0",
        README_md="# Card\n",
        report_html="<p/>",
        pictures_bits_svg="<g/>",
    )
    result = compare(old, new)
    assert result.reworded == PROSE
    assert result.packages == (f"{PROJECT}: was 0.1.0, is 0.2.0",)
    assert set(result.compared) == {*FILES, MANIFEST} - set(PROSE)


def test_prose_that_is_the_same_is_not_called_reworded(tmp_path: Path) -> None:
    old = write_release(tmp_path / "old", "0.1.0")
    new = write_release(tmp_path / "new", "0.2.0", README_md="# Card\n")
    assert compare(old, new).reworded == ("README.md",)


def test_the_same_version_must_word_everything_the_same(tmp_path: Path) -> None:
    old = write_release(tmp_path / "old", "0.2.0")
    new = write_release(tmp_path / "new", "0.2.0", README_md="# Card\n")
    with pytest.raises(CheckError, match=r"README\.md: expected sha256"):
        compare(old, new)


def test_without_the_old_provenance_no_prose_is_excused(tmp_path: Path) -> None:
    old = write_release(tmp_path / "old", "0.1.0")
    new = write_release(tmp_path / "new", "0.2.0", README_md="# Card\n")
    (old / PROVENANCE).unlink()
    with pytest.raises(CheckError, match=r"README\.md: expected sha256"):
        compare(old, new)


@pytest.mark.parametrize("name", ["M.gguf", "imatrix_M.gguf", "params", "template", "Modelfile"])
def test_files_without_prose_must_be_the_same_whatever_the_version(
    tmp_path: Path, name: str
) -> None:
    old = write_release(tmp_path / "old", "0.1.0")
    new = write_release(tmp_path / "new", "0.2.0", **{name.replace(".", "_"): "other"})
    with pytest.raises(CheckError) as e:
        compare(old, new)
    (problem,) = e.value.problems
    assert problem.startswith(f"{new / name}: expected sha256 ")


def test_a_manifest_must_be_the_same_whatever_the_version(tmp_path: Path) -> None:
    old = write_release(tmp_path / "old", "0.1.0")
    new = write_release(tmp_path / "new", "0.2.0")
    (new / MANIFEST).write_text(make_manifest(parameters=7).to_json())
    with pytest.raises(CheckError, match=f"{MANIFEST}: expected sha256"):
        compare(old, new)
    assert compare(old, new, ("Q: KLD was 0.1, is 0.101",)).figures


def measure(kld: float, name: str = "Q") -> Manifest:
    figures = make_figures(kld_mean=kld, kld_mean_low=kld - 0.01, kld_mean_high=kld + 0.01)
    return make_manifest(
        evaluation=make_evaluation(base=replace(make_evaluation().base, ppl=kld)),
        variants=(make_variant(name, "Q.gguf", evaluation=figures),),
    )


def test_figures_may_differ_by_a_little_and_nothing_else_may() -> None:
    assert find_changed_figures(measure(0.1), measure(0.101)) == ("Q: KLD was 0.1, is 0.101",)
    assert find_changed_figures(measure(0.1), measure(0.1)) == ()
    assert find_changed_figures(measure(0.1), measure(0.2)) == ()
    assert find_changed_figures(measure(0.1), measure(0.101, "P")) == ()
    longer = measure(0.101)
    assert longer.evaluation
    evaluation = replace(longer.evaluation, context=1024)
    assert find_changed_figures(measure(0.1), replace(longer, evaluation=evaluation)) == ()
