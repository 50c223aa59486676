"""The whole way of a release, stage by stage. The command line and the Prefect flow both walk it.

``do`` is how one stage is run: the command line shows progress around it, the flow makes a Prefect task of it.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from quant import files, ggml, toolchain
from quant import source as sources
from quant.calibrate import calibrate
from quant.calibrate import check as check_set
from quant.check import Taken, hold
from quant.convert import convert, convert_vision, words
from quant.deliver import deliver
from quant.engine.job import Settings
from quant.errors import InputError, refuse
from quant.imatrix import SMALL_BASE, imatrix
from quant.lock import Lock, check, pinned, read_lock
from quant.measured import measured
from quant.moments import moments
from quant.package import Ingredients, Release, package, place
from quant.plan import Plan, plan
from quant.publish import Change, Published, Target, change, publish, welcome
from quant.quantize import quantize
from quant.recipe import (
    SIZE,
    Model,
    TemplatePatch,
    Variant,
    Waiver,
    load_model,
    load_template_patch,
    load_variant,
    shard_bytes,
)
from quant.rendering import Tokens
from quant.room import room_problems
from quant.scenarios import Scenarios, all_of, load_scenarios
from quant.send import send
from quant.shard import Sharded, shard
from quant.sign import sign, signer_problems
from quant.smoke import Original, smoke, waived
from quant.source import Checkpoint
from quant.store import Store
from quant.template import ChatTemplate, patch
from quant.toolchain import Toolchain
from quant.verdict import Verdict

T = TypeVar("T")
NEEDED = ("llama-tokenize", "llama-imatrix", "llama-gguf-split", "llama-server")
WORK = ".work"
"""The store of a build, in the folder of its releases."""


class Do(Protocol):
    """Runs one stage for one subject and gives back what it made."""

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Do the work now."""


@dataclass(frozen=True)
class Job:
    """One release to build: everything that was asked for, checked."""

    model: Model
    recipe: Path
    """The file that the model came from; its folder is where relative paths begin."""
    variants: tuple[Variant, ...]
    out: Path
    store: Store
    tools: Toolchain
    lock: Lock | None
    """What the source's files have to be, where the recipe was locked."""
    settings: Settings = field(default_factory=Settings)
    """How much of the machine quantising may take."""
    target: Target | None = None
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
        optional = [self.model.sees, bool(self.model.evaluation.chunks), passes, self.model.imatrix.feedback]
        return 7 + sum(optional) + bases + (2 + self.sends) * len(self.variants) + publishing


@dataclass(frozen=True)
class Built:
    """A release that stands, and what the way there was."""

    folder: Path
    release: Release
    plans: tuple[Plan, ...]
    verdicts: tuple[Verdict, ...]
    fresh: bool
    """False when it stood already and nothing was done."""
    change: Change | None = None
    """What publishing it changes, if that was asked for."""
    published: Published | None = None


def prepare(
    model: str,
    variants: Sequence[str] = (),
    *,
    out: str | Path,
    work: str | Path | None = None,
    revision: str | None = None,
    llama_cpp: str | Path | None = None,
    settings: Settings | None = None,
    target: Target | None = None,
    dry_run: bool = False,
    waive: Sequence[str] = (),
    evaluate: bool = True,
    as_ready: bool = False,
    key: str | Path | None = None,
) -> Job:
    """A job from what a person says: names or paths of recipes, folders, where to publish, what may fail, a key.

    With ``evaluate`` off, the files are not measured.

    Raises InputError with everything that is wrong with the recipes or forbids to publish, ToolError for tools that are
    missing or too old: all of it before hours of work.
    """
    recipe, path, locked = pinned_model(model, revision)
    waivers = waived(recipe, all_of(recipe, sees=recipe.sees), waive)
    recipe = replace(recipe, waivers=tuple(Waiver(*w) for w in waivers.items()))
    if not evaluate:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, chunks=0))
    loaded = tuple(load_variant(name) for name in _all_known(variants or recipe.variants))
    if recipe.template != "none":
        load_template_patch(recipe.template)
    check_set(recipe.imatrix.calibration)
    tools = toolchain.find(llama_cpp)
    tools.require(*NEEDED, *(["llama-quantize"] if recipe.imatrix.base == SMALL_BASE else []))
    ggml.find(tools.bin)
    out = Path(out).expanduser().resolve()
    store = Store(Path(work).expanduser().resolve() if work else out / WORK)
    if as_ready and not target:
        raise InputError("as ready: expected a repo to send to, found none; name one with --repo")
    signing = Path(key).expanduser() if key else None
    if signing:
        signer_problems(signing)
    if target:
        welcome(target, recipe.card, f"{path}: card")
    settings = settings or Settings()
    return Job(
        recipe, path, loaded, out, Store(store.root / recipe.name), tools, locked, settings, target, dry_run, as_ready,
        signing,
    )  # fmt: skip


