"""Networks that end in a softmax or a sigmoid: how to detect them, and how to get their logits anyway."""

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
from interp_models.core.outputs import are_finite, check_finite, field_of
from interp_models.core.passes import uncounted
from interp_models.core.squashing import ENDINGS, LOG_SOFTMAX, SIGMOID, SOFTMAX, SOFTMIN

WIDE = 10.0
"""How far beyond the range of the images the noise goes that half of the probes have."""

_more: ContextVar[int] = ContextVar("more_calls", default=0)
"""Calls in each pass that are not the network's own."""
_without: ContextVar[bool] = ContextVar("without_ending", default=False)


@dataclass(frozen=True)
class Call:
    """A call of a softmax or sigmoid in the passes of a network. There may be others for each image of a batch."""

    after: int
    """The number of calls after it."""
    for_one: int
    """The number of calls in a pass of one image."""
    for_each: float
    """The number of calls for each further image."""

    def of(self, batch: int) -> float:
        """The number of calls in a pass of a batch."""
        return self.for_one + self.for_each * (batch - 1) + _more.get()


@dataclass(frozen=True)
class Ending:
    """What a network ends in.

    `softmax`: rows of its output add up to 1. `log_softmax`: so do those of the exponential of its output. `sigmoid`:
    each value is in [0, 1].
    """

    kind: Literal["softmax", "log_softmax", "sigmoid"]
    call: Call | None
    """The call of a softmax, log_softmax or sigmoid whose result is the output; None if there is none."""


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
    check_finite(are_finite(output))  # nothing is found out from NaN
    values, near = output.double().reshape(len(image), -1), max(1e-5, 4 * torch.finfo(output.dtype).eps)
    if not output.numel() or (float(values.min()) < -near and not _are_logarithms(values, near)):
        return None
    low, high = torch.aminmax(image)
    noise = torch.rand(8, *image.shape[1:], generator=torch.Generator().manual_seed(0)).to(image)
    noise[4:] = WIDE * (2 * noise[4:] - 1)
    noting_noise = _Noting(len(noise) * output.numel() // len(image))
    with _opened(noting_noise, network):
        others = field_of(network(low + (high - low if high > low else 1) * noise), where, one=True)
    rows = others.double().reshape(len(noise), -1)
    values = torch.cat([values, rows[~rows.isnan().any(dim=1)]])
    notings = (noting, noting_noise)
    if _are_logarithms(values, near):
        return Ending("log_softmax", _call(network, image, where, output, notings, others, LOG_SOFTMAX))
    values = values[values.isfinite().all(dim=1)]
    if not len(values) or float(values.min()) < -near:
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
    call = _call(network, image, where, output, notings, others, SOFTMAX if softmax else SIGMOID)
    if call is None and (constant or (not softmax and _ends_linearly(network, image, where))):
        return None
    return Ending("softmax" if softmax else "sigmoid", call)


def _are_logarithms(values: Tensor, near: float) -> bool:
    """Whether each row (of several values) has the logarithms of probabilities."""
    return values.shape[1] > 1 and float(values.logsumexp(dim=1).abs().max()) <= near


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
    network: nn.Module,
    image: Tensor,
    where: str | int | None,
    output: Tensor,
    notings: tuple["_Noting", "_Noting"],
    others: Tensor,
    kind: Any,
) -> Call | None:
    """The last call that made the output, also that of a larger batch, if the network without it gives the logits."""
    one, many = notings
    for number, (func, made) in reversed(list(enumerate(one.made))):
        if func not in kind or not _same(made, output):
            continue
        own = len(one.made) - _more.get()
        call = Call(len(one.made) - 1 - number, own, (len(many.made) - len(one.made)) / (len(others) - 1))
        if call.after >= len(many.made) or not _same(many.made[-1 - call.after][1], others):
            return None
        with _opened(_Skipping(call, type(network).__name__), network):
            logits = field_of(network(image.clone()), where, one=True)
        logits = logits.to(torch.promote_types(logits.dtype, output.dtype))  # F.softmax(z, dim=1, dtype=torch.float32)
        again = logits.sigmoid() if kind is SIGMOID else logits.softmax(1) if kind is SOFTMAX else logits.log_softmax(1)
        return call if torch.allclose(again.to(output.dtype), output, atol=1e-6) else None
    return None


def _same(made: Tensor | None, output: Tensor) -> bool:
    if made is None or made.numel() != output.numel():
        return False
    return torch.equal(made.flatten().nan_to_num(), output.flatten().to(made.dtype).nan_to_num())


