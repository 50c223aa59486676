"""Recipes: what a person writes in ``recipes/`` to say which model to release, in which variants, with which template.

A recipe is TOML. Keys that are not known are refused with their nearest neighbour, and all problems of a file are told
at once. Relative paths in a recipe are relative to that recipe.
"""

import re
import typing
from dataclasses import dataclass, field
from typing import Any

from quant.core.toml import Strict
from quant.hub.checkpoint import ModelSource

NAME = re.compile(r"\w[\w.-]*")
"""Of what becomes part of a file's name: no separator, no dot at its beginning."""
FEWEST_CHUNKS = 4
"""That files may be measured on: with fewer, an interval says nothing."""
SIZE = re.compile(r"[1-9]\d*[MG]")
"""As llama-gguf-split reads a size: M is 10^6 bytes, G is 10^9."""


@dataclass(frozen=True)
class Rule(Strict):
    """One line of a variant: tensors whose whole name matches are stored as this type."""

    tensors: str
    """A regular expression for the whole name."""
    type: str
    why: str
    optional: bool = False
    """It may match nothing: a rule for a kind of layer that some models lack."""
    only: typing.Literal["moe", "dense"] | None = None
    """For models with experts, or for models without."""
    depth: tuple[float, float] | None = None
    """Only blocks from and up to (not at) these shares of the trunk; an MTP block, behind the trunk, is at 1."""
    narrow: str | None = None
    """The type for rows that do not fill the blocks of ``type``."""

    def matches(self, name: str, depth: float | None, moe: bool) -> bool:
        """Whether the rule speaks of that tensor: its name, where its block lies, and the kind of its model."""
        if self.only and self.only != ("moe" if moe else "dense"):
            return False
        if self.depth and (depth is None or not self.depth[0] <= depth < self.depth[1]):
            return False
        return re.fullmatch(self.tensors, name) is not None


@dataclass(frozen=True)
class Variant(Strict):
    """recipes/variants/NAME.toml: ordered rules, of which the first that matches decides."""

    name: str
    summary: str
    """Who should take this file, in a sentence for the model card."""
    file_type: str
    """``general.file_type``, which loaders show as the file's quantisation."""
    rules: tuple[Rule, ...] = ()
    """None at all: the converted file itself."""
    split: bool = True
    """False: one file whatever its size, because Ollama cannot pull shards."""
    answers: float = 1.0
    """Of the answers that the BF16 file gives rightly, the share that this file must give rightly too."""

    @property
    def is_base(self) -> bool:
        """Whether it is the converted file itself."""
        return not self.rules


@dataclass(frozen=True)
class Sampling(Strict):
    """The settings that the model's authors advise."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class OllamaRecipe(Strict):
    """What a release tells Ollama beside the sampling."""

    num_ctx: int
    """Tokens of context; moderate, because the KV cache is taken from the same memory."""
    stop: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class CardRecipe(Strict):
    """What the model card says and no number tells."""

    license: str
    """The hub's word for it; ``other`` with a name and a link."""
    languages: tuple[str, ...]
    base_model: str | None = None
    """The hub repo that this is a quantisation of; ``none`` for weights that are on no hub."""
    description: str = ""
    license_name: str | None = None
    license_link: str | None = None
    """The address of its text."""

    @property
    def base(self) -> str | None:
        """The hub repo that this is a quantisation of, if there is one."""
        return None if self.base_model == "none" else self.base_model

    @property
    def front_matter(self) -> dict[str, Any]:
        """What the hub and the GGUF's own metadata are told, by the hub's names."""
        return {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "language": list(self.languages),
            "base_model": self.base,
        }


@dataclass(frozen=True)
class PublishRecipe(Strict):
    """Where the releases of a model are published; the files say it too."""

    repo: str | None = None
    private: bool = False
    pull_request: bool = False
    """Propose a release, and let the repo's owners merge it."""
    quantized_by: str | None = None
    """Who makes the files; the owner of the repo, when not given."""

    @property
    def by(self) -> str | None:
        """Who is named as the maker of the files."""
        return self.quantized_by or (self.repo.partition("/")[0] if self.repo else None)


@dataclass(frozen=True)
class Turn(Strict):
    """One thing to say to a model, and what its answer must hold."""

    say: str
    expect: str
    """A regular expression that is searched in the answer, upper and lower case alike."""


