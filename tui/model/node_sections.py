"""What a node's own document tells, as sections of its page: daemons, maintenance, what it wants, what holds it back.

What is left of anything is counted down from the moment the document came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tui.model import ages, daemon_columns
from tui.model.ages import number
from tui.model.daemons import Daemons, daemon_key, saturation
from tui.model.failures import Failure
from tui.model.glyphs import Glyphs
from tui.model.spans import Line
from tui.model.text import clean, elide, pad, width, wrap

Doc = Mapping[str, Any]
MOST = 200
"""Items of a section that are shown; the rest is counted."""
_INDENT = 3


def left_text(value: object, passed_ms: float) -> str:
    """`in 4:20`, `past by 12s`; empty where nothing is waited for. `passed_ms`: since the document came."""
    figure = number(value)
    if figure is None:
        return ""
    left = figure - passed_ms
    return f"in {ages.countdown(left)}" if left > 0 else f"past by {ages.age(-left)}"


def _wrapped(text: str, cells: int, role: str = "text") -> list[Line]:
    parts = wrap(text, max(8, cells - _INDENT - 1))
    return [[(" " if not at else " " * _INDENT, "text"), (part, role)] for at, part in enumerate(parts)]


def _maps(value: object) -> list[Doc]:
    return [item for item in value[:MOST] if isinstance(item, Mapping)] if isinstance(value, list) else []


def _rest(value: object) -> list[Line]:
    more = len(value) - MOST if isinstance(value, list) else 0
    return [[(f"   and {more} more", "soft")]] if more > 0 else []


def daemons(doc: Doc, passed_ms: float, cells: int, glyphs: Glyphs) -> list[Line]:
    """A line a daemon, trouble first, and below it what there is to say."""
    given = doc.get("daemons")
    found = sorted(Daemons.read(_maps(given)), key=daemon_key)
    now = passed_ms / 1000  # the rows were received at 0
    name_cells = min(max((width(d.name) for d in found), default=0), max(10, cells // 3))
    lines: list[Line] = []
    for daemon in found:
        restarts, full = daemon.figure("restarts"), saturation(daemon)
        facts = [
            f"{restarts:.0f} restart{'s' * (restarts != 1)}" if restarts else "",
            f"{ages.share(full)} full" if full is not None else "",
            f"needs {daemon.needs}" if daemon.needs else "",
            daemon.status,
        ]
        line: Line = [(" ", "text"), *daemon_columns.lead(daemon, glyphs), (" ", "text")]
        line += [(pad(elide(daemon.name, name_cells, glyphs.ellipsis), name_cells), "name")]
        line += [(f"  {pad(daemon.word, 13)}", daemon.role), (f"{ages.age(daemon.age_ms(now)):>4}", "text")]
        line += [(f"  {pad(daemon.health or ages.UNKNOWN, 9)}", daemon.role if daemon.ails else "text")]
        room = cells - sum(width(text) for text, _ in line) - 3
        said = ", ".join(fact for fact in facts if fact)
        lines.append(
            [*line, (f"  {elide(said, room, glyphs.ellipsis)}", "soft")] if said and room > 8 else line
        )
        if why := daemon.detail(now):
            lines += [[("     ", "text"), (part, "text")] for part in wrap(why, cells - 7)]
    return lines + _rest(given)


def maintenance(doc: Doc, passed_ms: float, cells: int) -> list[Line]:
    """Where it stands, since when and by whom; what is left to do, and until when."""
    given = doc.get("local_maintenance")
    told: Doc = given if isinstance(given, Mapping) else {}
    local = doc.get("local")
    drain = local.get("drain") if isinstance(local, Mapping) else None
    lines: list[Line] = []
    state = clean(told.get("state"))
    if state and state != "active":
        since = number(told.get("since_ms"))
        head = state.replace("_", " ") + (f" for {ages.age(since + passed_ms)}" if since is not None else "")
        lines += _stands(head, told, passed_ms, cells, "dead" if state == "drain_failed" else "draining")
    if isinstance(drain, Mapping):
        since = number(drain.get("age_ms"))
        head = "draining" + (f" for {ages.age(since + passed_ms)}" if since is not None else "")
        lines += _stands(head, drain, passed_ms, cells, "draining")
    elif isinstance(local, Mapping) and local.get("cordoned") is True and not lines:
        lines += _wrapped("cordoned: takes nothing new", cells)
    return lines


def _stands(head: str, told: Doc, passed_ms: float, cells: int, role: str) -> list[Line]:
    by, reason = clean(told.get("by")), clean(told.get("reason"))
    line: Line = [(f" {head}", role)]
    due = left_text(told.get("deadline_in_ms"), passed_ms)
    if due.startswith("in "):
        line.append((f"  {due.removeprefix('in ')} left until its deadline", "hot"))
    elif due:
        line.append((f"  {due.replace('past', 'past its deadline', 1)}", "hot"))
    lines = [line]
    if reason:
        lines += _wrapped(reason, cells)
    left = told.get("left")
    items = (
        [clean(item) for item in left[:MOST] if not isinstance(item, Mapping)]
        if isinstance(left, list)
        else []
    )
    if items:
        lines += _wrapped(f"left to do: {', '.join(items)}", cells)
        lines += _rest(left)
    return lines + (_wrapped(f"by {by}", cells, "soft") if by else [])


def wants(doc: Doc, passed_ms: float, cells: int) -> list[Line]:
    """What reconcile wants next, and since when."""
    given = doc.get("wants")
    lines: list[Line] = []
    for want in _maps(given):
        what = clean(want.get("kind")).replace("_", " ")
        age = number(want.get("age_ms"))
        since = "" if age is None else f", wanted for {ages.age(age + passed_ms)}"
        lines += _wrapped(f"{what} {clean(want.get('target'))}".strip() + since, cells)
    return lines + _rest(given)


def held_back(doc: Doc, passed_ms: float, cells: int) -> list[Line]:
    """What it would do and doesn't yet: why, and for how long still."""
    given = doc.get("held_back")
    lines: list[Line] = []
    for held in _maps(given):
        wait = left_text(held.get("in_ms"), passed_ms)
        wait = "now due" if wait.startswith("past") else wait
        what, why = clean(held.get("what")), clean(held.get("reason"))
        parts = wrap(f"{what}: {why}" if why else what, max(8, cells - width(wait) - 6))
        lines.append([(f" {parts[0]}", "text"), *([(f"  {wait}", "hot")] if wait else [])])
        lines += [[("   ", "text"), (part, "text")] for part in parts[1:]]
    return lines + _rest(given)


