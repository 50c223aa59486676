"""What ``ollama run hf.co/OWNER/NAME:TAG`` makes of a release: by the hub's rules before it is published, asked of it after.

The hub speaks Ollama's registry protocol: a tag is what its rules read out of a file's name, or that whole name, and of
a split model there is none. The release's ``params``, ``template`` and ``system`` go with every file.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quant.core import files
from quant.errors import InputError
from quant.hub import client as hub_client
from quant.llama.gguf import FIRST_SHARD
from quant.release.folder import read_manifest
from quant.release.ollama import params_problems

# huggingface.js, packages/gguf: GGMLFileQuantizationType in its order, of which the first that fits counts, and
# GGUF_QUANT_RE; of several in a name the last.
SCHEMES = (
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_1_SOME_F16",
    "Q4_2",
    "Q4_3",
    "Q8_0",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "IQ2_XXS",
    "IQ2_XS",
    "Q2_K_S",
    "IQ3_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ3_M",
    "IQ2_S",
    "IQ2_M",
    "IQ4_XS",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "MXFP4_MOE",
    "NVFP4",
    "Q1_0",
    "Q2_K_XL",
    "Q3_K_XL",
    "Q4_K_XL",
    "Q5_K_XL",
    "Q6_K_XL",
    "Q8_K_XL",
)
LABEL = re.compile(f"(?:UD-)?(?:{'|'.join(SCHEMES)})(?:_[A-Z]+)?")
DEFAULT = "Q4_K_M"
"""What stands for no tag at all, where a release has it."""
HUB_BYTES = 500 * 10**9
"""The hub takes no larger file."""
TERNARY = ("TQ1_0", "TQ2_0")
"""Types that Ollama cannot run on most accelerators, and that ruin weights which were not trained for them."""
ACCEPT = "application/vnd.docker.distribution.manifest.v2+json"
LAYER = "application/vnd.ollama.image."
BESIDE = ("params", "template", "system")
SPLIT = "the hub refuses the tag of a split model; put it together with `quant merge … --modelfile`"


@dataclass(frozen=True)
class OllamaResolution:
    """What a file of a release is for Ollama."""

    file: str
    """The first shard, of a split model."""
    tag: str
    """What a person writes behind the colon, if it can be pulled."""
    pulled: bool
    why: str
    """What comes of it, or why nothing does."""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class OllamaCheck:
    """What Ollama makes of a whole release."""

    files: tuple[OllamaResolution, ...]
    beside: Mapping[str, str]
    """Of params, template and system: what each is."""
    default: str
    """What the hub gives to who names no tag."""
    faults: tuple[str, ...]

    @property
    def all_faults(self) -> tuple[str, ...]:
        """Everything that is wrong."""
        return (*self.faults, *(fault for f in self.files for fault in f.faults))

    def json(self) -> dict[str, Any]:
        """As plain JSON."""
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
    """What every file of a release folder is for Ollama; with a repo, asked of the hub and compared with the folder.

    Raises InputError for a folder that is no release and a repo that is not there, Unreachable when the hub is not.
    """
    manifest = read_manifest(folder)
    found = tuple(resolve_tag(manifest["variants"]))
    beside, faults = _beside(folder)
    if repo:
        found = tuple(
            _asked(repo, f, variant, beside)
            for f, variant in zip(found, manifest["variants"], strict=True)
        )
    return OllamaCheck((*found, *_no_models(manifest)), beside, _default(found), faults)


def resolve_tag(variants: Sequence[Mapping[str, Any]]) -> Iterator[OllamaResolution]:
    """Each variant of a manifest by the hub's rules, without asking it."""
    labels = [quant_label(v["files"][0]["path"]) for v in variants if len(v["files"]) == 1]
    for variant in variants:
        first = variant["files"][0]
        name, tag = PurePosixPath(first["path"]).name, quant_label(first["path"])
        if len(variant["files"]) > 1:
            yield OllamaResolution(first["path"], "", False, SPLIT)
            continue
        faults = list(_file_faults(variant, first))
        if tag is None:
            tag, why = name, "no scheme in its name, so only its whole name is a tag"
        elif labels.count(tag) > 1:
            faults.append(
                f"{first['path']}: tag {tag}: expected one file of that tag, found {labels.count(tag)}"
            )
            tag, why = name, "another file has the same tag, so only its whole name is sure"
        else:
            why = f"the tag, in upper or lower case, with or without UD-, or the whole name {name}"
        yield OllamaResolution(first["path"], tag, not faults, why, tuple(faults))


def _no_models(manifest: Mapping[str, Any]) -> Iterator[OllamaResolution]:
    """The files of a release that end in .gguf too and are no model."""
    for key, why in (
        ("imatrix", "the importance matrix, no model"),
        ("vision", "the part that sees, no model; the hub adds it to the others"),
    ):
        if path := (manifest.get(key) or {}).get("path"):
            yield OllamaResolution(path, "", False, why)


