"""Recipes: what a person writes in ``recipes/`` to say which model to release, in which variants, with which template.

A recipe is TOML. Keys that are not known are refused with their nearest neighbour, and all problems of a file are told
at once. Relative paths in a recipe are relative to that recipe.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant.errors import InputError, nearest, refuse
from quant.ggml_types import FILE_TYPES, TYPES
from quant.toml import Strict, read, recipe_text

_HERE = Path(__file__).parent
RECIPES = next(p for p in (_HERE / "recipes", _HERE.parent / "recipes") if (p / "models").is_dir())
"""Beside the code in an installed wheel, beside the package in a clone."""

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
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
class Source(Strict):
    """Where a model's weights come from: a repo of the hub at a commit, or a folder."""

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Sampling(Strict):
    """The settings that the model's authors advise."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class Ollama(Strict):
    """What a release tells Ollama beside the sampling."""

    num_ctx: int
    """Tokens of context; moderate, because the KV cache is taken from the same memory."""
    stop: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class Card(Strict):
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
            "license": self.license, "license_name": self.license_name, "license_link": self.license_link,
            "language": list(self.languages), "base_model": self.base,
        }  # fmt: skip


@dataclass(frozen=True)
class Publish(Strict):
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
    """What the plan does with a tensor that is not known so well: see :class:`quant.plan.Doubt`."""
    floor: str = "Q4_K"
    """The type from which on a tensor is good enough without importance."""


@dataclass(frozen=True)
class Waiver(Strict):
    """A scenario of the smoke test that may fail and does not stop the release; the model card says so."""

    scenario: str
    """The name under which it fails."""
    why: str


@dataclass(frozen=True)
class Imatrix(Strict):
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
class Measuring(Strict):
    """How files are measured against the BF16 file, on the text that the calibration set holds out."""

    chunks: int = 8
    """Of each domain at most; with 0 nothing is measured."""
    context: int = 512
    """Tokens in a chunk, of which the second half is predicted."""
    top: int = 4096
    """Words that are kept of what the base says to a token: see :class:`quant.evaluate.Settings`."""
    worst: float = 3.0
    """Nats that a file may be away from the base, in mean KLD and in loss: beyond it, it is broken and no release is made."""


@dataclass(frozen=True)
class Model(Strict):
    """recipes/models/NAME.toml: one model and how its release is made."""

    name: str
    title: str
    """Begins the name of every file."""
    source: Source
    template: str
    """recipes/templates/NAME.toml, or ``none``."""
    variants: tuple[str, ...]
    sampling: Sampling
    ollama: Ollama
    card: Card
    smoke: tuple[Turn, ...]
    """The conversation that every file must hold, turn by turn."""
    scenarios: str = "glm"
    """recipes/scenarios/NAME.toml: what is tried beside it."""
    waivers: tuple[Waiver, ...] = ()
    max_shard_size: str = "50G"
    pre_tokenizer: str | None = None
    """llama.cpp's name for the pre-tokenizer, where the converter does not know its hash."""
    imatrix: Imatrix = field(default_factory=Imatrix)
    evaluation: Measuring = field(default_factory=Measuring)
    publish: Publish = field(default_factory=Publish)
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
    """Conversations of :mod:`quant.battery` that it means to render otherwise; of all others not a letter may change."""


@dataclass(frozen=True)
class TemplatePatch(Strict):
    """recipes/templates/NAME.toml: what has to change in a family's chat template, and why."""

    name: str
    summary: str
    replacements: tuple[Replacement, ...]


def load_model(name: str) -> tuple[Model, Path]:
    """A model by its name in recipes/models or by a path, and the file it came from. Raises InputError."""
    path = locate("models", name)
    model = read(path, Model)
    refuse(_model_problems(model, path))
    return model, path


def _architecture_problems(model: Model, path: Path) -> typing.Iterator[str]:
    from quant.inventory import recipe_problems

    if model.architecture:
        yield from recipe_problems(model.architecture, f"{path}: architecture")


