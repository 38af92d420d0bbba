"""A control op as it is signed: one UTF-8 JSON object, its limits, and the verbs it can carry.

Both sides use this room: the caller builds, the target decodes after it verified the signature. People and
JSON speak of verbs (`kill`, `drain`, …); the signed bytes carry a wire op (`shutdown`, `set_state`, …) with
args. Pure: time and randomness are arguments.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from discovery.errors import LocalError, Refused

NAMESPACE = "quarterdeck-op"
VERSION = 1
MESSAGE_MAX_BYTES = 16 * 1024
LIFETIME_MAX_MS = 120_000
DEADLINE_MAX_MS = 7 * 24 * 3600 * 1000
RETIRE_MIN_MS = 1000
CHAINS_MAX = 256
APPEND_MAX_BYTES = 192 * 1024
"""Of one record of a user's chain: what a frame between members takes."""

ROLES: tuple[str, ...] = ("observe", "operate", "admin")
"""Each may do what the ones before it may."""

NOT_AUTHORISED = frozenset(
    {
        "unknown_key",
        "role",
        "revoked",
        "key_expired",
        "from_address",
        "principal",
        "certificate",
        "not_verified",
        "not_touched",
    }
)
"""Refusal codes that mean "not authorised" (exit 4)."""

RETRY_LATER = frozenset({"in_update"})
"""Refusal codes that pass by themselves: the caller asks for a new nonce and tries again."""

_ULID = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ULID_SHAPE = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")

Time = Annotated[int, Meta(ge=0, le=2**53)]
ChainName = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+\Z")]
Duration = Annotated[int, Meta(ge=0, le=DEADLINE_MAX_MS)]


class OpMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of the signed object. Times are Unix milliseconds by the target's clock."""

    v: int
    mesh: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
    target: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
    op: Annotated[str, Meta(pattern=r"^[a-z_]{1,32}\Z")]
    args: dict[str, Any] = {}
    op_id: Annotated[str, Meta(pattern=r"^[0-7][0-9A-HJKMNP-TV-Z]{25}\Z")]
    issued_at_ms: Time
    expires_at_ms: Time
    nonce: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


class NoArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The op says it all."""


class SetState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state: Literal["alive", "updating", "draining"]
    deadline_ms: Duration | None = None
    """A duration, for draining."""


class Deadline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    deadline_ms: Duration | None = None
    """A duration."""


class Chains(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    chains: Annotated[list[ChainName], Meta(max_length=CHAINS_MAX)]


class Retire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    retire_ms: Annotated[int, Meta(ge=RETIRE_MIN_MS, le=DEADLINE_MAX_MS)] | None = None
    """A duration: how long the old key still opens."""


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    line: Annotated[str, Meta(min_length=1, max_length=8192, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
    """A line of `authorized_keys`, its role in it."""


class Revoke(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fingerprint: Annotated[str, Meta(pattern=r"^SHA256:[A-Za-z0-9+/]{43}\Z")]
    last: tuple[Time, Time, Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")], Time] | None = None
    """Position of the key's last valid record: wall_ms, counter, node, number. None: as of this record."""


class ApplySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Of the spec, which travels beside the message."""
    base: Annotated[str, Meta(pattern=r"^([0-7][0-9A-HJKMNP-TV-Z]{25})?\Z")] | None = None
    """Op id of the spec that it was compared with, empty for none; with another one in force it is refused."""


class Append(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    chain: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Of the record, which travels beside the message."""


Args = NoArgs | SetState | Deadline | Chains | Retire | Grant | Revoke | ApplySpec | Append


@dataclass(frozen=True)
class Verb:
    """What a verb is on the wire, and the role it needs. `state`: the one that its set_state asks for. `of_mesh`: it
    is about the whole mesh, and its target is the node that puts it on the admin chain."""

    wire: str
    role: str
    args: type[Args] = NoArgs
    state: str | None = None
    of_mesh: bool = False


