"""One release to build: what was asked for, checked before hours of work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quant.calibration.imatrix import SMALL_BASE
from quant.calibration.text import check_set
from quant.chat.scenarios import Scenarios, merge_scenarios
from quant.chat.smoke import collect_waivers
from quant.core.disk import find_existing_folder, find_space_problem, measure_folder
from quant.core.errors import InputError, raise_problems
from quant.core.store import Store
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
from quant.release.change import preflight
from quant.release.sign import check_signing_key

REQUIRED_TOOLS = ("llama-tokenize", "llama-imatrix", "llama-gguf-split", "llama-server")
WORK = ".work"
"""The work folder of a build, inside the folder of its releases, unless another is named."""


@dataclass(frozen=True)
class BuildRequest:
    """What a person asks for. ``prepare_job`` checks it and makes a job of it."""

    model: str
    """The name of a recipe in recipes/models, or a path to one."""
    out: str | Path
    """The folder in which the release's folder is made."""
    variants: Sequence[str] = ()
    """Names or paths of variants; the recipe's when empty."""
    work: str | Path | None = None
    """Where finished stages are kept; OUT/.work when None."""
    revision: str | None = None
    """The commit of the hub repo, if neither recipe nor lock pins it."""
    llama_cpp: str | Path | None = None
    """A folder with llama.cpp's tools; this environment's when None."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    """Threads and memory for quantization."""
    destination: Destination | None = None
    """The hub repo to publish to; nothing is published when None."""
    dry_run: bool = False
    """Only list what publishing would change."""
    waive: Sequence[str] = ()
    """Smoke scenarios that may fail; the model card names them."""
    evaluate: bool = True
    """Measure every file against BF16."""
    as_ready: bool = False
    """Upload each variant to the hub's storage as soon as its smoke test passed."""
    key: str | Path | None = None
    """A private key to sign the release with."""