def build(job: Job, do: Do = lambda stage, subject, work: work()) -> Built:
    """The release that a job describes, from the weights to the folder; what is done already is not done again.

    Raises InputError before anything that cannot be done, CheckFailed after anything that came out wrong.
    """
    model, store, tools = job.model, job.store, job.tools
    refuse(room_problems(model, job.variants, store.root, job.out))
    began = time.time()
    with store.alone():
        checkpoint = do("source", model.name, partial(pull, model, job.recipe, job.lock, store))
        waivers = {w.scenario: w.why for w in model.waivers}
        held = partial(held_template, job.template or model.template, checkpoint, waivers, store)
        template = do("template", model.template, held)
        base = do("convert", model.title, partial(convert, checkpoint, template, words(model), tools, store))
        vision = None
        if model.sees:
            vision = do(
                "convert", f"{model.title} mmproj", partial(convert_vision, checkpoint, words(model), tools, store)
            )
        text = do("calibrate", model.imatrix.calibration, partial(calibrate, model, template, base, tools, store))
        matrix = do("imatrix", model.title, partial(imatrix, base, text, model, tools, store))
        seen = None
        if model.imatrix.feedback:
            seen = do("moments", model.title, partial(moments, base, text, model, store))
        tensors = base.header.tensors
        doubt = matrix.doubt(tensors, model.imatrix.coverage)
        plans = [do("plan", v.name, partial(plan, v, tensors, matrix.covered, doubt)) for v in job.variants]
        made: list[Sharded] = []
        if todo := [p for p in plans if not p.is_base]:
            subject = todo[0].variant.name if len(todo) == 1 else f"{len(todo)} variants"
            size = model.max_shard_size
            made += do(
                "quantize",
                subject,
                partial(quantize, base, matrix, todo, model.title, size, tools, store, job.settings, seen),
            )
        for p in plans:
            if p.is_base:
                cut = partial(shard, base, p, model.title, model.max_shard_size, tools, store)
                made.append(do("shard", p.variant.name, cut))
        made.sort(key=lambda v: plans.index(v.plan))
        tried = job.scenarios or load_scenarios(model.scenarios)
        # What BF16 says need not be asked twice of the same weights.
        known = next((Original(v.paths[0], v.receipts) for v in made if v.plan.is_base), None)
        original = known or Original(base.path, (base.receipt,))
        heard: list[tuple[Sharded, Verdict]] = []
        for v in made:
            heard.append((v, do("smoke", v.name, partial(smoke, v, original, model, tools, store, vision, tried))))
            if job.target and job.sends:
                do("send", v.name, partial(send, place(v), v.receipts, job.target))
        figures = None
        if model.evaluation.chunks:
            subject = made[0].name if len(made) == 1 else f"{len(made)} files"
            figures = do("evaluate", subject, partial(measured, made, base, text, model, tools, store))
        whole = Ingredients(
            model,
            checkpoint,
            template,
            base,
            vision,
            text,
            matrix,
            tuple(heard),
            str(tools.version),
            tools.built,
            tried,
            figures,
        )
        release = do("package", model.title, partial(package, whole, store))
        delivered = do("deliver", model.title, partial(deliver, release, job.out))
        verdicts = tuple(verdict for _, verdict in heard)
        if delivered.fresh:
            _record(job, delivered.folder, began, verdicts)
        if job.key:
            do("sign", model.title, partial(sign, delivered.folder, job.key))
        planned = published = None
        if job.target:
            planned = do("publish", f"{job.target.repo}: what changes", partial(change, delivered.folder, job.target))
            if not job.dry_run:
                published = do("publish", job.target.repo, partial(publish, planned))
    return Built(delivered.folder, release, tuple(plans), verdicts, delivered.fresh, planned, published)


