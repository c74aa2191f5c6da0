"""`Truth`: where the object and its parts are in a batch of images."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from interp_models.core.errors import InputError

Kind = Literal["boxes", "mask", "part_masks", "parts"]
WORDS: dict[str, str] = {
    "boxes": "a box around the object",
    "mask": "a mask of the object",
    "part_masks": "masks of the object's parts",
    "parts": "key points of the object's parts",
}
"""The kinds of ground truth in words."""


@dataclass(frozen=True)
class Truth:
    """Ground truth of a batch of images; None is what is unknown.

    It refers to the explained class. Of an image without it, boxes are NaN, and masks and `visible` are false
    everywhere.
    """

    boxes: Tensor | None = None
    """Boxes of the object, XYXY in pixels: (B, 4), or (B, M, 4) for several objects, filled up with NaN."""
    mask: Tensor | None = None
    """Mask of the object, or of all objects of the class, (B, H, W) bool."""
    part_masks: Tensor | None = None
    """Masks of the object's parts, (B, P, H, W) bool."""
    parts: Tensor | None = None
    """Key points of the object's parts, x and y in pixels (B, J, 2)."""
    visible: Tensor | None = None
    """Whether each key point is visible and inside the image, (B, J) bool; None if all are. One of NaN is not."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Truth":
        """Apply `change` to all tensors."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return Truth(**{name: None if value is None else change(value) for name, value in found.items()})

    def checked(self, images: Tensor) -> "Truth":
        """Check that the ground truth fits images (B, 3, H, W), and bring it to their device and to one form.

        Returns:
            The ground truth with boxes (B, M, 4), M at least 1, and `visible`.

        Raises:
            InputError: for tensors of another shape or type.
        """
        n, size = len(images), (images.shape[-2], images.shape[-1])
        boxes, visible = self.boxes, self.visible
        if isinstance(boxes, Tensor) and boxes.dim() == 2:
            boxes = boxes[:, None]
        if isinstance(boxes, Tensor) and boxes.dim() == 3 and boxes.shape[1] == 0:  # no image has one
            boxes = boxes.new_full((len(boxes), 1, boxes.shape[2]), torch.nan)
        if isinstance(self.parts, Tensor) and visible is None:
            visible = torch.ones(self.parts.shape[:2], dtype=torch.bool, device=self.parts.device)
        _check("boxes", boxes, (n, None, 4))
        _check("mask", self.mask, (n, *size), torch.bool)
        _check("part_masks", self.part_masks, (n, None, *size), torch.bool)
        _check("parts", self.parts, (n, None, 2))
        _check("visible", visible, (n, None if self.parts is None else self.parts.shape[1]), torch.bool)
        if visible is not None and self.parts is not None:
            visible = visible.to(self.parts.device) & self.parts.isfinite().all(dim=2)
        moved = Truth(boxes, self.mask, self.part_masks, self.parts, visible)
        return moved.each(lambda x: (x if x.dtype == torch.bool else x.float()).to(images.device))


def _check(name: str, value: Any, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """Raise `InputError` unless a value is None or a tensor of this shape (None: any number)."""
    if value is None:
        return
    is_tensor = isinstance(value, Tensor) and value.dim() == len(shape) and (value.dtype == dtype or dtype is None)
    if is_tensor and all(side in (None, own) for own, side in zip(value.shape, shape, strict=True)):
        return
    sides = ", ".join("any" if side is None else str(side) for side in shape)
    found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise InputError(f"{name} must be a tensor ({sides}){'' if dtype is None else f' of {dtype}'}; got {found}")


def in_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether the centre of each pixel lies in each box, bool (B, M, H, W).

    Args:
        boxes: (B, M, 4), XYXY in pixels; a box of NaN has no pixel.
        size: height H and width W of the images.

    >>> in_boxes(torch.tensor([[[0.0, 0.0, 2.0, 1.0]]]), (2, 3)).int().tolist()
    [[[[1, 1, 0], [0, 0, 0]]]]
    """
    left, top, right, bottom = boxes[..., None].unbind(dim=2)
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in size)  # pixel centres
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return rows[..., :, None] & columns[..., None, :]
