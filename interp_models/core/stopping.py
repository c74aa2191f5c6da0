"""Signals that stop a command. It ends with their exit code and one line that says how to go on."""

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
"""Seconds during which further signals are ignored: a terminal or `timeout` may send one twice."""


class Stopped(BaseException):
    """A signal arrived. It is not a `KeyboardInterrupt`, because Lightning would exit with code 1 on that."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


_ways: list[Callable[[], str]] = []


def goes_on_by(how: Callable[[], str]) -> None:
    """Set the function that returns the hint to print if the command is stopped from now on."""
    _ways[:] = [how]


def how_to_go_on() -> str:
    """The hint of the function that `goes_on_by` set last."""
    return _ways[0]() if _ways else "repeat the command"


def stop_of(error: BaseException | None) -> Stopped | None:
    """The `Stopped` that caused an error, if any."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` at a signal inside the context. Signals that the process ignores from its start (`nohup`) stay
    ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, last = os.getpid(), -REPEAT_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a loader process; it ends with its parent
            raise KeyboardInterrupt
        if time.monotonic() - last > REPEAT_S:
            last = time.monotonic()
            raise Stopped(number)

    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook

    def again(unraisable: Any) -> None:
        """Send the signal again if Python drops `Stopped`, as it does in a destructor or a C callback."""
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
    """If this process is a rank that Lightning started, end it soon after its parent ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=watch, daemon=True).start()
