"""Make a release again from nothing but its manifest, in another folder, and compare every byte.

The manifest holds every recipe that went in, so that it does not matter what the recipes are called or say by now. What made
the bytes has to be the same: the source's files, the calibration texts, and llama.cpp.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import build as builds
from quant.build import StageRunner
from quant.chat.scenarios import Scenarios
from quant.core import files
from quant.core.store import Store
from quant.core.toml import parse_json_value
from quant.errors import CheckError, InputError, raise_problems
from quant.evaluate import html
from quant.evaluate.figures import figures_close
from quant.job import WORK, ReleaseJob
from quant.llama.toolchain import Toolchain
from quant.plan.load import RECIPES
from quant.plan.recipe import ModelRecipe, TemplatePatch, Variant
from quant.release.folder import read_checksums
from quant.release.package import CHECKSUMS, FORMAT, MANIFEST, PROVENANCE


@dataclass(frozen=True)
class RebuildResult:
    """A release that was made again and is the same."""

    folder: Path
    compared: tuple[str, ...]
    """Files that hold the same bytes."""
    uncompared: tuple[str, ...]
    """Files of the new release of which the old one's digest is not known, because only its manifest was given."""
    packages: tuple[str, ...]
    """Packages that are of another version here, and changed no byte but those that name them."""
    figures: tuple[str, ...] = ()
    """Files that were measured a little otherwise here, within what two processors may differ by."""


def prepare_rebuild(
    manifest: Path,
    out: Path,
    tools: Toolchain,
    work: Path | None = None,
    source: Path | None = None,
) -> tuple[ReleaseJob, Mapping[str, Any]]:
    """The job that makes a manifest's release again, and what is known of the old one.

    ``source`` is a folder with the checkpoint, for a model that does not come from the hub. Raises InputError with
    everything that keeps it from being the same.
    """
    path = manifest / MANIFEST if manifest.is_dir() else manifest
    known = _read(path)
    model = parse_json_value(known["recipe"], ModelRecipe, f"{path}: recipe")
    variants = [
        parse_json_value(v["recipe"], Variant, f"{path}: variants[{n}]")
        for n, v in enumerate(known["variants"])
    ]
    patch = (known["chat_template"] or {}).get("patch")
    template = (
        parse_json_value(patch, TemplatePatch, f"{path}: chat_template.patch") if patch else None
    )
    beside = _beside(model, source)
    raise_problems(_problems(path, known, model, tools, beside, out.resolve() / model.title))
    store = Store(work.resolve() if work else out.resolve() / WORK)
    tried = (
        parse_json_value(known["scenarios"], Scenarios, f"{path}: scenarios")
        if "scenarios" in known
        else None
    )
    job = ReleaseJob(
        model=model,
        recipe=beside,
        variants=tuple(variants),
        out=out.resolve(),
        store=Store(store.root / model.name),
        tools=tools,
        template=template,
        scenarios=tried,
    )
    return job, known


def rebuild_release(
    job: ReleaseJob, known: Mapping[str, Any], manifest: Path, do: StageRunner
) -> RebuildResult:
    """Make the release and compare it; raises CheckFailed with every file that came out otherwise."""
    with job.store.lock():
        checkpoint = builds.pull_locked(job.model, job.recipe, None, job.store)
    found = {r.path: r.sha256 for r in checkpoint.receipts}
    expected = {f["path"]: f["sha256"] for f in known["source"]["files"]}
    if wrong := sorted(
        n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)
    ):
        raise CheckError(
            *(
                f"{checkpoint.folder / n}: expected sha256 {expected.get(n)}, found {found.get(n)}"
                for n in wrong
            )
        )
    built = builds.build_release(job, do)
    old = manifest if manifest.is_dir() else manifest.parent
    new = _digests(built.folder)
    before = _known_digests(old, known) | {
        MANIFEST: files.hash_file(old / MANIFEST if manifest.is_dir() else manifest)
    }
    packages = tuple(_package_changes(old, built.folder))
    excused = {PROVENANCE, CHECKSUMS} if packages else set()
    figures = measured_otherwise(known, built.release.manifest)
    if figures:  # what tells them differs with them, and nothing else may
        excused |= {MANIFEST, PROVENANCE, CHECKSUMS, "README.md", html.REPORT}
        excused |= {n for n in differing_names(before, new) if n.startswith(f"{html.PICTURES}/")}
    differing = differing_names(before, new)
    if wrong := [n for n in differing if n not in excused]:
        raise CheckError(
            *(
                f"{built.folder / n}: expected sha256 {before[n]}, found {new.get(n, 'no such file')}"
                for n in wrong
            )
        )
    same = tuple(sorted(n for n in before if before[n] == new.get(n)))
    return RebuildResult(
        built.folder,
        same,
        tuple(sorted(new.keys() - before.keys())),
        packages if differing else (),
        figures,
    )


