"""``manifest.json``: what went into a release, and type and sha256 of every tensor in it.

The manifest is written last, so a folder that has one is complete. It holds the whole recipes, so
that ``quant rebuild`` needs no file of ``recipes/``. docs/release-format.md describes every key;
manifest.schema.json, beside this module, is the same as a JSON schema, for programs that are not in
Python.

Each object of the JSON is a frozen dataclass here, and its fields are the keys in the order in
which they are written. Three rules turn one into the other:

- a key that is no Python name is spelled as in ``KEYS``;
- a field with a default is a key that may be absent: in a release that is older than the key, or
  where there is nothing to say. It is left out if it is None. Other fields are written as null;
- recipes and receipts are written with all their fields.

So a manifest that is read and written again has the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter

from quant.chat.scenarios import Scenarios
from quant.core.errors import InputError, raise_problems, suggest_name
from quant.core.files import Receipt
from quant.core.format import to_pretty_json
from quant.core.toml import parse_json_value
from quant.plan.recipe import ModelRecipe, TemplatePatch, Variant

MANIFEST = "manifest.json"
FORMAT = "gguf-foundry release 3"
SCHEMA = "manifest.schema.json"
KEYS = {"llama_cpp": "llama.cpp"}
"""JSON key by field, where the key is not a Python name."""

R = TypeVar("R", bound="Record")


class Record:
    """An object of the manifest. Unknown keys are refused: they belong to another format."""

    __pydantic_config__ = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda field: KEYS.get(field, field),
    )


@dataclass(frozen=True, kw_only=True)
class SourceRecord(Record):
    """Where the weights came from: a commit of a hub repo, or a folder."""

    repo: str | None = None
    """The hub repo, OWNER/NAME."""
    revision: str | None = None
    """Its commit, 40 hex digits."""
    folder: str | None = None
    """The name of the folder, for a checkpoint that is on no hub."""
    files: tuple[Receipt, ...]
    """Every file that the conversion may read."""

    @property
    def name(self) -> str:
        """The source in one word: ``OWNER/NAME@COMMIT``, or the folder."""
        return f"{self.repo}@{self.revision}" if self.repo else str(self.folder)


@dataclass(frozen=True, kw_only=True)
class TemplateRecord(Record):
    """The chat template in the files, and what it was before it was patched."""

    original_sha256: str
    """Of the checkpoint's own template."""
    sha256: str
    """Of the template in every GGUF."""
    patch: TemplatePatch | None
    """The patch, whole; null if the template is the checkpoint's own."""
    waived: Mapping[str, str] | None = None
    """Test conversations that it renders wrong and that do not stop a release: name to reason."""


@dataclass(frozen=True, kw_only=True)
class TextSourceRecord(Record):
    """One source of the calibration text."""

    name: str
    """Its name in the calibration set."""
    kind: str
    """conversation, coding, tools, …: the domain that it is evaluated in."""
    licence: str | None = None
    """The license of its texts."""
    attribution: str | None = None
    """Whom its license asks to name."""
    repo: str | None = None
    """The dataset on the hub, if it comes from there."""
    documents: int
    """Documents that were drawn from it."""
    tokens: int
    """Tokens in them."""
    share: float
    """Fraction of the text's tokens, 0 to 1."""
    share_wanted: float | None = None
    """The fraction that the set asks for."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord(Record):
    """The text that the importance matrix was computed over."""

    set: str
    """The name of the calibration set."""
    documents: int
    """Documents in the text."""
    tokens: int
    """Tokens in the text, by the model's tokenizer."""
    sha256: str
    """Of the text."""
    near_duplicates: int
    """Documents that were dropped because they resemble another."""
    held_out: int
    """Documents that were kept out of the text, for evaluation."""
    sources: tuple[TextSourceRecord, ...]
    """What the text was drawn from."""
    characters: int
    """Length of the text."""
    pieces: int
    """Pieces of documents that were packed into chunks."""
    needless_cuts: int
    """Chunk borders that cut a piece which would have fitted a chunk."""
    held_out_sha256: str
    """Of the held-out documents, as lines of JSON."""


