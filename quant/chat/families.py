"""Facts of a model family: control tokens, reasoning markers, tool-call format.

The facts are data, ``recipes/families/NAME.toml``. Nobody names a family: :func:`find_family` finds
it by the chat template, or by the architecture where no template is known. A model without such a
file gets what its template and its vocabulary tell (:func:`probe_family`); rules that need a fact
which nobody knows are not applied to it.

The template decides before the architecture: a GLM checkpoint that was fine-tuned with ChatML reads
ChatML.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant.core.errors import InputError, raise_problems
from quant.core.toml import Strict, read_toml
from quant.llama.gguf import Header
from quant.plan.load import RECIPES

CONTROL_TYPE = 3
"""LLAMA_TOKEN_TYPE_CONTROL in ``tokenizer.ggml.token_type``."""
REASONING_WORDS = ("think", "reason")
CALL_WORDS = ("tool_call", "function_call")
RESULT_WORDS = ("tool_response", "tool_result", "tool_output")
SWITCH = "enable_thinking"
"""The template variable that llama-server and most templates use to turn reasoning on and off."""
# <x> and [x] without attributes; the brackets are Mistral's ([THINK]).
_TAG = re.compile(r"([<\[])(/?)([A-Za-z][\w:.-]*)[>\]]")
_CONTROL_TOKEN = re.compile(
    r"<[|｜][^<>|｜\s{}'\"]+[|｜]>"  # ChatML, Llama 3, DeepSeek (full-width bars)
    r"|<(?:start|end)_of_\w+>"  # Gemma
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"  # Mistral
)


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that a template may refer to by name; ``""`` if the model has none."""

    bos_token: str = ""
    eos_token: str = ""


@dataclass(frozen=True)
class ReasoningFormat(Strict):
    """How a family writes reasoning."""

    open: str
    close: str
    switch: str | None = None
    """Template variable that turns reasoning on or off."""
    on_by_default: bool = False
    """Without the variable, a prompt is as with reasoning on."""
    off_suffix: str = ""
    """Text that the template appends to a question when reasoning is off."""
    keep_variable: str | None = None
    """Template variable that keeps the reasoning of earlier answers when it is false."""
    drops_past: bool = False
    """The template drops the reasoning of earlier turns, and keeps it inside a tool loop."""


@dataclass(frozen=True)
class ToolCallFormat(Strict):
    """How a family writes tool calls and their results."""

    call_open: str
    call_close: str
    result_open: str = ""
    result_close: str = ""
    arguments_error: str = ""
    """Part of the message with which the template refuses arguments that are not an object."""


@dataclass(frozen=True)
class ModelFamily(Strict):
    """recipes/families/NAME.toml, or what a template tells of its model. Empty is unknown."""

    name: str
    summary: str
    template_markers: tuple[str, ...] = ()
    """A template that contains all of these belongs to the family."""
    architectures: tuple[str, ...] = ()
    """Architectures of config.json and of GGUF metadata."""
    prompt_start: str = ""
    """Every prompt starts with it, and contains it once."""
    user_token: str = ""
    assistant_token: str = ""
    bos_token: str = ""
    """Used where neither the checkpoint nor the GGUF names one."""
    eos_token: str = ""
    control_tokens: tuple[str, ...] = ()
    """Each is one token of the vocabulary."""
    forbidden_in_answers: tuple[str, ...] = ()
    """Tokens of the prompt that must not occur in an answer."""
    reasoning: ReasoningFormat | None = None
    tool_calls: ToolCallFormat | None = None
    default_model: str | None = None
    """The model recipe for a file of this family that no recipe knows."""
    # Not hashed, because a dict cannot be: families are keys of build_conversations' cache.
    collected_templates: dict[str, str] = field(default_factory=dict, hash=False)
    """Model name to file of llama.cpp's template collection."""

    @property
    def special_tokens(self) -> SpecialTokens:
        """The tokens for a template whose checkpoint is not at hand."""
        return SpecialTokens(self.bos_token, self.eos_token)


@lru_cache(maxsize=1)
def load_families() -> tuple[ModelFamily, ...]:
    """Return the families of recipes/families. Raises InputError with every problem of a file."""
    paths = sorted((RECIPES / "families").glob("*.toml"))
    families = tuple(read_toml(path, ModelFamily) for path in paths)
    raise_problems(
        f"{path}: template_markers: expected at least one that is not empty, found none"
        for path, family in zip(paths, families, strict=True)
        if not all(family.template_markers) or not family.template_markers
    )
    return families


def load_family(name: str) -> ModelFamily:
    """Return the family of that name. Raises InputError if there is none."""
    by_name = {family.name: family for family in load_families()}
    if name not in by_name:
        raise InputError(f"family {name!r} is not known: known are {', '.join(by_name)}")
    return by_name[name]


