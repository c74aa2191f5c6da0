"""A cache of facts about a model, emptied when the model changes."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from inspect import getattr_static
from itertools import chain
from pathlib import PurePath
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

_known: "WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Any]]]" = WeakKeyDictionary()
"""By model: its state, and what is known. Values must not refer to the model, which would then live forever."""
_looked_at: ContextVar[dict[int, tuple[nn.Module, dict[Any, Any]]] | None] = ContextVar("looked_at", default=None)
"""By id of a model: the model and what is known of it, inside `unchanging`."""


def known_of(model: nn.Module) -> dict[Any, Any]:
    """A dictionary that belongs to a model. It is emptied if `state_of` the model changes.

    >>> model = nn.Sequential(nn.ReLU())
    >>> known_of(model)["a"] = 1
    >>> known_of(model), model.append(nn.ReLU()) is model and known_of(model)
    ({'a': 1}, {})
    """
    looked_at = _looked_at.get()
    if looked_at is not None and id(model) in looked_at:
        return looked_at[id(model)][1]
    state = state_of(model)
    before, known = _known.get(model, (None, {}))
    if before != state:
        known = {}
        _known[model] = (state, known)
    if looked_at is not None:
        looked_at[id(model)] = (model, known)
    return known


@contextmanager
def unchanging() -> Iterator[None]:
    """A context in which nobody else changes models, as in one call of an explainer: `known_of` looks at the state of
    each only once, which takes as long as a few convolutions."""
    token = _looked_at.set({}) if _looked_at.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _looked_at.reset(token)


def state_of(model: nn.Module) -> list[object]:
    """A value that changes if modules, attributes, hooks, `forward` or weights change.

    Metrics of torchmetrics are no part of it: each update changes them. It does not read the weights, so a write to
    `.data` escapes it (see `fingerprint`); so does a change of something that is no attribute, such as a global
    variable or an attribute of a class.
    """
    seen: dict[int, int] = {}
    modules = list(_parts(model))
    parts = [
        (
            name,
            _Same(part),
            getattr_static(type(part), "forward", None),
            _attributes(part, seen),
            _hooks(part._forward_hooks),
            _hooks(part._forward_pre_hooks),
            _hooks(part._backward_hooks),
            _hooks(part._backward_pre_hooks),
        )
        for name, part in modules
    ]
    tensors = (x for _, part in modules for x in chain(part.parameters(False), part.buffers(False)))
    return [parts, [(*_version(x), x.data_ptr()) for x in tensors if not _meta(x)]]


def fingerprint(model: nn.Module) -> list[object]:
    """A value that changes if weights change, also by a write to `.data`, which does not change their version.

    Each tensor as a matrix M gives aᵀ M b with random vectors a and b, so that rows in another order are seen, too.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    with torch.no_grad():
        for x in chain(model.parameters(), model.buffers(), _hidden(model)):
            if x.numel() and not _meta(x):
                m = x.detach()
                m = m if m.is_floating_point() and m.element_size() >= 4 else m.float()
                m = m.reshape(len(m) if m.dim() else 1, -1)
                with torch.autocast(x.device.type, enabled=False):
                    found = (m @ _random(m, 1)) @ _random(m, 0)
                by_device.setdefault(x.device, []).append(found.float())
    # Values are compared as bits, so that NaN equals itself. There is one read per device, as each read waits for it.
    return [torch.stack(some).view(torch.int32).tolist() for some in by_device.values()]


def _random(m: Tensor, side: int) -> Tensor:
    """A random vector for a side of a matrix, the same in each call."""
    key = (m.shape[side], m.dtype, m.device)
    if key not in _vectors:
        vector = torch.rand(m.shape[side], generator=torch.Generator().manual_seed(0)) + 0.5
        _vectors[key] = vector.to(m)
    return _vectors[key]


_vectors: dict[Any, Tensor] = {}


def _meta(x: Tensor) -> bool:
    """Whether a tensor has no values yet."""
    return x.is_meta or nn.parameter.is_lazy(x)


def _hooks(hooks: dict[int, Any]) -> tuple[int, ...]:
    """The hooks of a module, without those that change nothing."""
    return tuple(key for key, hook in hooks.items() if not getattr(hook, "changes_nothing", False))


