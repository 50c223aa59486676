"""Hold a chat template against the battery, in every engine that will meet it: `quant template check`.

A build does the same before it converts anything, without the server: a template that is wrong costs seconds, not hours.
"""

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant.chat import go_template
from quant.chat.conversations import BATTERY, Conversation
from quant.chat.engines import SpecialTokens, hopeless, render_by_server, render_in_sandbox
from quant.chat.gguf_patch import read_template
from quant.chat.rules import (
    Renderings,
    TemplateFault,
    find_changes,
    find_disagreements,
    list_requests,
    render_alike,
)
from quant.chat.rules import find_faults as faults
from quant.chat.template import patch_template as patch
from quant.core.format import hash_text, hash_texts, to_canonical_json
from quant.core.store import Store
from quant.errors import CheckError, InputError
from quant.hub.checkpoint import Checkpoint
from quant.llama.gguf import Header, read_headers
from quant.llama.toolchain import Toolchain
from quant.plan.load import load_model, load_template_patch
from quant.plan.recipe import ModelRecipe, TemplatePatch

COLLECTION = Path(sysconfig.get_paths()["purelib"]) / "templates"
"""llama.cpp's, which is installed with its tools."""
COLLECTED = {
    "glm-4.6": "GLM-4.6.jinja",
    "tiny-glm": "GLM-4.6.jinja",
    "glm-4.7": "GLM-4.7-Flash.jinja",
    "glm-4.7-flash": "GLM-4.7-Flash.jinja",
}
"""Which of them stands in for a model whose checkpoint is not here: its own, or its nearest sister's."""
RULES = 1
"""Counts up when the rules of :mod:`quant.chat.rules` change; what was found by others is then found anew."""


@dataclass(frozen=True)
class TemplateUnderTest:
    """A chat template to look at."""

    name: str
    text: str
    where: str
    """The file that it was found in."""
    tokens: SpecialTokens
    original: str | None = None
    """Before the patch, if one was made here."""
    patch: TemplatePatch | None = None


@dataclass(frozen=True)
class TemplateReport:
    """What the battery found."""

    taken: TemplateUnderTest
    conversations: int
    engines: Mapping[str, int]
    """How many texts each engine made."""
    faults: tuple[TemplateFault, ...]

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.faults

    def json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        taken = self.taken
        template = {
            "found_in": taken.where,
            "patch": taken.patch.name if taken.patch else None,
            "sha256": hash_text(taken.text),
        }
        return {
            "name": taken.name,
            "passed": self.passed,
            "template": template,
            "conversations": self.conversations,
            "engines": dict(self.engines),
            "faults": [asdict(f) for f in self.faults],
        }


def load_template(named: str, patch_name: str | None = None) -> TemplateUnderTest:
    """The template of a GGUF, as it stands there, or of a model, as a release would carry it.

    ``patch_name`` is a patch to make instead, or ``none``. Raises InputError when there is no template to be found.
    """
    if named.endswith(".gguf"):
        header = read_headers(Path(named))[0]
        return _patched(
            Path(named).name, read_template(header), named, patch_name or "none", _tokens(header)
        )
    model, path = load_model(named)
    text, where = _of_model(model, path)
    return _patched(model.name, text, where, patch_name or model.template, SpecialTokens())


def check_template(
    taken: TemplateUnderTest, tools: Toolchain | None, battery: Sequence[Conversation] = BATTERY
) -> TemplateReport:
    """Every rule that the template breaks, in every engine; without tools the server is left out.

    Raises InputError, in one line, for a template that renders nothing at all or reaches a limit.
    """
    wanted = list_requests(battery)
    ours = render_in_sandbox(taken.text, wanted, "jinja", taken.tokens)
    if problem := hopeless(ours):
        raise InputError(f"{taken.where}: {problem}")
    others = dict(_others(taken, tools, battery))
    found = [*faults(battery, ours, taken.text)]
    for engine, theirs in others.items():
        found += find_disagreements(engine, theirs, ours, battery)
    if taken.original is not None and taken.patch:
        original = render_in_sandbox(taken.original, wanted, "jinja", taken.tokens)
        meant = [name for r in taken.patch.replacements for name in r.changes]
        found += find_changes(original, ours, battery, meant)
    counts = {engine: len(made) for engine, made in {"jinja": ours, **others}.items()}
    return TemplateReport(taken, len(battery), counts, tuple(found))