def model_of_file(file: str) -> str | None:
    """The project's model whose title begins a file's name; the longest, because GLM-4.6 begins GLM-4.6V-Flash too."""
    titles = {load_model(name)[0].title.lower(): name for name in known("models")}
    fitting = [title for title in titles if file.lower().startswith(f"{title}-")]
    return titles[max(fitting, key=len)] if fitting else None


def variant_of_file(file: str) -> str | None:
    """The project's variant with whose name a file's name ends, before the number of a shard."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.removesuffix(".gguf"))
    fitting = [name for name in known("variants") if stem.endswith(f"-{name}")]
    return max(fitting, key=len) if fitting else None


def load_variant(name: str) -> Variant:
    """A variant by its name in recipes/variants or by a path. Raises InputError."""
    path = locate("variants", name)
    variant = read(path, Variant)
    refuse(_variant_problems(variant, path))
    return variant


def load_template_patch(name: str) -> TemplatePatch:
    """A template patch by its name in recipes/templates or by a path. Raises InputError."""
    path = locate("templates", name)
    by = read(path, TemplatePatch)
    refuse(
        f"{path}: replacements[{n}].find: expected the text to replace, found nothing"
        for n, change in enumerate(by.replacements)
        if not change.find.strip()
    )
    return by


def variant_of_types(path: Path) -> Variant:
    """A variant from lines ``REGEX=type``, each for whole names, the first that matches deciding. Raises InputError."""
    rules = []
    for number, line in enumerate(recipe_text(path).splitlines(), 1):
        if text := line.split("#")[0].strip():
            pattern, _, ggml_type = text.rpartition("=")
            rules.append(
                Rule(pattern.removeprefix("^").removesuffix("$"), ggml_type.upper(), f"line {number}", optional=True)
            )
    variant = Variant(name=path.stem, summary="", file_type="Q8_0", rules=tuple(_spelt(rules)))
    refuse(_variant_problems(variant, path))
    return variant


def known(kind: str) -> list[str]:
    """The names of the project's own recipes of a kind: models, variants or templates."""
    return sorted(p.stem for p in (RECIPES / kind).glob("*.toml"))


def shard_bytes(size: str) -> int:
    """``50G`` as bytes."""
    return int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]]


def _spelt(rules: typing.Iterable[Rule]) -> typing.Iterator[Rule]:
    """Types as ggml spells them: tools take q4_k for Q4_K."""
    names = {name.upper(): name for name in TYPES}
    return (dataclasses.replace(rule, type=names.get(rule.type, rule.type)) for rule in rules)


