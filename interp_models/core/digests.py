"""Digests of networks and of code, to see whether they have changed."""

import hashlib
import inspect
import io
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError


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


def object_digest(value: object) -> str:
    """Digest of what an object can be read to consist of, the same in every process.

    That is its class and the code of it, and its attributes, elements and, for a function, its code, defaults and the
    variables that it closes over, and so on inwards. Addresses in memory do not count.

    Raises:
        InputError: for an object that is nested too deeply.

    >>> object_digest(partial(round, ndigits=1)) == object_digest(partial(round, ndigits=1))
    True
    >>> object_digest(partial(round, ndigits=1)) == object_digest(partial(round, ndigits=2))
    False
    """
    try:
        text = _written(value, {})
    except RecursionError:
        raise InputError(f"{type(value).__name__} is nested too deeply to tell later whether it has changed") from None
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _without_addresses(text: str) -> str:
    return re.sub(r"\b0x[0-9a-fA-F]+", "", text)


def _written(value: Any, seen: dict[int, tuple[int, Any]]) -> str:
    """An object as text. `seen` numbers the objects that were written, and keeps them alive, as ids are used again."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return f"object {seen[id(value)][0]}"
    seen[id(value)] = len(seen), value

    def written(*parts: Any) -> str:
        return ", ".join(_written(part, seen) for part in parts)

    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes(value)).hexdigest()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    name = type(value).__qualname__
    if isinstance(value, Mapping):
        return f"{name}({', '.join(sorted(written(*pair) for pair in value.items()))})"
    if isinstance(value, list | tuple):
        return f"{name}({written(*value)})"
    if isinstance(value, set | frozenset):
        return f"{name}({sorted(map(written, value))})"
    if isinstance(value, partial):
        return f"{name}({written(value.func, value.args, value.keywords)})"
    if inspect.ismethod(value):
        return f"{name}({written(value.__self__, value.__func__)})"
    if inspect.isfunction(value):
        code, cells = value.__code__, [_contents(cell) for cell in value.__closure__ or ()]
        compiled = [code.co_code, code.co_names, [c for c in code.co_consts if not inspect.iscode(c)]]
        return f"{value.__module__}.{value.__qualname__}({written(compiled, value.__defaults__, cells)})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__} {code_digest(value)}"
    own = dict(getattr(value, "__dict__", {}))
    slots = (slot for cls in type(value).__mro__ for slot in cls.__dict__.get("__slots__", ()))
    own |= {slot: getattr(value, slot) for slot in slots if slot not in own and hasattr(value, slot)}
    if isinstance(value, nn.Module):  # without its hooks
        own = {key: part for key, part in own.items() if not key.startswith("_")}
        own |= value._parameters | value._buffers | value._modules
    if isinstance(value, torch.Generator):
        own = {"state": value.get_state()}
    if isinstance(value, np.random.Generator):
        own = {"state": value.bit_generator.state}
    inner = written(own) if own else _without_addresses(repr(value))
    return f"{type(value).__module__}.{name} {code_digest(type(value))}({inner})"


def _contents(cell: Any) -> Any:
    """The variable of a closure; an unset one has none."""
    try:
        return cell.cell_contents
    except ValueError:
        return "unset"


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
