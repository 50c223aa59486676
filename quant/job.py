"""Whether the disks hold what a build will write: asked before it begins, so that it does not end on a full one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quant.calibration.imatrix import SMALL_BASE
from quant.calibration.text import check_set
from quant.chat.scenarios import Scenarios, merge_scenarios
from quant.chat.smoke import collect_waivers
from quant.core.disk import find_existing_folder, find_space_problem, measure_folder
from quant.core.store import Store
from quant.errors import InputError, raise_problems
from quant.hub.lock import Lock, choose_commit, read_lock
from quant.hub.upload import Destination
from quant.llama import ggml, toolchain
from quant.llama.toolchain import Toolchain
from quant.plan import inventory
from quant.plan.load import load_model, load_template_patch, load_variant
from quant.plan.plan import make_plan
from quant.plan.recipe import SIZE, ModelRecipe, TemplatePatch, Variant, Waiver, parse_size
from quant.plan.sizes import estimate_build_bytes
from quant.quantize.engine.job import EngineSettings
from quant.release.publish import preflight
from quant.release.sign import signer_problems

NEEDED = ("llama-tokenize", "llama-imatrix", "llama-gguf-split", "llama-server")


WORK = ".work"
"""The store of a build, in the folder of its releases."""


@dataclass(frozen=True)
class ReleaseJob:
    """One release to build: everything that was asked for, checked."""

    model: ModelRecipe
    recipe: Path
    """The file that the model came from; its folder is where relative paths begin."""
    variants: tuple[Variant, ...]
    out: Path
    store: Store
    tools: Toolchain
    lock: Lock | None
    """What the source's files have to be, where the recipe was locked."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    """How much of the machine quantising may take."""
    target: Destination | None = None
    """Where to publish it, if that was asked for."""
    dry_run: bool = False
    """Only say what publishing would change."""
    as_ready: bool = False
    """Send each variant to the hub's storage as soon as it talks."""
    key: Path | None = None
    """The file of a key to sign the release with."""
    template: TemplatePatch | None = None
    """The patch of the chat template itself, instead of the one that the model's recipe names."""
    scenarios: Scenarios | None = None
    """What smoke tests try itself, likewise."""

    @property
    def sends(self) -> bool:
        """Whether variants go to the hub before all of them are made."""
        return self.as_ready and self.target is not None and not self.dry_run

    @property
    def steps(self) -> int:
        """How many stages will be run; a bar needs to know."""
        bases = sum(v.is_base for v in self.variants)
        passes = bases < len(self.variants)
        publishing = ((2 - self.dry_run) if self.target else 0) + (self.key is not None)
        optional = [
            self.model.sees,
            bool(self.model.evaluation.chunks),
            passes,
            self.model.imatrix.feedback,
        ]
        return 7 + sum(optional) + bases + (2 + self.sends) * len(self.variants) + publishing


def prepare_job(
    model: str,
    variants: Sequence[str] = (),
    *,
    out: str | Path,
    work: str | Path | None = None,
    revision: str | None = None,
    llama_cpp: str | Path | None = None,
    settings: EngineSettings | None = None,
    target: Destination | None = None,
    dry_run: bool = False,
    waive: Sequence[str] = (),
    evaluate: bool = True,
    as_ready: bool = False,
    key: str | Path | None = None,
) -> ReleaseJob:
    """A job from what a person says: names or paths of recipes, folders, where to publish, what may fail, a key.

    With ``evaluate`` off, the files are not measured.

    Raises InputError with everything that is wrong with the recipes or forbids to publish, ToolError for tools that are
    missing or too old: all of it before hours of work.
    """
    recipe, path, locked = pinned_model(model, revision)
    waivers = collect_waivers(recipe, merge_scenarios(recipe, sees=recipe.sees), waive)
    recipe = replace(recipe, waivers=tuple(Waiver(*w) for w in waivers.items()))
    if not evaluate:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, chunks=0))
    loaded = tuple(load_variant(name) for name in _all_known(variants or recipe.variants))
    if recipe.template != "none":
        load_template_patch(recipe.template)
    check_set(recipe.imatrix.calibration)
    tools = toolchain.find_toolchain(llama_cpp)
    tools.require(*NEEDED, *(["llama-quantize"] if recipe.imatrix.base == SMALL_BASE else []))
    ggml.find_library(tools.bin)
    out = Path(out).expanduser().resolve()
    store = Store(Path(work).expanduser().resolve() if work else out / WORK)
    if as_ready and not target:
        raise InputError("as ready: expected a repo to send to, found none; name one with --repo")
    signing = Path(key).expanduser() if key else None
    if signing:
        signer_problems(signing)
    if target:
        preflight(target, recipe.card, f"{path}: card")
    settings = settings or EngineSettings()
    return ReleaseJob(
        recipe,
        path,
        loaded,
        out,
        Store(store.root / recipe.name),
        tools,
        locked,
        settings,
        target,
        dry_run,
        as_ready,
        signing,
    )


def choose_destination(
    model: str,
    repo: str | None = None,
    private: bool = False,
    pull_request: bool = False,
    uploads: int = 4,
    limit: str | None = None,
) -> Destination | None:
    """Where a model's releases are published: the repo that was named, else the recipe's; none when there is none."""
    recipe, _ = load_model(model)
    default = recipe.publish
    if not (named := repo or default.repo):
        return None
    if limit and not SIZE.fullmatch(limit):
        raise InputError(f"limit: expected bytes a second like 50M or 1G, found {limit!r}")
    return Destination(
        named,
        private=private or default.private,
        pull_request=pull_request or default.pull_request,
        uploads=uploads,
        limit=parse_size(limit) if limit else None,
    )


def pinned_model(name: str, revision: str | None = None) -> tuple[ModelRecipe, Path, Lock | None]:
    """A model with the commit that is to be built, the file of its recipe, and its lock."""
    model, path = load_model(name)
    locked = read_lock(model.source, path)
    return (
        replace(
            model,
            source=replace(model.source, revision=choose_commit(model.source, locked, revision)),
        ),
        path,
        locked,
    )


def _all_known(names: Sequence[str]) -> Sequence[str]:
    """The same names; raises one InputError with every variant that cannot be loaded, and for one that is named twice."""

    def problems() -> Iterator[str]:
        for name in names:
            try:
                load_variant(name)
            except InputError as e:
                yield from e.problems
        yield from (
            f"variant {name!r}: expected once, found twice"
            for name in {n for n in names if names.count(n) > 1}
        )

    raise_problems(problems())
    return names


def disk_problems(
    model: ModelRecipe, variants: Sequence[Variant], work: Path, out: Path
) -> Iterator[str]:
    """The folders whose disk is too small; what stands in ``work`` already is not needed again.

    Nothing is said of a model whose recipe does not tell its numbers.
    """
    if not model.architecture:
        return
    tensors = inventory.read_architecture(model.architecture).tensors()
    plans = [make_plan(v, tensors) for v in variants]
    needed = estimate_build_bytes(tensors, plans, model)
    if problem := _space_problem(work, needed - measure_folder(work), "--work"):
        yield problem
    release = sum(p.bytes for p in plans)
    disks = {find_existing_folder(folder).stat().st_dev for folder in (work, out)}
    if len(disks) > 1 and (problem := _space_problem(out, release, "--out")):
        yield problem


def _space_problem(folder: Path, needed: int, option: str) -> str | None:
    return find_space_problem(
        folder,
        needed,
        purpose=" for what this build will write",
        advice=f"free some, name another folder with {option}, or build fewer variants",
    )
