"""Sign a release with a key of its maker, and tell whether it was signed: one file beside the others, no network.

The signature is a bundle of OpenSSF's model signing, so that everybody's ``model_signing verify key`` can check it too. It
speaks of digests that the release's lists hold and that were compared with the files: hundreds of gigabytes are not read again.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.core import files
from quant.errors import InputError
from quant.release.folder import HUBS_OWN, SIGNATURE, ReleaseFolder, open_release

if TYPE_CHECKING:
    from model_signing.hashing import Config as Hashing

PASSWORD = "QUANT_KEY_PASSWORD"
"""The variable that opens a key file which is locked."""
KEYS = "a PEM file with an elliptic key (openssl ecparam -name prime256v1 -genkey -noout)"


def sign_release(folder: Path, key: Path) -> bool:
    """Sign the release in a folder; False when this key has signed these files already.

    Raises InputError for a key that is none, CheckFailed for a folder that was changed since it was made.
    """
    signer_problems(key)
    return sign_opened(open_release(folder), key)


def sign_opened(release: ReleaseFolder, key: Path) -> bool:
    """Sign a release whose files were compared with its lists, as :func:`sign` does."""
    from model_signing.signing import Config

    digests = {r.path: r.sha256 for r in release.files if r.path != SIGNATURE}
    with TemporaryDirectory() as place:
        public, made = Path(place) / "public.pem", Path(place) / SIGNATURE
        public.write_bytes(_public(key))
        if not list(signature_problems(release.folder, digests, public)):
            return False
        with _reading(key, KEYS):
            config = Config().use_elliptic_key_signer(private_key=key, password=_password())  # type: ignore[arg-type]  # it takes bytes
        config.set_hashing_config(_known(digests)).sign(release.folder, made)
        files.write_text(release.folder / SIGNATURE, made.read_text())
    return True


def signer_problems(key: Path) -> None:
    """Raise InputError for a key that cannot sign, before any work."""
    with _installed(), _reading(key, KEYS):
        from model_signing.signing import Config

        Config().use_elliptic_key_signer(private_key=key, password=_password())  # type: ignore[arg-type]  # it takes bytes


def signature_problems(folder: Path, digests: Mapping[str, str], public_key: Path) -> Iterator[str]:
    """Why files of these digests do not count as signed by that key; nothing means that they do.

    Raises InputError for a key that is none.
    """
    from cryptography.exceptions import InvalidSignature

    with _installed(), _reading(public_key, "a PEM file with the public half of an elliptic key"):
        from model_signing.verifying import Config

        config = Config().use_elliptic_key_verifier(public_key=public_key)
    signature = folder / SIGNATURE
    if not signature.is_file():
        yield f"{signature}: missing; the release is not signed"
        return
    try:
        config.set_hashing_config(_known(digests)).verify(folder, signature)
    except InvalidSignature:
        yield f"{signature}: not by the key {public_key}, or changed since"
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # of a bundle that is none, too
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        other = said.startswith("Key mismatch")
        yield (
            f"{signature}: not by the key {public_key}"
            if other
            else f"{signature}: does not fit the files ({said})"
        )


def _known(digests: Mapping[str, str]) -> "Hashing":
    """What model_signing would find out by reading every file."""
    from model_signing._hashing.hashing import (
        Digest,  # a pair of name and bytes, which has no public name
    )
    from model_signing.hashing import Config
    from model_signing.manifest import Manifest, SerializationType

    kind = SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE, *HUBS_OWN],
        }
    )
    items = [
        kind.new_item(name, Digest("sha256", bytes.fromhex(sha)))
        for name, sha in sorted(digests.items())
    ]

    class Known(Config):
        def hash(self, model_path: Any, **_: Any) -> Manifest:
            return Manifest(Path(model_path).name, items, kind)

    return Known()  # type: ignore[no-untyped-call]  # its base says no types there


def _public(key: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization as forms

    private = forms.load_pem_private_key(key.read_bytes(), _password())
    return private.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )


def _password() -> bytes | None:
    return os.environ.get(PASSWORD, "").encode() or None


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as e:
        raise InputError(
            f"signatures need the package model-signing ({e}); install gguf-foundry[sign]"
        ) from None


@contextmanager
def _reading(key: Path, expected: str) -> Iterator[None]:
    """Say in one line what is wrong with a key file, and nothing of what is in it."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except OSError as e:
        raise InputError(f"{key}: expected {expected}, found none ({e.strerror})") from None
    except TypeError:
        raise InputError(
            f"{key}: locked with a password, or not locked with one; {PASSWORD} has to hold it"
        ) from None
    except (ValueError, AttributeError, UnsupportedAlgorithm):
        raise InputError(
            f"{key}: expected {expected}, found something else, or {PASSWORD} is not its password"
        ) from None