@contextmanager
def without(ending: Ending, network: nn.Module) -> Iterator[None]:
    """Leave out the last softmax or sigmoid of a network inside the context: it returns logits. So do its prepared
    copies."""
    assert ending.call is not None
    token = _without.set(True)
    try:
        with _opened(_Skipping(ending.call, type(network).__name__), network):
            yield
    finally:
        _without.reset(token)


@contextmanager
def more_calls(number: int) -> Iterator[None]:
    """Tell that each pass inside the context calls softmax so many times more than the network does by itself, as to
    show its attention."""
    token = _more.set(_more.get() + number)
    try:
        yield
    finally:
        _more.reset(token)


def is_left_out() -> bool:
    """Whether the context `without` is open."""
    return _without.get()


class _Calls(TorchFunctionMode, ABC):
    """Sees the calls of softmax and sigmoid in each pass of a network, and counts them.

    It is opened when a pass begins, after the modes of explainers. So these do not see what it leaves out, and it does
    not see the operations by which they compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.batch, self.depth = 0, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in ENDINGS:
            return func(*args, **kwargs)
        self.count += 1
        return self.called(self.count - 1, func, args, kwargs)

    def begin(self, images: Any) -> None:
        """A pass of images begins, or one inside it, of a network that calls itself."""
        self.depth += 1
        if self.depth == 1:
            self.start(len(images) if isinstance(images, Tensor) else 0)
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """A pass ends, also by an error."""
        if not self.depth:  # a hook before `_Start` has failed
            return
        self.depth -= 1
        if not self.depth:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def start(self, batch: int) -> None:
        """The outermost pass begins."""
        self.count, self.batch = 0, batch

    def check(self) -> None:
        """Raise an error after a pass that had not the calls that were expected."""

    @abstractmethod
    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call of softmax or sigmoid returns."""


class _Noting(_Calls):
    """Keeps the results of the calls of the last pass, only those of a number of values if that is given."""

    def __init__(self, numel: int | None = None) -> None:
        super().__init__()
        self.numel = numel
        self.made: list[tuple[Any, Tensor | None]] = []

    def start(self, batch: int) -> None:
        super().start(batch)
        self.made.clear()

    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        made = func(*args, **kwargs)
        values = made
        while torch._C._functorch.is_batchedtensor(values):  # of torch.vmap, which cannot be read outside of it
            values = torch._C._functorch.get_unwrapped(values)
        kept = self.numel in (None, values.numel()) and not torch._C._functorch.is_functorch_wrapped_tensor(values)
        self.made.append((func, values.clone() if kept else None))  # a later operation may work in place
        return made


class _Skipping(_Calls):
    """Leaves one call out."""

    def __init__(self, call: Call, name: str) -> None:
        super().__init__()
        self.call, self.name = call, name

    def called(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        if number != self.call.of(self.batch) - 1 - self.call.after:
            return func(*args, **kwargs)
        logits: Tensor = args[0] if args else kwargs["self" if "self" in kwargs else "input"]
        return -logits if func in SOFTMIN else logits

    def check(self) -> None:
        if self.count != self.call.of(self.batch):
            raise InputError(
                f"{self.name} calls softmax, sigmoid or log_softmax {self.count} times in a pass of {self.batch} "
                f"images, where {self.call.of(self.batch):g} calls were expected, so the one that gives its outputs "
                "cannot be identified; return logits from the network"
            )


_open: ContextVar[_Calls | None] = ContextVar("open_calls", default=None)


class _Start:
    """A forward pre-hook: a pass of the network begins."""

    changes_nothing = True

    def __call__(self, module: nn.Module, args: Any) -> None:
        if (mode := _open.get()) is not None:
            mode.begin(args[0] if args else None)


class _End:
    """A forward hook, called after errors, too: a pass of the network ends."""

    changes_nothing = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if (mode := _open.get()) is not None:
            mode.end()


class _Check:
    """A forward hook, called without an error: the pass had the calls that were expected."""

    changes_nothing = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if (mode := _open.get()) is not None and mode.depth == 1:
            mode.check()


@contextmanager
def in_pass(images: Tensor) -> Iterator[None]:
    """A pass of a prepared copy, because hooks of the network are not copied to it."""
    mode = _open.get()
    if mode is None:
        yield
        return
    mode.begin(images)
    try:
        yield
        if mode.depth == 1:
            mode.check()
    finally:
        mode.end()


@contextmanager
def _opened(mode: _Calls, network: nn.Module) -> Iterator[None]:
    token = _open.set(mode)
    handles = []
    if not isinstance(network, torch.jit.ScriptModule):  # it takes no hooks, and hides its calls
        handles = [
            network.register_forward_pre_hook(_Start()),
            network.register_forward_hook(_Check()),
            network.register_forward_hook(_End(), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _open.reset(token)
