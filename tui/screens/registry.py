"""The views that have a screen. A new one is a file here, a name here, and a line in `tui.model.views`.

Each is loaded when it is first opened: the console has to paint before all of them are read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tui.screens.base import Maker, View

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

NAMES = ("fleet", "map", "meshes", "daemons", "chains", "failures", "events", "audit", "logs", "node")


def _maker(name: str) -> Maker:
    def make(deck: QuarterdeckApp) -> View:
        view: View = importlib.import_module(f"tui.screens.{name}").make(deck)
        return view

    return make


MAKERS: dict[str, Maker] = {name: _maker(name) for name in NAMES}
