"""The smoke test of a file outside of a build: what ``quant smoke`` does."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from quant.chat import report
from quant.chat.families import find_file_family
from quant.chat.scenarios import load_scenarios, merge_scenarios, select_scenarios
from quant.chat.smoke import SmokeSettings, collect_waivers, run_smoke_test
from quant.chat.verdict import SmokeResult, judge_run
from quant.core import process
from quant.llama.model_file import ModelFile
from quant.llama.toolchain import find_toolchain
from quant.plan.load import find_model_of_file, find_variant_of_file, load_model, load_variant
from quant.plan.recipe import ModelRecipe

GENERAL = "general"
"""The scenarios for a file that belongs to no model recipe and no family."""
GENERAL_MAX_ANSWER = 1024


@dataclass(frozen=True, kw_only=True)
class SmokeFileRequest:
    """A GGUF to talk to, and what is asked of it."""

    path: Path
    """The file, or its first shard."""
    model: str | None = None
    """The model recipe whose conversation is run. None: by the file's name."""
    reference: Path | None = None
    """The BF16 file: only answers that it gives correctly are required."""
    required_answers: float | None = None
    """Fraction of correct answers that is required. None: the variant's, else 1."""
    scenarios: tuple[str, ...] = ()
    """Run only these scenarios; all when empty."""
    waivers: tuple[str, ...] = ()
    """Checks that may fail."""
    mmproj: Path | None = None
    """Vision projector; adds the image scenario."""
    override_tensors: tuple[str, ...] = ()
    """Passed to llama-server as ``-ot``: the device that tensors are kept on."""
    port: int | None = None
    """Loopback port; a free one when None."""
    llama_cpp: Path | None = None
    """Folder of llama.cpp's tools; this environment's when None."""


@dataclass(frozen=True)
class SmokeFileResult:
    """The result, and the server's whole log."""

    result: SmokeResult
    server_log: str


def smoke_test_file(request: SmokeFileRequest) -> SmokeFileResult:
    """Serve a GGUF with llama-server, talk to it over several turns, and judge its answers.

    Args:
        request: The file and what is asked of it.

    Returns:
        Every check with its verdict, the transcript, and the server's log. A file that fails is a
        result too: look at ``result.passed``.

    Raises:
        InputError: If the file cannot be read, or a scenario or waiver does not exist.
        ToolError: If llama-server does not start, or dies.

    Example:
        >>> request = SmokeFileRequest(path=Path("tiny-glm-UD-TQ1_0.gguf"))
        >>> smoke_test_file(request).result.passed  # doctest: +SKIP
        True
    """
    file = ModelFile.open(request.path.resolve())
    recipe = _find_recipe(request, file)
    settings = _make_settings(request, file, recipe)
    waivers = collect_waivers(recipe.waivers if recipe else (), settings.scenarios, request.waivers)
    tools = find_toolchain(request.llama_cpp)
    with tempfile.TemporaryDirectory(prefix="quant-smoke-") as name:
        folder, reference = Path(name), None
        log = folder / report.LOG
        if request.reference:
            base = replace(settings, file=ModelFile.open(request.reference.resolve()))
            reference = run_smoke_test(base, tools, folder)
            # A server appends to its log: the file's own log must not begin with BF16's.
            log.unlink(missing_ok=True)
        run = run_smoke_test(settings, tools, folder)
        required = request.required_answers
        if required is None:
            required = _read_required_answers(request.path)
        result = judge_run(run, required, reference, waivers)
        result = replace(result, server_log=process.read_log_tail(log))
        return SmokeFileResult(result, log.read_text(errors="replace"))


def _find_recipe(request: SmokeFileRequest, file: ModelFile) -> ModelRecipe | None:
    """The recipe that was named, that the file's name or its family leads to, or None."""
    name = request.model or find_model_of_file(request.path.name)
    name = name or find_file_family(file.header).default_model
    return load_model(name)[0] if name else None


def _make_settings(
    request: SmokeFileRequest, file: ModelFile, recipe: ModelRecipe | None
) -> SmokeSettings:
    has_vision = request.mmproj is not None
    if recipe:
        scenarios = merge_scenarios(recipe, request.scenarios, has_vision=has_vision)
    else:
        general = load_scenarios(GENERAL)
        scenarios = select_scenarios(general, request.scenarios, has_vision=has_vision)
    return SmokeSettings(
        file=file,
        scenarios=scenarios,
        max_answer=recipe.max_answer if recipe else GENERAL_MAX_ANSWER,
        end_tokens=recipe.ollama.stop if recipe else (),
        vision=request.mmproj.resolve() if request.mmproj else None,
        override_tensors=request.override_tensors,
        port=request.port,
    )


def _read_required_answers(path: Path) -> float:
    """The fraction that the recipe of the file's variant names; 1 for a file of no variant."""
    name = find_variant_of_file(path.name)
    return load_variant(name).answers if name else 1.0
