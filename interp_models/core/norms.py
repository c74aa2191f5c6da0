"""Gradients that are also right behind batch norm and instance norm."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp_models.core.eager import name_of, nodes_of


def gradients(total: Tensor, inputs: Sequence[Tensor], *, again: bool = False) -> tuple[Tensor | None, ...]:
    """The gradient of a scalar with respect to each input; None for those that it does not depend on.

    torch (2.12, on a CPU) mixes up the cells of one image in the backward pass of batch norm and instance norm, if the
    gradient of their output has its channels last in memory, as behind `flatten(2).transpose(1, 2)`, which turns a
    feature map into tokens. Here that gradient is first made contiguous.

    Args:
        total: a scalar with its autograd graph.
        inputs: tensors of the graph.
        again: whether to keep the graph for another gradient.
    """
    norms = [] if total.device.type != "cpu" or total.grad_fn is None else nodes_of(total.grad_fn)
    handles = [node.register_prehook(_contiguous) for node in norms if name_of(node) == "NativeBatchNorm"]
    try:
        return torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=again)
    finally:
        for handle in handles:
            handle.remove()


def _contiguous(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients of a norm's outputs, that of one image in order in memory."""
    return tuple(x.contiguous() if isinstance(x, Tensor) and len(x) == 1 else x for x in given)
