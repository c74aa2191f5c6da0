"""The one type that every architecture returns."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class InterpOutput(NamedTuple):
    """What a forward pass of any architecture returns, in training and in evaluation.

    A named tuple is a pytree: DDP, `torch.export` and Lightning traverse it as it is.
    """

    logits: Tensor
    """(B, K), before the softmax."""
    maps: Tensor
    """(B, N, h, w), one map per part, prototype or head, on the model's own grid, not normalised;
    not below 0 unless the model says `signed_maps`."""
    aux: Mapping[str, Tensor] = {}  # never written to; a read-only mapping would be no pytree
    """What only the model's own loss and explanations read, such as features or distances."""
