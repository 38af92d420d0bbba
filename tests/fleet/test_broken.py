"""What a bad week does to a fleet: clocks set back, a run directory full of rubbish. Nothing hangs, nobody is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.fleet.harness import Fleet, wait_for

pytestmark = pytest.mark.fleet


def test_node_whose_clock_was_set_back_is_heard_at_once(fleet: Fleet) -> None:
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
    if library is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    a = fleet.agent("a").start()
    a.wait("node.ready")
    b = fleet.agent("b", join=a)
    b.env |= {"LD_PRELOAD": str(library), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    b.start()
    a.wait("node.joined", node="b")
    b.signal(signal.SIGKILL)
    b.wait_exit()
    a.wait("node.changed", node="b", to="dead")
    b.env["FAKETIME"] = "-1h"
    b.start()
    a.wait("node.changed", 8.0, node="b", frm="dead")
    assert "old_salt" not in fleet.qd_json("node", "a", "--via", "a")["counters"]


def test_rubbish_in_the_run_directory_holds_up_neither_nodes_nor_commands(fleet: Fleet) -> None:
    a = fleet.agent("a").start()
    a.wait("node.ready")
    run = fleet.home / "run"
    mine = json.loads((run / "alpha.a.json").read_text())
    for number, change in enumerate(({"pid": -1}, {"addr": "nonsense"}, {"pid": 2**90}, {"addr": "h:99999"})):
        (run / f"alpha.bad{number}.json").write_text(json.dumps(mine | change))
    (run / "alpha.half.json").write_text("{")
    (run / "alpha.endless.json").symlink_to("/dev/zero")
    os.mkfifo(run / "alpha.fifo.json")
    b = fleet.agent("b").start()
    b.wait("node.joined", node="a")
    done = fleet.qd("nodes", "--json", timeout_s=20)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: set(fleet.rows(a)) == {"a", "b"}, "a sees b and answers")
