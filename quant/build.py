"""Build a release: the stages in their order, for the command line and for the Prefect flow.

Every stage runs through a ``StageRunner``: the command line shows progress around it, the flow
makes a Prefect task of it. Each stage keeps its result in the store under a digest of its inputs,
so a build that was interrupted continues where it stopped.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from quant.calibration.hessians import HessianResult, compute_hessians
from quant.calibration.imatrix import ImportanceMatrix, compute_imatrix
from quant.calibration.text import CalibrationText, build_calibration_text
from quant.chat.check import load_checkpoint_template, require_template
from quant.chat.scenarios import Scenarios, load_scenarios
from quant.chat.smoke import SmokeTestRequest, smoke_test
from quant.chat.template import ChatTemplate, patch_template
from quant.chat.verdict import SmokeResult
from quant.core import files
from quant.core.errors import InputError, raise_problems
from quant.core.format import to_pretty_json
from quant.core.store import Store
from quant.evaluate.release import ReleaseEvaluation, evaluate_release
from quant.hub.checkpoint import Checkpoint, pull_checkpoint
from quant.hub.lock import Lock, check_lock
from quant.hub.upload import upload_variant
from quant.job import ReleaseJob, find_disk_problems
from quant.llama.convert import convert_checkpoint, convert_vision
from quant.llama.model_file import ModelFile
from quant.plan.load import load_template_patch
from quant.plan.plan import Plan, make_plan
from quant.plan.recipe import ModelRecipe, TemplatePatch
from quant.quantize.shard import VariantFile, shard_base
from quant.quantize.variants import StageRequest, quantize_variants
from quant.release.change import Change, plan_change
from quant.release.deliver import Delivery, deliver_release
from quant.release.inputs import ReleaseInputs, place_files
from quant.release.metadata import make_file_metadata
from quant.release.package import Release, package_release
from quant.release.publish import Publication, publish_release
from quant.release.sign import sign_release

T = TypeVar("T")


class StageRunner(Protocol):
    """Runs one stage for one subject and returns its result."""

    def __call__(self, stage: str, subject: str, work: Callable[[], T]) -> T:
        """Call ``work`` and return what it returns."""


def run_now(stage: str, subject: str, work: Callable[[], T]) -> T:
    """Run a stage without reporting it."""
    return work()


@dataclass(frozen=True)
class BuildResult:
    """A finished release, and the results of its stages."""

    folder: Path
    release: Release
    plans: tuple[Plan, ...]
    smoke_results: tuple[SmokeResult, ...]
    fresh: bool
    """False if the release existed already and nothing was done."""
    change: Change | None = None
    """What publishing changes on the hub, if a destination was named."""
    publication: Publication | None = None
    """The commit on the hub, if the release was published."""


def build_release(job: ReleaseJob, run: StageRunner = run_now) -> BuildResult:
    """Build the release that a job describes; stages that are done already are not done again.

    Args:
        job: What ``prepare_job`` returned.
        run: Runs each stage; shows progress, or makes a task of it.

    Returns:
        The release's folder and the results of its stages.

    Raises:
        InputError: If the disk is too small, or if an input of a stage is wrong.
        CheckError: If a result is not what it must be: a file that fails its smoke test, a download
            that differs from its lock, a file that is further from BF16 than the recipe allows.
        ToolError: If a tool of llama.cpp fails.

    Example:
        >>> from quant.job import BuildRequest, prepare_job
        >>> job = prepare_job(BuildRequest("tiny-glm", out="release"))  # doctest: +SKIP
        >>> build_release(job).folder  # doctest: +SKIP
        PosixPath('/home/me/release/tiny-glm')
    """
    # Here and not in prepare_job: the folders may fill up between the two, as in a queued flow.
    raise_problems(find_disk_problems(job.model, job.variants, job.store.root, job.out))
    began = time.time()
    stages = _Stages(job, run)
    with job.store.lock():
        checkpoint = stages.pull()
        # Before the conversion, which writes the template into the file; a broken one ends the
        # build after the download and before hours of work.
        template = stages.patch_template(checkpoint)
        base = stages.convert(checkpoint, template)
        vision = stages.convert_vision(checkpoint)
        text = stages.build_calibration_text(template, base)
        imatrix = stages.compute_imatrix(base, text)
        hessians = stages.compute_hessians(base, text)
        # After the imatrix: tensors with insufficient coverage get a fallback type.
        plans = stages.plan(base, imatrix)
        variants = stages.quantize(base, imatrix, hessians, plans)
        results = stages.smoke_test(variants, base, vision)
        evaluation = stages.evaluate(variants, base, text)
        inputs = ReleaseInputs(
            model=job.model,
            checkpoint=checkpoint,
            template=template,
            base=base,
            vision=vision,
            text=text,
            matrix=imatrix,
            variants=tuple(zip(variants, results, strict=True)),
            llama_cpp=str(job.tools.version),
            tools=job.tools.build_info,
            scenarios=stages.scenarios,
            evaluation=evaluation,
        )
        release = stages.package(inputs)
        delivery = stages.deliver(release)
        # A repeated call must not replace the record of the run that made the release.
        if delivery.fresh:
            _write_run_record(job, delivery.folder, began, results)
        stages.sign(delivery.folder)
        change, publication = stages.publish(delivery.folder)
    return BuildResult(
        folder=delivery.folder,
        release=release,
        plans=tuple(plans),
        smoke_results=tuple(results),
        fresh=delivery.fresh,
        change=change,
        publication=publication,
    )


@dataclass(frozen=True)
class _Stages:
    """The stages of one job. Each method runs one of ``quant.STAGES``, once or for each variant."""

    job: ReleaseJob
    run: StageRunner

    @property
    def scenarios(self) -> Scenarios:
        return self.job.scenarios or load_scenarios(self.job.model.scenarios)

    def pull(self) -> Checkpoint:
        job = self.job
        work = partial(pull_locked, job.model, job.recipe, job.lock, job.store)
        return self.run("source", job.model.name, work)

    def patch_template(self, checkpoint: Checkpoint) -> ChatTemplate | None:
        model = self.job.model
        # A waiver of a smoke scenario also waives the test conversation of that name.
        waivers = {w.scenario: w.why for w in model.waivers}
        patch = self.job.template or model.template
        work = partial(check_patched_template, patch, checkpoint, waivers, self.job.store)
        return self.run("template", model.template, work)

    def convert(self, checkpoint: Checkpoint, template: ChatTemplate | None) -> ModelFile:
        model, job = self.job.model, self.job
        text = template.text if template else None
        metadata = make_file_metadata(model)
        work = partial(convert_checkpoint, checkpoint, text, metadata, job.tools, job.store)
        return self.run("convert", model.title, work)

    def convert_vision(self, checkpoint: Checkpoint) -> ModelFile | None:
        model, job = self.job.model, self.job
        if not model.has_vision:
            return None
        work = partial(convert_vision, checkpoint, make_file_metadata(model), job.tools, job.store)
        return self.run("convert", f"{model.title} mmproj", work)

    def build_calibration_text(
        self, template: ChatTemplate | None, base: ModelFile
    ) -> CalibrationText:
        model, job = self.job.model, self.job
        work = partial(build_calibration_text, model, template, base, job.tools, job.store)
        return self.run("calibrate", model.imatrix.calibration, work)

    def compute_imatrix(self, base: ModelFile, text: CalibrationText) -> ImportanceMatrix:
        model, job = self.job.model, self.job
        work = partial(compute_imatrix, base, text, model, job.tools, job.store)
        return self.run("imatrix", model.title, work)

    def compute_hessians(self, base: ModelFile, text: CalibrationText) -> HessianResult | None:
        model = self.job.model
        if not model.imatrix.feedback:
            return None
        work = partial(compute_hessians, base, text, model, self.job.store)
        # The store's and Prefect's name for this stage, from before it was called Hessians.
        return self.run("moments", model.title, work)

    def plan(self, base: ModelFile, imatrix: ImportanceMatrix) -> list[Plan]:
        policy = imatrix.make_coverage_policy(base.tensors, self.job.model.imatrix.coverage)
        return [
            self.run("plan", v.name, partial(make_plan, v, base.tensors, imatrix.covered, policy))
            for v in self.job.variants
        ]

    def quantize(
        self,
        base: ModelFile,
        imatrix: ImportanceMatrix,
        hessians: HessianResult | None,
        plans: Sequence[Plan],
    ) -> list[VariantFile]:
        """Write the variants, in the plans' order: the quantized ones, and the BF16 file itself."""
        job, title, max_size = self.job, self.job.model.title, self.job.model.max_shard_size
        variants: list[VariantFile] = []
        # One pass for all: the weights are read once, which is what a build of hundreds of
        # gigabytes waits for.
        if quantized := [p for p in plans if not p.is_base]:
            request = StageRequest(
                base=base,
                imatrix=imatrix,
                plans=quantized,
                title=title,
                max_size=max_size,
                tools=job.tools,
                settings=job.settings,
                hessians=hessians,
            )
            work = partial(quantize_variants, request, job.store)
            names = [p.variant.name for p in quantized]
            variants += self.run("quantize", _name_or_count(names, "variants"), work)
        for p in plans:
            if p.is_base:
                cut = partial(shard_base, base, p, title, max_size, job.tools, job.store)
                variants.append(self.run("shard", p.variant.name, cut))
        # Results are matched with plans by position, and the quantized ones came first.
        return sorted(variants, key=lambda v: plans.index(v.plan))

    def smoke_test(
        self, variants: Sequence[VariantFile], base: ModelFile, vision: ModelFile | None
    ) -> list[SmokeResult]:
        """Run the smoke test of every variant; upload each at once if the job says so."""
        job, scenarios = self.job, self.scenarios
        # The BF16 variant has the base's weights: testing both would run the same test twice.
        reference = next((v.file for v in variants if v.plan.is_base), base)
        results: list[SmokeResult] = []
        for v in variants:
            request = SmokeTestRequest(
                file=v.file,
                required_answers=v.plan.variant.answers,
                reference=reference,
                model=job.model,
                tools=job.tools,
                store=job.store,
                vision=vision,
                scenarios=scenarios,
            )
            work = partial(smoke_test, request)
            results.append(self.run("smoke", v.name, work))
            if job.destination and job.uploads_early:
                upload = partial(upload_variant, place_files(v), v.receipts, job.destination)
                self.run("send", v.name, upload)
        return results

    def evaluate(
        self, variants: Sequence[VariantFile], base: ModelFile, text: CalibrationText
    ) -> ReleaseEvaluation | None:
        model, job = self.job.model, self.job
        if not model.evaluation.chunks:
            return None
        work = partial(evaluate_release, variants, base, text, model, job.tools, job.store)
        return self.run("evaluate", _name_or_count([v.name for v in variants], "files"), work)

    def package(self, inputs: ReleaseInputs) -> Release:
        work = partial(package_release, inputs, self.job.store)
        return self.run("package", self.job.model.title, work)

    def deliver(self, release: Release) -> Delivery:
        work = partial(deliver_release, release, self.job.out)
        return self.run("deliver", self.job.model.title, work)

    def sign(self, folder: Path) -> None:
        if self.job.key:
            self.run("sign", self.job.model.title, partial(sign_release, folder, self.job.key))

    def publish(self, folder: Path) -> tuple[Change | None, Publication | None]:
        destination = self.job.destination
        if destination is None:
            return None, None
        subject = f"{destination.repo}: what changes"
        change = self.run("publish", subject, partial(plan_change, folder, destination))
        if self.job.dry_run:
            return change, None
        return change, self.run("publish", destination.repo, partial(publish_release, change))