@dataclass(frozen=True, kw_only=True)
class ImatrixOriginRecord(Record):
    """What the importance matrix was computed from."""

    base: str
    """The sha256 of the GGUF that read the text."""
    text: str
    """The sha256 of the text."""
    context: int
    """Tokens in a chunk."""
    pass_chunks: int
    """Chunks that were read together."""
    llama_cpp: str
    """The version of llama.cpp."""
    chunks: int
    """Chunks that were read in all."""


@dataclass(frozen=True, kw_only=True)
class ImatrixCoverageRecord(Record):
    """How much of the model the calibration text reached."""

    matrices: int
    """Matrices with data."""
    matrices_with_experts: int
    """Those of them that hold several experts."""
    least_tokens: int
    """Tokens that the least visited matrix or expert saw."""
    unvisited: Mapping[str, tuple[int, ...]]
    """Experts that saw no token: tensor to their numbers."""


@dataclass(frozen=True, kw_only=True)
class ImatrixRecord(Record):
    """The importance matrix, which is a file of the release."""

    path: str
    """Its file."""
    sha256: str
    """Of that file."""
    bytes: int
    """Length of that file."""
    made_of: ImatrixOriginRecord
    """What it was computed from."""
    coverage: ImatrixCoverageRecord
    """How much of the model it covers."""


@dataclass(frozen=True, kw_only=True)
class BaseDomainRecord(Record):
    """The base on one domain of the held-out text."""

    chunks: int
    """Chunks that were read."""
    ppl: float
    """The base's perplexity."""


@dataclass(frozen=True, kw_only=True)
class BaseFiguresRecord(Record):
    """The base on the held-out text."""

    ppl: float
    """The base's perplexity on the whole text."""
    domains: Mapping[str, BaseDomainRecord]
    """By domain."""


@dataclass(frozen=True, kw_only=True)
class DominanceRecord(Record):
    """A file that another one dominates: not larger, and clearly closer to the base."""

    file: str
    """The variant that is dominated."""
    by: str
    """The variant that dominates it."""
    ladder: bool
    """Whether both belong to the UD- ladder, which is then not monotone."""
    kld_mean: float
    """How much higher its mean KLD is, in nats."""
    kld_mean_low: float
    """Lower end of that difference's 95 % interval."""
    kld_mean_high: float
    """Upper end of it."""
    said: str
    """The warning in words."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Record):
    """How the files were measured against the base, and what all of them share."""

    context: int
    """Tokens in a chunk, of which the second half is predicted."""
    top: int
    """Logits of the base that were kept for each token."""
    llama_cpp: str
    """The version of the bindings that evaluated the files."""
    texts: Mapping[str, str]
    """Held-out text by domain: its sha256."""
    too_short: tuple[str, ...] | None = None
    """Domains with too little held-out text to be measured."""
    base: BaseFiguresRecord
    """The base's own figures."""
    beaten: tuple[DominanceRecord, ...]
    """Dominated files."""


@dataclass(frozen=True, kw_only=True)
class DomainFiguresRecord(Record):
    """Figures of one file on one text, rounded to the digits that are the same on every machine."""

    chunks: int
    """Chunks that were read."""
    ppl: float
    """Perplexity of the file."""
    ppl_base: float
    """Perplexity of the base."""
    kld_mean: float
    """Mean Kullback-Leibler divergence from the base, in nats a token."""
    kld_mean_low: float
    """Lower end of its 95 % interval, bootstrapped over chunks."""
    kld_mean_high: float
    """Upper end of it."""
    kld_median: float
    """Median KLD."""
    kld_p99: float
    """99th percentile of the KLD."""
    kld_p999: float
    """99.9th percentile."""
    kld_max: float
    """Largest KLD of a token."""
    top1: float
    """How often the most likely token is the base's, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class FiguresRecord(DomainFiguresRecord):
    """Figures of one file, on the whole held-out text and by domain."""

    domains: Mapping[str, DomainFiguresRecord]
    """The same figures by domain."""
    errors: Mapping[str, float] | None = None
    """Relative weighted squared error of quantization by tensor class: mean over its matrices."""


@dataclass(frozen=True, kw_only=True)
class MemoryRecord(Record):
    """Memory that the weights of a file take; the KV cache comes on top."""

    weights: int
    """All tensors."""
    experts: int
    """Those of them that are experts, which can stay in main memory."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord(Record):
    """A tensor of a file."""

    type: str
    """Its ggml type: Q4_K, IQ2_XXS, F32, …"""
    sha256: str
    """Of its bytes, as they are in the file."""


