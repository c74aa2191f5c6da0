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
    """Digest of everything of a network that can be read and may change its outputs.

    That is `weights_digest`, buffers that are not saved, the code of its classes, and the public attributes of its
    modules that are numbers, strings, or tuples, lists and dicts of them, such as a temperature.
    """
    plain = {
        f"{name}.{key}": value
        for name, module in network.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_plain(value)
    }
    code = sorted({code_digest(type(module)) for module in network.modules()})
    found = hashlib.sha256(f"{weights_digest(network)} {sorted(plain.items())} {code}".encode())
    saved = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if name not in saved:
            found.update(name.encode() + _bytes(buffer))
    return found.hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def code_digest(cls: type) -> str:
    """Digest of the file of a class, or of its source if it is of a notebook.

    It is empty for a class of this package, whose changes `METHOD_VERSION` counts, and where there is no source.
    """
    if cls.__module__.split(".")[0] == __name__.split(".")[0]:
        return ""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        pass
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # typed into Python
        return ""


def _bytes(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    x = x.detach().cpu().as_subclass(Tensor).contiguous()
    if x.dtype == torch.bfloat16:  # NumPy has no such type
        x = x.view(torch.int16)
    np.save(buffer, x.numpy())
    return buffer.getvalue()
