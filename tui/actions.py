"""The one registry of actions: keys, footer, help and palette all come from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from discovery.errors import LocalError

ROWS = frozenset({"fleet", "map", "node"})
"""Views that have a node under the cursor."""
CARDS = frozenset({"fleet", "map"})
LISTS = frozenset({"fleet", "meshes", "daemons", "chains", "failures", "events", "audit", "logs"})
VIEWS = CARDS | LISTS
MARKED = CARDS | {"daemons"}


@dataclass(frozen=True)
class Action:
    """Something that can be done. `tui.doing` does it in a method of its id, `tui.acting` the ops."""

    id: str
    keys: tuple[str, ...]
    label: str
    """One or two words, for the footer."""
    about: str
    """A sentence, for help and palette."""
    group: str
    views: frozenset[str] | None = None
    """Where it works; None everywhere."""
    verb: str | None = None
    """The op that it makes."""
    hint: int | None = None
    """Place in the footer, lowest first; None keeps it out."""

    def works_in(self, view: str) -> bool:
        return self.views is None or view in self.views


GROUPS = ("Act", "Mark", "Move", "Find", "Look", "Leave")

ACTIONS: tuple[Action, ...] = (
    Action(
        "op_drain", ("d",), "drain",
        "Drain: takes no new work, and finishes what it has by a deadline",
        "Act", ROWS, "drain", 20,
    ),
    Action(
        "op_update", ("u",), "update",
        "Update: re-executes itself with the code on its disk, under the same id",
        "Act", ROWS, "update", 21,
    ),
    Action("op_resume", ("r",), "resume", "Resume: takes work again", "Act", ROWS, "resume", 22),
    Action(
        "op_kill", ("X",), "kill",
        "Kill: shuts it down by message; it says goodbye and its process ends",
        "Act", ROWS, "kill", 23,
    ),
    Action(
        "op_maintenance_enter", ("m",), "maint",
        "Enter maintenance: stops its daemons and hands over its replicas by a deadline, then stays out of use",
        "Act", ROWS, "maintenance_enter", 41,
    ),
    Action(
        "op_maintenance_exit", ("M",), "exit maint",
        "Exit maintenance: starts its daemons again, and after a recovery it is active",
        "Act", ROWS, "maintenance_exit", 42,
    ),
    Action(
        "op_cordon", ("c",), "cordon",
        "Cordon: takes nothing new; what runs there stays",
        "Act", ROWS, "cordon", 43,
    ),
    Action("op_uncordon", ("C",), "uncordon", "Uncordon: takes new work again", "Act", ROWS, "uncordon", 44),
    Action(
        "op_restart_daemons", ("R",), "restart",
        "Restart all daemons: each stops and is started again, through its gate",
        "Act", ROWS, "restart_daemons", 45,
    ),
    Action(
        "op_clear_avoid", ("A",), "clear avoid",
        "Clear the avoid list: forgets which nodes it avoids, and judges them anew",
        "Act", ROWS, "clear_avoid", 46,
    ),
    Action(
        "op_drop_replicas", ("D",), "drop",
        "Drop replicas: gives up its copies of the chains that you pick",
        "Act", ROWS, "drop_replicas", 47,
    ),
    Action(
        "op_invalidate_placement", ("I",), "placement",
        "Invalidate placement: the chains it leads are placed anew",
        "Act", ROWS, "invalidate_placement", 48,
    ),
    Action(
        "spawn", ("N",), "spawn",
        "New node: starts one of this home, on this host; it outlives the console",
        "Act", ROWS | {"meshes"}, None, 62,
    ),
    Action(
        "ops", ("o",), "ops",
        "Every op of this session with its outcome, in full",
        "Act", None, None, 60,
    ),
    Action(
        "read_only", ("ctrl+r",), "read-only",
        "Read-only on or off: while it is on, no op is made",
        "Act",
    ),
    Action(
        "mark", ("space",), "mark",
        "Mark or unmark the row under the cursor; ops act on the marks, Logs follows them",
        "Mark", MARKED, None, 10,
    ),
    Action("mark_all", ("*",), "all", "Mark all that the filter shows; again, none", "Mark", MARKED),
    Action("up", ("up", "k"), "up", "Up", "Move"),
    Action("down", ("down", "j"), "down", "Down", "Move"),
    Action("left", ("left", "h"), "left", "To the lane at the left", "Move", frozenset({"map"})),
    Action("right", ("right", "l"), "right", "To the lane at the right", "Move", frozenset({"map"})),
    Action("page_up", ("pageup", "ctrl+b"), "page up", "A page up", "Move"),
    Action("page_down", ("pagedown", "ctrl+f"), "page down", "A page down", "Move"),
    Action("first", ("home", "g"), "first", "To the first row", "Move"),
    Action("last", ("end", "G"), "last", "To the last row; in Events and Logs, follow what comes", "Move"),
    Action(
        "open", ("enter",), "open",
        "Open the node's page; Meshes: narrow the fleet to it; Daemons: open the log; Chains: show the holders",
        "Move", VIEWS, None, 40,
    ),
    Action(
        "page", ("p",), "node",
        "Open the page of the daemon's node",
        "Look", frozenset({"daemons"}), None, 41,
    ),
    Action("back", ("-",), "back", "Back to the place before this one", "Move"),
    Action(
        "escape", ("escape",), "back",
        "Close, go back, clear the filter, clear the marks: the first that applies",
        "Move", None, None, 5,
    ),
    Action(
        "filter", ("/",), "filter",
        "Filter: words, /regex/, !not, column:value, column>n, tag.key=value",
        "Find", VIEWS, None, 30,
    ),
    Action(
        "command", (":",), "go",
        "Go to a view locator or run an action; Tab completes",
        "Find", None, None, 31,
    ),
    Action(
        "search", ("F",), "find",
        "Find a text in the lines that are shown; n and N go to the next and the one before",
        "Find", frozenset({"logs"}), None, 32,
    ),
    Action("search_next", ("n",), "next find", "To the next line with it", "Find", frozenset({"logs"})),
    Action("search_back", ("N",), "last find", "To the line with it before this one", "Find", frozenset({"logs"})),
    Action(
        "level", ("w",), "level",
        "Only warnings and errors, only errors, everything again",
        "Find", frozenset({"logs"}), None, 13,
    ),
    Action("sort", ("s",), "sort", "Sort by the next column", "Find", LISTS),
    Action("sort_turn", ("S",), "turn", "Turn the order round", "Find", LISTS),
    Action("palette", ("ctrl+p",), "palette", "Every action, by name", "Find"),
    Action(
        "bookmark", ("b",), "bookmark",
        "Bookmark this view with its filter and order",
        "Find", VIEWS,
    ),
    Action(
        "follow", ("f",), "follow",
        "Follow new events or lines, or stop",
        "Look", frozenset({"events", "logs"}), None, 12,
    ),
    Action(
        "scrub_back", ("[",), "back in time",
        "To the change of the fleet before this one: the fleet is shown as it was then",
        "Look", frozenset({"events"}), None, 13,
    ),
    Action(
        "scrub_on", ("]",), "on in time",
        "To the next change of the fleet; after the newest one, to now",
        "Look", frozenset({"events"}), None, 14,
    ),
    Action(
        "copy", ("y",), "copy",
        "Copy the row to the clipboard (through the terminal, OSC 52)",
        "Look",
    ),
    Action(
        "export", ("e",), "export",
        "Write what is shown to a file: CSV, JSON or text",
        "Look", VIEWS,
    ),
    Action("retry", ("f5",), "retry", "Try the agent again now, or read the page anew", "Look"),
    Action("help", ("?",), "help", "This help", "Look", None, None, 50),
    Action("quit", ("q",), "quit", "Leave the console; Ctrl+C twice does it too", "Leave", None, None, 55),
)  # fmt: skip
_BY_ID = {action.id: action for action in ACTIONS}
OP_VERBS = {action.verb: action for action in ACTIONS if action.verb}

KEY_SIGNS = {
    "space": "␣",
    "enter": "⏎",
    "escape": "Esc",
    "up": "↑",
    "down": "↓",
    "left": "←",
    "right": "→",
    "pageup": "PgUp",
    "pagedown": "PgDn",
    "home": "Home",
    "end": "End",
    "tab": "Tab",
}
_ASCII_SIGNS = {"space": "Spc", "enter": "Ret", "up": "Up", "down": "Down", "left": "Left", "right": "Right"}


def key_sign(key: str, ascii_only: bool = False) -> str:
    """A key as it is written in the footer."""
    if key.startswith("ctrl+"):
        return f"Ctrl+{key[5:].upper()}"
    if ascii_only and key in _ASCII_SIGNS:
        return _ASCII_SIGNS[key]
    return KEY_SIGNS.get(key, key.upper() if len(key) > 1 else key)


class Keymap:
    """Actions by key, with the keys that a config gives them."""

    def __init__(
        self,
        views: Iterable[tuple[str, str, str]] = (),
        remap: Mapping[str, str | Sequence[str]] = {},
        abouts: Mapping[str, str] = {},
    ) -> None:
        """`views`: (key, name, title) of those that exist; `abouts`: what each shows. LocalError on an unknown action or
        a key given twice."""
        switches = [
            Action(
                f"view_{name}",
                (key,),
                title,
                f"To {title}" + (f": {abouts[name]}" if name in abouts else ""),
                "Move",
            )
            for key, name, title in views
        ]
        known = {action.id: action for action in (*ACTIONS, *switches)}
        for name, keys in remap.items():
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise LocalError(
                    f"keys: no action {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
            given = (keys,) if isinstance(keys, str) else tuple(keys)
            known[name] = replace(known[name], keys=given)
        self.actions = tuple(known.values())
        for action in self.actions:
            for other in self.actions:
                self._check(action, other, remap)

    @staticmethod
    def _check(one: Action, other: Action, remap: Mapping[str, object]) -> None:
        shared = set(one.keys) & set(other.keys)
        meet = one.views is None or other.views is None or bool(one.views & other.views)
        if one.id < other.id and shared and meet:
            raise LocalError(
                f"keys: {min(shared)!r} is both {one.id} and {other.id}; give one of them another key"
            )

    def find(self, key: str, view: str) -> Action | None:
        """The action of a key in a view."""
        for action in self.actions:
            if key in action.keys and action.works_in(view):
                return action
        return None

    def by_id(self, name: str) -> Action:
        return next(action for action in self.actions if action.id == name)

    def hints(self, view: str) -> list[Action]:
        """The footer of a view, the most needed first."""
        found = [a for a in self.actions if a.hint is not None and a.works_in(view) and a.keys]
        if view != "node":
            found = [a for a in found if a.id != "escape"]
        return sorted(found, key=lambda a: a.hint or 0)

    def of(self, view: str) -> list[Action]:
        """What works in a view, by group."""
        return sorted((a for a in self.actions if a.works_in(view)), key=lambda a: GROUPS.index(a.group))
