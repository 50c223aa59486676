"""The texts that files are measured on: those of a calibration set that no imatrix saw."""

from pathlib import Path

from quant.calibration import held_out
from quant.calibration.held_out import HeldOutDomains
from quant.calibration.text import CalibrationText, build_set_text
from quant.chat.template import patch_template
from quant.core.errors import InputError
from quant.core.store import Store
from quant.llama.model_file import ModelFile
from quant.llama.tokenizer import Tokenizer
from quant.llama.toolchain import Toolchain
from quant.plan.recipe import ImatrixRecipe


def render_set(
    name: str, base: ModelFile, context: int, tools: Toolchain, store: Store
) -> CalibrationText:
    """Return a calibration set in the model's own chat format, with what is held out of it.

    Args:
        name: Of the calibration set.
        base: Has the tokenizer, and the chat template; without one, conversations are plain text.
        context: Tokens in a chunk.
        tools: llama.cpp's tools, which tokenize.
        store: Where the text is kept.
    """
    source = base.metadata.get("tokenizer.chat_template")
    # No patch is applied: a file is measured with the template that its users have.
    template = patch_template(source, None, str(base.path)) if source else None
    return build_set_text(ImatrixRecipe(name, context), template, base, tools, store)


def prepare_held_out(
    name: str, base: ModelFile, context: int, tools: Toolchain, store: Store
) -> HeldOutDomains:
    """Return the held-out part of a calibration set, a text for each domain.

    It takes what :func:`render_set` takes.

    Raises:
        InputError: If no domain has enough text.
    """
    text = render_set(name, base, context, tools, store)
    domains = held_out.split_by_domain(text, context, Tokenizer(base, tools), store)
    if not domains.paths:
        raise InputError(
            f"{name}: expected a set that holds out enough text to measure on, found too little;"
            " name one with --text"
        )
    return domains


def name_domains(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Return texts by their domains, which are the names of their files.

    Raises:
        InputError: If two have the same name.
    """
    if len({p.stem for p in paths}) < len(paths):
        raise InputError("--text: expected texts with different names, for they name the domains")
    return {p.stem: p for p in paths}
