"""What was found out about a model, kept as long as the model has the same modules."""

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

_known: "WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Any]]]" = WeakKeyDictionary()
"""By model: its modules, and what is known. Values must not refer to the model, which would then live forever."""


def known_of(model: nn.Module) -> dict[Any, Any]:
    """A dictionary that belongs to a model. It is emptied if a module of the model is replaced.

    >>> model = nn.Sequential(nn.ReLU())
    >>> known_of(model)["a"] = 1
    >>> known_of(model), model.append(nn.ReLU()) is model and known_of(model)
    ({'a': 1}, {})
    """
    modules = list(model.named_modules())
    before, known = _known.get(model, ((), {}))
    same = len(before) == len(modules) and all(
        own == name and kept() is part for (own, kept), (name, part) in zip(before, modules, strict=True)
    )
    if not same or model not in _known:
        known = {}
        _known[model] = ([(name, ref(part)) for name, part in modules], known)
    return known
