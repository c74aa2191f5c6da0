"""One optimizer for the whole training, with named parameter groups."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from interp_models.training.recipe import Optimizer

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def make_optimizer(
    spec: Optimizer,
    groups: Mapping[str, Sequence[nn.Parameter]],
    hints: Mapping[nn.Parameter, tuple[float, bool]],
) -> torch.optim.Optimizer:
    """Make an optimizer whose groups have a `name`, a `scale` and learning rate 0; `PhaseSchedule` sets the rates.

    If a paper uses several optimizers, one is equivalent: the state of Adam and SGD is per parameter, and a frozen
    parameter has no gradient and is skipped. Parameters of one group with different hints make several optimizer groups
    of the same name.

    Args:
        spec: name and options of the optimizer.
        groups: parameters by name of the group.
        hints: see `InterpModule.optimizer_hints`.
    """
    made: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        decay = spec.weight_decays.get(name, spec.weight_decay)
        alike: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter in parameters:
            alike.setdefault(hints.get(parameter, (1.0, True)), []).append(parameter)
        for (scale, decays), some in alike.items():
            made.append({"name": name, "params": some, "weight_decay": decay if decays else 0.0, "scale": scale})
    options = {"momentum": spec.momentum} if spec.name == "sgd" else {"eps": spec.eps}
    return OPTIMIZERS[spec.name](made, lr=0.0, **options)
