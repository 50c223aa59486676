"""The whole way of a release, stage by stage. The command line and the Prefect flow both walk it.

``do`` is how one stage is run: the command line shows progress around it, the flow makes a Prefect task of it.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from quant.calibration.hessians import compute_hessians
from quant.calibration.imatrix import compute_imatrix
from quant.calibration.text import build_calibration_text
from quant.chat.check import TemplateUnderTest, require_template
from quant.chat.engines import SpecialTokens
from quant.chat.scenarios import load_scenarios
from quant.chat.smoke import smoke_test
from quant.chat.template import ChatTemplate, patch_template
from quant.chat.verdict import SmokeResult
from quant.core import files
from quant.core.format import to_pretty_json
from quant.core.store import Store
from quant.errors import InputError, raise_problems
from quant.evaluate.release import evaluate_release
from quant.hub import checkpoint as sources
from quant.hub.checkpoint import Checkpoint
from quant.hub.lock import Lock, check_lock
from quant.hub.upload import upload_variant
from quant.job import ReleaseJob, disk_problems
from quant.llama.convert import convert_checkpoint, convert_vision
from quant.plan.load import load_template_patch
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import ModelRecipe, TemplatePatch
from quant.quantize.shard import VariantFile, shard_base
from quant.quantize.variants import quantize_variants
from quant.release.deliver import deliver_release
from quant.release.metadata import words
from quant.release.package import Release, ReleaseInputs, package_release, place_files
from quant.release.publish import Change, Publication, publish_release
from quant.release.publish import plan_change as change
from quant.release.sign import sign_release

T = TypeVar("T")


class StageRunner(Protocol):
    """Runs one stage for one subject and gives back what it made."""

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Do the work now."""


@dataclass(frozen=True)
class BuildResult:
    """A release that stands, and what the way there was."""

    folder: Path
    release: Release
    plans: tuple[Plan, ...]
    verdicts: tuple[SmokeResult, ...]
    fresh: bool
    """False when it stood already and nothing was done."""
    change: Change | None = None
    """What publishing it changes, if that was asked for."""
    published: Publication | None = None


