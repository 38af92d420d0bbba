"""Starting processes: the environment that a daemon gets, the daemon itself, and short commands about it."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.daemons.log import escaped
from agent.daemons.process import End, end_of, signal_group
from agent.executor import DispatchError
from agent.spec.model import DaemonSpec

WITHHELD = frozenset(
    {
        "SSH_AUTH_SOCK",
        "SSH_AGENT_PID",
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "MAINPID",
    }
)
"""Of the agent's environment, beside all that begins with QD_: what could sign as the operator, what is said to the
agent by its own service manager, and the agent's own settings."""
OUTPUT_KEPT = 512


def environment(spec: DaemonSpec, ours: Mapping[str, str]) -> dict[str, str]:
    """The agent's own without what is withheld, then the user's, the spec's, and last what we tell it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("QD_") and k not in WITHHELD}
    if (entry := known_user(spec)) is not None:
        env |= {
            "USER": entry.pw_name,
            "LOGNAME": entry.pw_name,
            "HOME": entry.pw_dir,
            "SHELL": entry.pw_shell,
        }
    return {**env, **spec.env, **ours}


def other_user(spec: DaemonSpec) -> pwd.struct_passwd | None:
    """The user that a daemon shall run as, where it isn't ours; DispatchError when that can't be."""
    entry = _user(spec)
    if entry is None or entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise DispatchError(f"user {spec.user}: this agent is not root; run it as root or leave `user` out")
    return entry


def known_user(spec: DaemonSpec) -> pwd.struct_passwd | None:
    """The user that the spec names, if it names one and this host knows it."""
    try:
        return _user(spec)
    except DispatchError:
        return None


def _credentials(spec: DaemonSpec) -> dict[str, Any]:
    """What Popen needs to run something as the daemon's user."""
    entry = other_user(spec)
    if entry is None:
        return {}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def _user(spec: DaemonSpec) -> pwd.struct_passwd | None:
    if spec.user is None:
        return None
    try:
        return pwd.getpwnam(spec.user)
    except KeyError:
        raise DispatchError(f"user {escaped(spec.user)}: not known on this host; create it there") from None


def stop_signal(spec: DaemonSpec) -> signal.Signals:
    """DispatchError when this host has no signal of that name."""
    return signal_by(spec.stop_signal)


def signal_by(name: str) -> signal.Signals:
    """The signal of a name (`SIGUSR1`); DispatchError when this host has none."""
    try:
        return signal.Signals[name]
    except KeyError:
        raise DispatchError(f"signal {escaped(name)}: not known on this host") from None


def launch(spec: DaemonSpec, env: Mapping[str, str], output: int) -> tuple[int, int]:
    """Executes a daemon's command in a session of its own; its pid and a pidfd of it. DispatchError says why it can't.

    The child inherits no descriptor but its output, and holds ours (the place's lock) until it has executed the
    program: hence `close_fds=False`, every one of ours closes on exec."""
    who = _credentials(spec)
    if spec.cwd is not None and not Path(spec.cwd).is_dir():
        raise DispatchError(f"cwd {escaped(spec.cwd)}: no such directory")
    try:
        process = subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=spec.cwd,
            env=dict(env),
            start_new_session=True,
            close_fds=False,
            **who,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as why:
        reason = getattr(why, "strerror", None) or str(why)
        raise DispatchError(f"{escaped(spec.command[0])}: {reason}") from why
    return process.pid, _watched(process)


def _watched(process: subprocess.Popen[bytes]) -> int:
    """A pidfd of a child whose end is ours to see from now on. Without one it is ended again: DispatchError."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError as why:
        process.kill()
        process.wait()
        raise DispatchError(f"process {process.pid}: can't be watched: {why.strerror}", 5_000) from why
    process.returncode = 0
    return fd


async def run_command(
    argv: Sequence[str], env: Mapping[str, str], spec: DaemonSpec, timeout_s: float
) -> tuple[End | None, str]:
    """Runs a short command as the daemon's user in its directory: how it ended (None: not in time, and it was
    killed) and the last it said. DispatchError when it can't be executed."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()
    said = bytearray()
    try:
        try:
            os.set_blocking(writing, True)
            who = _credentials(spec)
            process = subprocess.Popen(  # noqa: ASYNC220 - as short as a fork and an exec
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd=spec.cwd,
                env=dict(env),
                start_new_session=True,
                **who,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as why:
            raise DispatchError(f"{escaped(argv[0])}: {getattr(why, 'strerror', None) or why}") from why
        finally:
            os.close(writing)
        pid, fd = process.pid, _watched(process)
        ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, _done, ended)
        loop.add_reader(reading, _drain, loop, reading, said)
        in_time = True
        try:
            async with asyncio.timeout(timeout_s):
                await ended
        except TimeoutError:
            in_time = False
        finally:
            loop.remove_reader(fd)
            signal_group(fd, pid, "", signal.SIGKILL)
            end = let_go(loop, fd)
        _drain(loop, reading, said)
        lines = bytes(said).decode("utf-8", "replace").strip().splitlines()
        return (end if in_time else None), escaped(lines[-1].strip()) if lines else ""
    finally:
        loop.remove_reader(reading)
        os.close(reading)


def _done(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def let_go(loop: asyncio.AbstractEventLoop, fd: int) -> End | None:
    """Reaps a child that has ended, and closes its pidfd; one that was just killed is reaped when it is gone."""
    end = end_of(fd, reap=True)
    loop.remove_reader(fd)
    if end is None:
        loop.add_reader(fd, let_go, loop, fd)
    else:
        os.close(fd)
    return end


def _drain(loop: asyncio.AbstractEventLoop, fd: int, said: bytearray) -> None:
    """Keeps the last of what a pipe has, at most so much at a time that others have their turn."""
    for _ in range(16):
        try:
            data = os.read(fd, 65536)
        except OSError:
            return
        if not data:
            loop.remove_reader(fd)
            return
        said += data
        del said[:-OUTPUT_KEPT]