def _attributes(part: nn.Module, seen: dict[int, int]) -> list[tuple[str, object]]:
    """The attributes of a module that its forward may read, beside modules, parameters and buffers."""
    return [
        (name, _value(value, seen, depth=0 if name in _OUTSIDE else LEVELS))
        for name, value in vars(part).items()
        if name not in _INTERNAL and name != "training" and not _computed(part, name)
    ]


def _computed(part: nn.Module, name: str) -> bool:
    """Whether a hook computes an attribute anew before each pass, from a parameter, as pruning and weight norm do."""
    own = part._parameters
    return bool(part._forward_pre_hooks) and any(own.get(f"{name}{end}") is not None for end in ("_orig", "_g"))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with their names, without metrics of torchmetrics and what is in them."""
    metrics = sys.modules.get("torchmetrics")  # if it is not imported, there are none
    kinds = () if metrics is None else (metrics.Metric, metrics.MetricCollection)
    inside = None
    for name, part in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(part, kinds):
            inside = f"{name}."
            continue
        yield name, part


def held_in(part: nn.Module) -> Iterator[object]:
    """What the plain attributes of a module hold, also in lists, dicts and the like: neither its modules, nor its
    parameters, nor its buffers."""
    waiting = [value for name, value in vars(part).items() if name not in _INTERNAL]
    for value in waiting:
        if not isinstance(value, _CONTAINERS):
            yield value
        elif len(waiting) < MOST_VALUES:
            waiting += value.values() if isinstance(value, dict) else value


def _hidden(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in attributes that are neither parameters nor buffers, as in a plain list of tensors or modules."""
    for _, part in _parts(model):
        for value in held_in(part):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, nn.Module):
                yield from chain(value.parameters(), value.buffers())


_MANY = (list, tuple, set, frozenset, deque)
_CONTAINERS = (*_MANY, dict)
MOST_VALUES = 10_000
"""Most values of a module's attributes that are looked at."""
_INTERNAL = frozenset(vars(nn.Module()))
_OUTSIDE = frozenset(["_trainer", "_fabric"])
"""What runs a LightningModule, and changes with every step."""


LEVELS = 9
"""How many lists and dicts inside each other are looked at. An object, such as a config, counts as three of them."""


def _value(value: object, seen: dict[int, int], depth: int = LEVELS) -> object:
    """What tells that an attribute is the same: its value for numbers, text and arrays, versions of tensors, else
    identity, with the attributes of an object such as a config.

    Args:
        value: the attribute.
        seen: by id, the depth to which lists, dicts and objects have been looked at, which is not done twice.
        depth: how many of the `LEVELS` remain.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | PurePath):
        return value
    if isinstance(value, Tensor):
        return _version(value)
    if isinstance(value, nn.Module):
        return tuple(map(_version, chain(value.parameters(), value.buffers())))
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.shape, value.dtype.str, blake2b(value.tobytes()).digest()
    if isinstance(value, _CONTAINERS):
        if seen.get(id(value), 0) >= max(depth, 1):
            return "seen", id(value)
        if depth > 0:
            seen[id(value)] = depth
            if isinstance(value, dict):
                return tuple((_value(key, seen, 0), _value(one, seen, depth - 1)) for key, one in value.items())
            return tuple(_value(one, seen, depth - 1) for one in value)
    elif depth > 0 and not isinstance(value, type | ModuleType) and seen.get(id(value), 0) < depth and _own(value):
        seen[id(value)] = depth
        return _Same(value), tuple((name, _value(one, seen, depth - 3)) for name, one in _own(value))
    return _Same(value)


def _own(value: object) -> list[tuple[str, object]]:
    """The attributes of an object, also those in slots."""
    own = getattr(value, "__dict__", None)
    found = list(own.items()) if isinstance(own, dict) else []
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.append((name, getattr(value, name)))
    return found


def _version(x: Tensor) -> tuple[object, int]:
    return _Same(x), 0 if x.is_inference() else x._version


class _Same:
    """An object, equal only to itself. It does not keep the object alive if that takes weak references."""

    def __init__(self, value: object) -> None:
        try:
            self.ref: Any = ref(value)
        except TypeError:
            self.ref = lambda: value

    def __eq__(self, other: object) -> bool:
        value = self.ref()
        return isinstance(other, _Same) and value is not None and value is other.ref()

    __hash__ = None  # type: ignore[assignment]
