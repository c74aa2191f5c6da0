"""Signals that stop a script: the exit code that belongs to them, and one line that says how to go on."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


REPEAT_S = 5.0
"""Further signals are ignored for so long: a terminal and `timeout` may send the same one twice."""


class Stopped(BaseException):
    """A signal arrived; no `KeyboardInterrupt`, after which Lightning ends the program itself, with exit code 1."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_ways: list[Callable[[], str]] = []


def goes_on_by(how: Callable[[], str]) -> None:
    """What to say if the script is stopped from now on."""
    _ways[:] = [how]


def how_to_go_on() -> str:
    """What was last given to `goes_on_by`."""
    return _ways[0]() if _ways else "repeat the command"


def stop_of(error: BaseException | None) -> Stopped | None:
    """The signal that an error comes of, if it does."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, a signal raises `Stopped`, unless the script was started so that it ignores it, as by `nohup`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, last = os.getpid(), -REPEAT_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a process that loads images; its end is that of the one that uses it
            raise KeyboardInterrupt
        if time.monotonic() - last > REPEAT_S:
            last = time.monotonic()
            raise Stopped(number)

    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook

    def again(unraisable: Any) -> None:
        """Python drops an exception that meets a destructor or a callback of C: the signal is sent once more."""
        nonlocal last
        if not isinstance(unraisable.exc_value, Stopped):
            hook(unraisable)
            return
        last = -REPEAT_S
        threading.Timer(0.05, os.kill, (owner, unraisable.exc_value.number)).start()

    sys.unraisablehook = again
    _ways.clear()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """End this process, a rank that Lightning started, soon after the one that started it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=watch, daemon=True).start()