@dataclass(frozen=True)
class ReleaseJob:
    """A release that can be built: recipes loaded, tools found, everything checked."""

    model: ModelRecipe
    recipe: Path
    """The file that the model came from. Relative paths in it start at its folder."""
    variants: tuple[Variant, ...]
    out: Path
    """The folder in which the release's folder is made."""
    store: Store
    tools: Toolchain
    lock: Lock | None = None
    """Digests that the source's files must have, if the recipe was locked."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    """Threads and memory for quantization."""
    destination: Destination | None = None
    """The hub repo to publish to."""
    dry_run: bool = False
    """Only list what publishing would change."""
    as_ready: bool = False
    """Upload each variant as soon as its smoke test passed."""
    key: Path | None = None
    """A private key to sign the release with."""
    template: TemplatePatch | None = None
    """A template patch that replaces the one that the recipe names. Set by a rebuild only."""
    scenarios: Scenarios | None = None
    """Smoke scenarios that replace those that the recipe names. Set by a rebuild only."""

    @property
    def uploads_early(self) -> bool:
        """Whether variants go to the hub before all of them are quantized and tested."""
        return self.as_ready and self.destination is not None and not self.dry_run

    @property
    def steps(self) -> int:
        """How many times a stage runs, for a progress bar."""
        bases = sum(v.is_base for v in self.variants)
        quantizes = bases < len(self.variants)
        # Publishing runs twice: once to list the change, once to make it.
        publishing = ((2 - self.dry_run) if self.destination else 0) + (self.key is not None)
        model = self.model
        optional = [
            model.has_vision,
            bool(model.evaluation.chunks),
            quantizes,
            model.imatrix.feedback,
        ]
        per_variant = 2 + self.uploads_early  # plan, smoke, and perhaps send
        always = 7  # source, template, convert, calibrate, imatrix, package, deliver
        return always + sum(optional) + bases + per_variant * len(self.variants) + publishing


def prepare_job(request: BuildRequest) -> ReleaseJob:
    """Check a request and return the job that builds it.

    Everything that can be known before hours of work is checked here, except free disk, which
    ``build_release`` checks when it starts.

    Args:
        request: What to build, from what, and where to.

    Returns:
        A job for ``build_release``.

    Raises:
        InputError: With every problem of the recipes, or with what forbids to publish.
        ToolError: If llama.cpp's tools are missing or too old.

    Example:
        >>> job = prepare_job(BuildRequest("tiny-glm", out="release", variants=["UD-TQ1_0"]))
        >>> job.model.title, [v.name for v in job.variants]
        ('tiny-glm', ['UD-TQ1_0'])
    """
    # From cheap to dear: recipes, then tools on this machine, then requests to the hub.
    model, recipe, lock = load_pinned_model(request.model, request.revision)
    scenarios = merge_scenarios(model, has_vision=model.has_vision)
    waivers = collect_waivers(model.waivers, scenarios, request.waive)
    model = replace(model, waivers=tuple(Waiver(*w) for w in waivers.items()))
    if not request.evaluate:
        # The manifest records the model as it was built, so options that change it go into the
        # recipe, and a rebuild needs no options.
        model = replace(model, evaluation=replace(model.evaluation, chunks=0))
    variants = _load_variants(request.variants or model.variants)
    if model.template != "none":
        # For its errors only. The stage that applies it comes after the download.
        load_template_patch(model.template)
    check_set(model.imatrix.calibration)
    tools = toolchain.find_toolchain(request.llama_cpp)
    # Only this base is written by llama-quantize; variants are written by the own engine.
    small_base = ["llama-quantize"] if model.imatrix.base == SMALL_BASE else []
    tools.require(*REQUIRED_TOOLS, *small_base)
    # The engine calls ggml's kernels from the shared library beside the tools.
    ggml.find_library(tools.bin)
    if request.as_ready and not request.destination:
        raise InputError("as ready: expected a repo to send to, found none; name one with --repo")
    key = Path(request.key).expanduser() if request.key else None
    if key:
        check_signing_key(key)
    if request.destination:
        preflight(request.destination, model.card, f"{recipe}: card")
    out = Path(request.out).expanduser().resolve()
    work = Path(request.work).expanduser().resolve() if request.work else out / WORK
    return ReleaseJob(
        model=model,
        recipe=recipe,
        variants=variants,
        out=out,
        store=Store(work / model.name),
        tools=tools,
        lock=lock,
        settings=request.settings,
        destination=request.destination,
        dry_run=request.dry_run,
        as_ready=request.as_ready,
        key=key,
    )


def choose_destination(
    model: str,
    repo: str | None = None,
    *,
    private: bool = False,
    pull_request: bool = False,
    uploads: int = 4,
    limit: str | None = None,
) -> Destination | None:
    """Return where releases of a model are published: ``repo``, else the recipe's repo, else None.

    Args:
        model: The name of a model recipe, or a path to one.
        repo: ``OWNER/NAME`` on the hub.
        private: Make the repo private if it has to be made.
        pull_request: Propose the release instead of committing it.
        uploads: Files sent at the same time.
        limit: Bytes per second for all uploads together, like ``50M`` or ``1G``.

    Raises:
        InputError: If the recipe cannot be loaded or the limit cannot be read.
    """
    recipe, _ = load_model(model)
    chosen = repo or recipe.publish.repo
    if not chosen:
        return None
    if limit and not SIZE.fullmatch(limit):
        raise InputError(f"limit: expected bytes a second like 50M or 1G, found {limit!r}")
    return Destination(
        chosen,
        private=private or recipe.publish.private,
        pull_request=pull_request or recipe.publish.pull_request,
        uploads=uploads,
        limit=parse_size(limit) if limit else None,
    )


def load_pinned_model(
    name: str, revision: str | None = None
) -> tuple[ModelRecipe, Path, Lock | None]:
    """Load a model with the commit to build; return it with its recipe's path and its lock.

    The commit is ``revision``, else the recipe's, else the lock's.
    """
    model, path = load_model(name)
    lock = read_lock(model.source, path)
    commit = choose_commit(model.source, lock, revision)
    return replace(model, source=replace(model.source, revision=commit)), path, lock


def _load_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Load variants; raise one InputError for all that cannot be loaded or are named twice."""
    variants: list[Variant] = []

    def problems() -> Iterator[str]:
        for name in names:
            try:
                variants.append(load_variant(name))
            except InputError as e:
                yield from e.problems
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"variant {name!r}: expected once, found twice"

    raise_problems(problems())
    return tuple(variants)


def find_disk_problems(
    model: ModelRecipe, variants: Sequence[Variant], work: Path, out: Path
) -> Iterator[str]:
    """Yield a line for each folder whose disk is too small for a build.

    What ``work`` holds already is not needed again.
    """
    # Without [architecture] the sizes are unknown until the checkpoint is there.
    if not model.architecture:
        return
    tensors = inventory.read_architecture(model.architecture).tensors()
    plans = [make_plan(v, tensors) for v in variants]
    needed = estimate_build_bytes(tensors, plans, model)
    # Bytes in `work` may be of other variants: then too little is asked for, never too much.
    if problem := _space_problem(work, needed - measure_folder(work), "--work"):
        yield problem
    release = sum(p.bytes for p in plans)
    # On one disk a release is made of hard links and takes nothing more.
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
