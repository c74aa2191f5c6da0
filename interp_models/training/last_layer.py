"""Training of weights on what a frozen network gives, computed once."""

from collections.abc import Callable
from itertools import chain, count, islice

import torch
from torch import Tensor
from tqdm import tqdm

from interp_models.core.distributed import gathered
from interp_models.data.module import DataModule


def fit_stored(
    weights: Tensor, loss: Callable[[Tensor, list[int]], Tensor], data: DataModule, first: int, steps: int, lr: float
) -> Tensor:
    """Weights after steps of Adam, which begins anew; the same on all ranks.

    Args:
        weights: to begin with.
        loss: of weights and a batch, by positions among the training images of all ranks.
        data: whose batches, in whose order, are taken.
        first: number of the epoch whose batches come first.
        steps: how many.
        lr: learning rate.
    """
    weights = weights.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=lr, fused=True)  # a third of the time
    batches = islice(chain.from_iterable(map(data.batches, count(first))), steps)
    for batch in tqdm(batches, total=steps, desc="last layer", leave=False, disable=not data.shows_progress):
        with torch.enable_grad():
            # Not backward(): DDP listens to the gradients of parameters.
            (weights.grad,) = torch.autograd.grad(loss(weights, batch), weights)
        optimizer.step()
    return gathered(weights.detach())[0]
