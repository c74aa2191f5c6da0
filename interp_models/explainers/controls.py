"""Controls: maps that use no model, as baselines for metrics."""

import zlib
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.inputs import check_images_for
from interp_models.core.maps import full_precision
from interp_models.core.rng import uniform
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS, Explainer


@EXPLAINERS.register("random")
class Random(Explainer):
    """Uniform noise for every pixel, a function of the seed and the image's pixels, so it does not depend on the batch.

    Averaged over the cells of a coarser grid it is Gaussian noise. The map has the resolution of the input.

    Args:
        model: not used.
        seed: of the noise.
    """

    passes = "0"
    uses_class = False

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model)
        self.seed = seed

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        height, width = inputs.shape[-2:]
        keys = np.asarray([zlib.crc32(image.numpy().tobytes()) for image in inputs.float().cpu()])
        noise = uniform(self.seed, keys[:, None], np.arange(height * width)).reshape(-1, height, width)
        return torch.as_tensor(noise, dtype=torch.float32, device=inputs.device)


@EXPLAINERS.register("fakecam")
class FakeCAM(Explainer):
    """1 everywhere but for 0 in the upper left pixel (Poppi et al., CVPR Workshops 2021, section 4).

    A mask that leaves nearly all of the image: what it wins, average drop foremost, is no merit of an explanation.

    Args:
        model: not used.
    """

    passes = "0"
    uses_class = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        maps = torch.ones(len(inputs), *inputs.shape[-2:], device=inputs.device)
        maps[:, 0, 0] = 0.0
        return maps


@EXPLAINERS.register("center_gaussian")
class CenterGaussian(Explainer):
    """exp(-(u² + v²) / 2σ²), with u and v a pixel's distances from the centre in heights and widths of the image: where
    photographers put things.

    Args:
        model: not used.
        sigma: σ.
    """

    passes = "0"
    uses_class = False

    def __init__(self, model: nn.Module, *, sigma: float = 0.25) -> None:
        super().__init__(model)
        if not sigma > 0:
            raise InputError(f"center_gaussian needs sigma > 0; got {sigma}")
        self.sigma = sigma

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        sides = [(torch.arange(n, device=inputs.device) + 0.5) / n - 0.5 for n in inputs.shape[-2:]]
        falls = [torch.exp(-x.square() / (2 * self.sigma**2)) for x in sides]
        return (falls[0][:, None] * falls[1]).repeat(len(inputs), 1, 1)


@EXPLAINERS.register("edges")
class Edges(Explainer):
    """Edge detector: the norm of the brightness gradient by Sobel filters, with the border repeated (Adebayo et al.,
    NeurIPS 2018, section 5).

    Args:
        model: not used.
    """

    passes = "0"
    uses_class = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        grey = F.pad(inputs.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=inputs.device) / 8
        with full_precision(grey):
            slopes = F.conv2d(grey, torch.stack([across, across.T])[:, None])
        return slopes.square().sum(dim=1).sqrt()


class GroundTruth(Explainer, ABC):
    """Abstract: a map of the image's box, where a data set has boxes.

    Args:
        model: not used.
    """

    passes = "0"
    uses_class = False
    shown = ("box",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def attribute(self, inputs: Tensor, target: Target = None, boxes: Tensor | None = None) -> Tensor:
        """Return one map per image, float32 (B, H, W).

        Args:
            inputs: images (B, 3, H, W).
            target: not used.
            boxes: (B, 4), XYXY in pixels.

        Raises:
            NotApplicable: without boxes.
            InputError: for another number of them.
        """
        check_images_for(self.model, inputs)
        needs = f"{type(self).__name__} shows ground truth and needs a box (x0, y0, x1, y1) of every image"
        if boxes is None:
            raise NotApplicable(f"{needs}; the images have none")
        if boxes.shape != (len(inputs), 4):
            raise InputError(f"{needs}; got {tuple(boxes.shape)}")
        left, top, right, bottom = boxes.to(inputs.device).float()[:, :, None].unbind(dim=1)
        y, x = (torch.arange(n, device=inputs.device) + 0.5 for n in inputs.shape[-2:])  # the middle of pixels
        rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
        return self._of(rows[:, :, None] & columns[:, None, :]).float()

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return self.attribute(inputs, target)  # raises, as there are no boxes

    @abstractmethod
    def _of(self, inside: Tensor) -> Tensor:
        """(B, H, W) bool: the pixel is in the box."""


def attribute_with(explainer: Explainer, inputs: Tensor, target: Target, boxes: Tensor | None) -> Tensor:
    """The maps of any explainer; boxes go only to explainers with `shown = ("box",)`."""
    return explainer.attribute(inputs, target, boxes if "box" in explainer.shown else None)


@EXPLAINERS.register("gt_box")
class GTBox(GroundTruth):
    """1 in the box of the object, 0 around it; refuses data sets without boxes.

    Args:
        model: not used.
    """

    def _of(self, inside: Tensor) -> Tensor:
        return inside


@EXPLAINERS.register("gt_background")
class GTBackground(GroundTruth):
    """0 in the box of the object, 1 around it; refuses data sets without boxes.

    Args:
        model: not used.
    """

    def _of(self, inside: Tensor) -> Tensor:
        return ~inside
