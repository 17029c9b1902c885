# SPDX-License-Identifier: Apache-2.0
"""Sealed messages between sites: files that only one site can open, for one round of one job, sure of who wrote them.

    recipient: a key pair for one round    ── Address: the public key, signed ──>                sender
    sender: a content key for one message  ── Head: for what, that key wrapped, signed; segments ──> recipient

The content key is wrapped by HPKE (RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM), with
all that the message is for as ``info``. The contents follow in segments of AES-256-GCM under it, as STREAM (Hoang,
Reyhanitabar, Rogaway and Vizár 2015, eprint 2015/189): a segment's nonce is its number and whether it is the last, its
associated data the head's SHA-256. Signatures are those of the sites' certificates, which the roster of whoever checks
them must admit then. A sealed message is an update whose parts are ``head`` and ``message``, bytes both, so it travels,
and is spooled, as updates do; memory is a segment.

Guarantees, against whoever carries messages and against every other site:

- the contents can be read by the recipient alone, who deletes its key when the round is over;
- what is opened is what the sender sealed, all of it, for this job, course, round, recipient and recipient's key.

| case | result |
|---|---|
| a bit altered, segments left out, repeated, or in another order; cut off, or lengthened | WireError |
| a message of another job, course, round or sender, for another site, or for an earlier key of this one | AccessError |
| an address or head that its site did not sign, or with a certificate that does not count now | AccessError |
| a site that signs another's message as its own | WireError: the sender is in what the key was wrapped for |
| one message opened twice | the same contents; one plan a round is the recipient's own rule (`hansa.site.history`) |
| the same contents sealed twice, or for two sites | different keys each time; no (key, nonce) is used twice |
| killed while it is opened | no file of the name it was to have |
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from hansa.core import storage, wire
from hansa.core import tree as trees
from hansa.core.lazy import Array, Leaf, Memo
from hansa.core.values import Chunk, Update
from hansa.errors import AccessError, StorageError, WireError
from hansa.pki.identities import Identities

MAX_BYTES = 1 << 17
"""The longest address or head: room for a thousand names."""

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_TAG = 16
_SEGMENT = trees.BLOCK - _TAG
"""Bytes of contents in a segment: with its tag, one chunk of an update's file."""