def backpressure(doc: Doc, cells: int) -> list[Line]:
    """Told while it is on: nothing is wrong with the node, but moves wait."""
    local = doc.get("local")
    inside = isinstance(local, Mapping) and local.get("backpressure") is True
    if doc.get("backpressure") is not True and not inside:
        return []
    said = "too many acts wait: daemons are told, moves and rebalancing wait until it is over"
    parts = wrap(said, max(8, cells - 17))
    lines: list[Line] = [[(" BACKPRESSURE", "hot"), (f"  {parts[0]}", "text")]]
    return lines + [[(" " * 15, "text"), (part, "text")] for part in parts[1:]]


def failures(doc: Doc, passed_ms: float, cells: int, glyphs: Glyphs) -> list[Line]:
    """Its failure ring, newest first; the same failure over and over is one line that says how often."""
    given = doc.get("recent_failures")
    now = passed_ms / 1000  # the rows were received at 0
    found = sorted((Failure(data, 0.0) for data in _maps(given)), key=lambda f: f.figure("age_ms") or 0.0)
    groups: list[list[Failure]] = []
    for failure in found:
        if groups and _same(groups[-1][-1]) == _same(failure):
            groups[-1].append(failure)
        else:
            groups.append([failure])
    lines: list[Line] = []
    for group in groups:
        newest = group[0]
        times = f" ×{len(group)}" if len(group) > 1 else ""
        what = (
            " ".join(part for part in (newest.action.replace("_", " "), newest.target) if part)
            or newest.source
        )
        wait = newest.then(now)
        parts = wrap(f"{what}: {newest.story or 'no reason given'}{times}", max(8, cells - width(wait) - 10))
        line: Line = [(f" {ages.age(newest.age_ms(now)):>4} ", "soft"), (parts[0], "text")]
        lines.append([*line, (f"  {wait}", "hot")] if wait else line)
        lines += [[(" " * 6, "text"), (part, "text")] for part in parts[1:]]
    return lines + _rest(given)