@dataclass(frozen=True, kw_only=True)
class ScenarioRecord(Record):
    """One result of the smoke test."""

    name: str
    """What was tried."""
    kind: Literal["protocol", "quality"]
    """protocol: every file must pass; quality: known answers, compared with the base's."""
    passed: bool
    """Whether it passed."""
    waived: str | None = None
    """Why a failure did not stop the release."""


@dataclass(frozen=True, kw_only=True)
class VariantRecord(Record):
    """One variant: a GGUF, whole or in shards."""

    name: str
    """The variant's name, which its files and its folder bear."""
    summary: str
    """Who should take it, in a sentence."""
    bytes: int
    """Length of all its files."""
    bpw: float
    """Bits per weight: bits of all tensors over parameters."""
    bytes_by_type: Mapping[str, int]
    """Bytes of tensor data by ggml type, largest first."""
    memory: MemoryRecord
    """What it takes in memory."""
    recipe: Variant
    """The variant's recipe, whole."""
    decided: tuple[int, ...]
    """Which rules of the recipe decided the type of a tensor, counted from 0."""
    files: tuple[Receipt, ...]
    """Its file, or its shards in order."""
    tensors: Mapping[str, TensorRecord]
    """Every tensor by name, in the order of the file."""
    raised: Mapping[str, str]
    """Tensors raised to a larger type for lack of imatrix data: name to the type of the rule."""
    smoke: tuple[ScenarioRecord, ...]
    """Results of the smoke test, in order."""
    evaluation: FiguresRecord | None
    """Its figures; null if nothing was measured."""

    @property
    def is_base(self) -> bool:
        """Whether it holds the unquantized weights."""
        return self.recipe.is_base


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """The manifest of a release."""

    format: Literal["gguf-foundry release 3"] = "gguf-foundry release 3"
    """Names this format; another format has another name."""
    model: str
    """The name of the model's recipe."""
    recipe: ModelRecipe
    """The model's recipe, whole, with every default written out."""
    scenarios: Scenarios | None = None
    """The scenarios of the smoke test, whole."""
    source: SourceRecord
    """Where the weights came from."""
    llama_cpp: str
    """The version of llama.cpp that made the files."""
    chat_template: TemplateRecord | None
    """The chat template in the files; null if the model has none."""
    ollama_template: str | None
    """The Go template for Ollama, as in the file ``template``; null if there is none."""
    calibration: CalibrationRecord
    """The text that the importance matrix was computed over."""
    imatrix: ImatrixRecord
    """The importance matrix."""
    base: Receipt
    """The GGUF with the unquantized weights that every variant was made of."""
    vision: Receipt | None
    """The vision projector (mmproj); null if the model has none."""
    parameters: int
    """Weights of the model."""
    kv_bytes_per_token: int
    """KV cache of one token of context in F16; 0 if the recipe lacks the model's numbers."""
    evaluation: EvaluationRecord | None
    """How the files were measured; null if they were not."""
    variants: tuple[VariantRecord, ...]
    """Every variant, in the recipe's order."""

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Return the manifest that a text holds.

        Args:
            text: JSON.
            where: Names the file in errors.

        Raises:
            InputError: With every problem: no JSON, another format, a key that is missing or
                unknown, a value of another type.
        """
        try:
            document = json.loads(text)
        except ValueError as e:
            raise InputError(f"{where}: expected JSON, found something else ({e})") from e
        name = document.get("format") if isinstance(document, dict) else document
        if name != FORMAT:
            raise InputError(f"{where}: format: expected {FORMAT!r}, found {name!r:.80}")
        raise_problems(f"{where}: {problem}" for problem in find_manifest_problems(document))
        return parse_json_value(document, cls, where)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Return a file's manifest. Raises InputError as :meth:`from_json`, or if it is missing."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), str(path))
        except OSError as e:
            raise InputError(
                f"{path}: expected the manifest of a release, found none ({e.strerror})"
            ) from e
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: expected JSON, found something else ({e})") from e

    def to_document(self) -> dict[str, Any]:
        """Return the manifest as plain values."""
        return dict(to_plain(self))

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        return to_pretty_json(self.to_document())

    @property
    def tested(self) -> bool:
        """Whether every variant passed a smoke test; a plan's variants did not."""
        return all(v.smoke for v in self.variants)

    @property
    def single_file(self) -> VariantRecord | None:
        """The variant for Ollama: the first that its recipe keeps in one file."""
        return next((v for v in self.variants if not v.recipe.split), None)

    @property
    def known_digests(self) -> dict[str, str]:
        """The sha256 of every file that the manifest itself lists, by path."""
        others = [r for r in (self.imatrix, self.vision) if r]
        listed = [*others, *(f for v in self.variants for f in v.files)]
        return {f.path: f.sha256 for f in listed}


