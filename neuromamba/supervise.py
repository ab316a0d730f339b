"""Run another program to its end, or end it with all that it has started.

Design choices
--------------
- The program has a process group of its own, so that the time limit, Ctrl-C and the cluster's
  SIGTERM end it and its children, and nothing else.
- What it prints goes to a log file and, as it comes, to stderr. Where these cannot be written, as
  on a full disk, it is ended, and the error is the caller's.
- A container goes on when the client that started it is killed: the caller says how to stop it.
- A caller that was killed by SIGKILL can end nothing. What it left running is found by a variable
  of its environment (on Linux) before the next start works in the same folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from neuromamba.files import InputError

GRACE = 20.0
"""Seconds from SIGTERM to SIGKILL; SLURM itself gives 30."""
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK = 1.0
"""Seconds between two looks at whether all is well."""
POLL = 0.05
"""Seconds between two looks at whether a process group has ended."""


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    `code` is its exit status as a shell tells it: 128 + n where signal n ended it.
    """

    code: int
    timed_out: bool


def run_program(
    command: Sequence[str],
    log: Path,
    time_limit: float,
    environment: Mapping[str, str],
    stop: Callable[[], None],
) -> Ended:
    """Run a program and wait for it.

    Parameters
    ----------
    command
        The program and its arguments; no shell reads them.
    log
        What it prints, stdout and stderr together; replaced.
    time_limit
        Seconds after which it is ended.
    environment
        Variables to set beside those of this process.
    stop
        Called whenever the program did not end well, to stop what is not its child.

    Raises
    ------
    InputError
        When it cannot be started.
    OSError
        When the log or stderr cannot be written, once the program has been ended.
    KeyboardInterrupt, SystemExit
        On SIGINT, and on SIGTERM or SIGHUP, once the program has ended.
    """
    timed_out, ended_well = False, False
    with _raising_on_signals(), log.open("w", encoding="utf-8") as output:
        process = _start(command, environment)
        try:
            relay = _Relay(process.stdout, output)
            relay.start()
            timed_out = not _wait(process, time_limit, relay)
            ended_well = process.returncode == 0
        finally:
            _end_group(process, _nothing if ended_well else stop)
        relay.join(GRACE)  # in vain where a process that has left the group holds the pipe
        if relay.error is not None:
            raise relay.error
    code = process.returncode
    return Ended(code if code >= 0 else 128 - code, timed_out)


def _nothing() -> None:
    """There is nothing to stop that is not a child."""


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(f"{command[0]} cannot be started ({error.strerror})") from None


class _Relay(threading.Thread):
    """Copies what a program prints. After an error it only reads on, so that none waits for it."""

    def __init__(self, source: IO[str] | None, log: IO[str]):
        super().__init__(daemon=True)
        assert source is not None
        self._source, self._log = source, log
        self.error: OSError | None = None

    def run(self) -> None:
        # ValueError: the log is closed, as the program is over, and a straggler prints.
        with suppress(ValueError):
            try:
                for line in self._source:
                    self._log.write(line)
                    self._log.flush()
                    sys.stderr.write(line)
            except OSError as error:
                self.error = error
                for _ in self._source:
                    pass


def _wait(process: subprocess.Popen[str], time_limit: float, relay: _Relay) -> bool:
    """Wait for the end of a program, or of what it prints to; false when the time is over."""
    deadline = time.monotonic() + time_limit
    while process.poll() is None and relay.error is None:
        if time.monotonic() > deadline:
            return False
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(LOOK, max(0.0, deadline - time.monotonic())))
    return True


@contextmanager
def _raising_on_signals() -> Iterator[None]:
    """Within the block the first signal to end becomes an exception, and more are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_once(number: int, _frame: FrameType | None) -> NoReturn:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    # What is ignored (SIGHUP under nohup) stays so.
    ends = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, raise_once) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[str], stop: Callable[[], None]) -> None:
    """End what is left of a process group: SIGTERM first, SIGKILL after `GRACE`."""
    alive = _signal_group(process, signal.SIGTERM)
    stop()
    deadline = time.monotonic() + GRACE
    while alive and time.monotonic() < deadline:
        process.poll()
        time.sleep(POLL)
        alive = _signal_group(process, 0)
    if alive:
        _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[str], number: int) -> bool:
    """Send a signal to a process group; whether there is one."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of a group of zombies
        return False
    return True


def end_earlier(variable: str, value: str) -> list[int]:
    """End by SIGKILL what an earlier start left running with a variable in its environment.

    Returns
    -------
    list of int
        The processes; none where there is no `/proc`.
    """
    wanted, found = f"{variable}={value}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found
