"""What ``ollama run hf.co/OWNER/NAME:TAG`` makes of a release, by the hub's rules or its registry.

The hub speaks Ollama's registry protocol. A tag is the quantization label that its rules read from
a file's name, or the whole name; a split model has none. The release's ``params``, ``template`` and
``system`` go with every file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from quant.core import files
from quant.core.errors import InputError
from quant.core.files import Receipt
from quant.hub import client as hub_client
from quant.llama.gguf import FIRST_SHARD
from quant.release.manifest import MANIFEST, Manifest, VariantRecord
from quant.release.ollama import read_params

# huggingface.js, packages/gguf: GGMLFileQuantizationType in its order, of which the first that fits
# counts, and GGUF_QUANT_RE; of several labels in a name the last.
SCHEMES = tuple(
    "F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L"
    " Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S"
    " IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 MXFP4_MOE"
    " NVFP4 Q1_0 Q2_K_XL Q3_K_XL Q4_K_XL Q5_K_XL Q6_K_XL Q8_K_XL".split()
)
LABEL = re.compile(f"(?:UD-)?(?:{'|'.join(SCHEMES)})(?:_[A-Z]+)?")
DEFAULT = "Q4_K_M"
"""What the hub gives for no tag, if a release has it."""
MAX_FILE_BYTES = 500 * 10**9
"""The hub accepts no larger file."""
TERNARY = ("TQ1_0", "TQ2_0")
"""Types that Ollama runs on few accelerators, and that ruin weights not trained for them."""
ACCEPT = "application/vnd.docker.distribution.manifest.v2+json"
LAYER = "application/vnd.ollama.image."
PARAMS = "params"
COMPANIONS = {
    PARAMS: "missing: Ollama uses its own defaults",
    "template": "none: Ollama uses the Jinja in the file; before 0.30 the hub translates that",
    "system": "none",
}
"""Files that go with every model of a repo, and what Ollama does without each."""
SPLIT = (
    "the hub refuses the tag of a split model; merge its shards with `quant merge … --modelfile`"
)


@dataclass(frozen=True, kw_only=True)
class OllamaResolution:
    """What Ollama makes of one file of a release."""

    file: str
    """The file, or its first shard."""
    tag: str = ""
    """What stands after the colon, if the file can be pulled."""
    pulled: bool = False
    why: str
    """What Ollama pulls, or why it pulls nothing."""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OllamaCheck:
    """What Ollama makes of a whole release."""

    files: tuple[OllamaResolution, ...]
    beside: Mapping[str, str]
    """What each of params, template and system is."""
    default: str
    """What the hub gives for no tag."""
    faults: tuple[str, ...]

    @property
    def all_faults(self) -> tuple[str, ...]:
        """Everything that is wrong, with the release and with its files."""
        return (*self.faults, *(fault for f in self.files for fault in f.faults))

    def json(self) -> dict[str, Any]:
        """Return the result as plain JSON."""
        listed = [
            {"file": f.file, "tag": f.tag, "pulled": f.pulled, "why": f.why} for f in self.files
        ]
        return {
            "passed": not self.all_faults,
            "files": listed,
            "default": self.default,
            "beside": dict(self.beside),
            "faults": list(self.all_faults),
        }


def check_release(folder: Path, repo: str | None = None) -> OllamaCheck:
    """Return what Ollama makes of every file of a release.

    Args:
        folder: The release.
        repo: The hub repo where it was published; then the hub is asked and compared.

    Raises:
        InputError: For a folder that is no release, or a repo that does not exist.
        Unreachable: If the hub does not answer.
    """
    manifest = Manifest.read(folder / MANIFEST)
    models = tuple(resolve_tags(manifest.variants))
    companions, faults = _read_companions(folder)
    if repo:
        models = tuple(
            _ask_registry(repo, local, variant, companions)
            for local, variant in zip(models, manifest.variants, strict=True)
        )
    return OllamaCheck(
        files=(*models, *_list_other_files(manifest)),
        beside=companions,
        default=_find_default(models),
        faults=faults,
    )


def resolve_tags(variants: Sequence[VariantRecord]) -> Iterator[OllamaResolution]:
    """Yield what Ollama makes of each variant by the hub's rules, without asking the hub."""
    # Split variants have no tag, so they make none ambiguous.
    labels = [read_quant_label(v.files[0].path) for v in variants if len(v.files) == 1]
    for variant in variants:
        file = variant.files[0]
        name, tag = PurePosixPath(file.path).name, read_quant_label(file.path)
        if len(variant.files) > 1:
            yield OllamaResolution(file=file.path, why=SPLIT)
            continue
        faults = list(_find_file_faults(variant, file))
        if tag is None:
            tag, why = name, "no quantization label in its name, so only its whole name is a tag"
        elif labels.count(tag) > 1:
            faults.append(
                f"{file.path}: tag {tag}: expected one file with that tag, found"
                f" {labels.count(tag)}"
            )
            tag, why = name, "another file has the same tag, so only its whole name is unambiguous"
        else:
            why = f"the tag, in upper or lower case, with or without UD-, or the whole name {name}"
        yield OllamaResolution(
            file=file.path, tag=tag, pulled=not faults, why=why, faults=tuple(faults)
        )


