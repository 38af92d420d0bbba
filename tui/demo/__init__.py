"""The demo: a fleet of real agent processes on this host, and the proof that is played on it."""

from tui.demo.fleet import DEFAULT_FLEET, Fleet, FleetNode, Plan, StaleFleet, parse_plan
from tui.demo.proof import Finding, play

__all__ = ["DEFAULT_FLEET", "Finding", "Fleet", "FleetNode", "Plan", "StaleFleet", "parse_plan", "play"]
