# SPDX-License-Identifier: Apache-2.0
"""Private keys, signatures, and the files that hold them.

All keys are ECDSA over P-256 with SHA-256 (FIPS 186-5): what TLS 1.3 requires everybody to read (RFC 8446, 9.1).

Guarantees:

====================================  =====================================================================
a private key on disk                 is never readable by others, not even while it is being written
a file that is there                  is never overwritten unless the caller says so
a crash while writing                 leaves the old file or the new one
a signature for one purpose           is worthless for another: the purpose is signed too
====================================  =====================================================================
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hansa.core.storage import sync_directory
from hansa.errors import AccessError, StorageError

PRIVATE = 0o600
PUBLIC = 0o644

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> PrivateKey:
    """Make a private key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """Return a private key as PKCS #8 PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes, path: Path) -> PrivateKey:
    """Read a private key; ``path`` is where it came from.

    Raises:
        AccessError: it is no P-256 key in PEM.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise AccessError(f"{path} is no private key. Restore it, or ask for a new certificate.") from error
    if not isinstance(key, PrivateKey) or not is_p256(key.public_key()):
        raise AccessError(f"{path} is no P-256 key. `hansa pki request` makes one that is.")
    return key


def is_p256(key: object) -> bool:
    """Say whether a public key is of the one kind in use here."""
    return isinstance(key, PublicKey) and isinstance(key.curve, ec.SECP256R1)


def public_bytes(key: PublicKey) -> bytes:
    """Return a public key as DER (SubjectPublicKeyInfo), by which two are compared."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(key: PrivateKey, purpose: str, data: bytes) -> bytes:
    """Return the DER signature of ``data`` for one purpose, such as ``roster``."""
    return key.sign(_message(purpose, data), ec.ECDSA(hashes.SHA256()))


def signed(key: PublicKey, purpose: str, data: bytes, signature: bytes) -> bool:
    """Say whether ``signature`` is that of ``data``, made for this purpose by the holder of ``key``."""
    try:
        key.verify(signature, _message(purpose, data), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _message(purpose: str, data: bytes) -> bytes:
    return b"hansa signature v1\0" + purpose.encode() + b"\0" + data


def read(path: Path) -> bytes:
    """Read a small file.

    Raises:
        StorageError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"Can't read {path}: {error.strerror}.") from error


def write(path: Path, data: bytes, mode: int = PUBLIC, *, replace: bool = False) -> None:
    """Write a file whole or not at all, durably, with ``mode`` from its first byte on.

    Raises:
        StorageError: it is there already and ``replace`` is not set, or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)  # unlike a rename, this refuses a name that is taken
            temporary.unlink()
        sync_directory(path.parent)
    except FileExistsError as error:
        raise StorageError(f"{path} is there already and is left as it is. Choose another folder.") from error
    except OSError as error:
        raise StorageError(f"Can't write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
