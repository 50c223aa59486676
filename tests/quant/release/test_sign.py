"""Signing a release by the real package with openssl's keys; its verifier has the last word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing.verifying import Config

from quant.core import files
from quant.core.errors import CheckError, InputError
from quant.hub.upload import Destination
from quant.release.change import plan_change
from quant.release.folder import SIGNATURE, open_release
from quant.release.publish import publish_release
from quant.release.sign import PASSWORD, find_signature_problems, sign_release
from quant.release.verify import verify_release
from tests.hub import Hub
from tests.quant.release.publishing import CONTENT, REPO, read_folder, read_repo, write_release

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content="
)  # the hub's client to its own HTTP library


def key_file(path: Path, password: bytes | None = None, private: Any = None) -> Path:
    """A key in a file, and its public half beside it."""
    key_path = private or ec.generate_private_key(ec.SECP256R1())
    locked = forms.BestAvailableEncryption(password) if password else forms.NoEncryption()
    path.write_bytes(key_path.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, locked))
    half = key_path.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(half)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return key_file(tmp_path / "maker.pem")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_release(tmp_path / "tiny")


def problems(folder: Path, key: Path) -> list[str]:
    digests = {r.path: r.sha256 for r in open_release(folder).files if r.path != SIGNATURE}
    return list(find_signature_problems(folder, digests, key.with_suffix(".pub")))


def test_a_signed_release_is_known_by_the_public_key_and_nothing_else_in_it_changed(
    folder: Path, key: Path
) -> None:
    before = read_folder(folder)
    assert sign_release(folder, key)
    assert problems(folder, key) == []
    assert {n: d for n, d in read_folder(folder).items() if n != SIGNATURE} == before


def test_signing_again_with_the_same_key_changes_nothing_and_another_key_signs_anew(
    folder: Path, key: Path
) -> None:
    sign_release(folder, key)
    before = (folder / SIGNATURE).read_bytes()
    assert not sign_release(folder, key)
    assert (folder / SIGNATURE).read_bytes() == before
    assert sign_release(folder, key_file(key.with_name("other.pem")))
    assert (folder / SIGNATURE).read_bytes() != before


def test_the_packages_own_verifier_reads_every_file_and_agrees(folder: Path, key: Path) -> None:
    sign_release(folder, key)
    (folder / ".gitattributes").write_text("what the hub puts there")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("what its client leaves")
    config = Config().use_elliptic_key_verifier(public_key=key.with_suffix(".pub"))
    config.verify(folder, folder / SIGNATURE)
    (folder / "params").write_bytes(b"{ }")
    with pytest.raises(ValueError, match="Hash mismatch for 'params'"):
        config.verify(folder, folder / SIGNATURE)


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_keys_of_every_curve_that_the_form_knows_sign(
    folder: Path, tmp_path: Path, curve: Callable[[], object]
) -> None:
    key_path = key_file(tmp_path / "k.pem", private=ec.generate_private_key(curve()))  # type: ignore[arg-type]
    sign_release(folder, key_path)
    assert problems(folder, key_path) == []


def test_a_key_with_a_password_is_opened_by_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_path = key_file(tmp_path / "k.pem", b"open sesame")
    for wrong in ("", "guess"):
        monkeypatch.setenv(PASSWORD, wrong)
        with pytest.raises(InputError, match=f"k.pem: .*{PASSWORD}") as e:
            sign_release(folder, key_path)
        assert len(e.value.problems) == 1
    monkeypatch.setenv(PASSWORD, "open sesame")
    assert sign_release(folder, key_path)
    assert problems(folder, key_path) == []


def test_another_key_a_changed_signature_and_a_missing_one_are_told_apart(
    folder: Path, key: Path
) -> None:
    other = key_file(key.with_name("other.pem"))
    assert problems(folder, key) == [f"{folder / SIGNATURE}: missing; the release is not signed"]
    sign_release(folder, key)
    assert problems(folder, other) == [
        f"{folder / SIGNATURE}: not by the key {other.with_suffix('.pub')}"
    ]
    bundle = json.loads((folder / SIGNATURE).read_text())
    good = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = good[:-8] + "AAAA" + good[-4:]
    (folder / SIGNATURE).write_text(json.dumps(bundle))
    (problem,) = problems(folder, key)
    assert problem.startswith(
        f"{folder / SIGNATURE}: not by the key {key.with_suffix('.pub')}, or changed since"
    )
    (folder / SIGNATURE).write_text("no bundle")
    assert problems(folder, key)[0].startswith(f"{folder / SIGNATURE}: does not fit the files (")


def test_files_that_fit_their_lists_and_are_not_those_that_were_signed_are_found(
    folder: Path, key: Path
) -> None:
    """Who can write the files can write the lists too: only the signature tells."""
    sign_release(folder, key)
    write_release(folder, {**CONTENT, "params": b"{ }"})
    (problem,) = problems(folder, key)
    assert "does not fit the files (Signature mismatch" in problem
    assert "'params'" in problem


def test_a_release_that_was_changed_by_hand_is_not_signed(folder: Path, key: Path) -> None:
    (folder / "params").write_bytes(b"changed")
    with pytest.raises(CheckError, match="params: was changed since it was made"):
        sign_release(folder, key)
    assert not (folder / SIGNATURE).exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "rsa", "strange curve", "public"])
def test_a_key_that_is_none_is_one_line(folder: Path, tmp_path: Path, key: Path, kind: str) -> None:
    path = tmp_path / "k.pem"
    if kind == "empty":
        path.write_text("")
    elif kind == "rsa":
        key_file(path, private=rsa.generate_private_key(65537, 2048))
    elif kind == "strange curve":
        key_file(path, private=ec.generate_private_key(ec.SECP256K1()))
    elif kind == "public":
        path = key.with_suffix(".pub")
    with pytest.raises(InputError, match=f"{path}: expected a PEM file with an elliptic key") as e:
        sign_release(folder, path)
    assert len(str(e.value).splitlines()) == 1
    assert not (folder / SIGNATURE).exists()


def test_a_public_key_that_is_none_is_one_line(folder: Path, key: Path) -> None:
    sign_release(folder, key)
    with pytest.raises(
        InputError, match=f"{key}: expected a PEM file with the public half of an elliptic key"
    ):
        list(find_signature_problems(folder, {}, key))


def test_verifying_with_a_key_checks_the_signature_and_without_one_says_that_it_did_not(
    release: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    key = key_file(tmp_path_factory.mktemp("keys") / "maker.pem")
    public = key.with_suffix(".pub")
    assert any("it has no signature" in line for line in verify_release(release).unchecked)
    assert verify_release(release, public).problems == (
        f"{release / SIGNATURE}: missing; the release is not signed",
    )
    sign_release(release, key)
    assert verify_release(release).problems == ()
    assert any(f"{SIGNATURE} was not checked" in line for line in verify_release(release).unchecked)
    result = verify_release(release, public)
    assert result.problems == ()
    assert result.checked[-1] == f"{SIGNATURE}: the files are signed by the key {public}"
    assert not any("who made" in line for line in result.unchecked)
    other = key_file(key.with_name("other.pem")).with_suffix(".pub")
    assert verify_release(release, other).problems == (
        f"{release / SIGNATURE}: not by the key {other}",
    )


def test_publishing_takes_the_signature_along_and_a_later_release_does_not_keep_it(
    the_hub: Hub, folder: Path, tmp_path: Path, key: Path
) -> None:
    sign_release(folder, key)
    publish_release(plan_change(folder, Destination(REPO)))
    assert read_repo(the_hub) == read_folder(folder)
    assert SIGNATURE in read_repo(the_hub)
    newer = write_release(tmp_path / "newer" / "tiny", {**CONTENT, "params": b"{ }"})
    planned = plan_change(newer, Destination(REPO))
    assert planned.removes == (SIGNATURE,)
    publish_release(planned)
    assert read_repo(the_hub) == read_folder(newer)


def test_without_the_package_the_error_says_what_to_install(
    folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing.signing", None)
    with pytest.raises(
        InputError,
        match=r"signatures need the package model-signing .*install gguf-foundry\[sign\]",
    ):
        sign_release(folder, key)
    assert files.hash_file(folder / "params")