def pull_locked(model: ModelRecipe, recipe: Path, lock: Lock | None, store: Store) -> Checkpoint:
    """Return the model's checkpoint, verified, and compared with its lock if there is one.

    Raises CheckError for every file that is not the locked one.
    """
    checkpoint = pull_checkpoint(model.source, recipe.parent, store)
    if lock:
        check_lock(checkpoint, lock)
    return checkpoint


def apply_template_patch(patch: str | TemplatePatch, checkpoint: Checkpoint) -> ChatTemplate | None:
    """Return the checkpoint's chat template with a patch applied; None if it has no template.

    Args:
        patch: A patch, the name of one, or ``none`` to leave the template as it is.
        checkpoint: Where the template comes from.

    Raises:
        InputError: If the patch does not fit the template, or there is no template to patch.
    """
    chosen = patch if isinstance(patch, TemplatePatch) else _load_patch(patch)
    original = checkpoint.chat_template
    if original is None:
        if chosen is not None:
            raise InputError(
                f"{checkpoint.folder}: expected a chat template to patch ({chosen.name}),"
                " found none"
            )
        return None
    text, path = original
    return patch_template(text, chosen, path)


def _load_patch(name: str) -> TemplatePatch | None:
    return None if name == "none" else load_template_patch(name)


def check_patched_template(
    patch: str | TemplatePatch, checkpoint: Checkpoint, waivers: Mapping[str, str], store: Store
) -> ChatTemplate | None:
    """Return the patched template after all test conversations were rendered with it.

    Raises CheckError for conversations that come out wrong and are not waived.
    """
    template = apply_template_patch(patch, checkpoint)
    if template is None:
        return None
    under_test = load_checkpoint_template(checkpoint, template)
    return replace(template, waived=require_template(under_test, waivers, store))


def _name_or_count(names: Sequence[str], noun: str) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} {noun}"


def _write_run_record(
    job: ReleaseJob, folder: Path, began: float, results: Sequence[SmokeResult]
) -> None:
    """Write NAME.run.json beside the release: what may differ between runs of the same inputs."""
    # Beside and not inside: times, paths and sampled answers would change the release's bytes.
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
        "conversations": {r.file: [asdict(e) for e in r.transcript] for r in results},
    }
    files.write_text(folder.with_name(folder.name + ".run.json"), to_pretty_json(record))
