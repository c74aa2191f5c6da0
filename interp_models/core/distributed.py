"""Collective operations between ranks. With a single process they return their input."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


def gathered(x: Tensor) -> Tensor:
    """Gather a tensor of the same shape from every rank: (ranks, ...)."""
    if not _many():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def gathered_objects(x: T) -> list[T]:
    """Gather the objects of all ranks, in the order of the ranks."""
    if not _many():
        return [x]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, x)
    return parts


def in_order(rows: Tensor, n: int) -> Tensor:
    """Gather the rows of a data set in their order, (n, ...); rank r has the rows r, r + ranks, r + 2 ranks, ..."""
    ranks = torch.distributed.get_world_size() if _many() else 1
    padding = -(-n // ranks) - len(rows)
    rows = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padding))
    return gathered(rows).transpose(0, 1).flatten(0, 1)[:n]


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks."""
    if not _many():
        return x
    x = x.clone()
    torch.distributed.all_reduce(x)
    return x


def share_buffers(module: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks: after the last step, batch-norm statistics differ between ranks."""
    if _many():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)


def rank_and_ranks() -> tuple[int, int]:
    """The rank of this process and the number of ranks."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _many() else (0, 1)


def is_first() -> bool:
    """Whether this process is rank 0, which writes and prints."""
    return rank_and_ranks()[0] == 0


def wait_for_all() -> None:
    """Wait for all ranks."""
    if _many():
        torch.distributed.barrier()


def _many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
