"""Everything about one mesh as lines: the pane beside the meshes."""

from __future__ import annotations

from tui.model import ages
from tui.model.glyphs import UNICODE, Glyphs
from tui.model.mesh_columns import counts, lead
from tui.model.meshes import MeshRow
from tui.model.page import LABEL, fact, gauge, section
from tui.model.rows import Fleet
from tui.model.spans import Line
from tui.model.text import elide, pad, wrap


def pane(mesh: MeshRow, fleet: Fleet, now: float, cells: int, glyphs: Glyphs = UNICODE) -> list[Line]:
    """What the view holds about one mesh, nothing asked for; trouble and what to do about it first."""
    lines: list[Line] = [
        [
            (" ", "text"),
            *lead(mesh, glyphs),
            (" ", "text"),
            (elide(mesh.name, cells - 4, glyphs.ellipsis), "title"),
        ]
    ]
    mine = mesh.name == fleet.mesh
    for mark in mesh.marks(now, mine):
        lines.append([(f" {mark.word}", mark.role)])
        lines += [[(f"   {part}", "text")] for part in wrap(mark.advice, cells - 4)]
    if reason := mesh.text("reason"):
        lines += [[(f"   {part}", "text")] for part in wrap(reason, cells - 4)]
    lines += [[], section("who publishes it", cells, glyphs), *_lease(mesh, now, cells)]
    lines += [[], section("nodes", cells, glyphs), *_nodes(mesh, now, cells, glyphs)]
    if mesh.impostors:
        lines += [[], section("other keys under its name", cells, glyphs)]
        for impostor in mesh.impostors:
            lines += fact("key", impostor.pub, cells)
            heard = impostor.age_ms
            age = ages.UNKNOWN if heard is None else f"{ages.age(heard + (now - mesh.received) * 1000)} ago"
            lines += fact("publisher", f"{impostor.publisher or ages.UNKNOWN}, last {age}", cells)
    lines += [[], [(" Enter", "key"), (" narrows the fleet to it", "soft")]] if mesh.named else []
    return lines


def _lease(mesh: MeshRow, now: float, cells: int) -> list[Line]:
    age = mesh.age_ms(now)
    lines = fact("publisher", mesh.publisher, cells)
    lines += fact("lease", mesh.lease(now), cells, "text" if mesh.lease(now)[:1].isdigit() else "hot")
    for key in ("epoch", "version"):
        figure = mesh.figure(key)
        lines += fact(key, ages.UNKNOWN if figure is None else f"{figure:.0f}", cells)
    lines += fact("news", "" if age is None else f"{ages.age(age)} old", cells)
    if not mesh.own:
        lines += fact("reached", mesh.path(), cells)
    lines += fact("address", mesh.publisher_addr, cells)
    lines += fact("key", mesh.text("pub"), cells)
    return lines + fact("backbone", mesh.backbone, cells)


def _nodes(mesh: MeshRow, now: float, cells: int, glyphs: Glyphs) -> list[Line]:
    total = mesh.total
    told: Line = [
        (" " + pad("nodes", LABEL), "soft"),
        (ages.UNKNOWN if total is None else f"{total:.0f}  ", "text"),
    ]
    lines: list[Line] = [[*told, *counts(mesh, glyphs)]]
    room = max(6, min(30, cells - LABEL - 9))
    for key, label in (("cpu", "cpu"), ("mem", "memory")):
        lines.append(gauge(label, None if mesh.expired else mesh.figure(key), room, glyphs))
    return lines
