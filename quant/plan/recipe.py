"""The nouns of a recipe: what a person writes in ``recipes/`` about models, variants and templates.

A recipe is TOML. The field names below are the keys that a person writes, and a release's manifest
repeats them: a key may be added, none may be renamed. ``quant.plan.load`` reads and checks the
files. Paths in a recipe are relative to that recipe.
"""

import re
import typing
from dataclasses import dataclass, field
from typing import Any

from quant.core.toml import Strict
from quant.hub.checkpoint import ModelSource

NAME = re.compile(r"\w[\w.-]*")
"""A name that becomes part of a file name: no path separator, no leading dot."""
FEWEST_CHUNKS = 4
"""Fewest chunks that a file may be evaluated on; with fewer, a confidence interval means
nothing."""
SIZE = re.compile(r"[1-9]\d*[MG]")
"""A size as llama-gguf-split reads it: M is 10^6 bytes, G is 10^9."""


@dataclass(frozen=True)
class Rule(Strict):
    """One rule of a variant: tensors whose whole name matches are stored as this type."""

    tensors: str
    """Regular expression, matched against the whole tensor name."""
    type: str
    """ggml type, such as Q4_K."""
    why: str
    """Reason, in a sentence; it is published with the release."""
    optional: bool = False
    """The rule may match nothing, for instance when it names a kind of layer that some models
    lack."""
    only: typing.Literal["moe", "dense"] | None = None
    """Apply the rule only to mixture-of-experts models, or only to dense ones."""
    depth: tuple[float, float] | None = None
    """Range of relative depth [from, to): 0 is the first trunk block, 1 is the first MTP block
    behind the trunk."""
    narrow: str | None = None
    """Fallback type, as llama.cpp calls it: for tensors whose row length is no multiple of the
    block size of ``type``."""

    def matches(self, name: str, depth: float | None, moe: bool) -> bool:
        """Return whether the rule applies to a tensor.

        Args:
            name: The tensor's name.
            depth: Relative depth of its block; None outside the blocks.
            moe: Whether the model is a mixture of experts.
        """
        if self.only and self.only != ("moe" if moe else "dense"):
            return False
        # Half-open, so that adjacent ranges share no block and omit none.
        if self.depth and (depth is None or not self.depth[0] <= depth < self.depth[1]):
            return False
        # llama-quantize's --tensor-type searches within names; there attn_v also means attn_v_b.
        return re.fullmatch(self.tensors, name) is not None


@dataclass(frozen=True)
class Variant(Strict):
    """recipes/variants/NAME.toml: ordered rules; the first that matches a tensor decides."""

    name: str
    summary: str
    """For whom this file is, in one sentence for the model card."""
    file_type: str
    """``general.file_type`` (llama.h, enum llama_ftype), which loaders show as the file's
    quantization."""
    rules: tuple[Rule, ...] = ()
    """No rules: the converted file itself."""
    split: bool = True
    """False writes one file whatever its size, because Ollama cannot pull shards."""
    answers: float = 1.0
    """Fraction of the smoke test's answers that must be right, of those that the BF16 file gets
    right."""

    @property
    def is_base(self) -> bool:
        """Whether the variant is the converted file itself."""
        return not self.rules


@dataclass(frozen=True)
class Sampling(Strict):
    """Sampling defaults that the model's authors recommend."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class OllamaRecipe(Strict):
    """Ollama parameters beside the sampling defaults."""

    num_ctx: int
    """Context length in tokens; moderate, because the KV cache uses the same memory as the
    weights."""
    stop: tuple[str, ...]
    """Stop strings."""
    system: str | None = None
    """System prompt."""


@dataclass(frozen=True)
class CardRecipe(Strict):
    """Facts for the model card that cannot be measured."""

    license: str
    """License identifier of the Hugging Face hub; ``other`` needs a name and a link."""
    languages: tuple[str, ...]
    base_model: str | None = None
    """Hub repo of the unquantized model; ``none`` for weights that are on no hub."""
    description: str = ""
    license_name: str | None = None
    license_link: str | None = None
    """URL of the license text."""

    @property
    def base(self) -> str | None:
        """Hub repo of the unquantized model; None if it is on no hub."""
        return None if self.base_model == "none" else self.base_model

    @property
    def front_matter(self) -> dict[str, Any]:
        """License, languages and base model by the hub's keys, for card and GGUF metadata."""
        return {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "language": list(self.languages),
            "base_model": self.base,
        }


@dataclass(frozen=True)
class PublishRecipe(Strict):
    """Where the releases of a model are published; GGUF metadata and card repeat it."""

    repo: str | None = None
    """OWNER/NAME on the hub."""
    private: bool = False
    """Create the repo as a private one."""
    pull_request: bool = False
    """Open a pull request instead of committing to the main branch."""
    quantized_by: str | None = None
    """Who quantized the files; the owner of ``repo`` when not given."""

    @property
    def quantizer(self) -> str | None:
        """Who is named as the quantizer in the files and on the card."""
        return self.quantized_by or (self.repo.partition("/")[0] if self.repo else None)


@dataclass(frozen=True)
class Turn(Strict):
    """One user message of the smoke test, and what the answer must contain."""

    say: str
    """The user message."""
    expect: str
    """Regular expression, searched in the answer case-insensitively."""