_HEAD, _MESSAGE = "head", "message"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
_Credential = Annotated[bytes, msgspec.Meta(max_length=1 << 15)]
_Signature = Annotated[bytes, msgspec.Meta(max_length=256)]


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What messages are for.

    Attributes:
        job: the digest of the signed job.
        course: the job's name, or that of one of its baselines.
        round: the round's number.
    """

    job: _Name
    course: _Name
    round: _Count


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mail-address"):
    """Where messages to a site go.

    Attributes:
        place: what they are for.
        site: the recipient.
        key: its X25519 public key, made for this place.
        credential: the certificate of who signed.
        signature: of all the others.
    """

    place: Place
    site: _Name
    key: _Key
    credential: _Credential
    signature: _Signature = b""


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mail-head"):
    """What comes before a message's segments.

    Attributes:
        place: what the message is for.
        sender, recipient: names of sites.
        key: the recipient's, which it was sealed with.
        trail: the sites that made the contents, in order; the sender is the last.
        num_bytes: of the contents.
        wrapped: the content key.
        credential: the certificate of who signed.
        signature: of all the others.
    """

    place: Place
    sender: _Name
    recipient: _Name
    key: _Key
    trail: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1)]
    num_bytes: _Count
    wrapped: Annotated[bytes, msgspec.Meta(max_length=256)]
    credential: _Credential
    signature: _Signature = b""


_S = TypeVar("_S", Address, Head)


def new_key() -> bytes:
    """Return a fresh private key for :func:`address` and :func:`unseal`; keep it secret."""
    return X25519PrivateKey.generate().private_bytes_raw()


def address(private: bytes, place: Place, site: str, identities: Identities) -> bytes:
    """Return the signed address of ``site``, whose identity this is."""
    return msgspec.msgpack.encode(_signed(Address(place, site, _public(private), identities.credential()), identities))


def read_address(data: bytes, place: Place, site: str, identities: Identities) -> Address:
    """Return an address that came from the network.

    Raises:
        WireError: these bytes are none.
        AccessError: it is another site's, for another place, or was not signed by the site.
    """
    found = _decoded(data, Address)
    if (found.place, found.site) != (place, site):
        raise AccessError(
            f"An address is that of {found.site!r} for round {found.place.round} of {found.place.course!r}; needed is "
            f"that of {site!r} for round {place.round} of {place.course!r}, in the same job. Nothing was sealed."
        )
    _check(found, site, identities)
    return found


def seal(contents: Path, out: Path, to: Address, sender: str, trail: tuple[str, ...], identities: Identities) -> None:
    """Write the sealed message of a file to ``out``.

    Args:
        contents: the file, which must not change meanwhile.
        out: where the message goes, the form of an update.
        to: an address that was checked.
        sender: this site.
        trail: the sites that made the contents.
        identities: this site's.

    Raises:
        WireError: the address has no key that can be sealed with.
        StorageError: the contents can't be read, the disk is full.
    """
    content_key = secrets.token_bytes(32)
    try:
        file = contents.open("rb", buffering=0)
    except OSError as error:
        raise StorageError(f"Can't read {contents}: {error.strerror}.") from error
    with file:
        num_bytes = contents.stat().st_size
        head = Head(to.place, sender, to.site, to.key, trail, num_bytes, b"", identities.credential())
        try:
            wrapped = _SUITE.encrypt(content_key, X25519PublicKey.from_public_bytes(to.key), _info(head))
        except ValueError as error:
            raise WireError(f"The address of {to.site!r} has a key that can't be sealed with.") from error
        signed = msgspec.msgpack.encode(_signed(msgspec.structs.replace(head, wrapped=wrapped), identities))
        cipher, bound = AESGCM(content_key), hashlib.sha256(signed).digest()

        def read(start: int, stop: int, memo: Memo) -> Array:
            number = start // trees.BLOCK
            data = os.pread(file.fileno(), _SEGMENT, number * _SEGMENT)
            if len(data) != stop - start - _TAG:
                raise StorageError(f"{contents} became shorter while it was sealed.")
            nonce = _nonce(number, last=stop == leaf.size)
            return np.frombuffer(cipher.encrypt(nonce, data, bound), np.uint8)

        leaf = Leaf((num_bytes + _TAG * _segments(num_bytes),), np.dtype(np.uint8), read)
        tree = trees.Lazy({_MESSAGE: leaf})
        parts = {_HEAD: {_HEAD: np.frombuffer(signed, np.uint8)}, _MESSAGE: trees.arrays(tree)}
        wire.spool(Update(sender, to.place.round, 0, parts, 1.0, {}), out)


def check_form(path: Path, place: Place, sender: str, recipient: str, identities: Identities) -> None:
    """Raise what :func:`unseal` would of a message that can be seen to be none without its key."""
    _head(wire.Spooled(path), place, sender, recipient, identities)


def unseal(
    path: Path, out: Path, private: bytes, place: Place, sender: str, recipient: str, identities: Identities
) -> tuple[str, ...]:
    """Open a sealed message, write its contents to ``out``, and return the sites that made them.

    Args:
        path: the message's file.
        out: where the contents go; there is nothing new there until all of them have been checked.
        private: the key of this site's address.
        place: what the message must be for.
        sender, recipient: whose it must be, and this site.
        identities: this site's.

    Raises:
        AccessError: it is another one's, for another one, or for something else.
        WireError: it was altered.
        StorageError: the disk is full.
    """
    message = wire.Spooled(path)
    head, signed = _head(message, place, sender, recipient, identities)
    if head.key != _public(private):
        raise AccessError(
            f"The message from {sender!r} was sealed with an earlier key of {recipient!r}. It was not opened."
        )
    try:
        content_key = _SUITE.decrypt(head.wrapped, X25519PrivateKey.from_private_bytes(private), _info(head))
    except (InvalidTag, ValueError) as error:
        raise _altered(sender) from error
    cipher, bound = AESGCM(content_key), hashlib.sha256(signed).digest()
    last = _segments(head.num_bytes) - 1
    temporary = out.with_suffix(".tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for number, chunk in enumerate(_body(message)):
                try:
                    data = chunk.values.tobytes()
                    file.write(cipher.decrypt(_nonce(number, last=number == last), data, bound))
                except InvalidTag as error:
                    raise _altered(sender) from error
        temporary.replace(out)
    except OSError as error:
        raise storage.full(out, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return head.trail


def _head(
    message: wire.Spooled, place: Place, sender: str, recipient: str, identities: Identities
) -> tuple[Head, bytes]:
    """Return a message's head and the bytes it stands in, checked as far as that goes without its key."""
    layout = {part: dict(tensors) for part, tensors in message.header.layout.items()}
    sizes = {part: tensors[part].size for part, tensors in layout.items() if [*tensors] == [part]}
    if sizes.keys() != {_HEAD, _MESSAGE} or layout.keys() != sizes.keys() or not 0 < sizes[_HEAD] <= MAX_BYTES:
        raise WireError("This is no sealed message.")
    if any(tensors[part].dtype != "uint8" for part, tensors in layout.items()):
        raise WireError("This is no sealed message: it is not made of bytes.")
    signed = next(iter(message.chunks())).values.tobytes()
    head = _decoded(signed, Head)
    if (head.place, head.sender, head.recipient) != (place, sender, recipient):
        raise AccessError(
            f"A message is from {head.sender!r} to {head.recipient!r}, for round {head.place.round} of "
            f"{head.place.course!r}; due is one from {sender!r} to {recipient!r}, for round {place.round} of "
            f"{place.course!r}, in the same job. It was not opened."
        )
    _check(head, sender, identities)
    if sizes[_MESSAGE] != head.num_bytes + _TAG * _segments(head.num_bytes):
        raise _altered(sender)
    return head, signed


def _body(message: wire.Spooled) -> Iterator[Chunk]:
    return (chunk for chunk in message.chunks() if chunk.part == _MESSAGE)


def _segments(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _SEGMENT))


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11) + bytes([last])


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _info(head: Head) -> bytes:
    """Return what a content key is wrapped for: all of the head that is known before."""
    said = (head.place, head.sender, head.recipient, head.key, head.trail, head.num_bytes)
    return b"hansa mail v1\0" + msgspec.msgpack.encode(said)


def _signed(said: _S, identities: Identities) -> _S:
    return msgspec.structs.replace(said, signature=identities.sign(_to_sign(said)))


def _check(said: Address | Head, site: str, identities: Identities) -> None:
    identities.check(site, said.credential, _to_sign(said), said.signature)


def _to_sign(said: Address | Head) -> bytes:
    return b"hansa mail v1\0" + msgspec.msgpack.encode(msgspec.structs.replace(said, signature=b""))


def _decoded(data: bytes, kind: type[_S]) -> _S:
    try:
        if len(data) <= MAX_BYTES:
            return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    raise WireError(f"These {len(data):,} bytes are no {kind.__name__.lower()} of sealed messages.")


def _altered(sender: str) -> WireError:
    return WireError(f"The message from {sender!r} was altered on its way, or not sealed for this. It was not opened.")
