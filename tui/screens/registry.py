"""The views that have a screen. A new one is a file here, a line here, and a line in `tui.model.views`."""

from __future__ import annotations

from tui.screens import events, fleet, map, meshes, node
from tui.screens.base import Maker

MAKERS: dict[str, Maker] = {
    "fleet": fleet.make,
    "map": map.make,
    "meshes": meshes.make,
    "events": events.make,
    "node": node.make,
}
