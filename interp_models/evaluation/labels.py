"""Labels of images that a caller of `judge` gives: one class per image, or several."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.data.base import multi_hot
from interp_models.data.checks import is_class

AS_BOOL = "several labels of each image must be bool (N, K): labels.bool() makes them from ones and zeros"


def one_label_each(labels: Any, n: int) -> Tensor:
    """The labels of n images as int64 (n,); without labels they are -1, which means unknown.

    Raises:
        InputError: for anything else than n whole numbers, at least -1.
    """
    if labels is None:
        return torch.full((n,), -1)
    wanted = f"labels must be {n} whole numbers, one per image"
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{wanted}; got {type(labels).__name__}: {error}") from None
    if given.shape != (n,) or whole_numbers(given) is None:
        if given.shape == (n, 1):
            hint = "; pass labels[:, 0].long()"
        elif given.shape == (n,) and given.is_floating_point():
            hint = "; pass labels.long()"
        else:
            hint = f"; {AS_BOOL}" if given.dim() == 2 and given.dtype != torch.bool else ""
        raise InputError(f"{wanted}; got {tuple(given.shape)} of {given.dtype}{hint}")
    known = given.long()
    if int(known.min()) < -1:
        raise InputError(f"{wanted}, at least 0 (-1: unknown); got {int(known.min())}")
    return known


def several_labels(labels: Any, n: int) -> Tensor | None:
    """Several labels of each of n images as bool (n, K), where K is at least the highest label + 1.

    Args:
        labels: bool (n, K), or the classes of each image, such as `[[0, 2], [], [1]]`, where a list may be a tensor or
            an array, too, and the outer one an array of objects; anything else gives None.
        n: number of images.

    Raises:
        InputError: if the number of images differs, if only some images have a list, or if a class is negative, a bool
            or listed twice.

    >>> several_labels([[0, 2], []], 2).tolist()
    [[True, False, True], [False, False, False]]
    """
    if isinstance(labels, np.ndarray) and labels.dtype == object:
        labels = labels.tolist()
    if isinstance(labels, Tensor | np.ndarray):
        if labels.dtype not in (torch.bool, np.bool_) or labels.ndim != 2:
            return None
        if len(labels) != n:
            raise InputError(f"labels: {len(labels)} rows of bool are given, and there are {n} images")
        return torch.as_tensor(labels)
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not any(map(_is_list, labels)):
        return None
    if single := [place for place, own in enumerate(labels) if not _is_list(own)]:
        raise InputError(
            f"labels must be {n} whole numbers, one per image, or {n} lists of classes; got both: labels[{single[0]}] "
            f"is {labels[single[0]]!r}, which is no list"
        )
    if len(labels) != n:
        raise InputError(f"labels: {len(labels)} lists of classes are given, and there are {n} images")
    lists = [own.tolist() if isinstance(own, Tensor | np.ndarray) else list(own) for own in labels]
    for place, own in enumerate(lists):
        if not all(is_class(label) for label in own) or len(set(own)) < len(own):
            is_bool = bool(own) and all(isinstance(label, bool | np.bool_) for label in own)
            hint = "; rows of bool must be a tensor or an array of them" if is_bool else ""
            raise InputError(f"labels[{place}] must list different classes, whole numbers from 0; got {own!r}{hint}")
    classes = 1 + max((int(label) for own in lists for label in own), default=0)
    return torch.stack([multi_hot(map(int, own), classes) for own in lists])


def _is_list(own: Any) -> bool:
    return isinstance(own, list | tuple) or (isinstance(own, Tensor | np.ndarray) and own.ndim == 1)


def whole_numbers(labels: Tensor) -> Tensor | None:
    """Labels as int64; None unless they are whole numbers, one per image."""
    is_whole = labels.dim() == 1 and not (labels.is_floating_point() or labels.is_complex())
    return labels.long() if is_whole and labels.dtype != torch.bool else None


def check_several(label: Any) -> None:
    """Raise `InputError` for labels (B, K) that are not bool."""
    if isinstance(label, Tensor) and label.dim() > 1 and (label.dim() > 2 or label.dtype != torch.bool):
        raise InputError(f"labels of a batch: {AS_BOOL}; got {tuple(label.shape)} of {label.dtype}")
