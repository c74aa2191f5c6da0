"""Right gradients through batch norm and instance norm."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def right_gradients(model: nn.Module) -> Iterator[None]:
    """Compute gradients through batch and instance norm rightly in the context, also those of one image on a CPU.

    torch (2.12, without a GPU) mixes up the cells of one image if the gradient of the output has its channels
    last in memory, as behind `flatten(2).transpose(1, 2)`, which turns a feature map into tokens.
    """
    handles = [part.register_forward_hook(_Contiguous()) for part in model.modules() if isinstance(part, _NormBase)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Contiguous:
    """A forward hook that puts the gradient of one image's output in order in memory."""

    changes_nothing = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and len(output) == 1 and output.device.type == "cpu":
            output.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