def to_plain(value: Any) -> Any:
    """Return a record, or what a record may hold, as plain JSON values."""
    if isinstance(value, Record):
        assert is_dataclass(value)
        pairs = ((f, getattr(value, f.name)) for f in fields(value))
        return {
            KEYS.get(f.name, f.name): to_plain(v)
            for f, v in pairs
            if v is not None or f.default is MISSING
        }
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def to_record(kind: type[R], document: Mapping[str, Any]) -> R:
    """Return plain values as a record of that kind; for values that this program made itself."""
    return parse_json_value(document, kind, kind.__name__)


def find_manifest_problems(document: Any) -> Iterator[str]:
    """Yield everything that the JSON schema refuses in a document, each with its field."""
    for error in _make_validator().iter_errors(document):
        yield from dict.fromkeys(_describe(error))


@cache
def read_schema() -> dict[str, Any]:
    """Return the JSON schema of the manifest, which is a file beside this module."""
    return dict(json.loads(resources.files(__package__).joinpath(SCHEMA).read_text("utf-8")))


@cache
def _make_validator() -> Any:
    from jsonschema import Draft202012Validator  # takes a tenth of a second; few commands need it

    return Draft202012Validator(read_schema())


def make_schema() -> dict[str, Any]:
    """Return the JSON schema that the dataclasses have; a test holds the file equal to it."""
    config = Record.__pydantic_config__
    # The fields' docstrings become descriptions. Only here: to find them takes half a second.
    Record.__pydantic_config__ = ConfigDict(**config, use_attribute_docstrings=True)
    try:
        schema = TypeAdapter(Manifest).json_schema()
    finally:
        Record.__pydantic_config__ = config
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"manifest.json of a release, format {FORMAT!r}",
        "required": ["format", *schema["required"]],
    }


def _describe(error: Any) -> Iterator[str]:
    """Yield what a jsonschema error says, as field, expectation and value."""
    field, rule, value = _field(error.absolute_path), error.validator_value, error.instance
    if error.validator == "anyOf":  # null, or an object: speak of the object
        branches = [e for e in error.context if e.validator_value != "null"]
        yield from (line for e in branches for line in _describe(e))
    elif error.validator == "required":
        yield from (f"{_join(field, key)}: missing" for key in rule if key not in value)
    elif error.validator == "additionalProperties":
        known = error.schema["properties"]
        for key in sorted(value.keys() - known.keys()):
            yield f"{_join(field, key)}: unknown key; {suggest_name(key, known)}"
    elif error.validator == "type":
        yield f"{field}: expected {rule}, found {value!r:.80}"
    elif error.validator in ("enum", "const"):
        names = rule if isinstance(rule, list) else [rule]
        yield f"{field}: expected {' or '.join(map(repr, names))}, found {value!r:.80}"
    else:
        yield f"{field}: expected {error.validator} {rule!r:.80}, found {value!r:.80}"


def _field(path: Any) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).lstrip(".") or "manifest"


def _join(field: str, key: str) -> str:
    return key if field == "manifest" else f"{field}.{key}"
