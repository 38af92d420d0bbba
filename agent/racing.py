"""Several ways to the same end, tried one beside the other: the first that works wins.

A way is given a head start before the next one joins in, so that the preferred one wins wherever it works, and one
that leads nowhere costs no more than that head start.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from discovery.errors import QuarterdeckError, Refused, Unreachable
from discovery.identity import Identity
from discovery.links import Handler, Link, dial
from discovery.member import Addr

T = TypeVar("T")

ADDR_HEAD_START_S = 0.2


class NoneWorked(Exception):
    """Every way failed; `errors` in the order in which they did."""

    def __init__(self, errors: list[QuarterdeckError]) -> None:
        super().__init__(f"{len(errors)} ways failed")
        self.errors = errors


async def first_of(
    ways: Sequence[Callable[[], Coroutine[Any, Any, T]]],
    *,
    head_start_s: float,
    dispose: Callable[[T], object],
    final: Callable[[QuarterdeckError], bool] = lambda why: False,
) -> T:
    """What the first way that works gives; NoneWorked when none does. The others are cancelled, and what they may
    have made meanwhile is disposed of. An error that is `final` ends the race, and is raised."""
    waiting = deque(ways)
    running: set[asyncio.Task[T]] = set()
    errors: list[QuarterdeckError] = []
    due = True
    try:
        while waiting or running:
            if waiting and (due or not running):
                running.add(asyncio.create_task(waiting.popleft()()))
            patience = head_start_s if waiting else None
            done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            due = True
            for task in done:
                try:
                    result = task.result()
                except QuarterdeckError as why:
                    running.discard(task)
                    if final(why):
                        raise
                    errors.append(why)
                else:
                    running.discard(task)
                    return result
        raise NoneWorked(errors)
    finally:
        for task in running:
            task.cancel()
        for left in await asyncio.gather(*running, return_exceptions=True):
            if not isinstance(left, BaseException):
                dispose(left)


async def dial_any(
    addrs: Sequence[Addr],
    *,
    who: str,
    identity: Identity,
    username: str,
    expect_pub: bytes,
    methods: Mapping[str, Handler],
    timeout_s: float,
) -> tuple[Link, Addr]:
    """A link to a node at the first of its addresses that proves to be the node; `timeout_s` for each of them.

    What the node itself refuses is raised at once. Else Refused `host_key` when only others were met, and
    Unreachable says what became of the last address.
    """

    async def one(addr: Addr) -> tuple[Link, Addr]:
        link = await dial(
            addr,
            identity=identity,
            username=username,
            expect_pub=expect_pub,
            methods=methods,
            timeout_s=timeout_s,
        )
        return link, addr

    if not addrs:
        raise Unreachable(f"{who}: has no address that can be dialled from here")
    try:
        return await first_of(
            [lambda addr=addr: one(addr) for addr in addrs],  # type: ignore[misc]
            head_start_s=ADDR_HEAD_START_S,
            dispose=lambda made: made[0].abort(),
            final=says_no,
        )
    except NoneWorked as why:
        raise telling(why.errors) from why


def shared(tasks: dict[int, asyncio.Task[T]], node: int, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A try that several may wait for, kept in `tasks` under the node's id until it is over. How it failed is for those
    who wait; all of them may have let go of it by then."""

    def over(done: asyncio.Task[T]) -> None:
        tasks.pop(node, None)
        if not done.cancelled():
            done.exception()

    task = tasks[node] = asyncio.create_task(work)
    task.add_done_callback(over)
    return task


def says_no(why: QuarterdeckError) -> bool:
    """Whether it is the very node that we look for that refuses us."""
    return isinstance(why, Refused) and why.code != "host_key"


def telling(errors: Sequence[QuarterdeckError]) -> QuarterdeckError:
    """The error that tells most: a stranger in a node's place, else the last one."""
    for why in errors:
        if isinstance(why, Refused):
            return why
    return errors[-1]
