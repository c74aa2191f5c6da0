"""One optimizer for the whole training, with named parameter groups."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # exported without being listed
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


def layer_decay_hints(transformer: Any, decay: float) -> dict[nn.Parameter, tuple[float, bool]]:
    """Hints of layer-wise learning-rate decay for a vision transformer of timm, see `InterpModule.optimizer_hints`.

    The factor is d for the last block and what comes after it, d² for the block before, and so on. Biases, norms,
    position embeddings and special tokens have no weight decay.

    Args:
        transformer: a vision transformer of timm.
        decay: d, above 0 and at most 1.
    """
    groups = param_groups_layer_decay(
        transformer, weight_decay=1.0, no_weight_decay_list=transformer.no_weight_decay(), layer_decay=decay
    )
    of = {p: (group["lr_scale"], group["weight_decay"] > 0) for group in groups for p in group["params"]}
    # timm's scale of 1 is at its head, or at other parameters after the blocks: divide by the last block's scale
    last, _ = of[next(transformer.blocks[-1].parameters())]
    return {p: (min(scale / last, 1.0) * decay, decays) for p, (scale, decays) in of.items()}
