"""What callers hand to a node's methods, read strictly; and which logins may call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from discovery.errors import Refused, RemoteError
from discovery.links import Handler, Link

MEMBER, HOME, OP, JOIN, MESH = "member", "home", "op", "join", "mesh"
READERS = frozenset({HOME, OP})
ANYBODY = frozenset({MEMBER, HOME, OP, MESH})
CARRIERS = frozenset({MEMBER, MESH})
"""Nodes that hand over an op of somebody else: for this node, or not at all."""
LIMIT_MAX = 10_000
ROWS_A_FRAME = 400
"""As many rows go into one frame of a link, which may not exceed 1 MiB."""


def calls(kinds: frozenset[str] | set[str], method: Callable[[Link, Any], Any]) -> Handler:
    async def guarded(link: Link, params: Any) -> Any:
        permit(kinds, link)
        return await method(link, params)

    return guarded


def streams(kinds: frozenset[str] | set[str], method: Callable[[Link, Any], AsyncIterator[Any]]) -> Handler:
    async def guarded(link: Link, params: Any) -> AsyncIterator[Any]:
        permit(kinds, link)
        async for item in method(link, params):
            yield item

    return guarded


def permit(kinds: frozenset[str] | set[str], link: Link) -> None:
    if link.login.kind not in kinds:
        raise Refused("login", f"a {link.login.kind} login may not call this")


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RemoteError("answer is not a map")
    return value


def octets(params: Any, key: str) -> bytes:
    value = mapping(params).get(key)
    if not isinstance(value, bytes):
        raise RemoteError(f"{key}: bytes expected")
    return value


def text_of(params: Any, key: str) -> str:
    value = mapping(params).get(key)
    if not isinstance(value, str):
        raise RemoteError(f"{key}: text expected")
    return value


def limit_of(params: Any, default: int, key: str = "limit", most: int = LIMIT_MAX) -> int:
    value = params.get(key, default) if isinstance(params, dict) else default
    if not isinstance(value, int) or not 0 <= value <= most:
        raise RemoteError(f"{key}: a number from 0 to {most} expected")
    return value


def chunked(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items in lists of at most `size`; one empty list when there are none."""
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]