@dataclass(frozen=True)
class CoverageRule(Strict):
    """Imatrix coverage that every expert needs, and the policy for tensors below it."""

    expert_tokens: int = 32
    """Fewest tokens that every expert must process; a mean over fewer activations says little of a
    column."""
    budget: int | None = None
    """Chunks to read in both passes together, when a second pass is needed; None reads all of the
    text."""
    otherwise: typing.Literal["raise", "refuse", "report"] = "raise"
    """Policy for a tensor below it: see :class:`quant.plan.plan.CoveragePolicy`."""
    floor: str = "Q4_K"
    """Smallest ggml type that is good enough without imatrix data."""


@dataclass(frozen=True)
class Waiver(Strict):
    """A smoke-test scenario that may fail without stopping the release; the model card names it."""

    scenario: str
    """Name of the scenario."""
    why: str
    """Reason, in a sentence; it is published with the release."""


@dataclass(frozen=True)
class ImatrixRecipe(Strict):
    """How the importance matrix is computed."""

    calibration: str = "embedded"
    """Name of the calibration set."""
    context: int = 512
    """Tokens in a chunk."""
    chunks: int | None = None
    """Maximum number of chunks in the first pass; None reads all of the text."""
    pass_chunks: int = 4
    """Chunks in one batch: the weights are read from memory once for all of them."""
    range_chunks: int = 40
    """Chunks in one range: what a killed run may lose, and the share that one of several machines
    takes."""
    base: typing.Literal["BF16", "Q8_0"] = "BF16"
    """Type of the file that reads the text; Q8_0 is half as large, and its activations differ
    little."""
    feedback: bool = False
    """Enable error compensation (GPTQ): each weight's rounding error is compensated by the weights
    quantized after it.

    Quality improves at the same types and sizes, but the bytes are not llama-quantize's. Needs
    Hessians; they are weighted with gradients where the architecture's backward pass is
    implemented.
    """
    coverage: CoverageRule = field(default_factory=CoverageRule)


@dataclass(frozen=True)
class EvaluationRecipe(Strict):
    """How files are compared with the BF16 file, on the text that the calibration set holds out."""

    chunks: int = 8
    """Maximum number of chunks of each domain; 0 skips the evaluation."""
    # llama-perplexity's convention: every predicted token has at least context / 2 before it.
    context: int = 512
    """Tokens in a chunk; the second half of them is predicted."""
    top: int = 4096
    """Base logits that are kept per token: see
    :class:`quant.evaluate.compare.EvaluationSettings`."""
    worst: float = 3.0
    """Largest mean KLD, and largest rise in loss, against BF16 in nats; a file above it fails the
    build."""


@dataclass(frozen=True)
class ModelRecipe(Strict):
    """recipes/models/NAME.toml: one model and how its release is made."""

    name: str
    title: str
    """First part of every file's name."""
    source: ModelSource
    template: str
    """recipes/templates/NAME.toml, or ``none``."""
    variants: tuple[str, ...]
    """Names of recipes/variants, the BF16 file among them."""
    sampling: Sampling
    ollama: OllamaRecipe
    card: CardRecipe
    smoke: tuple[Turn, ...]
    """One conversation, turn by turn, that every file must pass."""
    scenarios: str = "glm"
    """recipes/scenarios/NAME.toml: the smoke-test scenarios beside that conversation."""
    waivers: tuple[Waiver, ...] = ()
    # huggingface_hub refuses larger files without Xet (constants.MAX_HTTP_DOWNLOAD_SIZE).
    max_shard_size: str = "50G"
    """Largest shard, as llama-gguf-split reads a size: 50G or 500M."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for the pre-tokenizer, where the converter does not know its hash."""
    imatrix: ImatrixRecipe = field(default_factory=ImatrixRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    publish: PublishRecipe = field(default_factory=PublishRecipe)
    max_answer: int = 1024
    """Maximum number of tokens in one answer of the smoke test."""
    context_length: int | None = None
    """Context length in tokens that the model was trained for."""
    header_bytes: int = 0
    """Bytes of metadata and vocabulary at the head of a file; used by forecasts until a converted
    file exists."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The keys of config.json that decide the tensors; a release is planned from them before
    anything is downloaded."""

    @property
    def has_vision(self) -> bool:
        """Whether the model has a vision part, which becomes a file of its own (mmproj)."""
        return "vision_config" in self.architecture


@dataclass(frozen=True)
class Replacement(Strict):
    """One exact replacement in a chat template."""

    why: str
    """The failure that it fixes."""
    find: str
    """Text to replace; it must occur exactly once."""
    replace: str
    """Text to put there."""
    changes: tuple[str, ...] = ()
    """Test conversations (:mod:`quant.chat.conversations`) whose rendering is meant to change; all
    others must not."""


@dataclass(frozen=True)
class TemplatePatch(Strict):
    """recipes/templates/NAME.toml: fixes of a family's chat template, each with its reason."""

    name: str
    summary: str
    replacements: tuple[Replacement, ...]


def parse_size(size: str) -> int:
    """Return a size such as ``50G`` in bytes."""
    return int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]]
