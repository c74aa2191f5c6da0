"""Soft decision trees: complete binary trees in heap order, from which leaves may be removed.

Node n has the children 2n + 1 (left) and 2n + 2 (right). A tree with 2^depth leaves has 2^depth - 1 nodes. If all
leaves below one child are removed, the node decides nothing: every image goes to the other child.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_models.core.errors import InputError


@dataclass(frozen=True)
class TreeNode:
    """A node with two children, or a leaf with none."""

    number: int
    """Number of the node in heap order; -1 for a leaf."""
    label: str = ""
    """Text of a leaf."""
    left: "TreeNode | None" = None
    right: "TreeNode | None" = None


def children_kept(leaf_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Whether any leaf is kept below the right and below the left child of each node, (2^depth - 1,) bool each."""
    right, left = [], []
    for level in range(depth_of(leaf_kept)):
        halves = leaf_kept.view(2**level, 2, -1).any(dim=2)
        left.append(halves[:, 0])
        right.append(halves[:, 1])
    return torch.cat(right), torch.cat(left)


def route(log_right: Tensor, log_left: Tensor, leaf_kept: Tensor) -> Tensor:
    """Log probabilities of the leaves (B, 2^depth), from those of the nodes' decisions (B, 2^depth - 1)."""
    right, left = children_kept(leaf_kept)
    log_right = torch.where(left, log_right, 0.0).masked_fill(~right, -torch.inf)
    log_left = torch.where(right, log_left, 0.0).masked_fill(~left, -torch.inf)
    paths = log_right.new_zeros(len(log_right), 1)
    for level in range(depth_of(leaf_kept)):
        nodes = slice(2**level - 1, 2 ** (level + 1) - 1)
        paths = torch.stack([paths + log_left[:, nodes], paths + log_right[:, nodes]], dim=2).flatten(1)
    return paths


def leaf_depths(leaf_kept: Tensor) -> Tensor:
    """Number of decisions on the path to each leaf, (2^depth,) int64. Nodes that decide nothing do not count.

    >>> leaf_depths(torch.tensor([True, False, True, True])).tolist()
    [1, 1, 2, 2]
    """
    right, left = children_kept(leaf_kept)
    counts = (right & left).long()
    depths = counts.new_zeros(1)
    for level in range(depth_of(leaf_kept)):
        depths = (depths + counts[2**level - 1 : 2 ** (level + 1) - 1]).repeat_interleave(2)
    return depths


def grown(leaf_kept: Tensor, labels: Sequence[str]) -> TreeNode:
    """Build the tree for drawing, without removed leaves and nodes that decide nothing.

    Args:
        leaf_kept: (2^depth,) bool.
        labels: texts of the leaves.
    """
    kept = leaf_kept.tolist()
    right, left = (below.tolist() for below in children_kept(leaf_kept))
    nodes = len(right)

    def grow(number: int) -> TreeNode:
        if number >= nodes:
            return TreeNode(-1, labels[number - nodes])
        if right[number] and left[number]:
            return TreeNode(number, "", grow(2 * number + 1), grow(2 * number + 2))
        return grow(2 * number + (2 if right[number] else 1))

    assert any(kept), "a tree has a leaf"
    return grow(0)


def depth_of(leaf_kept: Tensor) -> int:
    """Depth of the tree with these leaves."""
    return (len(leaf_kept) - 1).bit_length()


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - exp(-x)) for x > 0, accurate for small and large x (Mächler 2012).

    >>> round(log1mexp(torch.tensor(1e-6)).item(), 4)
    -13.8155
    """
    small = x < 0.6931
    # Each branch only gets arguments at which its derivative is finite.
    near, far = torch.where(small, x, 1.0), torch.where(small, 1.0, x)
    return torch.where(small, (-torch.expm1(-near)).log(), torch.log1p(-(-far).exp()))


def check_memory(depth: int, values: int, classes: int) -> None:
    """Raise `InputError` if a tree does not fit into the machine's memory.

    Args:
        depth: depth of the tree.
        values: numbers per prototype; each takes 4 floats, with its gradient and Adam's moments.
        classes: numbers per leaf.
    """
    needed = 4 * 2 ** min(depth, 99) * (4 * values + 2 * classes)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"model.depth={depth}: the prototypes and leaves of this tree need {needed / 2**30:.0f} GiB of memory; the "
            f"machine has {there / 2**30:.0f} GiB"
        )
