"""Train a last layer on cached outputs of a frozen network."""

from collections.abc import Callable
from itertools import chain, count, islice

import torch
from torch import Tensor
from tqdm import tqdm

from interp_models.core.distributed import gathered
from interp_models.data.module import DataModule


def fit_on_cached(
    weights: Tensor, loss: Callable[[Tensor, list[int]], Tensor], data: DataModule, first: int, steps: int, lr: float
) -> Tensor:
    """Train weights by steps of a new Adam optimizer.

    Args:
        weights: the initial weights.
        loss: maps the weights and the positions of a batch, among the training images of all ranks, to a scalar loss.
        data: the data module, whose training batches are taken in their order.
        first: number of the epoch whose batches come first.
        steps: number of steps.
        lr: learning rate.

    Returns:
        The trained weights; the same on all ranks.
    """
    weights = weights.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=lr, fused=True)  # fused takes a third of the time
    batches = islice(chain.from_iterable(map(data.batches, count(first))), steps)
    for batch in tqdm(batches, total=steps, desc="last layer", leave=False, disable=not data.shows_progress):
        with torch.enable_grad():
            # Not backward(): DDP hooks into the gradients of parameters.
            (weights.grad,) = torch.autograd.grad(loss(weights, batch), weights)
        optimizer.step()
    return gathered(weights.detach())[0]
