"""Which holder of a chain to move, by score: a feedback loop slow enough not to chase its own tail.

A chain is rebalanced when its worst holder is bad (below the floor), another node is better by more than the
gap, and the last move is long enough ago. Nodes without a score, or with one that is no number, take no part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from agent.meshos.config import MeshOsConfig
from agent.meshos.events import Id, by_id


def worst(holders: Collection[Id], scores: Mapping[str, float]) -> tuple[Id, float] | None:
    """The holder with the lowest score, of equal ones the lowest id; None when none of them has a score."""
    found: Id | None = None
    lowest = 0.0
    for node in holders:
        score = scores.get(str(node))
        if score is None or score != score:
            continue
        if found is None or score < lowest or (score == lowest and by_id(node) < by_id(found)):
            found, lowest = node, score
    return None if found is None else (found, lowest)


def best_alternative(holders: Collection[Id], scores: Mapping[str, float]) -> float | None:
    """The highest score of a node that is no holder; whether that node may take the chain is the scorer's."""
    held = {str(node) for node in holders}
    return max((score for node, score in scores.items() if node not in held and score == score), default=None)


def by_score(
    holders: Collection[Id],
    scores: Mapping[str, float],
    last_rebalance_ms: int | None,
    now_ms: int,
    config: MeshOsConfig,
) -> Id | None:
    """The holder to evict, or None."""
    if last_rebalance_ms is not None and now_ms - last_rebalance_ms < config.rebalance_cooldown_ms:
        return None
    graded = worst(holders, scores)
    if graded is None or not graded[1] < config.score_floor:
        return None
    best = best_alternative(holders, scores)
    if best is None or not best > graded[1] + config.score_gap:
        return None
    return graded[0]
