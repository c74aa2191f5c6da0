"""Digests of networks and of code, to see whether they have changed."""

import hashlib
import inspect
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def weights_digest(network: nn.Module) -> str:
    """Digest of a network's layers, weights and buffers: 16 hexadecimal digits."""
    found = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        found.update(name.encode() + _bytes(tensor))
    return found.hexdigest()[:16]


def network_digest(network: nn.Module) -> str:
    """Digest of everything of a network that can be read and may change its outputs: `weights_digest`, and the public
    attributes of its modules that are numbers, strings or tuples of them, such as a temperature."""
    plain = {
        f"{name}.{key}": value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_plain(value)
    }
    return hashlib.sha256(f"{weights_digest(network)} {sorted(plain.items())}".encode()).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def code_digest(cls: type) -> str:
    """Digest of the file of a class that is not of this package, such as a plugin's; empty for a class of this package,
    whose version `METHOD_VERSION` follows."""
    if cls.__module__.split(".")[0] == __name__.split(".")[0]:
        return ""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):  # defined in a session of Python
        return ""


def _bytes(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    x = x.detach().cpu().as_subclass(Tensor).contiguous()
    if x.dtype == torch.bfloat16:  # NumPy has no such type
        x = x.view(torch.int16)
    np.save(buffer, x.numpy())
    return buffer.getvalue()
