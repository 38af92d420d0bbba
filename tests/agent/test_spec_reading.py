"""Spec files: what is read, and that everything else is one line which says where and what to do."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data import userchains
from agent.spec.model import ArtifactSpec, ChainSpec, ControlHooks, HealthCheck, Resources
from agent.spec.placing import Candidate
from agent.spec.reading import ENTRIES_MAX, SPEC_MAX_BYTES, read_spec
from agent.spec.selector import read_selector
from discovery.errors import LocalError

WHOLE = """\
[[daemon]]
name = "web"
command = ["/usr/bin/web", "--port", "8080"]
on = "kind=compute,tag.zone=a"
count = 2
env = { PORT = "8080" }
cwd = "/srv"
user = "web"
stop_signal = "SIGINT"
grace_s = 5
after = ["db"]
health = { http = "http://127.0.0.1:8080/health", interval_s = 2, timeout_s = 1 }
readiness = "sd_notify"
restart_on_update = false
resources = { cpu = 0.5, memory = "512M" }
control = { drain_start = "SIGUSR1", backpressure_on = ["/bin/slow", "down"] }

[[daemon]]
name = "db"
entry_point = "db"
all = true
health.tcp = 5432

[[chain]]
name = "orders"
replicas = 5

[[artifact]]
name = "model.bin"
"""


def daemon(extra: str, name: str = "a") -> str:
    return f'[[daemon]]\nname = "{name}"\ncommand = ["x"]\n{extra}\n'


def test_whole_spec_is_read_as_it_is_written() -> None:
    spec = read_spec(WHOLE)
    web, db = spec.daemon
    assert web.command == ["/usr/bin/web", "--port", "8080"] and web.count == 2 and not web.all
    assert web.env == {"PORT": "8080"} and web.grace_s == 5 and web.after == ["db"]
    assert web.health == HealthCheck(http="http://127.0.0.1:8080/health", interval_s=2, timeout_s=1)
    assert web.resources == Resources(cpu=0.5, memory=512 << 20) and db.resources is None
    assert web.control == ControlHooks(drain_start="SIGUSR1", backpressure_on=["/bin/slow", "down"])
    assert db.entry_point == "db" and db.all and db.stop_signal == "SIGTERM" and db.restart_on_update
    assert spec.chain == [ChainSpec(name="orders", replicas=5)]
    assert spec.artifact == [ArtifactSpec(name="model.bin", replicas=3)]


@pytest.mark.parametrize(
    ("tcp", "means"),
    [
        ("6379", "127.0.0.1:6379"),
        ('"6379"', "127.0.0.1:6379"),
        ('"db.lan:80"', "db.lan:80"),
        ('"[::1]:80"', "[::1]:80"),
    ],
)
def test_tcp_check_is_host_and_port_however_short_it_is_written(tcp: str, means: str) -> None:
    (found,) = read_spec(daemon(f"health = {{ tcp = {tcp} }}")).daemon
    assert found.health is not None and found.health.tcp == means


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ('"512M"', 512 << 20),
        ('"2G"', 2 << 30),
        ('"1T"', 1 << 40),
        ('"3K"', 3072),
        ('"7"', 7),
        ("1_000", 1000),
    ],
)
def test_memory_is_bytes_however_it_is_written(memory: str, size: int) -> None:
    (found,) = read_spec(daemon(f"resources = {{ memory = {memory} }}")).daemon
    assert found.resources == Resources(memory=size)


def test_spec_in_force_is_not_judged_by_rules_that_came_later() -> None:
    text = daemon("cwd='srv'") + "[[chain]]\nname='c'\n[[artifact]]\nname='c'"
    found = read_spec(text, in_force=True)
    assert found.daemon[0].cwd == "srv" and found.chain[0].name == found.artifact[0].name
    with pytest.raises(LocalError, match="`grace`"):
        read_spec(daemon("grace=1"), in_force=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (daemon('cmd = ["x"]', "web"), "daemon web: no key `cmd`; did you mean `command`?"),
        (daemon("depends_on = []"), "daemon a: no key `depends_on`; did you mean `after`?"),
        (daemon("grace = 3"), "daemon a: no key `grace`; did you mean `grace_s`?"),
        (daemon("health = { tpc = 1 }"), "daemon a: no key `health.tpc`; did you mean `health.tcp`?"),
        (
            daemon("control = { drain = 'SIGHUP' }"),
            "daemon a: no key `control.drain`; did you mean `control.drain",
        ),
        ("[[chain]]\nname='c'\ncount=3", "chain c: no key `count`; did you mean"),
        ("[[demon]]\nname='x'", "spec: no table `demon`; did you mean `[[daemon]]`?"),
        ("[daemon]\nname='x'", "daemon: not a list of tables; write [[daemon]]"),
        ("daemon = [3]", "daemon: not a list of tables"),
        ("[[daemon]]\ncommand=['x']", "daemon number 1: no `name`; give it one"),
        ("[[daemon]]\nname=''\ncommand=['x']", "daemon number 1: `name`: not a name; use"),
        ("[[daemon]]\nname='Web'\ncommand=['x']", "daemon Web: `name`: not a name; use small letters"),
        ("[[daemon]]\nname=3", "daemon number 1: `name`: expected text, got a whole number"),
        (daemon("") + daemon(""), "daemon a: `name` is there twice; rename one of them"),
        ("[[daemon]]\nname='a'", "daemon a: neither `command` nor `entry_point`; give exactly one"),
        (daemon("entry_point='b'"), "daemon a: both `command` and `entry_point`; give exactly one"),
        (
            "[[daemon]]\nname='a'\ncommand='x y'",
            'daemon a: `command`: expected a list, got text; write command = ["',
        ),
        (
            "[[daemon]]\nname='a'\ncommand=['x', 3]",
            "daemon a: `command[1]`: expected text, got a whole number",
        ),
        (daemon("count=1\nall=true"), "daemon a: both `count` and `all`; keep one of them"),
        (daemon("count=0"), "daemon a: `count`: expected a whole number >= 1"),
        (daemon("grace_s=-1"), "daemon a: `grace_s`: expected a number >= 0.0"),
        (daemon("grace_s=nan"), "daemon a: `grace_s`:"),
        (daemon("health={exec=['x'],interval_s=nan}"), "daemon a: `health.interval_s`:"),
        (daemon("on='kin=compute'"), "daemon a: `on`: no key 'kin'; use kind, node or tag.KEY"),
        (daemon("on='compute'"), "daemon a: `on`: 'compute' is no term; write it as kind=compute"),
        (daemon("on='kind=a,kind=b'"), "daemon a: `on`: kind= is there twice"),
        (daemon("after=['b']"), "daemon a: `after`: no daemon b; did you mean a?"),
        (daemon("after=['a']"), "daemon a → a: `after`: goes round in a circle; break it"),
        (
            daemon("after=['b']") + daemon("after=['a']", "b"),
            "daemon a → b → a: `after`: goes round in a circle",
        ),
        (daemon("health={}"), "daemon a: `health`: none of `exec`, `tcp` and `http`; give exactly one"),
        (daemon("health={tcp=1,exec=['x']}"), "daemon a: `health`: `exec` and `tcp`; give exactly one"),
        (daemon("health={tcp=70000}"), "daemon a: `health.tcp`: not a port; use 1 to 65535"),
        (daemon("health={tcp='localhost'}"), "daemon a: `health.tcp`: no port; write it as HOST:PORT"),
        (
            daemon("health={http='https://x'}"),
            "daemon a: `health.http`: not a plain http:// URL; for anything",
        ),
        (daemon("health={http='http://x:99999'}"), "daemon a: `health.http`:"),
        (daemon("health={exec='a b'}"), "daemon a: `health.exec`: expected a list"),
        (
            daemon("stop_signal='SIGFOO'"),
            "daemon a: `stop_signal`: SIGFOO is no signal here; did you mean SIG",
        ),
        (
            daemon("control={drain_start='usr1'}"),
            "daemon a: `control.drain_start`: usr1 is no signal here; did you",
        ),
        (daemon("readiness='http'"), "daemon a: `readiness`: invalid enum value 'http'; use exec, sd_notify"),
        (daemon("env={A=1}"), "daemon a: `env[...]`: expected text, got a whole number"),
        (daemon("env={'A=B'='1'}"), "daemon a: `env`: 'A=B' is no name of a variable"),
        (daemon("cwd=''"), "daemon a: `cwd`: empty"),
        (daemon("cwd='srv'"), "daemon a: `cwd`: 'srv' is relative; write it from / on"),
        (daemon("resources={}"), "daemon a: `resources`: neither `cpu` nor `memory`; give one, or leave"),
        (daemon("resources={mem=1}"), "daemon a: no key `resources.mem`; did you mean `resources.memory`?"),
        (daemon("requests={cpu=1}"), "daemon a: no key `requests`; did you mean `resources`?"),
        (daemon("resources='512M'"), "daemon a: `resources`: expected a table | null, got text; write reso"),
        (daemon("resources={cpu='1'}"), "daemon a: `resources.cpu`: expected a number | null, got text"),
        (daemon("resources={cpu=0}"), "daemon a: `resources.cpu`: expected a number >= 0.001"),
        (daemon("resources={cpu=nan}"), "daemon a: `resources.cpu`: expected a number >= 0.001"),
        (daemon("resources={cpu=inf}"), "daemon a: `resources.cpu`: expected a number <= "),
        (daemon("resources={memory=0}"), "daemon a: `resources.memory`: expected a whole number >= 1"),
        (daemon("resources={memory='512MB'}"), "daemon a: `resources.memory`: '512MB' is no size; write it"),
        (daemon("resources={memory='1.5G'}"), "daemon a: `resources.memory`: '1.5G' is no size; write it as"),
        (daemon("resources={memory='9999999T'}"), "daemon a: `resources.memory`: expected a whole number <="),
        ("[[chain]]\nname='c'\n[[artifact]]\nname='c'", "artifact c: a chain has that name, and they share"),
        ("[[chain]]\nname='c'\nreplicas=99", "chain c: `replicas`: expected a whole number <= 64"),
        (
            "[[chain]]\nname='c'\nkeep_bytes='64 MB'",
            "chain c: `keep_bytes`: '64 MB' is no size; write it as 512K, 64M or 2G",
        ),
        ("[[chain]]\nname='c'\nkeep_bytes='9K'", "chain c: `keep_bytes`: out of range; give 1M at least"),
        ("[[chain]]\nname='c'\nkeep_bytes=1.5", "chain c: `keep_bytes`: expected "),
        (
            "[[chain]]\nname='c'\nkeep_for='7'",
            "chain c: `keep_for`: '7' is no age; write it as 90m, 12h or 7d",
        ),
        ("[[chain]]\nname='c'\nkeep_for='5s'", "chain c: `keep_for`: out of range; give 1m at least"),
        ("[[chain]]\nname='c'\nmax_age='5d'", "chain c: no key `max_age`; did you mean `keep_for`?"),
        ("[[daemon]]\nname = web", "line 2: "),
        ("x=" + "[" * 100_000, "spec: not TOML:"),
        ("#" * (SPEC_MAX_BYTES + 1), f"spec: {SPEC_MAX_BYTES + 1} bytes; at most {SPEC_MAX_BYTES} are read"),
        ("# \ud800", "spec: half of a character in it"),
        ("[[daemon]]\n" * (ENTRIES_MAX + 1), f"daemon: {ENTRIES_MAX + 1} of them; {ENTRIES_MAX} at most"),
    ],
)
def test_spec_that_is_wrong_is_one_line_naming_entry_key_and_cure(text: str, said: str) -> None:
    with pytest.raises(LocalError) as why:
        read_spec(text)
    assert str(why.value).startswith(said) and "\n" not in str(why.value) and len(str(why.value)) < 400


def test_chain_keeps_64_mebibytes_of_any_age_unless_the_spec_says_otherwise() -> None:
    said = ("name='a'", "name='b'\nkeep_bytes='2G'\nkeep_for='7d'", "name='c'\nkeep_bytes=5000000")
    plain, both, bare = read_spec("".join(f"[[chain]]\n{keys}\n" for keys in said)).chain
    assert plain.keep == (64 << 20, None) == userchains.KEEP
    assert both.keep == (2 << 30, 7 * 86_400_000) and bare.keep == (5_000_000, None)


def test_line_of_a_broken_file_is_named() -> None:
    with pytest.raises(LocalError, match=r"^line 4: .*; correct that line$"):
        read_spec('[[daemon]]\nname = "a"\n# fine\ncommand = [1,, 2]\n')


def test_control_characters_of_a_file_do_not_reach_the_error() -> None:
    with pytest.raises(LocalError) as why:
        read_spec('[[daemon]]\nname = "a"\n"x\\u001b[31m" = 1\n')
    assert "\x1b" not in str(why.value)


def test_as_many_daemons_as_are_allowed_are_read_in_order() -> None:
    text = "".join(daemon(f'after = ["d{n - 1}"]' if n else "", f"d{n}") for n in range(ENTRIES_MAX))
    assert [d.name for d in read_spec(text).daemon] == [f"d{n}" for n in range(ENTRIES_MAX)]


words = st.sampled_from(
    [
        "[[daemon]]",
        "[[chain]]",
        "name",
        "command",
        "=",
        '"a"',
        '["x"]',
        "1",
        "true",
        "\n",
        "health",
        "{",
        "}",
        ".",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(string.printable, max_size=200), st.lists(words, max_size=30).map(" ".join)))
def test_any_text_is_a_spec_or_an_error_of_one_line(text: str) -> None:
    try:
        read_spec(text)
    except LocalError as why:
        assert "\n" not in str(why)


NODE = Candidate(0x0123456789ABCDEF, "alpha.compute.0123", "compute", {"zone": "a", "rack": "7"})


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        (" ", True),
        ("kind=compute", True),
        ("kind=broker", False),
        ("kind=compute,tag.zone=a", True),
        (" kind = compute , tag.zone = a ", True),
        ("kind=compute,tag.zone=b", False),
        ("tag.zone=*", True),
        ("tag.disk=*", False),
        ("node=alpha.compute.0123", True),
        ("node=0123456789abcdef", True),
        ("node=alpha.compute", False),
        ("node=alpha.*", True),
        ("node=*.0123", True),
        ("node=a*e*3", True),
        ("node=*x*", False),
        ("kind=c.mpute", False),
    ],
)
def test_selector_means_nodes_for_which_every_term_holds(text: str, fits: bool) -> None:
    assert read_selector(text).matches(NODE) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [("", False), ("tag.zone=a", False), ("kind=console", True), ("node=me", True), ("kind=*", True)],
)
def test_console_is_meant_only_where_kind_or_node_asks_for_it(text: str, fits: bool) -> None:
    assert read_selector(text).matches(Candidate(1, "me", "console", {"zone": "a"})) is fits


@pytest.mark.parametrize(
    "text", ["a", "=a", "kind=", "kind=a,", ",", "tag.=a", "tag=a", "name=x", "kind=a;b=c,x"]
)
def test_selector_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(LocalError, match="; "):
        read_selector(text)
