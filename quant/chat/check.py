"""Check a chat template with the test conversations, in every engine that meets it.

``quant template check`` runs all engines. A build checks the template before it converts anything,
without the server: a wrong template costs seconds there, not hours.

What is compared, and with what:

- every rendering of this project's Jinja with the rules of :mod:`quant.chat.rules`;
- the renderings of transformers, llama-server and Ollama with those of Jinja, byte for byte;
- the patched template with the original: what no replacement lists in ``changes`` is the same.
"""

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant.chat import go_template
from quant.chat.conversations import build_conversations
from quant.chat.engines import find_fatal_error, render_by_server, render_in_sandbox
from quant.chat.families import (
    ModelFamily,
    SpecialTokens,
    find_family,
    find_file_family,
    read_checkpoint_tokens,
    read_file_tokens,
)
from quant.chat.gguf_patch import read_template
from quant.chat.messages import Conversation
from quant.chat.renderings import Renderings, list_requests
from quant.chat.rules import (
    TemplateFault,
    find_changes,
    find_disagreements,
    find_faults,
    group_faults,
)
from quant.chat.template import ChatTemplate, patch_template
from quant.core.errors import CheckError, InputError
from quant.core.format import hash_json, hash_text
from quant.core.store import Store
from quant.hub.checkpoint import Checkpoint
from quant.llama.gguf import read_headers
from quant.llama.toolchain import Toolchain
from quant.plan.load import load_model, load_template_patch
from quant.plan.recipe import ModelRecipe, TemplatePatch

COLLECTION = Path(sysconfig.get_paths()["purelib"]) / "templates"
"""llama.cpp's template collection, which is installed with its tools."""
RULES = 2
"""Increase it when :mod:`quant.chat.rules` changes: stored results are then computed again."""


@dataclass(frozen=True)
class TemplateUnderTest:
    """A chat template to check."""

    name: str
    text: str
    source: str
    """The file that it is from."""
    tokens: SpecialTokens
    family: ModelFamily
    original: str | None = None
    """The text before the patch, if it was patched here."""
    patch: TemplatePatch | None = None

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """The test conversations of its family."""
        return build_conversations(self.family)


@dataclass(frozen=True)
class TemplateReport:
    """The result of a check."""

    template: TemplateUnderTest
    conversations: int
    engines: Mapping[str, int]
    """Number of texts that each engine rendered."""
    faults: tuple[TemplateFault, ...]

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.faults

    def json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        template = self.template
        return {
            "name": template.name,
            "passed": self.passed,
            "template": {
                "found_in": template.source,
                "patch": template.patch.name if template.patch else None,
                "sha256": hash_text(template.text),
            },
            "conversations": self.conversations,
            "engines": dict(self.engines),
            "faults": [asdict(f) for f in self.faults],
        }


def load_template(model_or_gguf: str, patch_name: str | None = None) -> TemplateUnderTest:
    """Return the template of a GGUF as it is, or of a model as its release has it.

    Args:
        model_or_gguf: A path that ends in ``.gguf``, or a model recipe by name or path.
        patch_name: A patch to apply instead of the recipe's, or ``none``.

    Raises:
        InputError: There is no template, or the patch does not fit it.
    """
    if model_or_gguf.endswith(".gguf"):
        header = read_headers(Path(model_or_gguf))[0]
        template = TemplateUnderTest(
            name=Path(model_or_gguf).name,
            text=read_template(header),
            source=model_or_gguf,
            tokens=read_file_tokens(header),
            family=find_file_family(header),
        )
        # As it is, unless a patch is named: a GGUF of this project has its patch already.
        return _patch(template, patch_name or "none")
    model, path = load_model(model_or_gguf)
    return _patch(_find_model_template(model, path), patch_name or model.template)


def load_checkpoint_template(checkpoint: Checkpoint, template: ChatTemplate) -> TemplateUnderTest:
    """Return a checkpoint's template as ``template`` has it, patched or not, to be checked.

    Raises:
        InputError: The checkpoint has no template.
    """
    if checkpoint.chat_template is None:
        raise InputError(f"{checkpoint.folder}: expected a chat template, found none")
    original, source = checkpoint.chat_template
    family, tokens = _identify(original, checkpoint.folder)
    return TemplateUnderTest(
        name=source,
        text=template.text,
        source=source,
        tokens=tokens,
        family=family,
        original=original if template.by else None,
        patch=template.by,
    )


def check_template(
    template: TemplateUnderTest,
    tools: Toolchain | None,
    conversations: Sequence[Conversation] | None = None,
) -> TemplateReport:
    """Return every rule that a template breaks, in every engine.

    Args:
        template: The template.
        tools: llama.cpp's tools; None leaves llama-server out.
        conversations: Test conversations; None takes those of the template's family.

    Raises:
        InputError: The template renders nothing at all, or reaches a limit. The error is one line.
    """
    if conversations is None:
        conversations = template.conversations
    requests = list_requests(conversations)
    ours = render_in_sandbox(template.text, requests, "jinja", template.tokens)
    # One line instead of the same fault for each of hundreds of texts.
    if problem := find_fatal_error(ours):
        raise InputError(f"{template.source}: {problem}")
    others = dict(_render_elsewhere(template, tools, conversations))
    faults = [*find_faults(conversations, ours, template.family)]
    for engine, theirs in others.items():
        faults += find_disagreements(engine, theirs, ours, conversations)
    if template.original is not None and template.patch:
        original = render_in_sandbox(template.original, requests, "jinja", template.tokens)
        intended = [name for r in template.patch.replacements for name in r.changes]
        faults += find_changes(original, ours, conversations, intended)
    counts = {engine: len(rendered) for engine, rendered in {"jinja": ours, **others}.items()}
    return TemplateReport(template, len(conversations), counts, tuple(faults))


