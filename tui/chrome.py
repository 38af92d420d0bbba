"""The lines around the views: header, view bar, banner, tray, footer. Each is made from what is known now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tui.actions import key_sign
from tui.model import ages
from tui.model.spans import Line, keep, line_width, spread
from tui.model.status import alarms, notices, silence
from tui.model.text import clean, elide, shorten, width, wrap
from tui.model.views import VIEWS
from tui.session import SILENT_AFTER_S

if TYPE_CHECKING:
    from tui.app import QuarterdeckApp

LEAST_CELLS, LEAST_LINES = 40, 10
"""Below this a terminal is told to be too small."""
MESH_ROOM = 20
"""Cells of the header that are kept for the meshes when words of alarm take their place."""


class Chrome:
    """Makes the lines; the app asks for them whenever something may have changed."""

    def __init__(self, deck: QuarterdeckApp) -> None:
        self._deck = deck
        self._notices: list[str] = []
        self._noticed_at = float("-inf")

    def header(self, cells: int) -> list[Line]:
        deck = self._deck
        left: Line = [(" QUARTERDECK ", "title")]
        role = clean(deck.session.hello.get("role")) if deck.session.phase == "live" else ""
        read_only = deck.acting.read_only
        alarm = alarms(deck.fleet)
        mode: Line = [("READ-ONLY" if read_only else "rw", "hot" if read_only else "text"), (" ", "text")]
        clock: Line = [(f"  {time.strftime('%H:%M:%S')} ", "text")]
        who: Line = [(f"{role} {deck.glyphs.bullet} ", "soft")] if role else []
        room = cells - line_width(left) - 1
        # What is wrong stays longest; the clock and the role leave first.
        for right in ([*alarm, *who, *mode, *clock], [*alarm, *mode, *clock], [*alarm, *mode], alarm):
            if line_width(right) <= room - (MESH_ROOM if alarm and right is not alarm else 0):
                break
        return [spread([*left, *self._meshes(room - line_width(right))], right, cells)]

    def _meshes(self, room: int) -> Line:
        """The meshes with their nodes, one's own first; what has no room is counted."""
        deck = self._deck
        mine = deck.fleet.mesh
        known = deck.fleet.meshes()
        pieces: list[Line] = []
        for mesh in sorted(known, key=lambda mesh: (mesh != mine, mesh)):
            row = deck.fleet.directory.rows.get(mesh)
            old = row is not None and row.expired
            name = elide(mesh, 24, deck.glyphs.ellipsis)
            role = "dim" if old else "title" if mesh == mine else "text"
            pieces.append([(f" {name}", role), (f" {known[mesh]}", "dim" if old else "text")])
        line: Line = []
        for at, piece in enumerate(pieces):
            rest = len(pieces) - at - 1
            gap = 1 if line else 0
            need = line_width(line) + gap + line_width(piece) + (width(f"  +{rest} more") if rest else 0)
            if need > room:
                return [*line, (f"  +{rest + 1} more", "soft")] if line else []
            line += [(" ", "text"), *piece] if line else piece
        return line

    def viewbar(self, cells: int) -> list[Line]:
        deck = self._deck
        pieces: list[Line] = []
        for key, name, title in deck.switches:
            here = name == deck.view_name
            pieces.append([(f"{key} ", "key" if here else "soft"), (title, "title" if here else "text")])
        if deck.node_id:
            row = deck.fleet.rows.get(deck.node_id)
            pieces.append([("> ", "soft"), (row.name if row else deck.node_id, "title")])
        return [[(" ", "text"), *keep(pieces, cells - 2, (" " * self.viewgap(cells), "text"))]]

    def viewgap(self, cells: int) -> int:
        """Cells between the views' names: one where two would leave no room for all."""
        used = sum(len(key) + 1 + len(title) for key, _, title in self._deck.switches)
        return 2 if used + 2 * len(self._deck.switches) <= cells else 1

    def banner(self, cells: int) -> list[Line]:
        """What is to be said about the attachment; nothing while all is well."""
        deck = self._deck
        session, now = deck.session, deck.now()
        quiet = deck.fleet.silence_ms(now)
        if session.phase == "live":
            if quiet is None or quiet < SILENT_AFTER_S * 1000:
                return []
            text = f"{session.agent} has said nothing for {ages.age(quiet)}: {silence(deck.fleet, now)}"
        elif session.phase == "joining":
            text = f"joining… looking for an agent, {ages.age((now - session.started) * 1000)}"
        elif session.phase == "waiting":
            text = f"attached to {session.agent}, waiting for its first news"
            if quiet is not None:
                text += f"; {silence(deck.fleet, now)}"
        else:
            lost = "no agent" if not session.hello else f"lost {session.agent}"
            if session.next_try is None:
                then = "trying now"
            else:
                then = f"next try in {max(0, round(session.next_try - now))} s ({deck.key_of('retry')} now)"
            known = silence(deck.fleet, now)
            text = f"{lost}: {session.reason}; {then}; {known}"
        return [[(" ! ", "hot"), (part, "text")] for part in wrap(text, cells - 4)[:3]]

    def title(self, cells: int) -> list[Line]:
        return [self._deck.view_shown().title(cells)]

    def tray(self, cells: int) -> list[Line]:
        """The last message, the ops under way, what is wrong in the fleet."""
        deck = self._deck
        now = deck.now()
        most = max(1, min(6, deck.size.height // 5))
        lines: list[Line] = []
        if deck.message and now < deck.message_until:
            text, role = deck.message
            lines += [[(" ", "text"), (part, role)] for part in wrap(text, cells - 2)[:3]]
        lines += deck.acting.book.tray(now, cells, most)
        if deck.size.height >= 16:
            lines += self._notice(now, cells, 2 if deck.size.height < 40 else 3)
        return lines

    def _notice(self, now: float, cells: int, most: int) -> list[Line]:
        """What is wrong in the fleet, the gravest first, looked for once a second; whole sentences on `most` lines."""
        if now - self._noticed_at >= 1.0 or not self._notices:
            self._noticed_at = now
            deck = self._deck
            self._notices = notices(deck.fleet, deck.wall_ms(), deck.key_of("op_update"), now)
        lines: list[Line] = []
        for text in self._notices:
            piece: Line = [("! ", "hot"), (shorten(text, cells - 4), "text")]
            if lines and line_width(lines[-1]) + line_width(piece) + 4 <= cells:
                lines[-1] += [("   ", "text"), *piece]
            elif len(lines) < most:
                lines.append([(" ", "text"), *piece])
        return lines

    def footer(self, cells: int) -> list[Line]:
        """Keys by need, whole ones only; help and quit always have their place."""
        deck = self._deck
        if deck.prompt is not None:
            return deck.prompt.lines(cells, max(1, deck.size.height - 4))
        if deck.quit_armed():
            return [[(" Ctrl+C", "key"), (" again leaves the console", "text")]]
        ascii_only = deck.glyphs.name == "ascii"

        def hint(key: str, label: str) -> Line:
            return [(key_sign(key, ascii_only), "key"), (f" {label}" if len(label) > 1 else label, "text")]

        actions = deck.keymap.hints(deck.view_for_keys())
        if deck.acting.read_only:
            actions = [action for action in actions if not action.verb]
        last = [action for action in actions if action.id in ("help", "quit")]
        always = [hint(action.keys[0], action.label) for action in last]
        room = cells - 2 - sum(line_width(piece) + 2 for piece in always)
        chosen = [hint(a.keys[0], a.label) for a in actions if a not in last]
        return [
            [
                (" ", "text"),
                *keep(chosen, room, ("  ", "text")),
                ("  ", "text"),
                *keep(always, cells, ("  ", "text")),
            ]
        ]

    def too_small(self, cells: int) -> list[Line]:
        """Told instead of everything, on a terminal that has no room."""
        deck = self._deck
        size = deck.size
        text = f"Terminal too small: {size.width}×{size.height}, needs {LEAST_CELLS}×{LEAST_LINES}. q leaves."
        counts = deck.fleet.by_state()
        if counts:
            text += " " + ", ".join(f"{count} {state}" for state, count in counts.items() if state != "alive")
        return [[(part, "text")] for part in wrap(text, max(1, cells))][: max(1, size.height)]


__all__ = ["VIEWS", "Chrome"]