VERBS: dict[str, Verb] = {
    "kill": Verb("shutdown", "operate"),
    "drain": Verb("set_state", "operate", SetState, "draining"),
    "update": Verb("set_state", "operate", SetState, "updating"),
    "resume": Verb("set_state", "operate", SetState, "alive"),
    "cordon": Verb("cordon", "operate"),
    "uncordon": Verb("uncordon", "operate"),
    "maintenance_enter": Verb("enter_maintenance", "operate", Deadline),
    "maintenance_exit": Verb("exit_maintenance", "operate"),
    "restart_daemons": Verb("restart_all_daemons", "operate"),
    "clear_avoid": Verb("clear_avoid_list", "operate"),
    "drop_replicas": Verb("drop_replicas", "admin", Chains),
    "invalidate_placement": Verb("invalidate_placement", "operate"),
    "append": Verb("append", "operate", Append),
    "rotate_key": Verb("rotate_key", "admin", Retire),
    "apply": Verb("apply_spec", "admin", ApplySpec, of_mesh=True),
    "grant_operator": Verb("grant_operator", "admin", Grant, of_mesh=True),
    "revoke_operator": Verb("revoke_operator", "admin", Revoke, of_mesh=True),
}
"""Every verb of the interface. Whether a build can do it is the applier's to say (`unsupported`)."""

_BY_WIRE = {v.wire: name for name, v in VERBS.items() if v.state is None}
_BY_STATE = {v.state: name for name, v in VERBS.items() if v.state is not None}


@dataclass(frozen=True)
class Op:
    """A decoded op: the message, its verb, and its args in their own shape."""

    message: OpMessage
    verb: str
    args: Args

    @property
    def op_id(self) -> str:
        return self.message.op_id

    @property
    def deadline_ms(self) -> int | None:
        """The duration it may take, for those ops that have one."""
        return self.args.deadline_ms if isinstance(self.args, SetState | Deadline) else None

    @property
    def retire_ms(self) -> int | None:
        """How long a rotated key still opens, where that was said."""
        return self.args.retire_ms if isinstance(self.args, Retire) else None

    @property
    def role(self) -> str:
        return VERBS[self.verb].role

    @property
    def of_mesh(self) -> bool:
        return VERBS[self.verb].of_mesh

    @property
    def chains(self) -> list[str]:
        return self.args.chains if isinstance(self.args, Chains) else []


def suffices(role: str | None, needed: str) -> bool:
    """Whether who has `role` may do what needs `needed`."""
    return role in ROLES and ROLES.index(role) >= ROLES.index(needed)


def new_ulid(now_ms: int, random: bytes) -> str:
    """A ULID: 48 bits of time and 80 of randomness (10 bytes), in 26 characters that sort by time."""
    if len(random) != 10:
        raise LocalError(f"a ULID needs 10 random bytes, not {len(random)}")
    number = (now_ms & (2**48 - 1)) << 80 | int.from_bytes(random, "big")
    return "".join(_ULID[number >> shift & 31] for shift in range(125, -1, -5))


def ulid_bytes(text: str) -> bytes:
    """The 16 bytes that a ULID's text stands for. ValueError for what is none."""
    number = 0
    for char in text:
        number = number << 5 | _ULID.index(char)
    if len(text) != 26 or number >> 128:
        raise ValueError(f"{text[:32]!r} is no ULID")
    return number.to_bytes(16, "big")


def is_op_id(text: object) -> bool:
    return isinstance(text, str) and _ULID_SHAPE.fullmatch(text) is not None


