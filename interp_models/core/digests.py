"""Digests of networks, to see whether they have changed."""

import hashlib
import io

import numpy as np
from torch import Tensor, nn


def weights_digest(network: nn.Module) -> str:
    """Digest of a network's layers, weights and buffers: 16 hexadecimal digits."""
    found = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        found.update(name.encode() + _bytes(tensor))
    return found.hexdigest()[:16]


def _bytes(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x.detach().cpu().as_subclass(Tensor).contiguous().numpy())
    return buffer.getvalue()
