"""What Ollama makes of a release: by the hub's rules, and as a registry says."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from quant.core.errors import InputError, Unreachable
from quant.core.files import Receipt
from quant.core.secrets import TOKEN
from quant.hub import client as hub_client
from quant.plan.load import list_recipes, load_model
from quant.release import ollama_registry
from quant.release.manifest import Manifest, VariantRecord
from quant.release.ollama_registry import check_release, read_quant_label, resolve_tags
from tests.quant.release.manifests import make_manifest, make_variant


# Names and labels of huggingface.js's own tests (packages/gguf), and of this project's files.
@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("Meta-Llama-3-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("Codestral-22B-v0.1-IQ3_XS.gguf", "IQ3_XS"),
        ("Codestral-22B-v0.1-Q2_K.gguf", "Q2_K"),
        ("Codestral-22B-v0.1.gguf", None),
        ("Codestral-22B-v0.1-IQ3_XS-Q4_K_M.gguf", "Q4_K_M"),
        ("model.q8_0.gguf", "Q8_0"),
        ("GLM-4.6-UD-TQ1_0.gguf", "UD-TQ1_0"),
        ("UD-Q2_K_XL/GLM-4.6-UD-Q2_K_XL.gguf", "UD-Q2_K_XL"),
        ("GLM-4.6-IQ4_NL.gguf", "IQ4_NL"),
        ("GLM-4.6-BF16.gguf", "BF16"),
        ("Q4_0/GLM-4.6.gguf", None),
        ("imatrix_GLM-4.6.gguf", None),
    ],
)
def test_a_tag_is_what_the_hub_reads_out_of_a_name(name: str, tag: str | None) -> None:
    assert read_quant_label(name) == tag


@pytest.mark.parametrize("model", list_recipes("models"))
def test_every_variant_of_every_model_has_a_tag_of_its_own(model: str) -> None:
    recipe, _ = load_model(model)
    tags = [read_quant_label(f"{recipe.title}-{variant}.gguf") for variant in recipe.variants]
    assert tags == list(recipe.variants)


def variant(name: str, *paths: str, size: int = 10, kind: str = "IQ1_S") -> VariantRecord:
    return make_variant(name, *paths, size=size, kind=kind)


WHOLE, SPLIT = (
    variant("UD-TQ1_0", "M-UD-TQ1_0.gguf"),
    variant("Q4_1", *(f"Q4_1/M-Q4_1-0000{n}-of-00002.gguf" for n in (1, 2))),
)


def test_a_whole_file_is_pulled_by_its_tag_and_a_split_one_is_not() -> None:
    whole, split = resolve_tags([WHOLE, SPLIT])
    assert (whole.file, whole.tag, whole.pulled, whole.faults) == (
        "M-UD-TQ1_0.gguf",
        "UD-TQ1_0",
        True,
        (),
    )
    assert (split.file, split.pulled, split.faults) == (
        "Q4_1/M-Q4_1-00001-of-00002.gguf",
        False,
        (),
    )
    assert "quant merge" in split.why


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (variant("A", "M-Q4_1.gguf", size=500 * 10**9 + 1), "expected at most 500000000000 bytes"),
        (
            variant("A", "M-Q4_1.gguf", kind="TQ1_0"),
            "expected types that Ollama can run, found TQ1_0",
        ),
        (variant("A", "M-Q4_1-00001-of-00002.gguf"), "found a first shard without the others"),
    ],
)
def test_a_file_that_ollama_could_not_run_is_a_fault(broken: VariantRecord, message: str) -> None:
    [resolution] = resolve_tags([broken])
    assert not resolution.pulled
    assert message in resolution.faults[0]


def test_a_name_without_a_scheme_is_a_tag_as_a_whole_and_two_of_one_scheme_are_a_fault() -> None:
    [named] = resolve_tags([variant("A", "M-mine.gguf")])
    assert (named.tag, named.pulled) == ("M-mine.gguf", True)
    one, other = resolve_tags([variant("A", "M-a-Q4_1.gguf"), variant("B", "M-b-Q4_1.gguf")])
    assert "tag Q4_1: expected one file with that tag, found 2" in one.faults[0] and other.faults


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_text(manifest.to_json())


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    write_manifest(folder, make_manifest(variants=(WHOLE, SPLIT)))
    (folder / "params").write_text('{"temperature": 1.0, "stop": ["<|user|>"]}')
    (folder / "template").write_text("{{ .Messages }}")
    return folder


def test_a_release_is_told_whole(release: Path) -> None:
    check = check_release(release)
    assert check.all_faults == ()
    assert [f.tag for f in check.files] == ["UD-TQ1_0", "", ""]
    assert check.default == "the hub's choice among UD-TQ1_0, because there is no Q4_K_M"
    assert check.beside["params"].startswith("sha256 ") and check.beside["system"] == "none"
    assert check.json()["passed"] is True


def test_files_that_are_no_model_are_named_as_that(release: Path) -> None:
    vision = Receipt("mmproj-M-F16.gguf", "0" * 64, 10)
    write_manifest(release, make_manifest(variants=(WHOLE, SPLIT), vision=vision))
    *_, matrix, projector = check_release(release).files
    assert (matrix.file, matrix.pulled, matrix.why) == (
        "imatrix_tiny-glm.gguf",
        False,
        "the importance matrix, no model",
    )
    assert (projector.file, projector.pulled) == ("mmproj-M-F16.gguf", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "params: missing"),
        ("{", "params: expected JSON"),
        ("[]", "params: expected an object"),
        ('{"stop": "x"}', "params: stop: expected an array of strings"),
        ('{"temprature": 1}', "did you mean 'temperature'?"),
    ],
)
def test_parameters_that_ollama_would_not_take_are_faults(
    release: Path, text: str | None, message: str
) -> None:
    (release / "params").unlink()
    if text is not None:
        (release / "params").write_text(text)
    assert message in check_release(release).all_faults[0]


def test_the_default_is_q4_k_m_where_a_release_has_it(release: Path) -> None:
    usual = variant("Q4_K_M", "M-Q4_K_M.gguf")
    write_manifest(release, make_manifest(variants=(WHOLE, SPLIT, usual)))
    assert check_release(release).default == "Q4_K_M"


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        check_release(tmp_path)


# ---- as the hub has it


class Registry(ThreadingHTTPServer):
    """The hub's registry: what it answers for a tag, and what it was asked with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.tags: dict[str, tuple[int, Any]] = {}
        self.asked: list[tuple[str, str, str]] = []


