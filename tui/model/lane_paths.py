"""The measured paths between lanes of the map: from the lane of the node that measures to the lane of another mesh.

Each path is a line of its own, so that it can't be taken for one between two other lanes: it leaves the measuring lane
at its top (or at its side, for lanes further down), has its time on it, and comes down at the lane that it leads to.
Relayed ones are dashed. A mesh to which nothing was measured has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tui.model import ages
from tui.model.glyphs import Glyphs
from tui.model.meshes import MeshRow
from tui.model.spans import Line
from tui.model.text import width

TRUNK = 2
"""Cells at the left for the trunk that leads to lanes further down."""
DROP = 16
"""Cells from the left side of a lane to where a path comes down on it."""


@dataclass(frozen=True)
class Path:
    """One measured path to a mesh."""

    mesh: str
    rtt_ms: float
    relayed: bool

    @property
    def label(self) -> str:
        return f" {ages.rtt(self.rtt_ms)}{' relay' if self.relayed else ''} "


def measured(meshes: Mapping[str, MeshRow], mine: str | None) -> dict[str, Path]:
    """The paths from the mesh `mine` that have been measured, by the mesh they lead to."""
    found = {}
    for name, mesh in meshes.items():
        rtt = mesh.figure("rtt_ms")
        if mine is not None and name != mine and rtt is not None and not mesh.expired:
            found[name] = Path(name, rtt, mesh.route == "relay")
    return found


def over_group(
    paths: Sequence[tuple[Path, int]], cells: int, glyphs: Glyphs, trunk: bool, last: bool
) -> list[Line]:
    """The lines over a group of lanes. `paths`: each with the cell at which its lane begins, nearest first.

    `trunk`: they come from the trunk at the left side, and else from the first lane of the group; `last`: the trunk
    ends here.
    """
    branch, end, bar, edge = tuple(glyphs.tree)
    left, right = glyphs.box[0], glyphs.box[1]
    lines: list[Line] = []
    drops: list[int] = []
    ways = list(reversed(paths))  # the furthest on top: so none crosses another
    for at, (path, lane) in enumerate(ways):
        signs = [" "] * cells
        begin = 0 if trunk else TRUNK + 2 * at
        if trunk:
            signs[0] = end if last and at == len(ways) - 1 else branch
        else:
            for before in range(at):
                signs[TRUNK + 2 * before] = bar
            signs[begin] = left
        stop = lane + DROP
        stroke = glyphs.relayed if path.relayed else edge
        signs[begin + 1 : stop] = stroke * (stop - begin - 1)
        signs[stop] = right
        for drop in drops:
            signs[drop] = bar
        drops.append(stop)
        label = path.label
        x = max(begin + 2, stop - width(label) - 2)
        text = "".join(signs)
        lines.append([(text[:x], "frame"), (label, "text"), (text[x + width(label) :], "frame")])
    return lines
