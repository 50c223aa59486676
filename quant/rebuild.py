"""Build a release again from its manifest alone, in another folder, and compare every byte.

The manifest has every recipe of the release, so a later change of ``recipes/`` has no effect. What
decides the bytes must be the same: the source's files, the calibration texts, and llama.cpp.

Three kinds of difference are excused, and named in the result. All others are faults.

- *Packages*: provenance names the versions that made a release, so it and SHA256SUMS differ.
- *Prose*: another version of this project may have another text in card, report and charts.
- *Figures*: two processors add up in another order, so KLD and perplexity may differ a little, and
  with them every file that shows them. See :func:`quant.evaluate.figures.figures_close`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant import build as builds
from quant.build import StageRunner
from quant.core import files
from quant.core.errors import CheckError, raise_problems
from quant.core.store import Store
from quant.evaluate import html
from quant.evaluate.figures import figures_close
from quant.job import WORK, ReleaseJob
from quant.llama.toolchain import Toolchain
from quant.plan.load import RECIPES
from quant.plan.recipe import ModelRecipe
from quant.release.folder import CHECKSUMS, PROVENANCE, README, hash_lists, read_checksums
from quant.release.manifest import MANIFEST, Manifest, to_plain
from quant.release.provenance import PROJECT, read_versions

LISTS = {PROVENANCE, CHECKSUMS}
"""They name the versions of the packages, and the digests of all other files."""
PROSE = {README, html.REPORT}


@dataclass(frozen=True, kw_only=True)
class RebuildResult:
    """A release that was built again and is the same."""

    folder: Path
    compared: tuple[str, ...]
    """Files with the same bytes."""
    uncompared: tuple[str, ...]
    """Files of the new release whose old digest is unknown, because only the manifest was given."""
    reworded: tuple[str, ...]
    """Card, report and charts whose text differs in this version of the project."""
    packages: tuple[str, ...]
    """Packages of another version, which changed no byte but in the lists."""
    figures: tuple[str, ...]
    """Variants whose figures differ as they may between two processors."""


def prepare_rebuild(
    path: Path,
    out: Path,
    tools: Toolchain,
    work: Path | None = None,
    source: Path | None = None,
) -> tuple[ReleaseJob, Manifest]:
    """Return the job that builds a release again, and the old release's manifest.

    Args:
        path: The manifest, or the folder of the release.
        out: Where the new release goes.
        tools: llama.cpp.
        work: Where finished stages are kept; in ``out`` if not given.
        source: The checkpoint, for a model that does not come from the hub.

    Raises:
        InputError: With everything that would keep the new release from being the same.
    """
    path = path / MANIFEST if path.is_dir() else path
    manifest = Manifest.read(path)
    model = manifest.recipe
    recipe = _locate_recipe(model, source)
    target = out.resolve() / model.title
    # Before the build: each of these would only show after hours, as differing bytes.
    raise_problems(_find_problems(path, manifest, tools, recipe, target))
    store = Store(work.resolve() if work else out.resolve() / WORK)
    template = manifest.chat_template
    job = ReleaseJob(
        model=model,
        recipe=recipe,
        # From the manifest, not from recipes/: those may have changed since.
        variants=tuple(v.recipe for v in manifest.variants),
        out=out.resolve(),
        store=Store(store.root / model.name),
        tools=tools,
        template=template.patch if template else None,
        scenarios=manifest.scenarios,
    )
    return job, manifest


def rebuild_release(
    job: ReleaseJob, manifest: Manifest, path: Path, run: StageRunner
) -> RebuildResult:
    """Build a release again and compare it with the old one.

    Args:
        job: What :func:`prepare_rebuild` returned.
        manifest: The same.
        path: The manifest, or the folder of the release.
        run: Runs a stage.

    Raises:
        CheckError: With every file of the source or the release that differs.
    """
    # First, because a changed source explains every later difference.
    _check_source(job, manifest)
    result = builds.build_release(job, run)
    old = path if path.is_dir() else path.parent
    manifest_path = old / MANIFEST if path.is_dir() else path
    before = _read_old_digests(old, manifest) | {MANIFEST: files.hash_file(manifest_path)}
    return compare_releases(
        old, before, result.folder, find_changed_figures(manifest, result.release.manifest)
    )


def compare_releases(
    old: Path, before: Mapping[str, str], new: Path, figures: tuple[str, ...]
) -> RebuildResult:
    """Compare a rebuilt release with the old one.

    Args:
        old: The folder of the old release; its provenance, if there, has the versions that made it.
        before: The sha256 of every file of the old release that is known, by name.
        new: The folder of the rebuilt release.
        figures: The variants whose figures differ as they may; nothing if none do.

    Raises:
        CheckError: With every file that differs and is not excused.
    """
    after = hash_lists(new)
    old_versions, new_versions = _read_versions(old), _read_versions(new)
    packages = tuple(_list_changes(old_versions, new_versions)) if old_versions else ()
    differing = [name for name in sorted(before) if before[name] != after.get(name)]
    prose = {n for n in differing if n in PROSE or n.startswith(f"{html.PICTURES}/")}
    excused = set(LISTS) if packages else set()
    reworded: tuple[str, ...] = ()
    if old_versions and old_versions.get(PROJECT) != new_versions.get(PROJECT):
        reworded = tuple(sorted(prose))
    # The manifest has the figures, so every file that shows or lists them differs too.
    if figures:
        excused |= {MANIFEST, *LISTS, *prose}
    excused |= set(reworded)
    if faults := [name for name in differing if name not in excused]:
        raise CheckError(
            *(
                f"{new / n}: expected sha256 {before[n]}, found {after.get(n, 'no such file')}"
                for n in faults
            )
        )
    return RebuildResult(
        folder=new,
        compared=tuple(name for name in sorted(before) if name not in differing),
        uncompared=tuple(sorted(after.keys() - before.keys())),
        reworded=reworded,
        packages=packages if differing else (),
        figures=figures,
    )


def find_changed_figures(old: Manifest, new: Manifest) -> tuple[str, ...]:
    """Return the variants whose figures differ as they may between two processors.

    Nothing is returned if anything else of the manifests differs, or if a figure differs by more.
    """
    if _without_figures(old) != _without_figures(new):
        return ()
    pairs = [
        (v.name, v.evaluation, w.evaluation)
        for v, w in zip(old.variants, new.variants, strict=True)
    ]
    if not all(a and b and figures_close(to_plain(a), to_plain(b)) for _, a, b in pairs):
        return ()
    return tuple(
        f"{name}: KLD was {a.kld_mean}, is {b.kld_mean}"
        for name, a, b in pairs
        if a and b and a != b
    )


def _without_figures(manifest: Manifest) -> tuple[Manifest, Any]:
    """Return a manifest without what evaluating measured, and how it was evaluated."""
    evaluation = manifest.evaluation
    settings = evaluation and (
        evaluation.context,
        evaluation.top,
        evaluation.llama_cpp,
        evaluation.texts,
    )
    variants = tuple(replace(v, evaluation=None) for v in manifest.variants)
    return replace(manifest, evaluation=None, variants=variants), settings


def _locate_recipe(model: ModelRecipe, source: Path | None) -> Path:
    """Return the recipe that relative paths start at: the project's, or one beside ``source``."""
    if source is None or model.source.folder is None:
        return RECIPES / "models" / f"{model.name}.toml"
    # `source.folder` is relative to the recipe, so the recipe is that many levels above the
    # checkpoint. It need not exist: the manifest has its content.
    levels = len(Path(model.source.folder).parts)
    return source.resolve().parents[levels - 1] / f"{model.name}.toml"


