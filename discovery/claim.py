"""A claim on the lease of a mesh: what it says, who signed it, and which of two counts.

Its signature proves the holder, so nobody has to be believed who passes it on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from discovery.errors import RemoteError
from discovery.identity import MESH_NAME, node_id
from discovery.member import U64

CLAIM_MAX_BYTES = 300
CLAIM_CONTEXT = b"quarterdeck/lease/1\0"
Verify = Callable[[bytes, bytes, bytes], bool]


class Claim(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One claim of a holder. Field order is the wire order: only ever append, with a truthful default."""

    mesh: Annotated[str, Meta(max_length=64)]
    epoch: U64
    renewal: U64
    """0 while it has only been claimed: such a claim gives way to one that stands."""
    holder: Annotated[bytes, Meta(min_length=32, max_length=32)]
    ttl_ms: Annotated[int, Meta(ge=1, le=60_000)]
    tier: Annotated[int, Meta(ge=0, le=255)] = 1
    """0 of a gateway, 1 of a console: the first half of its rank."""
    aloud: bool = False
    """To be passed on by everybody: somebody doesn't hear this holder directly."""
    released: bool = False
    """The last word of a holder that gives up."""

    @property
    def holder_id(self) -> int:
        return node_id(self.holder)

    @property
    def order(self) -> tuple[int, int]:
        """What makes one claim newer than another of the same holder."""
        return self.epoch, self.renewal

    @property
    def precedence(self) -> tuple[int, int, int]:
        """What makes one claim better than another holder's, all else equal: higher epoch, then lower rank."""
        return self.epoch, -self.tier, -self.holder_id


class SignedClaim(msgspec.Struct, frozen=True, array_like=True):
    """The exact bytes of a claim and the 64-byte signature of its holder's node key."""

    blob: Annotated[bytes, Meta(max_length=CLAIM_MAX_BYTES)]
    sig: Annotated[bytes, Meta(min_length=64, max_length=64)]


Weight = tuple[bool, bool, int, int, int]

_encode = msgspec.msgpack.Encoder().encode
_claim = msgspec.msgpack.Decoder(Claim)
_signed = msgspec.msgpack.Decoder(SignedClaim)


def weight(claim: Claim, *, live: bool, stands: bool) -> Weight:
    """The rule between the claims of two holders: the greater weight is the holder's.

    A live claim before a dead one, so that nobody yields to the dead. Then one that stands (renewed, and not long ago)
    before one that was only just made, so that nobody is preempted who is at work. Then the higher epoch, then the
    lower rank: after a partition both stand. SEMANTICS 4.
    """
    return live, live and stands, *claim.precedence


def seal_claim(claim: Claim, sign: Callable[[bytes], bytes]) -> SignedClaim:
    """Encodes and signs with the holder's node key. ValueError when it exceeds CLAIM_MAX_BYTES."""
    blob = _encode(claim)
    if len(blob) > CLAIM_MAX_BYTES:
        raise ValueError(f"claim of {len(blob)} bytes exceeds {CLAIM_MAX_BYTES}")
    return SignedClaim(blob, sign(CLAIM_CONTEXT + blob))


def read_claim(signed: SignedClaim) -> Claim:
    """What it says, whoever signed it; RemoteError when that is no claim."""
    try:
        claim = _claim.decode(signed.blob)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"claim does not decode: {why}") from why
    if not MESH_NAME.fullmatch(claim.mesh):
        raise RemoteError("claim with an illegal name")
    return claim


def signed_by_its_holder(signed: SignedClaim, claim: Claim, verify: Verify) -> bool:
    """Whether the key that `claim` names made this signature. `verify(pub, data, sig)`."""
    return verify(claim.holder, CLAIM_CONTEXT + signed.blob, signed.sig)


def open_claim(signed: SignedClaim, verify: Verify) -> Claim:
    """The claim, once shape, name and signature hold; RemoteError otherwise. `verify(pub, data, sig)`."""
    claim = read_claim(signed)
    if not signed_by_its_holder(signed, claim, verify):
        raise RemoteError("claim signed by another key")
    return claim


def pack(signed: SignedClaim) -> bytes:
    """For the body of a note."""
    return _encode(signed)


def unpack(body: bytes) -> SignedClaim:
    """RemoteError when it is none."""
    try:
        return _signed.decode(body)
    except (msgspec.MsgspecError, ValueError) as why:
        raise RemoteError(f"signed claim does not decode: {why}") from why