@dataclass(frozen=True)
class CoverageRule(Strict):
    """How well every expert has to be known, and what becomes of those that are not."""

    expert_tokens: int = 32
    """Every expert has to see so many; the mean of fewer squares says little of a column."""
    budget: int | None = None
    """Chunks that may be read in all, when a second pass is needed; all of the text when not given."""
    otherwise: typing.Literal["raise", "refuse", "report"] = "raise"
    """What the plan does with a tensor that is not known so well: see :class:`quant.plan.plan.CoveragePolicy`."""
    floor: str = "Q4_K"
    """The type from which on a tensor is good enough without importance."""


@dataclass(frozen=True)
class Waiver(Strict):
    """A scenario of the smoke test that may fail and does not stop the release; the model card says so."""

    scenario: str
    """The name under which it fails."""
    why: str


@dataclass(frozen=True)
class ImatrixRecipe(Strict):
    """How the importance matrix is computed."""

    calibration: str = "embedded"
    context: int = 512
    """Tokens in a chunk."""
    chunks: int | None = None
    """At most so many in the first pass; all of the text when not given."""
    pass_chunks: int = 4
    """Read together, so that the weights stream through memory once for all of them."""
    range_chunks: int = 40
    """One piece of work: what a run that was killed may lose, and what one of several machines takes."""
    base: typing.Literal["BF16", "Q8_0"] = "BF16"
    """The file that reads: Q8_0 is half as large, and its activations differ little."""
    feedback: bool = False
    """Gather second moments too, and feed rounding back: nearer files of the same types, not with llama-quantize's bytes.

    Where the architecture can be read backward, tokens are counted by their gradients.
    """
    coverage: CoverageRule = field(default_factory=CoverageRule)


@dataclass(frozen=True)
class EvaluationRecipe(Strict):
    """How files are measured against the BF16 file, on the text that the calibration set holds out."""

    chunks: int = 8
    """Of each domain at most; with 0 nothing is measured."""
    context: int = 512
    """Tokens in a chunk, of which the second half is predicted."""
    top: int = 4096
    """Words that are kept of what the base says to a token: see :class:`quant.evaluate.compare.EvaluationSettings`."""
    worst: float = 3.0
    """Nats that a file may be away from the base, in mean KLD and in loss: beyond it, it is broken and no release is made."""


@dataclass(frozen=True)
class ModelRecipe(Strict):
    """recipes/models/NAME.toml: one model and how its release is made."""

    name: str
    title: str
    """Begins the name of every file."""
    source: ModelSource
    template: str
    """recipes/templates/NAME.toml, or ``none``."""
    variants: tuple[str, ...]
    sampling: Sampling
    ollama: OllamaRecipe
    card: CardRecipe
    smoke: tuple[Turn, ...]
    """The conversation that every file must hold, turn by turn."""
    scenarios: str = "glm"
    """recipes/scenarios/NAME.toml: what is tried beside it."""
    waivers: tuple[Waiver, ...] = ()
    max_shard_size: str = "50G"
    pre_tokenizer: str | None = None
    """llama.cpp's name for the pre-tokenizer, where the converter does not know its hash."""
    imatrix: ImatrixRecipe = field(default_factory=ImatrixRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    publish: PublishRecipe = field(default_factory=PublishRecipe)
    max_answer: int = 1024
    """Tokens that one answer of the smoke test may take."""
    context_length: int | None = None
    """Tokens that the model was made for."""
    header_bytes: int = 0
    """Metadata and vocabulary at the head of a file: what a forecast adds as long as no file is there to be read."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The numbers of config.json that decide the tensors, with which a release is planned before anything is pulled."""

    @property
    def sees(self) -> bool:
        """Whether it has a vision part, which is a file of its own."""
        return "vision_config" in self.architecture


@dataclass(frozen=True)
class Replacement(Strict):
    """One exact change of a chat template."""

    why: str
    """The failure that it mends."""
    find: str
    """Must occur exactly once."""
    replace: str
    changes: tuple[str, ...] = ()
    """Conversations of :mod:`quant.chat.conversations` that it means to render
    otherwise; of all others not a letter may change."""


@dataclass(frozen=True)
class TemplatePatch(Strict):
    """recipes/templates/NAME.toml: what has to change in a family's chat template, and why."""

    name: str
    summary: str
    replacements: tuple[Replacement, ...]


def parse_size(size: str) -> int:
    """``50G`` as bytes."""
    return int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]]