def build_op(
    verb: str,
    *,
    mesh: str,
    target: str,
    op_id: str,
    nonce: str,
    now_ms: int,
    lifetime_ms: int = 60_000,
    deadline_ms: int | None = None,
    chains: list[str] | None = None,
    retire_ms: int | None = None,
    fields: dict[str, Any] | None = None,
) -> bytes:
    """The exact bytes to sign. `now_ms` is the target's clock (from its challenge), `fields` are the args of a verb of
    the mesh, and of append; LocalError on misuse."""
    spec = VERBS.get(verb)
    if spec is None:
        raise LocalError(f"{verb!r} is no op; use one of {', '.join(VERBS)}")
    if not 0 < lifetime_ms <= LIFETIME_MAX_MS:
        raise LocalError(f"an op lives at most {LIFETIME_MAX_MS // 1000} s")
    args: dict[str, Any] = {}
    if spec.state is not None:
        args["state"] = spec.state
    if deadline_ms is not None:
        if verb not in ("drain", "maintenance_enter"):
            raise LocalError(f"{verb} takes no deadline")
        args["deadline_ms"] = deadline_ms
    if retire_ms is not None:
        if spec.args is not Retire:
            raise LocalError(f"{verb} retires no key")
        args["retire_ms"] = retire_ms
    if spec.args is Chains:
        args["chains"] = list(chains or [])
    if spec.of_mesh or spec.args is Append:
        args |= fields or {}
    asked = {
        "v": VERSION,
        "mesh": mesh,
        "target": target,
        "op": spec.wire,
        "args": args,
        "op_id": op_id,
        "issued_at_ms": now_ms,
        "expires_at_ms": now_ms + lifetime_ms,
        "nonce": nonce,
    }
    message = msgspec.json.encode(asked)
    try:
        decode_op(message)
    except Refused as why:
        raise LocalError(f"{verb}: {why}") from why
    return message


def decode_op(message: bytes) -> Op:
    """The op in these bytes, or Refused: `too_large`, `malformed`, `version`, `unknown_op`, `bad_state`.

    Strict on purpose: an unknown field or a repeated key could be a condition that we would not keep."""
    if len(message) > MESSAGE_MAX_BYTES:
        raise Refused("too_large", f"an op of {len(message)} bytes; at most {MESSAGE_MAX_BYTES} are read")
    fields = strict_object(message)
    version = fields.get("v")
    if type(version) is int and version != VERSION:
        raise Refused("version", f"an op of version {version}; this build reads {VERSION}")
    try:
        decoded = msgspec.convert(fields, OpMessage)
    except msgspec.ValidationError as why:
        raise Refused("malformed", f"not an op: {plain(why)}") from why
    verb = _verb(decoded)
    try:
        args = msgspec.convert(decoded.args, VERBS[verb].args)
    except msgspec.ValidationError as why:
        raise Refused("malformed", f"{verb}: {plain(why)}") from why
    if verb in ("update", "resume") and getattr(args, "deadline_ms", None) is not None:
        raise Refused("malformed", f"{verb} takes no deadline")
    return Op(decoded, verb, args)


def glimpse(message: bytes) -> tuple[str | None, str | None]:
    """Op id and verb of a message that is refused anyway, as far as they can be told, for its record."""
    try:
        fields = strict_object(message[: MESSAGE_MAX_BYTES + 1])
    except Refused:
        return None, None
    op_id = fields.get("op_id")
    wire, args = fields.get("op"), fields.get("args")
    verb = _BY_WIRE.get(wire) if isinstance(wire, str) else None
    if wire == "set_state" and isinstance(args, dict) and isinstance(args.get("state"), str):
        verb = _BY_STATE.get(args["state"])
    return (op_id if isinstance(op_id, str) and is_op_id(op_id) else None), verb


def _verb(message: OpMessage) -> str:
    if message.op != "set_state":
        verb = _BY_WIRE.get(message.op)
        if verb is None:
            raise Refused("unknown_op", f"{message.op!r} is no op that this build knows")
        return verb
    state = message.args.get("state")
    verb = _BY_STATE.get(state) if isinstance(state, str) else None
    if verb is None:
        shown = ascii(state)[:24]
        raise Refused(
            "bad_state", f"a node can't be set to {shown}; alive, updating and draining can be asked for"
        )
    return verb


def strict_object(message: bytes) -> dict[str, Any]:
    """The JSON object in these bytes, no key twice. Refused `malformed`."""
    try:
        fields = json.loads(message.decode(), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as why:
        raise Refused("malformed", f"not one UTF-8 JSON object: {plain(why)}") from why
    if not isinstance(fields, dict):
        raise Refused("malformed", "not a JSON object")
    return fields


def plain(why: Exception) -> str:
    """An error text that may quote the sender, on one line and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(why))[:120]


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