def _same(failure: Failure) -> tuple[str, ...]:
    return failure.source, failure.action, failure.target, failure.reason


def replicas(doc: Doc, cells: int, glyphs: Glyphs) -> list[Line]:
    """A line a chain or artifact that the node knows: how many hold it, who leads it; those to be given up are marked."""
    given = doc.get("replicas")
    lines: list[Line] = []
    found = sorted(_maps(given), key=lambda replica: clean(replica.get("chain")))
    name_cells = min(max((width(clean(r.get("chain"))) for r in found), default=0), max(10, cells // 2))
    for replica in found:
        holders, desired = replica.get("holders"), number(replica.get("desired"))
        held = len(holders) if isinstance(holders, list) else None
        counts = "/".join(ages.UNKNOWN if n is None else f"{n:.0f}" for n in (held, desired))
        lacks = held is not None and desired is not None and held < desired
        leader = clean(replica.get("leader"))
        said = f"led by {leader}" if leader else "no leader"
        line: Line = [
            (" " + pad(elide(clean(replica.get("chain")), name_cells, glyphs.ellipsis), name_cells), "name"),
            (f"  {counts:>5} held", "hot" if lacks else "text"),
        ]
        room = cells - name_cells - 16
        line.append((f"  {elide(said, max(8, room), glyphs.ellipsis)}", "text"))
        if clean(replica.get("intent")) == "drop":
            line.append(("  to be dropped", "draining"))
        if replica.get("eviction_pending") is True:
            line.append(("  an eviction is asked for", "hot"))
        lines.append(line)
    return lines + _rest(given)


def peers(doc: Doc, cells: int, glyphs: Glyphs) -> list[Line]:
    """A line a peer: how far it is, how it is, and why it is not to be counted on; those with trouble first."""
    given = doc.get("peers")
    found = []
    for peer in _maps(given):
        name, health = clean(peer.get("peer") or peer.get("name")), clean(peer.get("health"))
        stands = clean(peer.get("maintenance")).replace("_", " ")
        words = [health or ages.UNKNOWN, clean(peer.get("reason")), "" if stands == "active" else stands]
        words += [word for word in ("cordoned", "draining") if peer.get(word) is True]
        role = _HEALTH.get(health, "text")
        found.append(
            (role == "text", name, ages.rtt(number(peer.get("rtt_ms"))), ", ".join(filter(None, words)), role)
        )
    name_cells = min(max((width(name) for _, name, *_ in found), default=0), max(10, cells // 2))
    lines: list[Line] = []
    for _, name, far, said, role in sorted(found):
        line: Line = [(" " + pad(elide(name, name_cells, glyphs.ellipsis), name_cells), "name")]
        room = cells - name_cells - 11
        lines.append([*line, (f"  {far:>6}  ", "text"), (elide(said, room, glyphs.ellipsis), role)])
    return lines + _rest(given)


_HEALTH = {"degraded": "degraded", "suspect": "degraded", "unreachable": "dead", "dead": "dead"}


def stats(doc: Doc, cells: int) -> list[Line]:
    """The counters that count, a line each; those that stand at zero are only named."""
    given = doc.get("stats")
    found = {clean(k): v for k, v in given.items()} if isinstance(given, Mapping) else {}
    name_cells = min(28, max((width(name) for name, value in found.items() if value), default=0))
    lines: list[Line] = []
    for name, value in found.items():
        if value:
            figure = number(value)
            text = (
                clean(value)
                if figure is None
                else f"{figure:.0f}"
                if figure == int(figure)
                else f"{figure:.3g}"
            )
            lines.append(
                [(" " + pad(name, name_cells), "soft"), (f"  {elide(text, cells - name_cells - 4)}", "text")]
            )
    none = ", ".join(name for name, value in found.items() if not value)
    return lines + (_wrapped(f"0: {none}", cells, "soft") if none else [])
