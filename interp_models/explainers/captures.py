"""Hooks that read a layer's output in a pass, or replace it."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import InputError
from interp_models.explainers.forms import swapped, tensor_of
from interp_models.explainers.layers import Layer


@contextmanager
def captured(layer: Layer, *, gradient: bool) -> Iterator[list[Tensor]]:
    """While open, append the layer's output to the list; see `Layer.form` for its form.

    With `gradient`, the autograd graph starts at the layer's output; open this inside `torch.no_grad()`. The gradient
    with respect to the layer then costs one forward pass and the backward pass of the layers after it.
    """
    outputs: list[Tensor] = []
    calls = itertools.count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != layer.use:
            return None
        tensor = tensor_of(output)
        if tensor is None:
            raise InputError(f"layer {layer.name} gives no tensor but {type(output).__name__}")
        if not gradient:
            outputs.append(tensor.detach().clone())  # the next layer may modify it in place
            return None
        start = tensor.detach().requires_grad_(True)
        outputs.append(start)
        torch.set_grad_enabled(True)
        return swapped(output, start.clone())  # the next layer may work in place, which autograd forbids for a leaf

    handle = layer.module.register_forward_hook(own_thread(hook))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def captured_together(layers: Sequence[Layer], *, gradient: bool) -> Iterator[dict[int, Tensor]]:
    """As `captured`, of several layers in one pass: outputs by the layer's place in the sequence. With `gradient`, the
    autograd graph starts at the output of the first that runs."""
    outputs: dict[int, Tensor] = {}

    def hook_of(place: int, layer: Layer) -> Any:
        calls = itertools.count()

        @own_thread
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = tensor_of(output)
            if next(calls) != layer.use or tensor is None:
                return None
            if not gradient:
                outputs[place] = tensor.detach().clone()  # the next layer may modify it in place
                return None
            outputs[place] = tensor if tensor.requires_grad else tensor.detach().requires_grad_(True)
            torch.set_grad_enabled(True)
            return swapped(output, outputs[place].clone())

        return hook

    handles = [layer.module.register_forward_hook(hook_of(place, layer)) for place, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(layer: Layer, features: Tensor) -> Iterator[None]:
    """While open, for one pass, the layer's output has the features (B, C, h, w) in place of its own; the pass may
    be of one image only."""
    calls = itertools.count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != layer.use or (tensor := tensor_of(output)) is None:
            return None
        return swapped(output, layer.form.replaced(tensor, features))

    handle = layer.module.register_forward_hook(own_thread(hook))
    try:
        yield
    finally:
        handle.remove()
