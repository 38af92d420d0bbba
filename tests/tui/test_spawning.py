"""Nodes started from the console: the dialog, the start followed to its end, and the row until its mesh tells of it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.spawn import SpawnRegistry
from discovery.errors import LocalError, Unreachable
from tests.tui.canned import founded
from tests.tui.console import Console, console
from tests.tui.fakes import delta, row, wide_frame
from tui.spawning import Ended, Spawner

NEW = 0xABCDEF


class FakeSpawner:
    """Starts nothing. `answer` is what the started node says, or how it fails; it comes when `go` is set."""

    def __init__(self, answer: Any = None, known: list[str] | None = None) -> None:
        self.answer = answer
        self.known = ["alpha", "beta"] if known is None else known
        self.began: list[tuple[str, str]] = []
        self.go = asyncio.Event()
        self.is_foreign = False
        self.process = SimpleNamespace(running=True)

    def meshes(self) -> list[str]:
        return self.known

    def foreign(self, client: Any) -> bool:
        return self.is_foreign

    async def start(self, mesh: str, kind: str) -> Any:
        self.began.append((mesh, kind))
        self.process.id, self.process.mesh, self.process.kind = f"{NEW:016x}", mesh, kind
        self.process.name = f"{mesh}.{kind}.{NEW:06x}"
        return self.process

    async def answered(self, started: Any) -> dict[str, Any]:
        await self.go.wait()
        if isinstance(self.answer, Exception):
            started.running = not isinstance(self.answer, Ended)
            raise self.answer
        return {"id": started.id, "name": started.name}


async def spawn(here: Console, *keys: str) -> None:
    await here.press("N")
    await here.shows("Start a node here", "goes on when the console ends")
    await here.press(*keys, "enter")


def test_node_is_started_in_the_mesh_under_the_cursor_and_followed_until_it_answers() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await here.press("/", "=beta.broker.d2", "enter")
            await spawn(here, "tab", "down")
            assert spawner.began == [("beta", "broker")]
            name = f"beta.broker.{NEW:06x}"
            await here.shows(f"N spawn {name}  started, waiting for it to answer")
            spawner.go.set()
            await here.shows(f"N spawn {name}  done, answers")

    asyncio.run(main())


def test_started_node_stands_in_the_fleet_as_spawned_until_its_mesh_tells_of_it() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await spawn(here)
            await here.shows("18 nodes")
            fleet = here.app.fleet
            assert fleet.rows[f"{NEW:016x}"].text("source") == "spawned"
            here.client.put(wide_frame())  # an agent that has not met it begins anew
            await here.until(
                lambda: fleet.received and f"{NEW:016x}" in fleet.rows, "the row after a full frame"
            )
            here.client.put(delta([row("alpha.compute.abcdef", NEW, cpu=0.3)]))
            await here.until(
                lambda: fleet.rows[f"{NEW:016x}"].text("source") == "gossip", "its own mesh's row"
            )
            here.client.put(delta(gone=[f"{NEW:016x}"]))
            await here.until(lambda: f"{NEW:016x}" not in fleet.rows, "it to go when its mesh says so")
            here.client.put(delta())
            await here.shows("17 nodes")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "said", "stays"),
    [
        (
            Ended(2, "spawn: the node ended: mesh alpha: key is \x1b[31mdamaged; see /l"),
            "damaged; see /l",
            False,
        ),
        (
            Unreachable("spawn: process 9 runs but does not answer within 10 s; see /l"),
            "process 9 runs but",
            True,
        ),
        (LocalError("no room on the disk"), "failed: no room on the disk", True),
        (RuntimeError("boom"), "failed: RuntimeError: boom", True),
    ],
)
def test_start_that_fails_tells_the_last_words_and_shows_no_node_that_is_gone(
    answer: Exception, said: str, stays: bool
) -> None:
    async def main() -> None:
        spawner = FakeSpawner(answer)
        async with console(wide_frame(), spawner=spawner) as here:
            await spawn(here)
            await here.shows("18 nodes")
            spawner.go.set()
            await here.shows(said)
            await here.shows("18 nodes" if stays else "17 nodes")
            assert "\x1b" not in here.text

    asyncio.run(main())


def test_started_node_that_ends_unheard_of_leaves_the_fleet() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await spawn(here)
            spawner.go.set()
            await here.shows("18 nodes", "done, answers")
            spawner.process.running = False
            here.client.put(delta())
            await here.shows("17 nodes")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("shift+tab", "tab", "ctrl+u", "=delta"), "this home has no keys for delta"),
        (("ctrl+u",), "this home has no keys for"),
        (("tab", "ctrl+u", "=Not A Kind"), "not a kind"),
    ],
)
def test_mesh_without_keys_and_a_bad_kind_are_refused_in_the_panel(keys: tuple[str, ...], said: str) -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await spawn(here, *keys)
            await here.shows(said, "Start a node here")
            assert spawner.began == []
            await here.press("escape")
            await here.hides("Start a node here")

    asyncio.run(main())


def test_default_mesh_is_the_one_of_the_view_only_where_this_home_has_its_keys() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await here.press("3", "G")
            await here.shows("meshes  5 meshes")
            for name, given_mesh in (("beta", "beta"), ("delta", "alpha")):
                await here.press("escape", "/", f"={name}", "enter")
                await spawn(here)
                assert spawner.began[-1] == (given_mesh, "compute")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spawner": FakeSpawner, "read_only": True}, "read-only: no node is started"),
        ({}, "no home here to start a node in"),
        ({"spawner": lambda: FakeSpawner(known=[])}, "no mesh in this home: qd init makes one"),
    ],
)
def test_start_that_can_not_be_is_not_offered_and_says_why(options: dict[str, Any], said: str) -> None:
    async def main() -> None:
        made = {key: value() if callable(value) else value for key, value in options.items()}
        async with console(wide_frame(), **made) as here:
            await here.press("N")
            await here.shows(said)
            assert here.app.panel.dialog is None

    asyncio.run(main())


def test_console_on_an_agent_of_another_home_starts_nothing_and_says_where_to() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        spawner.is_foreign = True
        async with console(wide_frame(), spawner=spawner) as here:
            await here.press("N")
            await here.shows("alpha.console.31aa90 is of another home", "use qd spawn on its host")
            assert spawner.began == []

    asyncio.run(main())


def test_read_only_switched_on_in_the_dialog_still_holds() -> None:
    async def main() -> None:
        spawner = FakeSpawner()
        async with console(wide_frame(), spawner=spawner) as here:
            await here.press("N")
            here.app.acting.toggle_read_only()
            await here.press("enter")
            await here.shows("read-only mode was switched on")
            assert spawner.began == []

    asyncio.run(main())


def test_agent_is_of_another_home_only_without_a_run_entry_here(tmp_path: Path) -> None:
    spawner = Spawner(founded(tmp_path / "home"))
    assert spawner.meshes() == ["alpha"]
    assert spawner.foreign(SimpleNamespace(entry=None, id="00"))
    assert not spawner.foreign(SimpleNamespace(entry=object(), id="00"))


@pytest.mark.fleet
def test_real_node_answers_is_noted_and_is_reaped_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = founded(tmp_path / "home")
    for key, value in {"QD_HOME": str(home.root), "QD_NO_MDNS": "1", "QD_BIND": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)

    async def main() -> None:
        spawner = Spawner(home)
        started = await spawner.start("alpha", "broker")
        try:
            found = await spawner.answered(started)
            assert (found["id"], found["name"]) == (started.id, started.name)
            assert [e.addr for e in SpawnRegistry(home).entries()] == [found["addr"]]
        finally:
            os.kill(started.process.pid, signal.SIGTERM)
            async with asyncio.timeout(20):
                while started.running:  # noqa: ASYNC110 (a child's end is no event)
                    await asyncio.sleep(0.02)
        with pytest.raises(ProcessLookupError):
            os.kill(started.process.pid, 0)
        with pytest.raises(LocalError, match="this home has alpha"):
            await spawner.start("nosuch", "broker")

    asyncio.run(main())