def read_quant_label(path: str) -> str | None:
    """Return the tag that the hub reads from a file's name, or None if it knows no label there."""
    labels = LABEL.findall(PurePosixPath(path).name.upper())
    return labels[-1] if labels else None


def fetch_registry(repo: str, tag: str) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the registry manifest that the hub gives Ollama for a tag.

    Raises:
        InputError: If the repo does not exist, or the token may not read it.
        Unreachable: If the hub does not answer.
    """
    from huggingface_hub import get_session

    address = f"{hub_client.make_client().endpoint}/v2/{repo}/manifests/{tag}"
    token = hub_client.read_token()
    # Unlike HfApi, a session of the hub's client sends no token by itself.
    headers = {"Accept": ACCEPT} | ({"Authorization": f"Bearer {token}"} if token else {})

    def ask() -> tuple[int, dict[str, Any]]:
        answer = get_session().get(address, headers=headers, timeout=30)
        # Only these are raised, for the retry. Any other status is the answer: 400 refuses a tag.
        if answer.status_code in hub_client.TRANSIENT_STATUS:
            answer.raise_for_status()
        try:
            body = answer.json()
        except ValueError:
            body = {"error": answer.text[:200]}
        return answer.status_code, body if isinstance(body, dict) else {"error": str(body)[:200]}

    with hub_client.convert_errors(repo):
        code, body = hub_client.retry(ask)
    if code in (401, 403, 404):
        message = str(body.get("error", body))[:200]
        raise InputError(f"{repo}: {tag}: the hub's registry answers {code}: {message}")
    return code, body


def _list_other_files(manifest: Manifest) -> Iterator[OllamaResolution]:
    """Yield the files of a release that end in .gguf and are no model."""
    yield OllamaResolution(file=manifest.imatrix.path, why="the importance matrix, no model")
    if manifest.vision:
        why = "the vision projector, no model; the hub adds it to the others"
        yield OllamaResolution(file=manifest.vision.path, why=why)


def _find_file_faults(variant: VariantRecord, file: Receipt) -> Iterator[str]:
    if file.bytes > MAX_FILE_BYTES:
        yield (
            f"{file.path}: expected at most {MAX_FILE_BYTES} bytes, the hub's limit, found"
            f" {file.bytes}"
        )
    if FIRST_SHARD.fullmatch(PurePosixPath(file.path).stem):
        yield f"{file.path}: expected a whole file, found a first shard without the others"
    if types := sorted({t.type for t in variant.tensors.values()} & set(TERNARY)):
        yield f"{file.path}: expected types that Ollama can run, found {', '.join(types)}"


def _read_companions(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what params, template and system are, and what is wrong with params."""
    companions = {
        name: f"sha256 {files.hash_file(folder / name)[:12]}"
        if (folder / name).is_file()
        else without
        for name, without in COMPANIONS.items()
    }
    path = folder / PARAMS
    if not path.is_file():
        return companions, (
            f"{path}: missing; it has the sampling that the model's authors advise",
        )
    try:
        read_params(path)
    except InputError as e:
        return companions, e.problems
    return companions, ()


def _find_default(models: Sequence[OllamaResolution]) -> str:
    tags = [f.tag for f in models if f.pulled]
    if DEFAULT in tags:
        return DEFAULT
    listed = ", ".join(tags)
    return f"the hub's choice among {listed}, because there is no {DEFAULT}" if tags else "nothing"


def _ask_registry(
    repo: str, local: OllamaResolution, variant: VariantRecord, companions: Mapping[str, str]
) -> OllamaResolution:
    """Return what the hub's registry makes of a file, with the faults found before."""
    # A split variant is asked for by its label, for which the hub should refuse it.
    tag = local.tag or read_quant_label(local.file) or variant.name
    code, body = fetch_registry(repo, tag)
    if code != 200:
        message = str(body.get("error", body))[:200]
        fault = f"{repo}:{tag}: expected a manifest, found {code}: {message}"
        return replace(
            local,
            tag=tag,
            pulled=False,
            why=f"the hub answers {code}: {message}",
            faults=(*local.faults, *([fault] if local.pulled else [])),
        )
    layers = {str(x.get("mediaType", "")).removeprefix(LAYER): x for x in body.get("layers", ())}
    faults = _find_layer_faults(f"{repo}:{tag}", layers, variant.files, companions)
    return replace(
        local,
        tag=tag,
        pulled=True,
        why=f"the hub has {', '.join(layers)}",
        faults=(*local.faults, *faults),
    )


def _find_layer_faults(
    where: str,
    layers: Mapping[str, Mapping[str, Any]],
    published: Sequence[Receipt],
    companions: Mapping[str, str],
) -> Iterator[str]:
    model = layers.get("model")
    expected = {f"sha256:{f.sha256}": f.bytes for f in published}
    if model is None:
        yield f"{where}: expected a model among the layers, found {', '.join(layers) or 'none'}"
    elif (digest := model.get("digest")) not in expected or expected[digest] != model.get("size"):
        listed = ", ".join(f"{d} of {size} bytes" for d, size in expected.items())
        yield (f"{where}: expected the model {listed}, found {digest} of {model.get('size')} bytes")
    for name, what in companions.items():
        if what.startswith("sha256") and name not in layers:
            yield (
                f"{where}: expected the release's {name} among the layers, found"
                f" {', '.join(layers)}"
            )
