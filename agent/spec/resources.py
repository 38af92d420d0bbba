"""What daemons need of a node and what a node has, in whole thousandths of a core and bytes, so that every node adds
up alike.

It is bookkeeping: a need is set aside while a daemon is placed on a node, whether it uses that much or not, and nothing
keeps it from using more.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.spec.amounts import SUFFIXES
from agent.spec.model import Resources


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a node has for daemons; None: not known, and then anything fits."""

    millicores: int | None = None
    memory: int | None = None
    """Bytes."""


UNKNOWN = Capacity()


class Books:
    """What is set aside on each node. A daemon that needs nothing always fits."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[int, int]] = {}
        """Node → thousandths of a core, bytes."""

    def take(self, node: int, has: Capacity, needs: Resources) -> str:
        """Sets a daemon's needs aside on a node; or why they don't fit there, and nothing is set aside."""
        cores, memory = self._taken.get(node, (0, 0))
        more_cores, more_memory = needs.millicores, needs.memory or 0
        short = []
        if more_cores and has.millicores is not None and cores + more_cores > has.millicores:
            free = cores_text(max(0, has.millicores - cores))
            short.append(f"{_of_cores(needs)}, {free} free of {cores_text(has.millicores)}")
        if more_memory and has.memory is not None and memory + more_memory > has.memory:
            free = size_text(max(0, has.memory - memory))
            short.append(f"{_of_memory(needs)}, {free} free of {size_text(has.memory)}")
        if short:
            return f"needs {' and '.join(short)}"
        self._taken[node] = cores + more_cores, memory + more_memory
        return ""


def needs_text(needs: Resources) -> str:
    """`0.5 cores and 512M memory`, or one of them."""
    return " and ".join(filter(None, (_of_cores(needs), _of_memory(needs))))


def _of_cores(needs: Resources) -> str:
    if needs.cpu is None:
        return ""
    return f"{cores_text(needs.millicores)} core{'s' * (needs.millicores != 1000)}"


def _of_memory(needs: Resources) -> str:
    return "" if needs.memory is None else f"{size_text(needs.memory)} memory"


def cores_text(millicores: int) -> str:
    """`0.5`, `16`."""
    return f"{millicores / 1000:.3f}".rstrip("0").rstrip(".")


def size_text(size: int) -> str:
    """`512M`, `2.0G`, `1023`: what is left over of a unit is not shown, so that nothing seems to fit that doesn't."""
    for unit in reversed(SUFFIXES):
        if size >= SUFFIXES[unit]:
            tenths = size * 10 // SUFFIXES[unit]
            return f"{tenths // 10}{unit}" if unit in "KM" else f"{tenths // 10}.{tenths % 10}{unit}"
    return str(size)