def target(
    model: str, repo: str | None = None, private: bool = False, pull_request: bool = False, uploads: int = 4,
    limit: str | None = None,
) -> Target | None:  # fmt: skip
    """Where a model's releases are published: the repo that was named, else the recipe's; none when there is none."""
    recipe, _ = load_model(model)
    default = recipe.publish
    if not (named := repo or default.repo):
        return None
    if limit and not SIZE.fullmatch(limit):
        raise InputError(f"limit: expected bytes a second like 50M or 1G, found {limit!r}")
    return Target(
        named, private=private or default.private, pull_request=pull_request or default.pull_request, uploads=uploads,
        limit=shard_bytes(limit) if limit else None,
    )  # fmt: skip


def pinned_model(name: str, revision: str | None = None) -> tuple[Model, Path, Lock | None]:
    """A model with the commit that is to be built, the file of its recipe, and its lock."""
    model, path = load_model(name)
    locked = read_lock(model, path)
    return replace(model, source=replace(model.source, revision=pinned(model.source, locked, revision))), path, locked


def pull(model: Model, recipe: Path, locked: Lock | None, store: Store) -> Checkpoint:
    """The model's checkpoint, verified, and compared with the lock where there is one."""
    checkpoint = sources.pull(model.source, recipe.parent, store)
    if locked:
        check(checkpoint, locked)
    return checkpoint


def patched_template(named: str | TemplatePatch, checkpoint: Checkpoint) -> ChatTemplate | None:
    """The checkpoint's chat template with that patch, or the one of that name; ``none`` leaves it as it is.

    Raises InputError when the patch does not fit the template, or there is none to patch.
    """
    by = named if isinstance(named, TemplatePatch) else None if named == "none" else load_template_patch(named)
    found = checkpoint.chat_template
    if found is None:
        if by is not None:
            raise InputError(f"{checkpoint.folder}: expected a chat template to patch ({by.name}), found none")
        return None
    text, where = found
    return patch(text, by, where)


def held_template(
    named: str | TemplatePatch, checkpoint: Checkpoint, waivers: Mapping[str, str], store: Store
) -> ChatTemplate | None:
    """The same, held against the battery: raises CheckFailed for conversations that come out wrong and are not waived."""
    template, found = patched_template(named, checkpoint), checkpoint.chat_template
    if template is None or found is None:
        return None
    original, where = found
    taken = Taken(where, template.text, where, Tokens(), original if template.by else None, template.by)
    return replace(template, waived=hold(taken, waivers, store))


def _all_known(names: Sequence[str]) -> Sequence[str]:
    """The same names; raises one InputError with every variant that cannot be loaded, and for one that is named twice."""

    def problems() -> Iterator[str]:
        for name in names:
            try:
                load_variant(name)
            except InputError as e:
                yield from e.problems
        yield from (
            f"variant {name!r}: expected once, found twice" for name in {n for n in names if names.count(n) > 1}
        )

    refuse(problems())
    return names


def _record(job: Job, folder: Path, began: float, verdicts: Sequence[Verdict]) -> None:
    """What may differ between two runs of the same inputs, in one place beside the release."""
    record = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "paths": {
            "release": str(folder),
            "work": str(job.store.root),
            "recipe": str(job.recipe),
            "tools": str(job.tools.bin),
        },
        "conversations": {v.file: [asdict(e) for e in v.transcript] for v in verdicts},
    }
    files.write_text(folder.with_name(folder.name + ".run.json"), files.pretty(record))