def locate(kind: str, name: str) -> Path:
    """The file of a recipe, by its name among the project's own or by a path. Raises InputError."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in known(kind):
        raise InputError(f"{kind.removesuffix('s')} {name!r} is not known: {nearest(name, known(kind))}")
    return RECIPES / kind / f"{name}.toml"


def _model_problems(model: Model, path: Path) -> typing.Iterator[str]:
    source = model.source
    if (source.repo is None) == (source.folder is None):
        yield f"{path}: source: expected one of repo and folder, found {'both' if source.repo else 'neither'}"
    if source.repo and not REPO.fullmatch(source.repo):
        yield f"{path}: source.repo: expected OWNER/NAME, found {source.repo!r}"
    if model.publish.repo and not REPO.fullmatch(model.publish.repo):
        yield f"{path}: publish.repo: expected OWNER/NAME, found {model.publish.repo!r}"
    if model.card.base and not REPO.fullmatch(model.card.base):
        yield f"{path}: card.base_model: expected OWNER/NAME or none, found {model.card.base!r}"
    yield from _name_problems(model.name, f"{path}: name")
    yield from _name_problems(model.title, f"{path}: title")
    if not model.variants:
        yield f"{path}: variants: expected at least one, found none"
    if not SIZE.fullmatch(model.max_shard_size):
        yield f"{path}: max_shard_size: expected a size like 50G or 500M, found {model.max_shard_size!r}"
    if not model.smoke:
        yield f"{path}: smoke: expected at least one turn, found none"
    yield from _architecture_problems(model, path)
    yield from _imatrix_problems(model.imatrix, f"{path}: imatrix")
    yield from _evaluation_problems(model.evaluation, f"{path}: evaluation")
    for n, turn in enumerate(model.smoke):
        yield from pattern_problems(turn.expect, f"{path}: smoke[{n}].expect")


def _imatrix_problems(told: Imatrix, where: str) -> typing.Iterator[str]:
    least = {
        "context": (told.context, 32),
        "pass_chunks": (told.pass_chunks, 1),
        "range_chunks": (told.range_chunks, 1),
    }
    least["coverage.expert_tokens"] = (told.coverage.expert_tokens, 0)
    if told.chunks is not None:
        least["chunks"] = (told.chunks, 1)
    if told.coverage.budget is not None:
        least["coverage.budget"] = (told.coverage.budget, told.chunks or 1)
    yield from (
        f"{where}.{key}: expected at least {n}, found {found}" for key, (found, n) in least.items() if found < n
    )
    floor = told.coverage.floor
    if floor not in TYPES:
        yield f"{where}.coverage.floor: {floor!r} is not one of ggml's: {nearest(floor, TYPES)}"
    elif TYPES[floor].needs_imatrix:
        yield f"{where}.coverage.floor: expected a type that needs no importance matrix, found {floor}"


def _evaluation_problems(told: Measuring, where: str) -> typing.Iterator[str]:
    if 0 < told.chunks < FEWEST_CHUNKS or told.chunks < 0:
        yield f"{where}.chunks: expected 0 or at least {FEWEST_CHUNKS}, for fewer mean nothing, found {told.chunks}"
    least = {"context": (told.context, 32), "top": (told.top, 1)}
    yield from (
        f"{where}.{key}: expected at least {n}, found {found}" for key, (found, n) in least.items() if found < n
    )
    if not told.worst > 0:
        yield f"{where}.worst: expected nats above 0, found {told.worst}"


def _variant_problems(variant: Variant, path: Path) -> typing.Iterator[str]:
    yield from _name_problems(variant.name, f"{path}: name")
    if variant.file_type not in FILE_TYPES:
        yield f"{path}: file_type: {variant.file_type!r} is not known: {nearest(variant.file_type, FILE_TYPES)}"
    for n, rule in enumerate(variant.rules):
        if rule.type not in TYPES:
            yield f"{path}: rules[{n}].type: {rule.type!r} is not one of ggml's: {nearest(rule.type, TYPES)}"
        if rule.narrow is not None and rule.narrow not in TYPES:
            yield f"{path}: rules[{n}].narrow: {rule.narrow!r} is not one of ggml's: {nearest(rule.narrow, TYPES)}"
        if rule.depth is not None and not 0 <= rule.depth[0] < rule.depth[1]:
            yield f"{path}: rules[{n}].depth: expected two shares, the smaller first, found {list(rule.depth)}"
        for key, name in (("type", rule.type), ("narrow", rule.narrow or "")):
            if name.startswith("TQ"):
                yield f"{path}: rules[{n}].{key}: {name} ruins weights that were not trained ternary; IQ1_S is as small"
        yield from pattern_problems(rule.tensors, f"{path}: rules[{n}].tensors")
    if not 0 <= variant.answers <= 1:
        yield f"{path}: answers: expected a share from 0 to 1, found {variant.answers}"


def _name_problems(name: str, where: str) -> typing.Iterator[str]:
    if not NAME.fullmatch(name):
        yield f"{where}: expected letters, digits, '.', '_' and '-', found {name!r}"


def pattern_problems(pattern: str, where: str) -> typing.Iterator[str]:
    """What is wrong with a regular expression."""
    try:
        re.compile(pattern)
    except re.error as e:
        yield f"{where}: expected a regular expression, found {pattern!r} ({e})"
