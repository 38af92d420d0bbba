"""What one spec changes of another, for people and as JSON."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from agent.spec.difference import RESTARTING_KEYS, Change, difference, restarts
from agent.spec.model import DaemonSpec, FleetSpec
from agent.spec.placing import Candidate
from agent.spec.reading import read_spec
from agent.spec.resources import Capacity

NODES = [Candidate(n, f"n{n}", "compute", {"zone": "ab"[n % 2]}) for n in range(1, 5)]
OLD = """\
[[daemon]]
name = "web"
command = ["web"]
all = true
env = { PORT = "80", SECRET = "s" }
[[daemon]]
name = "same"
command = ["x"]
all = true
on = "tag.zone=a"
[[daemon]]
name = "gone"
command = ["x"]
all = true
on = "node=n1"
[[chain]]
name = "orders"
"""
NEW = """\
[[daemon]]
name = "web"
command = ["web", "-v"]
all = true
env = { PORT = "81", SECRET = "s" }
health.tcp = 81
[[daemon]]
name = "same"
command = ["x"]
all = true
on = "tag.zone=a"
[[daemon]]
name = "new"
command = ["x"]
count = 5
on = "tag.zone=b"
[[chain]]
name = "orders"
replicas = 5
[[artifact]]
name = "model"
"""


def test_entries_are_added_removed_changed_by_key_or_unchanged() -> None:
    found = difference(read_spec(OLD), read_spec(NEW), NODES)
    assert [(e.table, e.name, e.what) for e in found.entries] == [
        ("daemon", "gone", "removed"),
        ("daemon", "new", "added"),
        ("daemon", "same", "unchanged"),
        ("daemon", "web", "changed"),
        ("chain", "orders", "changed"),
        ("artifact", "model", "added"),
    ]
    web = next(e for e in found.entries if e.name == "web")
    assert (
        Change("env.PORT", "80", "81") in web.changes
        and Change("command", ["web"], ["web", "-v"]) in web.changes
    )
    assert Change("health.tcp", None, "127.0.0.1:81") in web.changes
    assert not any(c.key == "env.SECRET" for c in web.changes)


def test_nodes_start_stop_and_restart_what_the_change_means_for_them() -> None:
    found = difference(read_spec(OLD), read_spec(NEW), NODES)
    acts = {n.name: (n.starts, n.stops, n.restarts) for n in found.nodes}
    assert acts == {
        "n1": (("new",), ("gone",), ("web",)),
        "n2": ((), (), ("web",)),
        "n3": (("new",), (), ("web",)),
        "n4": ((), (), ("web",)),
    }
    assert [str(s) for s in found.shortfalls] == ["new: 5 wanted, 2 nodes can run it"]
    assert found.placed["new"] == ("n1", "n3")


def test_lines_for_people_say_it_in_order() -> None:
    assert difference(read_spec(OLD), read_spec(NEW), NODES).lines() == [
        "- daemon gone",
        "+ daemon new on n1, n3",
        "~ daemon web on n1, n2, n3, n4",
        '    command: ["web"] → ["web","-v"]',
        "    env.PORT: 80 → 81",
        "    health.tcp: none → 127.0.0.1:81",
        "    health.interval_s: none → 10.0",
        "    health.timeout_s: none → 5.0",
        "~ chain orders",
        "    replicas: 3 → 5",
        "+ artifact model",
        "= 1 unchanged",
        "@ n1: starts new; stops gone; restarts web",
        "@ n2: restarts web",
        "@ n3: starts new; restarts web",
        "@ n4: restarts web",
        "! new: 5 wanted, 2 nodes can run it",
    ]


def test_document_is_json_with_every_key() -> None:
    document = difference(read_spec(OLD), read_spec(NEW), NODES).document()
    again = msgspec.json.decode(msgspec.json.encode(document))
    assert again == document
    said = {"added", "removed", "changed", "unchanged", "nodes", "shortfalls", "placed", "held"}
    assert set(document) == said
    assert document["nodes"][0] == {
        "node": "n1",
        "id": "0000000000000001",
        "starts": ["new"],
        "stops": ["gone"],
        "restarts": ["web"],
    }


def test_resources_are_told_and_what_they_hold_back() -> None:
    nodes = [replace(c, capacity=Capacity(2000, (c.id * 512) << 20)) for c in NODES[:2]]
    entry = '[[daemon]]\nname = "{}"\ncommand = ["x"]\n{}\nresources = {{ {} }}\n'
    old = read_spec(entry.format("web", "all = true", 'cpu = 1, memory = "256M"'))
    new = read_spec(
        entry.format("web", "all = true", 'cpu = 1, memory = "768M"')
        + entry.format("db", "count = 2", "cpu = 1.5")
        + entry.format("log", 'on = "node=n2"', "cpu = 0.5, memory = 1048576")
    )
    found = difference(old, new, nodes)
    assert found.lines() == [
        "+ daemon db on n1, needs 1.5 cores",
        "+ daemon log on n2, needs 0.5 cores and 1M memory",
        "~ daemon web on n2",
        "    resources.memory: 256M → 768M",
        "@ n1: starts db; stops web",
        "@ n2: starts log",
        "! web: held back on n1: needs 768M memory, 512M free of 512M",
        "! db: 2 wanted, 1 node can run it; n2 needs 1.5 cores, 0.5 free of 2",
    ]
    document = found.document()
    assert document["held"] == {
        "db": {"n2": "needs 1.5 cores, 0.5 free of 2"},
        "web": {"n1": "needs 768M memory, 512M free of 512M"},
    }
    assert document["shortfalls"][0]["reason"] == "n2 needs 1.5 cores, 0.5 free of 2"
    assert not restarts(old.daemon[0], new.daemon[0])


def test_same_spec_changes_nothing() -> None:
    found = difference(read_spec(NEW), read_spec(NEW), NODES)
    assert not found.changed and found.nodes == () and found.lines()[0] == "= 5 unchanged"


def test_key_that_the_running_process_can_take_up_restarts_nothing() -> None:
    old = FleetSpec(daemon=[DaemonSpec(name="web", command=["x"], all=True)])
    new = FleetSpec(daemon=[DaemonSpec(name="web", command=["x"], all=True, grace_s=5, stop_signal="SIGINT")])
    found = difference(old, new, NODES)
    assert found.changed and found.nodes == () and not restarts(old.daemon[0], new.daemon[0])


def test_keys_that_restart_are_keys_of_a_daemon_and_each_one_does() -> None:
    old = DaemonSpec(name="web", command=["x"])
    changes = {
        "command": ["y"],
        "entry_point": "e",
        "env": {"A": "1"},
        "cwd": "/",
        "user": "u",
        "readiness": "sd_notify",
    }
    assert changes.keys() == RESTARTING_KEYS <= set(DaemonSpec.__struct_fields__)
    for key, value in changes.items():
        assert restarts(old, msgspec.structs.replace(old, **{key: value}))