def _find_problems(
    path: Path, manifest: Manifest, tools: Toolchain, recipe: Path, target: Path
) -> Iterator[str]:
    if manifest.llama_cpp != str(tools.version):
        yield (
            f"{path}: llama.cpp: expected {manifest.llama_cpp}, found {tools.version}; name the"
            " expected one with --llama-cpp"
        )
    folder = manifest.recipe.source.folder
    if folder and not (recipe.parent / folder).is_dir():
        yield (
            f"{recipe.parent / folder}: expected the checkpoint that the release was made from,"
            " found nothing; name it with --source"
        )
    if target.resolve() == path.parent.resolve():
        yield f"{target}: expected another folder than the release's own; name one with -o"


def _check_source(job: ReleaseJob, manifest: Manifest) -> None:
    """Raise CheckError if a file of the source is not what the old release was made from."""
    with job.store.lock():
        checkpoint = builds.pull_locked(job.model, job.recipe, None, job.store)
    actual = {r.path: r.sha256 for r in checkpoint.receipts}
    expected = {f.path: f.sha256 for f in manifest.source.files}
    names = sorted(expected.keys() | actual.keys())
    if changed := [n for n in names if expected.get(n) != actual.get(n)]:
        raise CheckError(
            *(
                f"{checkpoint.folder / n}: expected sha256 {expected.get(n)}, found {actual.get(n)}"
                for n in changed
            )
        )


def _read_old_digests(old: Path, manifest: Manifest) -> dict[str, str]:
    """Return the old release's digests: its list's if that is there, else the manifest's."""
    # The list has every file; the manifest cannot have the digests of files made from itself.
    if (old / CHECKSUMS).is_file() and (old / MANIFEST).is_file():
        return read_checksums(old) | {CHECKSUMS: files.hash_file(old / CHECKSUMS)}
    return manifest.known_digests


def _list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield the packages and the settings of llama.cpp's build that differ between two releases."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: was {old.get(name, 'none')}, is {new.get(name, 'none')}"


def _read_versions(folder: Path) -> dict[str, Any]:
    """Return the versions that made a release; nothing if its provenance is missing or broken."""
    try:
        return read_versions(json.loads((folder / PROVENANCE).read_text()))
    except (OSError, ValueError):
        return {}