def require_template(
    template: TemplateUnderTest, waivers: Mapping[str, str], store: Store
) -> tuple[str, ...]:
    """Check a template in the engines that need no model. The result is kept in the store.

    Args:
        template: The template.
        waivers: Names of conversations that may fail, and why.
        store: Keeps the faults under everything that they depend on.

    Returns:
        The conversations that fail and are waived.

    Raises:
        CheckError: Other conversations fail.
        InputError: As :func:`check_template`.
    """
    patch = template.patch
    go = go_template.load_go_template(patch.name) if patch else None
    inputs = {
        "rules": RULES,
        "template": hash_text(template.text),
        "original": hash_text(template.original) if template.original is not None else None,
        "patch": asdict(patch) if patch else None,
        # gotpl is a development dependency: where it is missing, the Go template is not checked.
        "ollama": go if find_spec("gotpl") else None,
        "tokens": asdict(template.tokens),
        "family": asdict(template.family),
        "conversations": hash_json([asdict(c) for c in template.conversations]),
        # The engines that run here. llama.cpp is not one of them, so its version is not in the key.
        "packages": {name: version(name) for name in ("jinja2", "transformers")},
    }
    stored = store.run_once(
        "template",
        inputs,
        lambda partial: {"faults": [asdict(f) for f in check_template(template, None).faults]},
    )
    faults = [TemplateFault(**f) for f in stored.facts["faults"]]
    if failures := [f for f in faults if f.conversation not in waivers]:
        raise CheckError(*_format_problems(failures, template))
    return tuple(dict.fromkeys(f.conversation for f in faults))


def _format_problems(faults: Sequence[TemplateFault], template: TemplateUnderTest) -> Iterator[str]:
    """A line for each rule that a conversation breaks; below the first that has one, its diff."""
    diff = next((f.diff for f in faults if f.diff), "")
    for fault, _ in group_faults(faults):
        conversation = f"conversation {fault.conversation!r} ({fault.engine}), {fault.where}"
        line = f"{template.source}: {conversation}: {fault.rule}: {fault.detail}"
        if diff and fault.diff == diff:
            line, diff = "\n".join([line, *(f"    {d}" for d in diff.splitlines())]), ""
        yield line
    state = f"patched by {template.patch.name}" if template.patch else "without a patch"
    total, failed = len(template.conversations), len({f.conversation for f in faults})
    yield (
        f"{template.source}, {state}: expected {total} conversations to pass, found {failed} that"
        " fail: fix the template with a patch (recipes/templates), or waive a conversation by name"
    )


def _render_elsewhere(
    template: TemplateUnderTest, tools: Toolchain | None, conversations: Sequence[Conversation]
) -> Iterator[tuple[str, Renderings]]:
    """The other engines, each with what it rendered."""
    requests, tokens = list_requests(conversations), template.tokens
    yield "transformers", render_in_sandbox(template.text, requests, "transformers", tokens)
    if tools:
        yield (
            "llama-server",
            render_by_server(template.text, requests, tools, template.family, tokens),
        )
    go = go_template.load_go_template(template.patch.name) if template.patch else None
    if go and find_spec("gotpl"):
        yield "ollama", go_template.render_go(go, requests)


def _find_model_template(model: ModelRecipe, path: Path) -> TemplateUnderTest:
    """The template of the model's checkpoint if it is a folder that is here.

    Otherwise the file of llama.cpp's collection that its family names for it.
    """
    folder = path.parent / model.source.folder if model.source.folder else None
    own = Checkpoint(folder, {}, ()).chat_template if folder else None
    if folder and own:
        family, tokens = _identify(own[0], folder)
        return TemplateUnderTest(model.name, *own, tokens, family)
    family = find_family(None, model.architecture.get("architectures", ()))
    file = COLLECTION / family.collected_templates.get(model.name, "-")
    if not file.is_file():
        raise InputError(f"{path}: its chat template is not here; name a GGUF of the model instead")
    text = file.read_text(encoding="utf-8")
    return TemplateUnderTest(model.name, text, str(file), family.special_tokens, family)


def _identify(template: str, checkpoint: Path) -> tuple[ModelFamily, SpecialTokens]:
    """The family of a checkpoint's template, and the tokens that the template may refer to."""
    # Asked twice: a family names tokens that the checkpoint lacks, and a probed one is made of
    # them.
    tokens = read_checkpoint_tokens(checkpoint, find_family(template))
    return find_family(template, tokens=tokens), tokens


def _patch(template: TemplateUnderTest, patch_name: str) -> TemplateUnderTest:
    if patch_name == "none":
        return template
    patch = load_template_patch(patch_name)
    return TemplateUnderTest(
        name=template.name,
        text=patch_template(template.text, patch, template.source).text,
        source=template.source,
        tokens=template.tokens,
        family=template.family,
        original=template.text,
        patch=patch,
    )
