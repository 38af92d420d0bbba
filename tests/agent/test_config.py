"""Settings: which source wins, what is legal, and how each mistake is told in one line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent import config
from agent.config import AGENT_OPTIONS, click_options, duration_ms, host_port, load, section
from discovery.errors import LocalError
from discovery.lifecycle import State
from discovery.member import MAX_KEEPS_BYTES, RECORD_MAX_BYTES, Record, addr_text, seal_record


def write(tmp_path: Path, text: str | bytes) -> Path:
    (tmp_path / "config.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def refused(tmp_path: Path, text: str | bytes) -> str:
    """The one line that a config.toml of this text is refused with."""
    with pytest.raises(LocalError) as caught:
        load({"mesh": "alpha"}, write(tmp_path, text), {})
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_settings_nothing_given_has_the_documented_defaults() -> None:
    settings = load({"mesh": "alpha"}, None, {})
    assert (settings.mesh, settings.kind, settings.name, settings.port) == ("alpha", "compute", None, None)
    assert (settings.cpu_budget, settings.mem_budget) == (95.0, 95.0)
    assert (settings.profile, settings.log, settings.no_mdns, settings.suspicion_ms) == (
        "lan",
        "text",
        False,
        None,
    )
    assert (settings.join, settings.advertise, settings.tag, settings.update_command) == ((), (), {}, ())


def test_settings_no_mesh_anywhere_is_refused_and_says_where_to_name_one() -> None:
    with pytest.raises(LocalError, match="mesh: none given; name one with --mesh, QD_MESH or"):
        load({}, None, {})


def test_settings_flag_beats_environment_beats_file(tmp_path: Path) -> None:
    home = write(tmp_path, 'mesh = "file"\nkind = "broker"\nname = "n"\nmem_budget = 80')
    environ = {"QD_MESH": "env", "QD_KIND": "gateway"}
    settings = load({"mesh": "flag", "kind": None, "join": ()}, home, environ)
    assert (settings.mesh, settings.kind, settings.name, settings.mem_budget) == (
        "flag",
        "gateway",
        "n",
        80.0,
    )


def test_settings_empty_variable_counts_as_unset(tmp_path: Path) -> None:
    assert load({"mesh": "a"}, write(tmp_path, 'kind = "broker"'), {"QD_KIND": ""}).kind == "broker"


def test_settings_lists_come_spaced_from_the_environment_and_whole_from_the_file(tmp_path: Path) -> None:
    home = write(tmp_path, 'join = ["[::1]:7000"]\ntag = ["zone=a"]')
    settings = load({"mesh": "a"}, home, {"QD_JOIN": "10.0.0.1:1  host.lan:65535"})
    assert settings.join == (("10.0.0.1", 1), ("host.lan", 65535))
    assert settings.tag == {"zone": "a"}


def test_settings_tags_may_be_a_table(tmp_path: Path) -> None:
    assert load({"mesh": "a"}, write(tmp_path, '[tag]\nzone = "b"\nrack = "7"'), {}).tag == {
        "zone": "b",
        "rack": "7",
    }


def test_settings_too_many_tags_are_refused() -> None:
    with pytest.raises(LocalError, match=r"--tag: 17 of them; 16 at most"):
        load({"mesh": "a", "tag": tuple(f"k{i}=v" for i in range(17))}, None, {})


def tags(sizes: list[int]) -> tuple[str, ...]:
    return tuple(f"key{i:02}={'v' * size}" for i, size in enumerate(sizes))


def test_settings_tags_the_member_record_has_no_room_for_are_refused_with_their_size() -> None:
    with pytest.raises(
        LocalError, match=r"^tag: 1123 bytes of tags, .* has room for \d{3}; give fewer or shorter ones$"
    ):
        load({"mesh": "a", "bind": "127.0.0.1", "tag": tags([62] * 16)}, None, {})


def test_settings_tags_that_just_fit_can_be_sealed_whatever_else_changes() -> None:
    flags = {"mesh": "a", "bind": "127.0.0.1", "name": "n" * 128}
    size = 0
    with pytest.raises(LocalError):
        while size < 64:
            settings = load({**flags, "tag": tags([31] * 12 + [size])}, None, {})
            size += 1
    record = Record(
        pub=bytes(32),
        mesh="a",
        name="n" * 128,
        kind=settings.kind,
        incarnation=2**62,
        version=2**62,
        state=State.DRAINING,
        addrs=[("127.0.0.1", 65535)],
        build="0" * 12,
        wire=1,
        host=bytes(8),
        deadline_ms=2**62,
        maintenance="entering_maintenance",
        cordoned=True,
        tags=settings.tag,
        keeps=bytes(MAX_KEEPS_BYTES),
    )
    sealed = seal_record(record, lambda data: bytes(64))
    assert 880 < len(sealed.blob) <= RECORD_MAX_BYTES


def test_settings_update_command_is_split_like_a_shell_line_or_given_as_words(tmp_path: Path) -> None:
    assert load({"mesh": "a"}, None, {"QD_UPDATE_COMMAND": "git -C '/a b' pull"}).update_command == (
        "git",
        "-C",
        "/a b",
        "pull",
    )
    home = write(tmp_path, 'update_command = ["make", "install"]')
    assert load({"mesh": "a"}, home, {}).update_command == ("make", "install")


def test_settings_dashes_in_the_file_read_as_underscores(tmp_path: Path) -> None:
    assert load({"mesh": "a"}, write(tmp_path, "mem-budget = 70"), {}).mem_budget == 70.0


def test_settings_absent_file_is_an_empty_one(tmp_path: Path) -> None:
    assert load({"mesh": "a"}, tmp_path / "nowhere", {}).kind == "compute"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mem_budgte = 1", "unknown key 'mem_budgte'; the nearest legal one is mem_budget"),
        (
            "[console]\nglyps = 'ascii'",
            "unknown key 'console.glyps'; the nearest legal one is console.glyphs",
        ),
        ("[consol]\nglyphs = 'ascii'", "unknown key 'consol'; the nearest legal one is console"),
        ("zzz = 1", "unknown key 'zzz'; the nearest legal one is "),
        ("kind = \nname = 'x'", "config.toml: line 1: "),
        ("kind = 'a'\n\nname = [", "config.toml: line 3: "),
        ("kind = 'a'\nkind = 'b'", "config.toml: line 2: "),
        (b"kind = '\xff'", "not UTF-8 at byte 8"),
        ("home = '/x'", "home: can't be set here; use --home or QD_HOME"),
        ("console = 3", "console: not a table"),
        ("join = 'a:1'", "config.toml: join: not a list"),
        ("join = [1]", "config.toml: join 1: must be text"),
        ("join = ['a']", "config.toml: join 'a': no port; write it as HOST:PORT"),
        ("port = 70000", "config.toml: port 70000: out of range; use 0 to 65535"),
        ("port = true", "config.toml: port True: not a whole number"),
        ("cpu_budget = 'lots'", "not a percentage; use 1 to 100"),
        ("cpu_budget = nan", "not a percentage"),
        ("profile = 'moon'", "not one of local, lan, wan"),
        ("kind = 'Gate Way'", "not a kind"),
        ("no_mdns = 'maybe'", "neither yes nor no"),
        ("suspicion_ms = 1.5", "not a whole number"),
        ("update_command = ''", "an empty command"),
        ("""update_command = "a 'b" """, "not a command"),
        ("tag = ['novalue']", "not a tag"),
    ],
)
def test_file_with_a_mistake_is_refused_in_one_line_that_names_it(
    tmp_path: Path, text: str, said: str
) -> None:
    line = refused(tmp_path, text)
    assert said in line
    assert str(tmp_path / "config.toml") in line


def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(LocalError, match=r"config\.toml: Is a directory; make it a file"):
        load({"mesh": "a"}, tmp_path, {})


def test_mistake_names_the_source_that_it_came_from() -> None:
    with pytest.raises(LocalError, match=r"^--port 'x': not a whole number"):
        load({"mesh": "a", "port": "x"}, None, {})
    with pytest.raises(LocalError, match=r"^QD_PORT 'x': not a whole number"):
        load({"mesh": "a"}, None, {"QD_PORT": "x"})
    with pytest.raises(LocalError, match=r"^QD_PORT 'x': not a whole number"):
        load({"mesh": "a", "port": "x"}, None, {"QD_PORT": "x"})  # as click hands it over


def test_mistake_of_great_length_is_shown_short() -> None:
    with pytest.raises(LocalError) as caught:
        load({"mesh": "a", "port": "9" * 10_000}, None, {})
    assert len(str(caught.value)) < 200


def test_console_section_has_defaults_and_is_legal_for_an_agent(tmp_path: Path) -> None:
    home = write(tmp_path, '[console]\nglyphs = "ascii"\n[console.keys]\ndrain = "ctrl+d"')
    assert load({"mesh": "a"}, home, {}).mesh == "a"
    assert section("console", home) == {"glyphs": "ascii", "theme": "auto", "keys": {"drain": "ctrl+d"}}
    assert section("console", None)["glyphs"] == "unicode"


def test_console_section_with_a_wrong_value_is_refused_where_it_stands(tmp_path: Path) -> None:
    home = write(tmp_path, '[console]\nglyphs = "runes"')
    with pytest.raises(LocalError, match=r"config\.toml: console\.glyphs 'runes': not one of unicode, ascii"):
        section("console", home)


def test_client_keys_are_legal_in_the_file(tmp_path: Path) -> None:
    home = write(tmp_path, 'via = "beta"\ntimeout = "5s"')
    values = config.resolve(config.CLIENT_OPTIONS, {}, home, {})
    assert (values["via"], values["timeout"], values["read_only"]) == ("beta", 5000, False)
    assert load({"mesh": "a"}, home, {}).mesh == "a"


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("250ms", 250),
        ("30s", 30_000),
        ("5m", 300_000),
        ("2h", 7_200_000),
        ("10", 10_000),
        ("0", 0),
        (90, 90_000),
    ],
)
def test_duration_legal_is_read(text: str | int, ms: int) -> None:
    assert duration_ms(text) == ms


@pytest.mark.parametrize(
    "text", ["", "s", "5 m", "5d", "-1s", "1e3", "٣s", "5ms ", "1h30m", True, "9" * 30, "9999h9", "99999h"]
)
def test_duration_illegal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a duration|longer than a year"):
        duration_ms(text)


def test_duration_number_of_the_file_is_seconds() -> None:
    assert duration_ms(0.5) == 500


@pytest.mark.parametrize(
    ("text", "addr"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("gate.example.org:1", ("gate.example.org", 1)),
        ("[::1]:7433", ("::1", 7433)),
        ("[fe80::1%eth0]:7", ("fe80::1%eth0", 7)),
    ],
)
def test_host_port_legal_is_read_and_written_back(text: str, addr: tuple[str, int]) -> None:
    assert host_port(text) == addr
    assert addr_text(addr) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "a:",
        "a",
        "a:0",
        "a:65536",
        "a:-1",
        "a:1:2",
        "::1",
        "[::1]",
        "[::1:1",
        "[x y]:1",
        "[::1]x:1",
        "a b:1",
        "a:١",
    ],
)
def test_host_port_illegal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=";"):
        host_port(text)


@pytest.mark.parametrize(("text", "addr"), [("h", ("h", 22)), ("[::1]", ("::1", 22)), ("h:9", ("h", 9))])
def test_host_port_without_port_takes_the_default(text: str, addr: tuple[str, int]) -> None:
    assert host_port(text, 22) == addr


@given(st.text(max_size=40))
def test_parsers_any_text_give_a_value_or_a_value_error(text: str) -> None:
    for parse in (duration_ms, host_port):
        try:
            parse(text)
        except ValueError as why:
            assert str(why)


def invoke(args: list[str], env: dict[str, str]) -> config.Settings:
    seen: list[config.Settings] = []

    @click.command()
    @click_options(AGENT_OPTIONS)
    def command(**flags: object) -> None:
        seen.append(load(flags, None, env))

    done = CliRunner().invoke(command, args, env=env, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


def test_click_options_every_agent_option_has_flag_variable_and_key() -> None:
    settings = invoke(
        [
            "--mesh",
            "m",
            "--join",
            "a:1",
            "--join",
            "[::1]:2",
            "--no-mdns",
            "--mem-budget",
            "100",
            "--suspicion-ms",
            "9",
        ],
        {"QD_TAG": "zone=a rack=b", "QD_KIND": "gateway", "QD_BACKBONE": "nats://h:4222 b:9"},
    )
    assert settings.join == (("a", 1), ("::1", 2))
    assert (settings.no_mdns, settings.mem_budget, settings.suspicion_ms) == (True, 100.0, 9)
    assert (settings.tag, settings.kind) == ({"zone": "a", "rack": "b"}, "gateway")
    assert settings.backbone == ("nats://h:4222", "b:9")


def test_click_options_flag_in_the_environment_is_read() -> None:
    assert invoke(["--mesh", "m"], {"QD_NO_MDNS": "1"}).no_mdns is True
    assert invoke(["--mesh", "m"], {"QD_NO_MDNS": "0"}).no_mdns is False


def test_click_options_help_hides_what_is_ours_alone() -> None:
    @click.command()
    @click_options(AGENT_OPTIONS)
    def command(**flags: object) -> None: ...

    text = CliRunner().invoke(command, ["--help"]).output
    assert "--mem-budget" in text
    assert "--stdin-goodbye" not in text


def test_unknown_variables_are_found_with_the_nearest_legal_one() -> None:
    assert config.unknown_variables({"QD_MEM_BUDGTE": "1", "QD_MESH": "a", "PATH": "x"}) == [
        ("QD_MEM_BUDGTE", "QD_MEM_BUDGET")
    ]
