"""The panels: confirm an op, help, palette, list of ops, export, leave."""

from __future__ import annotations

from collections.abc import Callable

from tui.actions import GROUPS, Action, Keymap, key_sign
from tui.model.ages import duration_ms
from tui.model.blast import Forecast, age_text
from tui.model.daemons import ROLES as DAEMON_ROLES
from tui.model.glyphs import SETS
from tui.model.lineedit import LineEdit
from tui.model.ops import OpBook
from tui.model.spans import Line
from tui.model.text import elide, pad, shorten, width, wrap
from tui.widgets.panel import Dialog, chosen


def _paragraph(text: str, cells: int, role: str = "text", lead: str = "") -> list[Line]:
    parts = wrap(text, cells - width(lead))
    return [[(lead if not at else " " * width(lead), role), (part, role)] for at, part in enumerate(parts)]


class Confirm(Dialog):
    """Says what an op would do, from the live view, and sends it only when it is confirmed."""

    wish = 84

    def __init__(
        self,
        ask: Callable[[], Forecast],
        send: Callable[[float | None], None],
        signer: str,
        hidden: int,
        deadline: str | None,
    ) -> None:
        self._ask = ask
        self._send = send
        self._signer = signer
        self._hidden = hidden
        self.count = LineEdit()
        self.deadline = LineEdit(deadline, len(deadline)) if deadline is not None else None
        self._on_deadline = deadline is not None
        self.error = ""
        self.forecast = ask()

    def body(self, cells: int) -> list[Line]:
        self.forecast = told = self._ask()
        self.title = told.title
        longest = max((width(name) for name, _ in told.lines), default=0)
        name_cells = min(longest, max(12, cells // 2 - 2))
        lines: list[Line] = []
        for name, effect in told.lines:
            parts = wrap(effect, max(10, cells - name_cells - 2))
            lines.append(
                [(pad(elide(name, name_cells), name_cells), "name"), ("  ", "text"), (parts[0], "text")]
            )
            lines += [[(" " * (name_cells + 2), "text"), (part, "text")] for part in parts[1:]]
        for warning in told.warnings:
            lines += _paragraph(warning, cells, "hot", "! ")
        if self._hidden:
            lines += _paragraph(
                f"{self._hidden} of these are marked but hidden by the filter", cells, "hot", "! "
            )
        said = f"Reached: {told.reach}. " if told.reach else ""
        said += age_text(told.data_age_ms)
        if self._signer:
            said += f" Signed as {self._signer}."
        return [*lines, *_paragraph(said, cells, "soft")]

    def foot(self, cells: int) -> list[Line]:
        lines: list[Line] = [[]]
        if self.deadline is not None:
            field = self.deadline.spans(20) if self._on_deadline else [(self.deadline.text, "text")]
            lines.append([("Deadline  ", "name"), *field, ("   such as 30s, 5m, 1h", "soft")])
        if self.error:
            lines += _paragraph(self.error, cells, "error")
        if self.forecast.needs_count:
            typed = self.count.spans(8) if not self._on_deadline else [(self.count.text, "text")]
            enter = "" if not self._on_deadline else "   Enter goes on"
            ask = f"Type {self.forecast.count} to send, Esc to leave it:  "
            lines.append([(ask, "name"), *typed, (enter, "soft")])
        else:
            lines.append([("Enter", "key"), (" sends it, ", "text"), ("Esc", "key"), (" leaves it", "text")])
        return lines

    def key(self, key: str, character: str | None) -> bool:
        if key == "escape":
            return False
        self.error = ""
        if key in ("tab", "up", "down", "shift+tab"):
            if self.deadline is not None and self.forecast.needs_count:
                self._on_deadline = not self._on_deadline
            return True
        if key == "enter":
            return self._enter()
        field = self.deadline if self._on_deadline and self.deadline is not None else self.count
        if field is self.deadline or self.forecast.needs_count:
            field.key(key, character)
        return True

    def _enter(self) -> bool:
        """True while the panel stays."""
        limit: float | None = None
        if self.deadline is not None:
            limit = duration_ms(self.deadline.text)
            if limit is None or limit <= 0:
                self._on_deadline = True
                self.error = f"{self.deadline.text!r} is no duration"
                return True
        if self.forecast.needs_count:
            if self._on_deadline:
                self._on_deadline = False
                return True
            if self.count.text.strip() != str(self.forecast.count):
                self.error = f"not sent: type {self.forecast.count}, the number of targets"
                self.count.set("")
                return True
        self._send(limit)
        return False

    def paste(self, text: str) -> None:
        (self.deadline if self._on_deadline and self.deadline is not None else self.count).insert(text)


class Help(Dialog):
    """Everything that can be done here, out of the registry: this view's ops first."""

    wish = 82

    def __init__(self, keymap: Keymap, view: str, columns: list[tuple[str, str]], ascii_only: bool) -> None:
        self.title = f"Help · {view}"
        self._keymap = keymap
        self._view = view
        self._columns = columns
        self._ascii = ascii_only

    def body(self, cells: int) -> list[Line]:
        lines: list[Line] = []
        for group in GROUPS:
            actions = [action for action in self._keymap.of(self._view) if action.group == group]
            if not actions:
                continue
            lines += [[(group, "title")]]
            for action in actions:
                keys = " ".join(key_sign(key, self._ascii) for key in action.keys) or "–"
                parts = wrap(action.about, cells - 14)
                lines.append([("  ", "text"), (pad(keys, 11), "key"), (" ", "text"), (parts[0], "text")])
                lines += [[(" " * 14, "text"), (part, "text")] for part in parts[1:]]
            lines.append([])
        lines.append([("A view locator: for :, for qd view, for bookmarks", "title")])
        lines += _paragraph("fleet state:degraded cpu>80 sort:-cpu @beta", cells, "name", "  ")
        lines += _paragraph(
            'Words must all be found; /regex/; !not; column:value, with a comma for or; "quoted text"; column>n with '
            "percent, 30s, 5m; tag.zone=x; sort:column or sort:-column; @mesh.",
            cells,
            "text",
            "  ",
        )
        if signs := self._signs():
            lines += [[], [("Signs", "title")], *signs]
        if self._columns:
            lines += [[], [("Columns of this view", "title")]]
            for name, about in self._columns:
                parts = wrap(about, cells - 16)
                lines.append([("  ", "text"), (pad(name, 13), "name"), (" ", "text"), (parts[0], "text")])
                lines += [[(" " * 16, "text"), (part, "text")] for part in parts[1:]]
        return lines

    def _signs(self) -> list[Line]:
        """What stands before a row: a node's state, or a daemon's."""
        glyphs = SETS["ascii" if self._ascii else "unicode"]
        if self._view == "daemons":
            return [
                [(f"  {sign}  ", DAEMON_ROLES.get(state, "text")), (state.replace("_", " "), "text")]
                for state, sign in glyphs.daemons.items()
            ]
        if self._view in ("fleet", "map", "events"):
            return [[(f"  {sign}  ", state), (state, "text")] for state, sign in glyphs.states.items()]
        return []

    def foot(self, cells: int) -> list[Line]:
        return [
            [
                ("↑↓ PgDn" if not self._ascii else "Up Down PgDn", "key"),
                (" scroll  ", "soft"),
                ("Esc", "key"),
                (" closes", "soft"),
            ]
        ]


class Palette(Dialog):
    """Every action by name; typing narrows, Enter does it."""

    title = "Do"
    wish = 72

    def __init__(self, actions: list[Action], run: Callable[[Action], None], ascii_only: bool) -> None:
        self._actions = actions
        self._run = run
        self._ascii = ascii_only
        self.typed = LineEdit()
        self.at = 0

    def found(self) -> list[Action]:
        words = self.typed.text.lower().split()
        hits = [a for a in self._actions if all(w in f"{a.id} {a.label} {a.about}".lower() for w in words)]
        return sorted(hits, key=lambda a: not (words and a.label.lower().startswith(words[0])))

    def body(self, cells: int) -> list[Line]:
        found = self.found()
        self.at = max(0, min(self.at, len(found) - 1))
        self.cursor_line = self.at
        lines: list[Line] = []
        for at, action in enumerate(found):
            keys = " ".join(key_sign(key, self._ascii) for key in action.keys[:1])
            line: Line = [(pad(keys, 7), "key"), (shorten(action.about, cells - 8), "text")]
            lines.append(chosen(line) if at == self.at else line)
        return lines or [[("no action has these words", "soft")]]

    def foot(self, cells: int) -> list[Line]:
        return [[], [("> ", "key"), *self.typed.spans(cells - 2)]]

    def key(self, key: str, character: str | None) -> bool:
        if key in ("escape", "ctrl+p"):
            return False
        if key in ("up", "down", "tab", "shift+tab"):
            self.at += 1 if key in ("down", "tab") else -1
        elif key == "enter":
            found = self.found()
            if not found:
                return True
            self._run(found[self.at])
            return False
        else:
            self.typed.key(key, character)
            self.at = 0
        return True

    def paste(self, text: str) -> None:
        self.typed.insert(text)


class OpList(Dialog):
    """Every op of this session with its outcome in full."""

    title = "Ops of this session"
    wish = 110
    sticky_end = True

    def __init__(self, book: OpBook, clock: Callable[[], float]) -> None:
        self._book = book
        self._clock = clock

    def body(self, cells: int) -> list[Line]:
        self._book.mark_seen()
        now = self._clock()
        lines: list[Line] = []
        for entry in self._book.entries:
            lines += self._book.describe(entry, now, cells)
            if entry.op_id:
                where = f" by the {entry.route} route" if entry.route else ""
                lines.append([(f"     op {entry.op_id}{where}, target {entry.target}", "soft")])
        return lines or [[("no op was made yet", "soft")]]

    def foot(self, cells: int) -> list[Line]:
        return [[("Esc", "key"), (" closes", "soft")]]

    def key(self, key: str, character: str | None) -> bool:
        return key not in ("escape", "enter", "q", "o")


class Pick(Dialog):
    """A list to take any number from: Space takes, Enter goes on with what was taken."""

    wish = 84

    def __init__(self, title: str, items: list[tuple[str, str]], done: Callable[[list[str]], None]) -> None:
        """`items`: (what it is, what is known of it)."""
        self.title = title
        self._items = items
        self._done = done
        self.taken: set[str] = set()
        self.at = 0
        self.error = ""

    def body(self, cells: int) -> list[Line]:
        self.cursor_line = self.at
        wide = min(max(width(name) for name, _ in self._items), max(12, cells - 24))
        lines: list[Line] = []
        for at, (name, about) in enumerate(self._items):
            sign = "[x] " if name in self.taken else "[ ] "
            line: Line = [(sign, "key"), (pad(elide(name, wide), wide), "name")]
            line += [("  ", "text"), (shorten(about, max(1, cells - wide - 6)), "soft")]
            lines.append(chosen(line) if at == self.at else line)
        return lines

    def foot(self, cells: int) -> list[Line]:
        lines: list[Line] = [[]]
        if self.error:
            lines += _paragraph(self.error, cells, "error")
        keys = (("Space", " takes   "), ("*", " all   "), ("Enter", f" goes on with {len(self.taken)}   "))
        return [
            *lines,
            [p for key, said in keys for p in ((key, "key"), (said, "text"))]
            + [("Esc", "key"), (" leaves it", "text")],
        ]

    def key(self, key: str, character: str | None) -> bool:
        if key == "escape":
            return False
        self.error = ""
        if key in ("up", "down", "k", "j"):
            self.at = max(0, min(len(self._items) - 1, self.at + (1 if key in ("down", "j") else -1)))
        elif key == "space":
            self.taken ^= {self._items[self.at][0]}
        elif character == "*":
            every = {name for name, _ in self._items}
            self.taken = set() if self.taken == every else every
        elif key == "enter":
            if self.taken:
                self._done([name for name, _ in self._items if name in self.taken])
                return False
            self.error = "nothing is taken: Space takes the one under the cursor"
        return True


class Choice(Dialog):
    """A question with one key an answer."""

    def __init__(self, title: str, text: str, answers: list[tuple[str, str, Callable[[], None]]]) -> None:
        self.title = title
        self._text = text
        self._answers = answers

    def body(self, cells: int) -> list[Line]:
        return _paragraph(self._text, cells)

    def foot(self, cells: int) -> list[Line]:
        line: Line = []
        for key, label, _ in self._answers:
            line += [(key_sign(key), "key"), (f" {label}   ", "text")]
        return [[], [*line, ("Esc", "key"), (" leaves it", "text")]]

    def key(self, key: str, character: str | None) -> bool:
        for wanted, _, run in self._answers:
            if wanted in (key, character):
                run()
                return False
        return key != "escape"
