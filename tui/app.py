"""The console. It paints before it has joined, never blanks what it knows, and leaves the terminal as it found it."""

from __future__ import annotations

import os

os.environ.setdefault("ESCDELAY", "25")  # textual reads it once, at import

import asyncio
import contextlib
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from textual import events
from textual.app import App, ComposeResult
from textual.containers import Container
from textual.screen import Screen
from textual.timer import Timer

from tui import actions
from tui.acting import Acting
from tui.actions import Action, Keymap, key_sign
from tui.chrome import LEAST_CELLS, LEAST_LINES, Chrome
from tui.doing import Doing
from tui.finding import Finding
from tui.model.audit import Audit
from tui.model.chains import Chains
from tui.model.daemons import Daemons
from tui.model.failures import Failures
from tui.model.glyphs import ASCII_SIGNS, SETS
from tui.model.locator import Locator, LocatorError
from tui.model.rows import Change, Fleet
from tui.model.text import clean
from tui.model.views import VIEWS
from tui.options import ConsoleOptions
from tui.prompt import Prompt
from tui.screens.base import Place, View
from tui.screens.registry import MAKERS
from tui.session import Connect, SendOp, Session
from tui.starting import Starting
from tui.theme import PLAIN, choose
from tui.widgets.lines import Lines
from tui.widgets.panel import Dialog, Panel
from tui.widgets.table import TableView

FRAME_S = 1 / 30
"""At most this often the screen follows the model."""
FIGURES_S = 0.4
"""So long newer figures may wait for each other, where nobody came, went or changed its state."""
MESSAGE_S = 6.0
CTRL_C_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
LEAVE_LIMIT_S = 5.0
NARROWED = frozenset({"fleet", "map", "daemons", "failures", "events"})
"""Views that begin narrowed to the mesh that the console was started with; Chains and Audit are of one mesh anyhow."""


class Deck(Screen[None], inherit_bindings=False):
    """The one screen; keys never reach it, the app takes them first."""

    ALLOW_SELECT = False


