"""Count the images that a method passes through a model."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

_counter: ContextVar["PassCounter | None"] = ContextVar("pass_counter", default=None)
_uncounted: ContextVar[bool] = ContextVar("uncounted", default=False)


class PassCounter:
    """A forward pre-hook that counts images."""

    changes_nothing = True

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        """Time of the passes that were reused, when they were made."""
        self._thread = get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and are_counted() and get_ident() == self._thread:
            self.images += len(args[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "PassCounter":
        """Return itself, so that copies of the model share the counter."""
        return self


@contextmanager
def counted_passes(*models: nn.Module) -> Iterator[PassCounter]:
    """Count the images that pass through any of these models inside the context. No model may contain another.

    >>> import torch
    >>> model = nn.Flatten()
    >>> with counted_passes(model) as passes:
    ...     _ = model(torch.zeros(3, 1, 2, 2))
    >>> passes.images
    3
    """
    counter = PassCounter()
    handles = [model.register_forward_pre_hook(counter) for model in dict.fromkeys(models)]
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)
        for handle in handles:
            handle.remove()


@contextmanager
def uncounted() -> Iterator[None]:
    """Count no passes inside the context: they find something out once per model, and are no part of a method."""
    token = _uncounted.set(True)
    try:
        yield
    finally:
        _uncounted.reset(token)


def are_counted() -> bool:
    """Whether passes count: they do outside of `uncounted`."""
    return not _uncounted.get()


def count_reused(images: Tensor, seconds: float) -> None:
    """Count a pass of these images that another method has made in so many seconds, and that this method reuses."""
    counter = _counter.get()
    if counter is not None:
        counter.images += len(images)
        counter.seconds += seconds


def seconds_now(images: Tensor) -> float:
    """The time in seconds, after all work on the images' device."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