def find_family(
    template: str | None,
    architectures: Iterable[str] = (),
    *,
    tokens: SpecialTokens | None = None,
    vocabulary: Sequence[str] = (),
) -> ModelFamily:
    """Return the family of a chat template, or of an architecture where there is no template.

    Args:
        template: The chat template; None if it is not known.
        architectures: Architectures of the model, as in config.json or in GGUF metadata.
        tokens: bos and eos of the model, for :func:`probe_family`.
        vocabulary: Control tokens of the model's vocabulary, for :func:`probe_family`.

    Returns:
        A family of recipes/families, or a family without a name that holds what could be probed.
    """
    names = set(architectures)
    # The first match counts. load_families sorts by file name: the order is the same everywhere.
    for family in load_families():
        if template is None:
            if names & set(family.architectures):
                return family
        elif all(marker in template for marker in family.template_markers):
            return family
    return probe_family(template or "", tokens or SpecialTokens(), vocabulary)


def find_file_family(header: Header) -> ModelFamily:
    """Return the family of a GGUF, by its chat template and its vocabulary."""
    template = header.metadata.get("tokenizer.chat_template")
    architecture = header.metadata.get("general.architecture")
    return find_family(
        template if isinstance(template, str) else None,
        [str(architecture)],
        tokens=read_file_tokens(header),
        vocabulary=list_control_tokens(header),
    )


def probe_family(
    template: str, tokens: SpecialTokens, vocabulary: Sequence[str] = ()
) -> ModelFamily:
    """Return what the text of a template tells of its model, as a family without a name.

    The template is searched, not run: ``<x>`` and ``</x>`` with a word for reasoning, calls or
    results in ``x`` are taken for markers. A template that writes only one of the two (the other
    comes from the model) has no known markers.

    Args:
        template: The chat template.
        tokens: bos and eos of the model.
        vocabulary: Control tokens of the vocabulary; empty if it is not at hand. With it, a control
            token is one that the template contains; without it, one that looks like those of
            common families.
    """
    reasoning = _find_pair(template, REASONING_WORDS)
    call, result = _find_pair(template, CALL_WORDS), _find_pair(template, RESULT_WORDS)
    written = (
        [token for token in vocabulary if token in template]
        if vocabulary
        else _CONTROL_TOKEN.findall(template)
    )
    ends = [token for token in (tokens.bos_token, tokens.eos_token) if token]
    control = tuple(dict.fromkeys([*ends, *written]))
    # The first control token that begins or ends no text opens a turn. In ChatML it is the same
    # for users and assistants, <|im_start|>.
    turn = next((token for token in control if token not in ends), "")
    return ModelFamily(
        name="",
        summary="Probed from the chat template.",
        user_token=turn,
        assistant_token=turn,
        bos_token=tokens.bos_token,
        eos_token=tokens.eos_token,
        control_tokens=control,
        forbidden_in_answers=tuple(dict.fromkeys([*control, *(reasoning or ()), *(call or ())])),
        reasoning=ReasoningFormat(*reasoning, switch=SWITCH if SWITCH in template else None)
        if reasoning
        else None,
        tool_calls=ToolCallFormat(*call, *(result or ())) if call else None,
    )


def read_file_tokens(header: Header) -> SpecialTokens:
    """Return bos and eos of a GGUF. A missing id, or one outside the vocabulary, gives ``""``."""
    vocabulary = header.metadata.get("tokenizer.ggml.tokens") or []
    ids = [header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")]
    return SpecialTokens(
        *(vocabulary[n] if isinstance(n, int) and 0 <= n < len(vocabulary) else "" for n in ids)
    )


def read_checkpoint_tokens(folder: Path, family: ModelFamily) -> SpecialTokens:
    """Return bos and eos of a checkpoint's tokenizer_config.json, else the family's.

    Raises InputError if the file is not a JSON object.
    """
    path = folder / "tokenizer_config.json"
    config: Any = {}
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as e:
            raise InputError(f"{path}: expected JSON, found something else ({e})") from e
        if not isinstance(config, dict):
            raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return SpecialTokens(
        _token_text(config.get("bos_token")) or family.bos_token,
        _token_text(config.get("eos_token")) or family.eos_token,
    )


def list_control_tokens(header: Header) -> list[str]:
    """Return the control tokens of a GGUF's vocabulary."""
    types = header.metadata.get("tokenizer.ggml.token_type") or []
    tokens = header.metadata.get("tokenizer.ggml.tokens") or []
    # Not strict: a file whose lists differ in length still gets its other checks. An empty token
    # is left out, because every text contains it.
    return [t for t, kind in zip(tokens, types, strict=False) if kind == CONTROL_TYPE and t]


def _token_text(token: Any) -> str:
    """A token is written as its text, or as an AddedToken with its text under ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _find_pair(template: str, words: Sequence[str]) -> tuple[str, str] | None:
    """The first tag with one of the words in its name that is both opened and closed."""
    tags = [(m[1], m[2], m[3]) for m in _TAG.finditer(template)]
    closed = {(bracket, name) for bracket, slash, name in tags if slash}
    for bracket, slash, name in tags:
        if not slash and (bracket, name) in closed and any(w in name.lower() for w in words):
            end = ">" if bracket == "<" else "]"
            return f"{bracket}{name}{end}", f"{bracket}/{name}{end}"
    return None
