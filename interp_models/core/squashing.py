"""The functions that turn logits into probabilities, under all their names."""

from typing import Any

import torch
from torch import Tensor, nn


def _forms(*names: str) -> frozenset[Any]:
    """Operators of torch.ops by their names, as in exported graphs, with all their overloads."""
    packets = [getattr(torch.ops.aten, name) for name in names]
    return frozenset([*packets, *(getattr(packet, form) for packet in packets for form in packet.overloads())])


SOFTMIN = frozenset([nn.functional.softmin])
"""The softmax of negative values."""
SOFTMAX = SOFTMIN | _forms("softmax", "_softmax") | {
    nn.functional.softmax, torch.softmax, Tensor.softmax, torch.special.softmax,
}  # fmt: skip
SIGMOID = _forms("sigmoid", "sigmoid_", "special_expit") | {
    nn.functional.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit, torch.sigmoid_, Tensor.sigmoid_,
}  # fmt: skip
LOG_SOFTMAX = _forms("log_softmax", "_log_softmax") | {
    nn.functional.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax,
}  # fmt: skip
ENDINGS = SOFTMAX | SIGMOID | LOG_SOFTMAX