def quant_label(path: str) -> str | None:
    """The tag that the hub reads out of a file's name; none when there is no scheme that it knows."""
    found = LABEL.findall(PurePosixPath(path).name.upper())
    return found[-1] if found else None


def _file_faults(variant: Mapping[str, Any], file: Mapping[str, Any]) -> Iterator[str]:
    if file["bytes"] > HUB_BYTES:
        yield f"{file['path']}: expected at most {HUB_BYTES} bytes, the hub's limit, found {file['bytes']}"
    if FIRST_SHARD.fullmatch(PurePosixPath(file["path"]).stem):
        yield f"{file['path']}: expected a whole file, found a first shard without the others"
    if types := sorted({t["type"] for t in variant["tensors"].values()} & set(TERNARY)):
        yield f"{file['path']}: expected types that Ollama can run, found {', '.join(types)}"


def _beside(folder: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the release tells Ollama, and what is wrong with it."""
    said = {
        "params": "missing: Ollama takes its own defaults",
        "template": "none: Ollama uses the Jinja in the file, or before 0.30 what the hub makes of it",
        "system": "none",
    }
    faults: list[str] = []
    for name in BESIDE:
        if (path := folder / name).is_file():
            said[name] = f"sha256 {files.hash_file(path)[:12]}"
    if not (folder / "params").is_file():
        return said, (
            f"{folder / 'params'}: missing; the sampling of the model's authors stands there",
        )
    try:
        told = json.loads((folder / "params").read_text(encoding="utf-8"))
    except ValueError as e:
        return said, (f"{folder / 'params'}: expected JSON, found something else ({e})",)
    if not isinstance(told, dict):
        return said, (f"{folder / 'params'}: expected an object, found {told!r:.80}",)
    faults += params_problems(told, str(folder / "params"))
    return said, tuple(faults)


def _default(found: Sequence[OllamaResolution]) -> str:
    if any(f.pulled and f.tag == DEFAULT for f in found):
        return DEFAULT
    able = [f.tag for f in found if f.pulled]
    return (
        f"the hub's choice among {', '.join(able)}, because there is no {DEFAULT}"
        if able
        else "nothing"
    )


def _asked(
    repo: str, local: OllamaResolution, variant: Mapping[str, Any], beside: Mapping[str, str]
) -> OllamaResolution:
    """The same file as the hub's registry has it."""
    tag = local.tag or quant_label(local.file) or variant["name"]
    code, said = fetch_registry(repo, tag)
    if code != 200:
        words = str(said.get("error", said))[:200]
        refused = (
            [f"{repo}:{tag}: expected a manifest, found {code}: {words}"] if local.pulled else []
        )
        return OllamaResolution(
            local.file, tag, False, f"the hub says {code}: {words}", (*local.faults, *refused)
        )
    layers = {str(x.get("mediaType", "")).removeprefix(LAYER): x for x in said.get("layers", ())}
    faults = tuple(_layer_faults(f"{repo}:{tag}", layers, variant["files"], beside))
    return OllamaResolution(
        local.file, tag, True, f"the hub has {', '.join(layers)}", (*local.faults, *faults)
    )


def _layer_faults(
    where: str,
    layers: Mapping[str, Mapping[str, Any]],
    published: Sequence[Mapping[str, Any]],
    beside: Mapping[str, str],
) -> Iterator[str]:
    model = layers.get("model")
    expected = {f"sha256:{f['sha256']}": f["bytes"] for f in published}
    if model is None:
        yield f"{where}: expected a model among the layers, found {', '.join(layers) or 'none'}"
    elif (digest := model.get("digest")) not in expected or expected[digest] != model.get("size"):
        listed = ", ".join(f"{d} of {size} bytes" for d, size in expected.items())
        yield f"{where}: expected the model {listed}, found {digest} of {model.get('size')} bytes"
    for name in BESIDE:
        if beside[name].startswith("sha256") and name not in layers:
            yield f"{where}: expected the release's {name} among the layers, found {', '.join(layers)}"


def fetch_registry(repo: str, tag: str) -> tuple[int, dict[str, Any]]:
    """The manifest of a tag as the hub gives it to Ollama, with the status of its answer. Raises Unreachable."""
    from huggingface_hub import get_session

    address = f"{hub_client.make_client().endpoint}/v2/{repo}/manifests/{tag}"
    headers = {"Accept": ACCEPT} | (
        {"Authorization": f"Bearer {secret}"} if (secret := hub_client.read_token()) else {}
    )

    def ask() -> tuple[int, dict[str, Any]]:
        answer = get_session().get(address, headers=headers, timeout=30)
        if answer.status_code in hub_client.MAY_PASS:
            answer.raise_for_status()
        try:
            said = answer.json()
        except ValueError:
            said = {"error": answer.text[:200]}
        return answer.status_code, said if isinstance(said, dict) else {"error": str(said)[:200]}

    with hub_client.convert_errors(repo):
        code, said = hub_client.retry(ask)
    if code in (401, 403, 404):
        raise InputError(
            f"{repo}: {tag}: the hub's registry says {code}: {str(said.get('error', said))[:200]}"
        )
    return code, said
