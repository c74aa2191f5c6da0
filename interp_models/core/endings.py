"""Networks that end in a softmax or a sigmoid: how that is found, and how their logits are read all the same."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp_models.core.eager import name_of
from interp_models.core.errors import InputError
from interp_models.core.known import known_of
from interp_models.core.outputs import field_of
from interp_models.core.passes import uncounted

SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
SIGMOID = (nn.functional.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit, torch.sigmoid_, Tensor.sigmoid_)
WIDE = 10.0
"""How far beyond the range of the images the noise goes that half of the probes have."""

_without: ContextVar[bool] = ContextVar("without_ending", default=False)


@dataclass(frozen=True)
class Ending:
    """What a network ends in.

    `softmax`: rows of its output add up to 1. `sigmoid`: each value is in [0, 1].
    """

    kind: Literal["softmax", "sigmoid"]
    call: int | None
    """The number of the call of a softmax or sigmoid, in a pass, whose result is the output; None if there is none."""


def ending_of(network: nn.Module, images: Tensor, where: str | int | None = None) -> Ending | None:
    """What a network ends in; None for one that returns logits.

    Its outputs for an image and for noise tell: they all lie in [0, 1]. The result is cached. `network` is in eval
    mode.

    Args:
        network: any module.
        images: images (B, C, H, W) as the network takes them.
        where: place of the logits, see `outputs.field_of`.

    Raises:
        InputError: if rows of the output add up to another number than 1, as percentages do.
    """
    known, key = known_of(network), ("ending", where)
    if key not in known:
        with uncounted(), torch.no_grad():
            known[key] = _found(network, images[:1].detach(), where)
    ending: Ending | None = known[key]
    return ending


def _found(network: nn.Module, image: Tensor, where: str | int | None) -> Ending | None:
    noting = _Noting()
    with _opened(noting, network):
        output = field_of(network(image.clone()), where, one=True)
    values, near = output.double().reshape(len(image), -1), max(1e-5, 4 * torch.finfo(output.dtype).eps)
    if not output.numel() or float(values.min()) < -near:
        return None
    low, high = torch.aminmax(image)
    noise = torch.rand(8, *image.shape[1:], generator=torch.Generator().manual_seed(0)).to(image)
    noise[4:] = WIDE * (2 * noise[4:] - 1)
    others = field_of(network(low + (high - low if high > low else 1) * noise), where, one=True).double()
    others = others.reshape(len(noise), -1)
    values = torch.cat([values, others[others.isfinite().all(dim=1)]])
    if float(values.min()) < -near:
        return None
    sums, most, constant = values.sum(dim=1), float(values.max()), bool((values == values[:1]).all())
    adds_up = values.shape[1] > 1 and float((sums / sums[0] - 1).abs().max()) <= near
    softmax = adds_up and abs(float(sums[0]) - 1) <= near
    if most > 1 + near and adds_up and not constant:
        raise InputError(
            f"{type(network).__name__} returns values that add up to {float(sums[0]):g} for every image: logits or "
            "probabilities were expected"
        )
    if most > 1 + near:
        return None
    call = _call(network, image, where, output, noting, SOFTMAX if softmax else SIGMOID)
    if call is None and (constant or _ends_linearly(network, image, where)):
        return None
    return Ending("softmax" if softmax else "sigmoid", call)


LINEAR = {"Addmm", "Mm", "Bmm", "Addbmm", "Convolution", "Baddbmm"}
"""Operations of the autograd graph by which logits are made, whatever lies before."""
HARMLESS = {
    "View", "UnsafeView", "Reshape", "Alias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Clone", "ToCopy",
    "Select", "Slice", "Index", "Expand", "Mean", "Sum", "Add", "Sub", "Neg", "Cat", "Stack", "Split", "Unbind",
    "AccumulateGrad",
}  # fmt: skip
"""Operations that keep logits unbounded."""


def _ends_linearly(network: nn.Module, image: Tensor, where: str | int | None) -> bool:
    """Whether only operations that bound nothing follow the last product with weights. Then outputs are logits, also
    of a network without training, whose outputs may all lie in [0, 1]."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            output = field_of(network(image.clone().requires_grad_(True)), where, one=True)
    except RuntimeError:
        return False
    waiting, seen = [output.grad_fn], {output.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None or name_of(node) not in LINEAR | HARMLESS:
            return False
        if name_of(node) in LINEAR:
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return True


def _call(
    network: nn.Module, image: Tensor, where: str | int | None, output: Tensor, noting: "_Noting", kind: Any
) -> int | None:
    """The number of the last call that made the output, if the network without it gives the logits."""
    for call, (func, made) in reversed(list(enumerate(noting.made))):
        if func in kind and made.numel() == output.numel() and torch.equal(made.flatten(), output.flatten()):
            with _opened(_Skipping(call), network):
                logits = field_of(network(image.clone()), where, one=True)
            again = logits.softmax(dim=1) if kind is SOFTMAX else logits.sigmoid()
            return call if torch.allclose(again.to(output.dtype), output) else None
    return None


@contextmanager
def without(ending: Ending, network: nn.Module) -> Iterator[None]:
    """Leave out the last softmax or sigmoid of a network inside the context: it returns logits. So do its prepared
    copies."""
    assert ending.call is not None
    token = _without.set(True)
    try:
        with _opened(_Skipping(ending.call), network):
            yield
    finally:
        _without.reset(token)


def is_left_out() -> bool:
    """Whether the context `without` is open."""
    return _without.get()


class _Calls(TorchFunctionMode, ABC):
    """Sees the calls of softmax and sigmoid in each pass of a network, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in SOFTMAX and func not in SIGMOID:
            return func(*args, **kwargs)
        self.count += 1
        return self.called(self.count - 1, func, args, kwargs)

    def start(self) -> None:
        """A pass begins."""
        self.count = 0

    @abstractmethod
    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call of softmax or sigmoid returns."""


class _Noting(_Calls):
    """Keeps the results of the calls of the last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Tensor]] = []

    def start(self) -> None:
        super().start()
        self.made.clear()

    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        self.made.append((func, made.clone()))  # a later operation may work in place
        return made


class _Skipping(_Calls):
    """Leaves one call out."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call

    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        if number != self.call:
            return func(*args, **kwargs)
        return args[0] if args else kwargs["input"]


_open: ContextVar[_Calls | None] = ContextVar("open_calls", default=None)


class _Start:
    """A forward pre-hook: a pass of the network begins."""

    only_counts = True

    def __call__(self, module: nn.Module, args: Any) -> None:
        begin_pass()


def begin_pass() -> None:
    """Say that a pass begins. Prepared copies call this, because hooks of the network are not copied to them."""
    mode = _open.get()
    if mode is not None:
        mode.start()


@contextmanager
def _opened(mode: _Calls, network: nn.Module) -> Iterator[None]:
    token = _open.set(mode)
    scripted = isinstance(network, torch.jit.ScriptModule)  # takes no hooks, and hides its calls
    handle = None if scripted else network.register_forward_pre_hook(_Start())
    try:
        with mode:
            yield
    finally:
        if handle is not None:
            handle.remove()
        _open.reset(token)