def differing_names(before: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Files whose digest is known and is another now."""
    return sorted(n for n in before if before[n] != new.get(n))


def measured_otherwise(known: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """The files whose figures differ as they may between two processors, when nothing else of the manifests differs."""
    if _without_figures(known) != _without_figures(json.loads(json.dumps(new))):
        return ()
    pairs = [
        (v["name"], v["evaluation"], w["evaluation"])
        for v, w in zip(known["variants"], new["variants"], strict=True)
    ]
    if not all(old and now and figures_close(old, now) for _, old, now in pairs):
        return ()
    return tuple(
        f"{name}: KLD was {old['kld_mean']}, is {now['kld_mean']}"
        for name, old, now in pairs
        if old != now
    )


def _without_figures(manifest: Mapping[str, Any]) -> dict[str, Any]:
    shared = {
        k: v
        for k, v in (manifest["evaluation"] or {}).items()
        if k in ("context", "top", "llama.cpp", "texts")
    }
    variants = [
        {k: v for k, v in entry.items() if k != "evaluation"} for entry in manifest["variants"]
    ]
    return {**manifest, "evaluation": shared, "variants": variants}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path}: expected the manifest of a release, found something else ({e})"
        ) from e
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        found = known.get("format") if isinstance(known, dict) else known
        raise InputError(f"{path}: format: expected {FORMAT!r}, found {found!r}")
    return known


def _beside(model: ModelRecipe, source: Path | None) -> Path:
    """The file from whose folder the source's folder is looked for: the project's own recipe, or one beside ``source``."""
    if source is None or model.source.folder is None:
        return RECIPES / "models" / f"{model.name}.toml"
    levels = len(Path(model.source.folder).parts)
    return source.resolve().parents[levels - 1] / f"{model.name}.toml"


def _problems(
    path: Path,
    known: Mapping[str, Any],
    model: ModelRecipe,
    tools: Toolchain,
    beside: Path,
    target: Path,
) -> Iterator[str]:
    if known["llama.cpp"] != str(tools.version):
        yield f"{path}: llama.cpp: expected {known['llama.cpp']}, found {tools.version}; name that one with --llama-cpp"
    if model.source.folder and not (beside.parent / model.source.folder).is_dir():
        wanted = beside.parent / model.source.folder
        yield f"{wanted}: expected the checkpoint that the release was made of, found nothing; name it with --source"
    if target.resolve() == path.parent.resolve():
        yield f"{target}: expected another folder than the release's own; name one with -o"


def _digests(folder: Path) -> dict[str, str]:
    return read_checksums(folder) | {
        name: files.hash_file(folder / name) for name in (CHECKSUMS, MANIFEST)
    }


def _known_digests(old: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """Of the old release: by its list of checksums if that is there, else what the manifest alone says."""
    if (old / CHECKSUMS).is_file() and (old / MANIFEST).is_file():
        return read_checksums(old) | {CHECKSUMS: files.hash_file(old / CHECKSUMS)}
    others = [known[key] for key in ("imatrix", "vision") if known.get(key)]
    return {
        f["path"]: f["sha256"]
        for f in [*others, *(f for v in known["variants"] for f in v["files"])]
    }


def _package_changes(old: Path, new: Path) -> Iterator[str]:
    """Packages, and settings of llama.cpp's build, that are not the same here as they were when the release was made."""
    before, now = _packages(old / PROVENANCE), _packages(new / PROVENANCE)
    if before:
        yield from (
            f"{name}: was {before.get(name, 'none')}, is {now.get(name, 'none')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        )


def _packages(path: Path) -> dict[str, Any]:
    """Version by package, from a statement, and how llama.cpp was built."""
    try:
        predicate = json.loads(path.read_text())["predicate"]
    except (OSError, ValueError, KeyError):
        return {}
    uris = [d.get("uri", "") for d in predicate["buildDefinition"]["resolvedDependencies"]]
    found = [
        uri.removeprefix("pkg:pypi/").partition("@") for uri in uris if uri.startswith("pkg:pypi/")
    ]
    tools = predicate["buildDefinition"]["internalParameters"]["llama.cpp"]
    built = {
        f"llama.cpp's {k}": v
        for k, v in (tools.items() if isinstance(tools, dict) else ())
        if k != "version"
    }
    return (
        {name: version for name, _, version in found}
        | dict(predicate["runDetails"]["builder"]["version"])
        | built
    )