class QuarterdeckApp(App[int], inherit_bindings=False):
    """Shows a fleet through one agent, and sends ops. `connect` and `send_op` are all it knows of the world."""

    ENABLE_COMMAND_PALETTE = False
    ALLOW_SELECT = False
    TITLE = "Quarterdeck"
    CSS = """
    Deck { layers: base over; layout: vertical; overflow: hidden; background: $deck-ground; }
    #views { height: 1fr; width: 1fr; }
    Sheet {
        scrollbar-background: $deck-ground; scrollbar-background-hover: $deck-ground;
        scrollbar-background-active: $deck-ground; scrollbar-corner-color: $deck-ground;
        scrollbar-color: $deck-thumb; scrollbar-color-hover: $deck-thumb-over; scrollbar-color-active: $deck-thumb-held;
    }
    """

    def __init__(self, connect: Connect, send_op: SendOp, options: ConsoleOptions | None = None) -> None:
        self.options = options or ConsoleOptions()
        self.look = choose(self.options.theme)
        # Without colour the terminal's own ground stays: textual would paint greys.
        super().__init__(ansi_color=self.look.name == PLAIN.name)
        self.glyphs = SETS.get(self.options.glyphs, SETS["unicode"])
        if self.glyphs.name == "ascii":
            self.look = replace(self.look, signs=ASCII_SIGNS)
        self.switches = [(v.key, v.name, v.title) for v in VIEWS.values() if v.name in MAKERS]
        self.keymap = Keymap(self.switches, self.options.keys, {v.name: v.about for v in VIEWS.values()})
        self.fleet = Fleet()
        self.daemons = Daemons()
        self.failures = Failures()
        self.chains = Chains()
        self.audit = Audit()
        self.session = Session(connect, self.options.mesh, self.now, self._frame, self.changed)
        self.acting = Acting(self, send_op, self.options.signer, self.options.read_only)
        self.starting = Starting(self, self.options.spawner)
        self.finding = Finding(self, self.options)
        self.doing = Doing(self)
        self.chrome = Chrome(self)
        self.view_name = "fleet"
        self.node_id = ""
        """The node whose page is open; empty for none."""
        self.views: dict[str, View] = {}
        self.trail: list[Place] = []
        self.prompt: Prompt | None = None
        self.message: tuple[str, str] | None = None
        self.message_until = 0.0
        self._ctrl_c_at = float("-inf")
        self._pending: Change | None = None
        self._paint_timer: Timer | None = None
        self._paint_at = 0.0
        self._fitted: tuple[bool, bool] | None = None
        """(tiny, low), as the bars were last shown for."""
        self._wall_offset_ms: float | None = None
        self._join: asyncio.Task[None] | None = None
        self.panel = Panel(id="panel")

    # -- clocks

    @staticmethod
    def now() -> float:
        """The viewer's monotonic clock, in seconds: every age on the screen is measured with it."""
        return time.monotonic()

    def wall_ms(self) -> float:
        """The attached agent's wall clock, as far as its frames tell it; events are labelled with it."""
        return time.time() * 1000 + (self._wall_offset_ms or 0.0)

    # -- composition

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The stock parts (grounds, scrollbars) in the colours of the look."""
        colours = self.look.colours
        parts = {"thumb": "track", "thumb-over": "frame", "thumb-held": "accent"}
        found = {f"deck-{name}": colours.get(role, "ansi_default") for name, role in parts.items()}
        return found | {"deck-ground": self.look.background}

    def get_default_screen(self) -> Screen[Any]:
        return Deck(id="_default")

    def compose(self) -> ComposeResult:
        chrome = self.chrome
        self.bars = {
            "small": Lines(chrome.too_small, "base", id="small"),
            "header": Lines(chrome.header, "bar", id="header"),
            "viewbar": Lines(chrome.viewbar, "bar", id="viewbar"),
            "banner": Lines(chrome.banner, "banner", id="banner"),
            "title": Lines(chrome.title, "base", id="title"),
            "tray": Lines(chrome.tray, "base", id="tray"),
            "footer": Lines(chrome.footer, "bar", id="footer"),
        }
        self.bars["footer"].keep_end = True
        self.views["fleet"] = self._made("fleet")
        for name in ("small", "header", "viewbar", "banner", "title"):
            yield self.bars[name]
        with Container(id="views"):
            yield self.views["fleet"]
        yield self.bars["tray"]
        yield self.bars["footer"]
        yield self.panel

    def on_mount(self) -> None:
        self.panel.glyphs = self.glyphs
        self._fit()
        self.bars["viewbar"].pick = self._pick_view
        self.set_interval(1.0, self._tick)
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self._leave_by_signal, number)
        if self.options.locator:
            self.finding.open_first(self.options.locator)
        # The first paint comes before the first connection is tried.
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self._join = asyncio.create_task(self.session.run())

    async def on_unmount(self) -> None:
        if self._join is not None:
            self._join.cancel()
        await self.session.close()
        if self.options.elsewhere is not None:
            await self.options.elsewhere.close()

    def _handle_exception(self, error: Exception) -> None:
        """A bug of ours ends the console with one line and a whole terminal, not with a page of traceback."""
        if self.is_headless:
            super()._handle_exception(error)
            return
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" in {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
        text = clean(str(error))[:200]
        self.exit(
            return_code=1,
            message=f"qd: console: {type(error).__name__}{where}: {text}; this is a bug, please report it",
        )

    def _leave_by_signal(self, number: int) -> None:
        """Leaves in order, but leaves: writing to a terminal that is gone ends Textual's writer, and closing would
        then wait for it for ever. The end of this process is the goodbye of the console's own node all the same."""
        limit = threading.Timer(LEAVE_LIMIT_S, os._exit, (128 + number,))
        limit.daemon = True
        limit.start()
        self.exit(return_code=128 + number)

    # -- following the model

    def _frame(self, frame: Mapping[str, Any]) -> None:
        change = self.fleet.fold(frame, self.now())
        change.merge(self.starting.bridge())
        at_ms = frame.get("at_ms")
        if isinstance(at_ms, (int, float)):
            self._wall_offset_ms = at_ms - time.time() * 1000
        self.folded(change)

    def folded(self, change: Change) -> None:
        """The model has changed: the views hear of it at the next paint."""
        if self._pending is None:
            self._pending = change
        else:
            self._pending.merge(change)
        self.changed(FRAME_S if change.full or change.moved or change.events else FIGURES_S)

    def changed(self, within_s: float = FRAME_S) -> None:
        """Something may look different: it is drawn within that time, together with whatever else comes until then."""
        due = self.now() + within_s
        if self.is_running and (self._paint_timer is None or due < self._paint_at - FRAME_S):
            if self._paint_timer is not None:
                self._paint_timer.stop()
            self._paint_at = due
            self._paint_timer = self.set_timer(within_s, self._paint)

    def _paint(self) -> None:
        self._paint_timer = None
        change, self._pending = self._pending, None
        view = self.view_shown()
        if change is not None:
            for each in self.views.values():
                if each is view or change.full or each.view == "events":
                    each.folded(change)
        self._remake()

    def _tick(self) -> None:
        self.view_shown().tick()
        self._remake()

    def _remake(self) -> None:
        self._fit()
        if self._tiny():
            self.bars["small"].remake()
            return
        for bar in self.bars.values():
            if bar.display or bar.id in ("banner", "tray"):
                bar.remake()
        self.panel.remake()

    def blind(self) -> bool:
        """Whether what is shown is the past: the agent is lost, or silent for too long."""
        quiet = self.fleet.silence_ms(self.now())
        return quiet is not None and (self.session.phase != "live" or quiet > 5000)

    def say(self, text: str, role: str = "text") -> None:
        """A message for a few seconds."""
        self.message, self.message_until = (text, role), self.now() + MESSAGE_S
        self.changed()

    # -- size and look

    def on_resize(self) -> None:
        if hasattr(self, "bars"):
            self.call_after_refresh(self._remake)

    def _tiny(self) -> bool:
        return self.size.width < LEAST_CELLS or self.size.height < LEAST_LINES

    def _fit(self) -> None:
        """Shows what has room: on a low terminal the view bar leaves, on a tiny one everything but a sentence."""
        tiny, low = self._tiny(), self.size.height < 14
        if (tiny, low) == self._fitted:
            return
        self._fitted = (tiny, low)
        self.bars["small"].display = tiny
        self.query_one("#views").display = not tiny
        for name in ("header", "title", "footer", "banner", "tray"):
            bar = self.bars[name]
            bar.display = not tiny and (name not in ("banner", "tray") or bool(bar.lines))
        self.bars["viewbar"].display = not tiny and not low
        self.panel.display = not tiny and self.panel.dialog is not None

    # -- views and places

    def view_shown(self) -> View:
        """The view on screen: the node page while one is open."""
        return self.views["node"] if self.node_id and "node" in self.views else self.views[self.view_name]

    def view_for_keys(self) -> str:
        return "node" if self.node_id else self.view_name

    def _place(self) -> Place:
        view = self.views[self.view_name]
        cursor, scroll = view.place()
        return Place(self.view_name, self.node_id, view.locator.text(), cursor, scroll)

    def visit(self, name: str, locator: Locator | None = None, node: str = "", remember: bool = True) -> None:
        """Goes to a view, or to a node's page over it. LocatorError before anything has changed."""
        here = self._place()
        view = self._view(name)
        if locator is not None:
            view.set_locator(locator)
        if remember and (here.view, here.node, here.locator) != (name, node, view.locator.text()):
            self.trail.append(here)
            del self.trail[:-100]
        self.view_name, self.node_id = name, node
        if node:
            self._view("node").restore(node, 0)
        self._show()

    def _made(self, name: str) -> View:
        """A new view, narrowed to the mesh that the console was started with."""
        view = MAKERS[name](self)
        if self.options.mesh and name in NARROWED:
            view.set_locator(Locator(name, mesh=self.options.mesh))
        return view

    def _view(self, name: str) -> View:
        if name not in self.views:
            view = self.views[name] = self._made(name)
            self.query_one("#views").mount(view)
        return self.views[name]

    def _show(self) -> None:
        shown = self.view_shown()
        for view in self.views.values():
            if view.display and view is not shown:
                view.left()
            view.display = view is shown
        self.call_after_refresh(self.arrive)
        self._remake()

    def arrive(self) -> None:
        """The view on screen catches up with the model."""
        if self.view_shown().is_mounted:
            self.view_shown().folded(Change(full=True))
        self._remake()

    def go_back(self) -> bool:
        """To the place before this one, just as it was; False when there is none."""
        if not self.trail:
            return False
        place = self.trail.pop()
        view = self._view(place.view)
        self.view_name, self.node_id = place.view, place.node
        if view.locator.text() != place.locator:
            with contextlib.suppress(LocatorError):
                view.set_locator(self.finding.parse(place.locator))
        self._show()
        view.restore(place.cursor, place.scroll)
        return True

    def _pick_view(self, x: int, _y: int) -> None:
        at, gap = 1, self.chrome.viewgap(self.size.width)
        for key, name, title in self.switches:
            if at <= x < at + len(key) + 1 + len(title):
                self.visit(name)
            at += len(key) + 1 + len(title) + gap

    # -- keys

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key) and not event.is_forwarded:
            event.stop()
            self.press(event.key, event.character)
        elif isinstance(event, events.Paste) and not event.is_forwarded:
            event.stop()
            self._paste(event.text)
        else:
            await super().on_event(event)

    def press(self, key: str, character: str | None) -> None:
        """One key, to whoever has the word: Ctrl+C, the panel, the prompt, the registry of actions."""
        name = character if character and character.isprintable() and character != " " else key
        if key == "ctrl+c":
            self._ctrl_c()
        elif self._tiny():
            # What can't be seen can't be meant; only leaving works.
            if (action := self.keymap.find(name, self.view_for_keys())) and action.id == "quit":
                self.doing.quit()
        elif self.panel.dialog is not None:
            self.panel.key(key, character)
        elif self.prompt is not None:
            if not self.prompt.key(key, character):
                self.prompt = None
        elif action := self.keymap.find(name, self.view_for_keys()):
            self.run_deck_action(action)
        self._remake()

    def _paste(self, text: str) -> None:
        if self.panel.dialog is not None:
            self.panel.dialog.paste(text)
        elif self.prompt is not None:
            self.prompt.paste(text)
        self._remake()

    def _ctrl_c(self) -> None:
        if self.quit_armed():
            self.doing.quit()
        self._ctrl_c_at = self.now()

    def quit_armed(self) -> bool:
        """Whether the next Ctrl+C leaves."""
        return self.now() - self._ctrl_c_at < CTRL_C_S

    def key_of(self, action: str) -> str:
        """The key of an action as it is written."""
        keys = self.keymap.by_id(action).keys
        return key_sign(keys[0], self.glyphs.name == "ascii") if keys else ":" + action

    def run_deck_action(self, action: Action) -> None:
        """Does an action of the registry, if it works here."""
        if not action.works_in(self.view_for_keys()):
            self.say(f"{action.label} does not work in this view")
        elif action.verb:
            self.acting.ask(action.verb)
        elif action.id == "view_logs":
            self.doing.open_logs()
        elif action.id.startswith("view_"):
            self.visit(action.id.removeprefix("view_"))
        elif action.group == "Move" and action.id not in ("open", "back", "escape"):
            self.view_shown().move(action.id)
        else:
            getattr(self.doing, action.id)()

    def open_panel(self, dialog: Dialog) -> None:
        self.panel.open(dialog)

    # -- mouse

    def on_table_view_opened(self, _message: TableView.Opened) -> None:
        self.doing.open()

    def on_table_view_moved(self, _message: TableView.Moved) -> None:
        self._remake()


__all__ = ["ConsoleOptions", "QuarterdeckApp", "actions"]