def require_template(
    taken: TemplateUnderTest, waivers: Mapping[str, str], store: Store
) -> tuple[str, ...]:
    """The conversations that a template gets wrong and that are waived by name; raises CheckFailed with all others.

    In the engines that need no model. What they found is kept: the same template is rendered once.
    """
    go = go_template.load_go_template(taken.patch.name) if taken.patch else None
    inputs = {
        "rules": RULES,
        "template": hash_text(taken.text),
        "original": hash_text(taken.original) if taken.original is not None else None,
        "patch": asdict(taken.patch) if taken.patch else None,
        "ollama": go if find_spec("gotpl") else None,
        "battery": hash_texts([to_canonical_json(asdict(c)) for c in BATTERY]),
        "packages": {name: version(name) for name in ("jinja2", "transformers")},
    }
    done = store.run_once(
        "template",
        inputs,
        lambda partial: {"faults": [asdict(f) for f in check_template(taken, None).faults]},
    )
    found = [TemplateFault(**f) for f in done.facts["faults"]]
    if stopping := [f for f in found if f.conversation not in waivers]:
        raise CheckError(*_problems(stopping, taken))
    return tuple(dict.fromkeys(f.conversation for f in found))


def _problems(found: Sequence[TemplateFault], taken: TemplateUnderTest) -> Iterator[str]:
    """A line for each rule that a conversation breaks, with the difference below the first that has one."""
    shown = next((f.diff for f in found if f.diff), "")
    for fault, _ in render_alike(found):
        place = (
            f"{taken.where}: conversation {fault.conversation!r} ({fault.engine}), {fault.where}"
        )
        line = f"{place}: {fault.rule}: {fault.detail}"
        if shown and fault.diff == shown:
            line, shown = "\n".join([line, *(f"    {d}" for d in shown.splitlines())]), ""
        yield line
    by = f"patched by {taken.patch.name}" if taken.patch else "as it is"
    names = len({f.conversation for f in found})
    yield (
        f"{taken.where}, {by}: expected {len(BATTERY)} conversations to come out right, found {names} that do not: mend it"
        " with a patch (recipes/templates), or waive a conversation by its name"
    )


def _others(
    taken: TemplateUnderTest, tools: Toolchain | None, battery: Sequence[Conversation]
) -> Iterator[tuple[str, Renderings]]:
    wanted = list_requests(battery)
    yield "transformers", render_in_sandbox(taken.text, wanted, "transformers", taken.tokens)
    if tools:
        yield "llama-server", render_by_server(taken.text, wanted, tools, taken.tokens)
    go = go_template.load_go_template(taken.patch.name) if taken.patch else None
    if go and find_spec("gotpl"):
        yield "ollama", go_template.render_go(go, wanted)


def _of_model(model: ModelRecipe, path: Path) -> tuple[str, str]:
    """The model's own template if its checkpoint is a folder that is here, else the one in llama.cpp's collection."""
    if model.source.folder and (
        own := Checkpoint(path.parent / model.source.folder, {}, ()).chat_template
    ):
        return own
    file = COLLECTION / COLLECTED.get(model.name, "-")
    if not file.is_file():
        raise InputError(f"{path}: its chat template is not here; name a GGUF of the model instead")
    return file.read_text(encoding="utf-8"), str(file)


def _patched(
    name: str, text: str, where: str, patch_name: str, tokens: SpecialTokens
) -> TemplateUnderTest:
    if patch_name == "none":
        return TemplateUnderTest(name, text, where, tokens)
    by = load_template_patch(patch_name)
    return TemplateUnderTest(name, patch(text, by, where).text, where, tokens, text, by)


def _tokens(header: Header) -> SpecialTokens:
    """The tokens that the file's template may call by name."""
    words = header.metadata.get("tokenizer.ggml.tokens") or []
    ids = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")]
    return SpecialTokens(
        *(words[n] if isinstance(n, int) and 0 <= n < len(words) else "" for n in ids)
    )
