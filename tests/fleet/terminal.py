"""A real terminal for a test: a tmux server of its own, typed into and read back."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable

import pytest


class Terminal:
    """One window of `columns` × `rows` running a command. Use as a context manager."""

    def __init__(self, argv: list[str], env: dict[str, str], columns: int = 160, rows: int = 45) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("needs tmux")
        self._server = f"qd-test-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._argv, self._env = argv, env
        self.columns, self.rows = columns, rows

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", self._server, *words], capture_output=True, text=True, timeout=20
        )
        return done.stdout

    def __enter__(self) -> Terminal:
        words = " ".join(shlex.quote(word) for word in self._argv)
        command = f"{words}; echo LEFT $?; exec sleep 1000"
        env = {**self._env, "TERM": "xterm-256color", "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8"}
        size = ["-x", str(self.columns), "-y", str(self.rows)]
        argv = ["tmux", "-L", self._server, "-f", "/dev/null", "new-session", "-d", *size, command]
        subprocess.run(argv, env=env, check=True, timeout=20)
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")

    @property
    def screen(self) -> str:
        """What stands on the screen now."""
        return self._tmux("capture-pane", "-p")

    @property
    def pid(self) -> int:
        """The process of the shell that runs the command."""
        return int(self._tmux("display", "-p", "#{pane_pid}"))

    def keys(self, *keys: str) -> None:
        """Types keys, by tmux's names (`Enter`, `Escape`, `x`)."""
        for key in keys:
            self._tmux("send-keys", key)

    def shows(self, *texts: str, timeout_s: float = 15.0) -> str:
        """Waits until all of these stand on the screen; the screen."""
        return self._until(lambda screen: all(text in screen for text in texts), f"shows {texts}", timeout_s)

    def shows_not(self, text: str, timeout_s: float = 15.0) -> str:
        """Waits until this stands there no more; the screen."""
        return self._until(lambda screen: text not in screen, f"no longer shows {text!r}", timeout_s)

    def _until(self, condition: Callable[[str], bool], what: str, timeout_s: float) -> str:
        end = time.monotonic() + timeout_s
        while not condition(screen := self.screen):
            assert time.monotonic() < end, f"waited {timeout_s} s in vain until the screen {what}:\n{screen}"
            time.sleep(0.05)
        return screen
