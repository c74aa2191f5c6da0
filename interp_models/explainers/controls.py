"""Controls: maps that do not depend on the model, as baselines for metrics."""

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
from interp_models.core.truth import Truth, in_boxes
from interp_models.explainers.base import EXPLAINERS, Explainer


class Control(Explainer, ABC):
    """Abstract: an explainer that runs no model, so that there is no score to choose.

    Args:
        model: not used.
    """

    passes = "0"
    uses_class = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)


def is_control(name: str) -> bool:
    """Whether an explainer, by its registered name, is a control, such as noise."""
    return name in EXPLAINERS and issubclass(EXPLAINERS.get(name), Control)


@EXPLAINERS.register("random")
class Random(Control):
    """Uniform noise in [0, 1) for every pixel.

    It depends on the seed and the image's pixels only, not on the batch. The map has the resolution of the input;
    averaged over the cells of a coarser grid, the noise becomes nearly Gaussian.

    Args:
        model: not used.
        seed: seed of the noise.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model)
        self.seed = seed

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        height, width = inputs.shape[-2:]
        keys = np.asarray([zlib.crc32(image.numpy().tobytes()) for image in inputs.float().cpu()])
        noise = uniform(self.seed, keys[:, None], np.arange(height * width)).reshape(-1, height, width)
        return torch.as_tensor(noise, dtype=torch.float32, device=inputs.device)


@EXPLAINERS.register("fakecam")
class FakeCAM(Control):
    """Fake-CAM: 1 everywhere except for 0 in the upper left pixel (Poppi et al., CVPR Workshops 2021, section 4).

    As a mask it leaves nearly the whole image. A metric that prefers it, such as average drop, does not measure the
    quality of an explanation.

    Args:
        model: not used.
    """

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        maps = torch.ones(len(inputs), *inputs.shape[-2:], device=inputs.device)
        maps[:, 0, 0] = 0.0
        return maps


@EXPLAINERS.register("center_gaussian")
class CenterGaussian(Control):
    """A Gaussian at the image centre, exp(-(u² + v²) / 2σ²): photographs usually show their object there.

    u and v are a pixel's vertical and horizontal distances from the centre, as fractions of the image's height and
    width.

    Args:
        model: not used.
        sigma: σ, as a fraction of the image's sides.
    """

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
class Edges(Control):
    """Edge detector: the norm of the brightness gradient, by Sobel filters (Adebayo et al., NeurIPS 2018, section 5).

    Brightness is the mean of the colours. Border pixels are repeated.

    Args:
        model: not used.
    """

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        grey = F.pad(inputs.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        with full_precision(grey):
            slopes = F.conv2d(grey, torch.stack([across, across.T])[:, None])
        return slopes.square().sum(dim=1).sqrt()


class GroundTruth(Control, ABC):
    """Abstract: a map made from the ground-truth boxes of each image.

    Args:
        model: not used.
    """

    shown = ("boxes",)

    def attribute(self, inputs: Tensor, target: Target = None, truth: Truth | None = None) -> Tensor:
        """Return one map per image, float32 (B, H, W).

        Args:
            inputs: images (B, 3, H, W).
            target: not used.
            truth: ground truth with boxes; of several boxes of an image, the map shows all. An image without a box has
                a constant map.

        Raises:
            NotApplicable: if there are no boxes.
            InputError: if boxes have another shape.
        """
        check_images_for(self.model, inputs)
        boxes = None if truth is None else truth.checked(inputs).boxes
        if boxes is None:
            raise NotApplicable(
                f"{type(self).__name__} shows ground truth and needs a box (x0, y0, x1, y1) of every image; the images "
                "have none"
            )
        return self._of(in_boxes(boxes, (inputs.shape[-2], inputs.shape[-1])).any(dim=1)).float()

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        return self.attribute(inputs, target)  # raises, as there are no boxes

    @abstractmethod
    def _of(self, inside: Tensor) -> Tensor:
        """Make the map from a mask of the box, (B, H, W) bool."""


@EXPLAINERS.register("gt_box")
class GTBox(GroundTruth):
    """Ground-truth box: 1 inside the object's box, 0 outside; needs a data set with boxes.

    Args:
        model: not used.
    """

    def _of(self, inside: Tensor) -> Tensor:
        return inside


@EXPLAINERS.register("gt_background")
class GTBackground(GroundTruth):
    """Ground-truth background: 0 inside the object's box, 1 outside; needs a data set with boxes.

    Args:
        model: not used.
    """

    def _of(self, inside: Tensor) -> Tensor:
        return ~inside
