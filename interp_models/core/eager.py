"""Run models without recomputation and without compiled parts, so that hooks and gradients see every operation once."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from interp_models.core.errors import NotApplicable

RECOMPUTES = (
    "the network recomputes activations in its backward pass (gradient checkpointing), which hides them from "
    "explainers; switch that off, as by set_grad_checkpointing(False)"
)
HIDING = ("CompiledFunction", "DifferentiableGraph")
"""Parts of the names of autograd nodes that hide other operations: those of torch.compile and of torch.jit."""


HIDDEN = {
    "Inference tensors cannot be saved": "has weights made in inference mode, through which no gradient flows",
    "requires_grad=True on inference tensor": "has weights made in inference mode, which take no gradients",
    "cannot register a hook on a tensor that": "registers a hook on a tensor in its forward, which fails in passes "
    "without gradients; put `if x.requires_grad` before it",
    "functorch transforms": "uses vmap or another transform of torch.func, through which the method cannot reach",
}
"""By a part of an error of torch: what a network does that methods by gradients cannot follow."""


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run a model inside the context as if it were neither compiled nor checkpointed.

    Checkpoints that a timm model switches on are off inside. Parts and functions made by
    `torch.compile` run eagerly.

    Raises:
        NotApplicable: if a gradient meets other checkpoints.
    """
    with ExitStack() as stack:
        for part in model.modules():
            if getattr(part, "grad_checkpointing", False) is True:
                setattr(part, "grad_checkpointing", False)  # noqa: B010 (mypy knows only modules' parameters)
                stack.callback(setattr, part, "grad_checkpointing", True)
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled
            stack.enter_context(_stance("force_eager"))
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTES):
                yield
        except RuntimeError as error:
            if is_recomputed(error):
                raise NotApplicable(RECOMPUTES) from None
            if hidden := next((why for sign, why in HIDDEN.items() if sign in str(error)), None):
                raise NotApplicable(f"{type(model).__name__} {hidden}") from None
            raise


_guard = threading.Lock()
_users: Any = None
"""What restores the stance on compilation, which all threads share, as it was before the contexts in `_open`."""
_open: list[str] = []
"""Stances that open contexts of all threads ask for. The last one holds."""


@contextmanager
def _stance(name: Literal["force_eager", "default"], *, inside: bool = False) -> Iterator[None]:
    """Set torch's stance. The user's comes back at the end of the last context, in whatever order these end.

    Args:
        name: the stance.
        inside: whether to set it only inside other such contexts.
    """
    global _users
    with _guard:
        sets = bool(_open) or not inside
        if sets:
            made = torch.compiler.set_stance(name)
            _users = _users or made
            _open.append(name)
    try:
        yield
    finally:
        if sets:
            with _guard:
                _open.remove(name)
                if _open:
                    torch.compiler.set_stance(_open[-1])
                else:
                    _users.__exit__(None, None, None)
                    _users = None


def compiled_again() -> AbstractContextManager[None]:
    """Run what a prepared copy has compiled as such, also inside `eagerly`."""
    return _stance("default", inside=True)


def own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that acts in the thread that calls this, and not when another thread runs the model meanwhile."""
    owner = threading.get_ident()

    @functools.wraps(hook)
    def acts(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return acts


def is_recomputed(error: Exception) -> bool:
    """Whether an error comes from a gradient that meets a checkpoint inside `eagerly`."""
    return RECOMPUTES in str(error) or ("checkpoint is incompatible" in str(error) and ".grad()" in str(error))


def nodes_of(node: Any, without: Any = None) -> set[Any]:
    """The nodes that a node of the autograd graph depends on, and itself, without those behind `without`."""
    found, waiting = {node}, [node]
    while waiting:
        for parent, _ in waiting.pop().next_functions:
            if parent is not None and parent is not without and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def name_of(node: Any) -> str:
    """The name of an autograd node's operation, as `Relu` of `ReluBackward0`."""
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]