class Answer(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        self.server.asked.append(
            (self.path, self.headers.get("Accept", ""), self.headers.get("Authorization", ""))
        )
        code, answer_body = self.server.tags.get(
            self.path.rpartition("/")[2], (404, {"error": "Repository not found"})
        )
        body = (
            answer_body.encode()
            if isinstance(answer_body, str)
            else json.dumps(answer_body).encode()
        )
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        class Client:
            endpoint = f"http://127.0.0.1:{server.server_address[1]}"

        monkeypatch.setattr(hub_client, "make_client", Client)
        monkeypatch.setattr(hub_client, "MAX_TRIES", 1)
        monkeypatch.delenv(TOKEN, raising=False)
        server.tags = {
            "UD-TQ1_0": (200, published()),
            "Q4_1": (400, {"error": "The specified tag is a sharded GGUF."}),
        }
        yield server
        server.shutdown()
        thread.join()


def layer(kind: str, digest: str = "0" * 64, size: int = 1) -> dict[str, Any]:
    return {
        "mediaType": f"application/vnd.ollama.image.{kind}",
        "digest": f"sha256:{digest}",
        "size": size,
    }


def published(*layers: dict[str, Any]) -> dict[str, Any]:
    usual = (layer("model", f"{1:064x}", 10), layer("template"), layer("params"))
    return {
        "schemaVersion": 2,
        "mediaType": ollama_registry.ACCEPT,
        "config": {},
        "layers": list(layers or usual),
    }


def test_what_the_hub_has_is_compared_with_the_release(release: Path, registry: Registry) -> None:
    check = check_release(release, "me/m")
    assert check.all_faults == ()
    assert [(f.tag, f.pulled) for f in check.files] == [
        ("UD-TQ1_0", True),
        ("Q4_1", False),
        ("", False),
    ]
    assert check.files[1].why == "the hub answers 400: The specified tag is a sharded GGUF."
    assert registry.asked[0] == ("/v2/me/m/manifests/UD-TQ1_0", ollama_registry.ACCEPT, "")


def test_a_private_repo_is_asked_with_the_token(
    release: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, "abc")
    check_release(release, "me/m")
    assert registry.asked[0][2] == "Bearer abc"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (200, published(layer("model", "9" * 64, 10), layer("template"), layer("params"))),
            "expected the model sha256:000",
        ),
        (
            (200, published(layer("model", f"{1:064x}", 9), layer("template"), layer("params"))),
            "of 9 bytes",
        ),
        (
            (200, published(layer("model", f"{1:064x}", 10), layer("params"))),
            "expected the release's template among the",
        ),
        ((200, published(layer("template"))), "expected a model among the layers, found template"),
        ((200, {}), "expected a model among the layers, found none"),
        (
            (400, {"error": "not a valid quantization scheme"}),
            "expected a manifest, found 400: not a valid quantization",
        ),
        ((400, "plain words"), "expected a manifest, found 400: plain words"),
        ((400, [1]), "expected a manifest, found 400: [1]"),
    ],
)
def test_what_the_hub_has_otherwise_is_a_fault(
    answer: tuple[int, Any], message: str, release: Path, registry: Registry
) -> None:
    registry.tags["UD-TQ1_0"] = answer
    [fault, *_] = check_release(release, "me/m").all_faults
    assert fault.startswith("me/m:UD-TQ1_0: ") and message in fault


def test_a_repo_that_is_not_there_is_wrong_input_and_a_hub_that_stumbles_may_pass(
    release: Path, registry: Registry
) -> None:
    registry.tags["UD-TQ1_0"] = (401, {"error": "Invalid username or password."})
    with pytest.raises(
        InputError, match="me/m: UD-TQ1_0: the hub's registry answers 401: Invalid username"
    ):
        check_release(release, "me/m")
    registry.tags["UD-TQ1_0"] = (503, {})
    with pytest.raises(Unreachable):
        check_release(release, "me/m")
