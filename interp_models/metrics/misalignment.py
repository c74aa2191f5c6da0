"""Spatial misalignment: whether a prototype's activation can be changed from outside the region that it shows."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp_models.core.boxes import activation_boxes
from interp_models.core.maps import enlarged
from interp_models.core.protocols import PrototypeModel
from interp_models.core.rng import seed_of
from interp_models.core.truth import in_boxes
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS, Found, PrototypeMetric, undefined_without
from interp_models.metrics.stability import IMAGENET_STD

EPSILON, STEP, STEPS = 0.4, 0.01, 50
"""Largest change of a pixel and the change in one step, in units of the standard deviation of ImageNet's pixels, and
number of steps."""
REGION = 0.9
"""Pixels of the upsampled map above this quantile are the prototype's region."""


@PROTOTYPE_METRICS.register("misalignment")
class Misalignment(PrototypeMetric):
    """Spatial misalignment (Sacha et al., AAAI 2024): an attack outside the box of a prototype tries to lower its
    activation.

    For every image the prototype of its class with the highest activation is attacked. Only pixels outside its
    activation box may change, by at most 0.4 standard deviations of ImageNet's pixels: 50 steps of projected gradient
    descent (0.01 each) on its highest activation. A prototype that looks where it seems to look cannot be changed so.

    - `plc`, location change: 1 - intersection over union of the tenth of the pixels with the highest activation before
      and after, in [0, 1].
    - `pac`, activation change: (a - a') / a for the highest activation before and after; negative if it rises, and
      undefined for an image with a = 0.
    - `prc`, rank change: how many prototypes of other classes more are activated higher than it.
    - `ac`, accuracy change: 1 if the prediction is right before the attack alone, -1 if after it alone, else 0.

    Lower is better. A prototype's value is the mean over the images in which it is attacked, and undefined without one.
    The attack follows the sign of a gradient, which amplifies rounding: with another batch size values can differ by
    some thousandths. 52 passes per image, 50 of them there and back.
    """

    needs = ()
    keys = ("plc", "pac", "prc", "ac")
    higher_is_better_by_key: ClassVar[dict[str, bool]] = {"plc": False, "pac": False, "prc": False, "ac": False}
    percent = False
    legend: ClassVar[dict[str, str]] = {
        "plc": "Location change: how much of a prototype's region moves when the image changes outside its box.",
        "pac": "Activation change: the fraction of its activation that a prototype loses when the image changes "
        "outside its box.",
        "prc": "Rank change: how many prototypes of other classes overtake it when the image changes outside its box.",
        "ac": "Accuracy change: the accuracy that is lost when images change outside the boxes of prototypes.",
    }
    sums: Tensor
    images: Tensor

    def __init__(self, model: PrototypeModel, part_names: Sequence[str] = ()) -> None:
        super().__init__(model, part_names)
        zeros = torch.zeros(len(self.classes), len(self.keys), device=self.classes.device, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("images", zeros.clone(), dist_reduce_fx="sum")

    def update(self, model: PrototypeModel, found: Found) -> None:
        """Attack the highest prototype of its class in each image."""
        highest = found.maps.flatten(2).amax(dim=2)  # (B, P)
        own = self.classes[:, found.label].T
        rows = own.any(dim=1).nonzero()[:, 0]
        if not len(rows):
            return
        highest, own, images, label = highest[rows], own[rows], found.images[rows], found.label[rows]
        chosen = highest.where(own, -torch.inf).argmax(dim=1)
        size, number = (images.shape[-2], images.shape[-1]), torch.arange(len(rows), device=images.device)
        before = found.maps[rows][number, chosen]  # (b, h, w)
        attacked = self._attacked(model, images, chosen, _outside(before, size), found.number[rows])
        output = model(attacked)
        maps = output.maps.detach()
        after, then = maps[number, chosen], maps.flatten(2).amax(dim=2)
        a, a_after = highest[number, chosen], then[number, chosen]
        values = torch.stack(
            [
                1 - _overlap(before, after, size),
                (a - a_after) / a.where(a != 0, torch.nan),
                _others_above(then, a_after, own) - _others_above(highest, a, own),
                _right(model(images), label) - _right(output, label),
            ],
            dim=1,
        )
        self.sums.index_add_(0, chosen, values.double().nan_to_num())
        self.images.index_add_(0, chosen, (~values.isnan()).double())

    def _attacked(self, model: PrototypeModel, images: Tensor, chosen: Tensor, free: Tensor, index: Tensor) -> Tensor:
        """The images (b, 3, H, W) after the attack on prototypes `chosen` (b,), changed where `free` (b, 1, H, W)."""
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1).to(images)
        seeds = [torch.Generator().manual_seed(seed_of(int(i), 1)) for i in index]
        starts = [torch.rand(images.shape[1:], generator=seed) for seed in seeds]
        change = (2 * torch.stack(starts).to(images) - 1) * EPSILON * std * free
        number = torch.arange(len(images), device=images.device)
        low, high = images.clamp(max=0), images.clamp(min=1)
        for _ in range(STEPS):
            with torch.enable_grad():
                moved = (images + change).clamp(low, high).requires_grad_(True)
                maps = model(moved).maps[number, chosen]
                (slope,) = torch.autograd.grad(maps.flatten(1).amax(dim=1).sum(), moved)
            change = (moved.detach() - images - STEP * std * slope.sign()) * free
            change = change.maximum(-EPSILON * std).minimum(EPSILON * std)
        return (images + change).clamp(low, high)

    def per_prototype(self) -> dict[str, Tensor]:
        """The means of every prototype over the images in which it was attacked."""
        return {
            key: self.in_use(undefined_without(self.sums[:, place], self.images[:, place])).float()
            for place, key in enumerate(self.keys)
        }


def _outside(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """1 outside the activation boxes of maps (b, h, w), 0 inside: (b, 1, H, W)."""
    inside = in_boxes(activation_boxes(maps, size)[:, None].float(), size)
    return (~inside).to(maps.dtype)


def _overlap(before: Tensor, after: Tensor, size: tuple[int, int]) -> Tensor:
    """Intersection over union (b,) of the regions of maps (b, h, w)."""
    regions = []
    for maps in (before, after):
        large = enlarged(maps, size).flatten(1)
        regions.append(large > large.quantile(REGION, dim=1, keepdim=True))
    common, either = (regions[0] & regions[1]).sum(dim=1), (regions[0] | regions[1]).sum(dim=1)
    return torch.where(either > 0, common / either.clamp(min=1), 1.0)


def _others_above(highest: Tensor, own: Tensor, of_class: Tensor) -> Tensor:
    """How many prototypes of other classes have a higher activation (b, P) than `own` (b,)."""
    return ((highest > own[:, None]) & ~of_class).sum(dim=1)


def _right(output: Any, label: Tensor) -> Tensor:
    """Whether each prediction is right, 1 or 0; NaN without logits."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        return torch.full(label.shape, torch.nan, device=label.device)
    return torch.eq(logits.argmax(dim=1), label).float()
