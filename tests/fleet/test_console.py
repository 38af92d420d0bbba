"""The console in a real terminal, on real agents: what it shows is so, and what it sends takes effect."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.fleet.harness import BIN, Agent, Fleet, wait_for
from tests.fleet.terminal import Terminal

pytestmark = pytest.mark.fleet

NO_TIMER = ("--suspicion-ms", "120000")


def console(fleet: Fleet, *words: str, columns: int = 160, rows: int = 45) -> Terminal:
    env = {**fleet.env, "QD_NO_MDNS": "1", "QD_BIND": "127.0.0.1", "QD_SUSPICION_MS": "1500"}
    return Terminal(
        [str(BIN / "qd"), "console", "--home", str(fleet.home), "--mesh", "alpha", *words], env, columns, rows
    )


def console_of(agent: Agent) -> str:
    """The name of the console's own node, as another node met it."""
    return wait_for(
        lambda: next((e["node"] for e in agent.of("node.joined") if ".console." in e["node"]), None),
        "a console joins",
    )


@pytest.mark.parametrize(("columns", "rows"), [(160, 45), (80, 24)])
def test_console_joins_as_a_node_and_shows_the_fleet(fleet: Fleet, columns: int, rows: int) -> None:
    a, *_ = fleet.boot("a-one", "b-two", "c-three")
    with console(fleet, columns=columns, rows=rows) as screen:
        shown = screen.shows("a-one", "b-two", "c-three", "alive", "you")
        assert all(len(line) <= columns for line in shown.splitlines())
        name = console_of(a)
        screen.keys("q")
        screen.shows("LEFT 0")
        assert a.wait("node.evicted", node=name)["source"] == "left"


def test_kill_from_the_console_is_left_in_the_views_of_others(fleet: Fleet) -> None:
    a, b, c = fleet.boot("a", "b", "victim", flags=NO_TIMER)
    with console(fleet, "fleet", "victim", columns=100, rows=30) as screen:
        screen.shows("● victim")
        screen.keys("X")
        screen.shows("Kill", "victim")
        screen.keys("Enter")
        assert c.wait_exit() == 0
        for witness in (a, b):
            assert witness.wait("node.evicted", node="victim")["source"] == "left"
            assert not witness.of("node.changed", node="victim", to="dead")
        screen.shows("done")


def test_stopped_node_is_shown_dead_as_silent_and_alive_again(fleet: Fleet) -> None:
    _, b = fleet.boot("a", "b", flags=("--suspicion-ms", "1500"))
    with console(fleet) as screen:
        screen.shows("● b", "alive")
        b.signal(signal.SIGSTOP)
        screen.shows("✕ b", "no answer to", timeout_s=40)
        b.signal(signal.SIGCONT)
        screen.shows("● b", timeout_s=40)


def test_console_whose_node_dies_keeps_the_rows_and_says_so(fleet: Fleet) -> None:
    fleet.boot("a", "b")
    with console(fleet) as screen:
        screen.shows("● a", "● b")
        (node,) = [
            p for p in psutil.Process(screen.pid).children(recursive=True) if "--stdin-goodbye" in p.cmdline()
        ]
        node.kill()
        shown = screen.shows("next try")
        assert " a " in shown and " b " in shown
        left = psutil.Process(screen.pid).children(recursive=True)
    # The terminal is gone with its server: nobody may be left behind, whatever state the console was in.
    wait_for(lambda: not psutil.wait_procs(left, timeout=0)[1], f"{left} end with their terminal")


def test_console_that_is_ended_by_sigterm_restores_the_terminal(fleet: Fleet) -> None:
    a, _ = fleet.boot("a", "b")
    with console(fleet) as screen:
        screen.shows("● a")
        name = console_of(a)
        children = psutil.Process(screen.pid).children(recursive=True)
        ui = next(p for p in children if "console" in p.cmdline() and "--stdin-goodbye" not in p.cmdline())
        ui.send_signal(signal.SIGTERM)
        screen.shows("LEFT")
        assert "QUARTERDECK" not in screen.screen
        assert a.wait("node.evicted", node=name)["source"] == "left"


def test_read_only_console_sends_nothing(fleet: Fleet) -> None:
    a, b = fleet.boot("a", "b")
    with console(fleet, "--read-only") as screen:
        screen.shows("● b", "READ-ONLY")
        screen.keys("X")
        screen.shows("read-only: no op is made")
        screen.keys("Enter", "q")
        screen.shows("LEFT 0")
    assert not a.of("control.received") and not b.of("control.received")


def test_terminal_of_20_by_5_is_no_crash(fleet: Fleet) -> None:
    fleet.boot("a")
    with console(fleet, columns=20, rows=5) as screen:
        wait_for(lambda: screen.screen.strip(), "something on the screen")
        screen.keys("q")
        screen.shows("LEFT 0")
