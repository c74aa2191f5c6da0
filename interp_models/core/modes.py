"""The state in which a model is passed: in eval mode, by one thread at a time, in full float32."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from interp_models.core.known import held_in

_free = threading.Condition()
"""Tells waiting threads that modules in `_busy` were released."""
_busy: dict[int, tuple[int, int]] = {}
"""By id of a module that a thread uses in `alone`: the thread, and how many such contexts it is in."""
_guard = threading.RLock()
"""Held while one of the next two changes."""
_held: dict[int, int] = {}
"""By id of a module that is in train mode outside of `evaluating`: how many such contexts it is in. They keep it alive,
and the hash of torchmetrics' modules changes with their state."""
_precision: list[Any] = []
"""Settings of the caller of `full_float32`, for every context that is open."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode inside the context, and restore its own mode afterwards. So are modules that
    are no submodules, in plain lists, tuples and dicts.

    Contexts of several threads may overlap; the last one to end restores the mode.
    """
    with _guard:
        held = [part for part in _every(model) if getattr(part, "training", False) or id(part) in _held]
        for module in held:
            _held[id(module)] = _held.get(id(module), 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _guard:
            for module in held:
                _held[id(module)] -= 1
                if not _held[id(module)]:
                    del _held[id(module)]
                    module.training = True


def _every(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, also those that plain attributes hold."""
    found = list(model.modules())
    seen = set(map(id, found))
    for part in found:  # it grows meanwhile
        for value in held_in(part):
            if isinstance(value, nn.Module) and id(value) not in seen:
                new = [one for one in value.modules() if id(one) not in seen]
                seen.update(map(id, new))
                found += new
    return found


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread explains or scores with any part of the model, and make others wait meanwhile.

    Explainers hook and change modules for the length of a call; another thread's pass would meet these changes.
    """
    me, parts = threading.get_ident(), [id(part) for part in model.modules()]
    with _free:
        _free.wait_for(lambda: all(_busy.get(part, (me, 0))[0] == me for part in parts))
        for part in parts:
            _busy[part] = (me, _busy.get(part, (me, 0))[1] + 1)
    try:
        yield
    finally:
        with _free:
            for part in parts:
                count = _busy.pop(part)[1] - 1
                if count:
                    _busy[part] = (me, count)
            _free.notify_all()


_backends: Any = torch.backends  # torch has no types for the new switches
PRODUCTS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
"""All backends that torch allows to round float32 to TF32 or bfloat16; convolutions on GPUs do so by default."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in full float32 inside the context, on GPUs and CPUs, without TF32 or bfloat16.

    The settings are restored afterwards. Autocast is not affected.
    """
    # Torch has old and new switches. torch.compile reads the old ones, and this fails if the two differ, so both are
    # set. If the caller has mixed them, the old ones cannot be read and are left as they are.
    with _guard:  # the settings are those of all threads; the first context changes them, the last one restores them
        if not _precision:
            tf32 = _readable(lambda: torch.backends.cudnn.allow_tf32)
            matmul = _readable(torch.get_float32_matmul_precision)
            _precision.append((tf32, matmul, [product.fp32_precision for product in PRODUCTS]))
            full = ["ieee"] * len(PRODUCTS)
            _set_precision(None if tf32 is None else False, None if matmul is None else "highest", full)
        else:
            _precision.append(_precision[0])
    try:
        yield
    finally:
        with _guard:
            own = _precision.pop()
            if not _precision:
                _set_precision(*own)


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


def _set_precision(tf32: bool | None, matmul: str | None, products: Iterable[str]) -> None:
    """Set both kinds of switches: the old ones first, because they change the new ones."""
    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    for product, precision in zip(PRODUCTS, products, strict=True):
        product.fp32_precision = precision
