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
    modules = [(name, ref(part)) for name, part in model.named_modules()]  # ids are used again
    if model not in _known or _known[model][0] != modules:
        _known[model] = (modules, {})
    return _known[model][1]
