"""The panel that asks where a new node of this home is to be started, and as what."""

from __future__ import annotations

from collections.abc import Callable

from discovery.errors import LocalError
from tui.model.lineedit import LineEdit
from tui.model.spans import Line
from tui.model.text import pad, wrap
from tui.widgets.panel import Dialog

KINDS = ("compute", "broker", "gateway", "registry", "console")
"""Offered; any word of a-z, 0-9 and - is a kind."""
ABOUT = (
    "A process on this host, in this home. It goes on when the console ends; who may operate it is a matter of keys, "
    "not of who started it."
)


class SpawnDialog(Dialog):
    """Two fields, mesh and kind; Enter starts the node. The arrows go through what is known, Tab to the other field."""

    title = "Start a node here"
    wish = 76

    def __init__(self, meshes: list[str], mesh: str, begin: Callable[[str, str], None]) -> None:
        self._meshes = meshes
        self._begin = begin
        self.fields = {"mesh": LineEdit(mesh, len(mesh)), "kind": LineEdit(KINDS[0], len(KINDS[0]))}
        self.on = "kind" if len(meshes) == 1 else "mesh"
        self.error = ""

    def body(self, cells: int) -> list[Line]:
        lines: list[Line] = [[(part, "text")] for part in wrap(ABOUT, cells)]
        lines.append([])
        for name, known in (("mesh", self._meshes), ("kind", list(KINDS))):
            field = self.fields[name]
            shown = field.spans(24) if name == self.on else [(field.text, "text")]
            lines.append([(pad(name.capitalize(), 6), "name" if name == self.on else "soft"), *shown])
            lines += [[(f"      {part}", "soft")] for part in wrap(", ".join(known), cells - 6)[:3]]
        return lines

    def foot(self, cells: int) -> list[Line]:
        lines: list[Line] = [[]]
        if self.error:
            lines += [[(part, "error")] for part in wrap(self.error, cells)]
        keys = (
            ("Enter", " starts it  "),
            ("Tab", " other field  "),
            ("↑↓", " choose  "),
            ("Esc", " leaves it"),
        )
        line: Line = []
        for key, said in keys:
            line += [(key, "key"), (said, "text")]
        return [*lines, line]

    def key(self, key: str, character: str | None) -> bool:
        if key == "escape":
            return False
        self.error = ""
        if key in ("tab", "shift+tab"):
            self.on = "mesh" if self.on == "kind" else "kind"
        elif key in ("up", "down"):
            self._choose(1 if key == "down" else -1)
        elif key == "enter":
            return not self._enter()
        else:
            self.fields[self.on].key(key, character)
        return True

    cursor_line = 0
    """The arrows are for choosing here, not for scrolling."""

    def _choose(self, by: int) -> None:
        known = self._meshes if self.on == "mesh" else list(KINDS)
        field = self.fields[self.on]
        at = known.index(field.text) + by if field.text in known else 0
        field.set(known[at % len(known)])

    def _enter(self) -> bool:
        """Whether it was begun."""
        mesh, kind = (self.fields[name].text.strip() for name in ("mesh", "kind"))
        if mesh not in self._meshes:
            self.on = "mesh"
            self.error = f"this home has no keys for {mesh or 'a mesh without a name'}"
            return False
        from discovery.identity import check_kind  # not needed before the first paint

        try:
            check_kind(kind)
        except LocalError as why:
            self.on, self.error = "kind", str(why)
            return False
        self._begin(mesh, kind)
        return True

    def paste(self, text: str) -> None:
        self.fields[self.on].insert(text)
