"""Sign a release with its maker's key, and check such a signature, without network.

The signature is a bundle of OpenSSF's model signing, so that ``model_signing verify key`` checks it
as well. It covers the digests in the release's lists, after they were compared with the files or
the digest cache. So signing does not read hundreds of gigabytes again.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quant.core import files
from quant.core.errors import InputError
from quant.release.folder import HUB_FILES, SIGNATURE, ReleaseFolder, open_release

if TYPE_CHECKING:
    from model_signing.hashing import Config as HashingConfig

PASSWORD = "QUANT_KEY_PASSWORD"
"""The environment variable with the password of a locked key file."""
KEYS = "a PEM file with an elliptic key (openssl ecparam -name prime256v1 -genkey -noout)"


def sign_release(folder: Path, key: Path) -> bool:
    """Sign the release in a folder.

    Args:
        folder: The release.
        key: A PEM file with an elliptic key.

    Returns:
        False if this key has signed these files already.

    Raises:
        InputError: For a file that is no such key.
        CheckError: For a folder that was changed since it was made.
    """
    check_signing_key(key)
    return sign_opened(open_release(folder), key)


def sign_opened(release: ReleaseFolder, key: Path) -> bool:
    """Sign a release whose files were compared with its lists, as :func:`sign_release` does."""
    from model_signing.signing import Config

    digests = {r.path: r.sha256 for r in release.files if r.path != SIGNATURE}
    with TemporaryDirectory() as temp:
        public, signature = Path(temp) / "public.pem", Path(temp) / SIGNATURE
        public.write_bytes(_export_public_key(key))
        # ECDSA signatures differ each time: signing again would change the release's bytes.
        if not list(find_signature_problems(release.folder, digests, public)):
            return False
        with _convert_key_errors(key, KEYS):
            config = Config()
            config.use_elliptic_key_signer(private_key=key, password=_read_password())
        config.set_hashing_config(_make_hashing(digests)).sign(release.folder, signature)
        # The package writes in place. From here the file appears whole or not at all.
        files.write_text(release.folder / SIGNATURE, signature.read_text())
    return True


def check_signing_key(key: Path) -> None:
    """Raise InputError for a key that cannot sign; called before any work."""
    with _convert_import_errors(), _convert_key_errors(key, KEYS):
        from model_signing.signing import Config

        Config().use_elliptic_key_signer(private_key=key, password=_read_password())


def find_signature_problems(
    folder: Path, digests: Mapping[str, str], public_key: Path
) -> Iterator[str]:
    """Yield why files do not count as signed by a key; nothing means that they do.

    Args:
        folder: The release.
        digests: The sha256 of every file, by name.
        public_key: A PEM file with the public half of an elliptic key.

    Raises:
        InputError: For a file that is no such key.
    """
    from cryptography.exceptions import InvalidSignature

    expected = "a PEM file with the public half of an elliptic key"
    with _convert_import_errors(), _convert_key_errors(public_key, expected):
        from model_signing.verifying import Config

        config = Config().use_elliptic_key_verifier(public_key=public_key)
    signature = folder / SIGNATURE
    if not signature.is_file():
        yield f"{signature}: missing; the release is not signed"
        return
    try:
        config.set_hashing_config(_make_hashing(digests)).verify(folder, signature)
    except InvalidSignature:
        yield f"{signature}: not by the key {public_key}, or changed since"
    except (ValueError, KeyError, TypeError, AttributeError) as e:  # so a broken bundle fails too
        message = str(e).splitlines()[0] if str(e) else type(e).__name__
        if message.startswith("Key mismatch"):
            yield f"{signature}: not by the key {public_key}"
        else:
            yield f"{signature}: does not fit the files ({message})"


def _make_hashing(digests: Mapping[str, str]) -> "HashingConfig":
    """Return the hashing of model_signing with known digests; its own reads every file."""
    from model_signing._hashing.hashing import Digest  # name and bytes; it has no public name
    from model_signing.hashing import Config
    from model_signing.manifest import Manifest, SerializationType

    # Part of the signature: model_signing learns from it which files to hash, and how.
    settings = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": [SIGNATURE, *HUB_FILES],
    }
    kind = SerializationType.from_args(settings)
    items = [
        kind.new_item(name, Digest("sha256", bytes.fromhex(sha)))
        for name, sha in sorted(digests.items())
    ]

    class KnownDigests(Config):
        def hash(self, model_path: Any, **_: Any) -> Manifest:
            return Manifest(Path(model_path).name, items, kind)

    return KnownDigests()  # type: ignore[no-untyped-call]  # its base has no annotation there


def _export_public_key(key: Path) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_private_key,
    )

    public = load_pem_private_key(key.read_bytes(), _read_password()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _read_password() -> Any:
    # Bytes, which the package needs although it declares str.
    return os.environ.get(PASSWORD, "").encode() or None


@contextmanager
def _convert_import_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as e:
        raise InputError(
            f"signatures need the package model-signing ({e}); install gguf-foundry[sign]"
        ) from None


@contextmanager
def _convert_key_errors(key: Path, expected: str) -> Iterator[None]:
    """Convert what cryptography raises for a key file to one line."""
    from cryptography.exceptions import UnsupportedAlgorithm

    # "from None" everywhere: a cause may quote what is in the key file.
    try:
        yield
    except OSError as e:
        raise InputError(f"{key}: expected {expected}, found none ({e.strerror})") from None
    # What cryptography raises for a password that is missing, or that the key does not have.
    except TypeError:
        raise InputError(
            f"{key}: locked with a password, or not locked with one; set or unset {PASSWORD}"
        ) from None
    except (ValueError, AttributeError, UnsupportedAlgorithm):
        raise InputError(
            f"{key}: expected {expected}, found something else, or {PASSWORD} is not its password"
        ) from None
