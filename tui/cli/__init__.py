"""`qd`: every command. A command's module is imported when that command runs, and textual only by the console."""

from tui.cli.program import main

__all__ = ["main"]