def build_release(
    job: ReleaseJob, do: StageRunner = lambda stage, subject, work: work()
) -> BuildResult:
    """The release that a job describes, from the weights to the folder; what is done already is not done again.

    Raises InputError before anything that cannot be done, CheckFailed after anything that came out wrong.
    """
    model, store, tools = job.model, job.store, job.tools
    raise_problems(disk_problems(model, job.variants, store.root, job.out))
    began = time.time()
    with store.lock():
        checkpoint = do(
            "source", model.name, partial(pull_locked, model, job.recipe, job.lock, store)
        )
        waivers = {w.scenario: w.why for w in model.waivers}
        held = partial(
            check_patched_template, job.template or model.template, checkpoint, waivers, store
        )
        template = do("template", model.template, held)
        base = do(
            "convert",
            model.title,
            partial(
                convert_checkpoint,
                checkpoint,
                template.text if template else None,
                words(model),
                tools,
                store,
            ),
        )
        vision = None
        if model.sees:
            vision = do(
                "convert",
                f"{model.title} mmproj",
                partial(convert_vision, checkpoint, words(model), tools, store),
            )
        text = do(
            "calibrate",
            model.imatrix.calibration,
            partial(build_calibration_text, model, template, base, tools, store),
        )
        matrix = do(
            "imatrix", model.title, partial(compute_imatrix, base, text, model, tools, store)
        )
        seen = None
        if model.imatrix.feedback:
            seen = do("moments", model.title, partial(compute_hessians, base, text, model, store))
        tensors = base.header.tensors
        doubt = matrix.doubt(tensors, model.imatrix.coverage)
        plans = [
            do("plan", v.name, partial(make_plan, v, tensors, matrix.covered, doubt))
            for v in job.variants
        ]
        made: list[VariantFile] = []
        if todo := [p for p in plans if not p.is_base]:
            subject = todo[0].variant.name if len(todo) == 1 else f"{len(todo)} variants"
            size = model.max_shard_size
            made += do(
                "quantize",
                subject,
                partial(
                    quantize_variants,
                    base,
                    matrix,
                    todo,
                    model.title,
                    size,
                    tools,
                    store,
                    job.settings,
                    seen,
                ),
            )
        for p in plans:
            if p.is_base:
                cut = partial(shard_base, base, p, model.title, model.max_shard_size, tools, store)
                made.append(do("shard", p.variant.name, cut))
        made.sort(key=lambda v: plans.index(v.plan))
        tried = job.scenarios or load_scenarios(model.scenarios)
        # What BF16 says need not be asked twice of the same weights.
        known = next((v.file for v in made if v.plan.is_base), None)
        original = known or base
        heard: list[tuple[VariantFile, SmokeResult]] = []
        for v in made:
            heard.append(
                (
                    v,
                    do(
                        "smoke",
                        v.name,
                        partial(
                            smoke_test,
                            v.file,
                            v.plan.variant.answers,
                            original,
                            model,
                            tools,
                            store,
                            vision,
                            tried,
                        ),
                    ),
                )
            )
            if job.target and job.sends:
                do("send", v.name, partial(upload_variant, place_files(v), v.receipts, job.target))
        figures = None
        if model.evaluation.chunks:
            subject = made[0].name if len(made) == 1 else f"{len(made)} files"
            figures = do(
                "evaluate",
                subject,
                partial(evaluate_release, made, base, text, model, tools, store),
            )
        whole = ReleaseInputs(
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
        release = do("package", model.title, partial(package_release, whole, store))
        delivered = do("deliver", model.title, partial(deliver_release, release, job.out))
        verdicts = tuple(verdict for _, verdict in heard)
        if delivered.fresh:
            _record(job, delivered.folder, began, verdicts)
        if job.key:
            do("sign", model.title, partial(sign_release, delivered.folder, job.key))
        planned = published = None
        if job.target:
            planned = do(
                "publish",
                f"{job.target.repo}: what changes",
                partial(change, delivered.folder, job.target),
            )
            if not job.dry_run:
                published = do("publish", job.target.repo, partial(publish_release, planned))
    return BuildResult(
        delivered.folder, release, tuple(plans), verdicts, delivered.fresh, planned, published
    )


def pull_locked(model: ModelRecipe, recipe: Path, locked: Lock | None, store: Store) -> Checkpoint:
    """The model's checkpoint, verified, and compared with the lock where there is one."""
    checkpoint = sources.pull_checkpoint(model.source, recipe.parent, store)
    if locked:
        check_lock(checkpoint, locked)
    return checkpoint


def patched_template(named: str | TemplatePatch, checkpoint: Checkpoint) -> ChatTemplate | None:
    """The checkpoint's chat template with that patch, or the one of that name; ``none`` leaves it as it is.

    Raises InputError when the patch does not fit the template, or there is none to patch.
    """
    by = (
        named
        if isinstance(named, TemplatePatch)
        else None
        if named == "none"
        else load_template_patch(named)
    )
    found = checkpoint.chat_template
    if found is None:
        if by is not None:
            raise InputError(
                f"{checkpoint.folder}: expected a chat template to patch ({by.name}), found none"
            )
        return None
    text, where = found
    return patch_template(text, by, where)


def check_patched_template(
    named: str | TemplatePatch, checkpoint: Checkpoint, waivers: Mapping[str, str], store: Store
) -> ChatTemplate | None:
    """The same, held against the battery: raises CheckFailed for conversations that come out wrong and are not waived."""
    template, found = patched_template(named, checkpoint), checkpoint.chat_template
    if template is None or found is None:
        return None
    original, where = found
    taken = TemplateUnderTest(
        where, template.text, where, SpecialTokens(), original if template.by else None, template.by
    )
    return replace(template, waived=require_template(taken, waivers, store))


def _record(job: ReleaseJob, folder: Path, began: float, verdicts: Sequence[SmokeResult]) -> None:
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
    files.write_text(folder.with_name(folder.name + ".run.json"), to_pretty_json(record))
