"""The control that knows nothing."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn

from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.rng import uniform
from interp_models.scoring import Target


@EXPLAINERS.register("random")
class Random(Explainer):
    """Uniform noise for every pixel, a function of the seed and the image's pixels, so it does not depend on the batch.

    Averaged over the cells of a coarser grid it is Gaussian noise. The map has the resolution of the input.

    Args:
        model: not looked at.
        seed: of the noise.
    """

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__(model)
        self.seed = seed

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        height, width = inputs.shape[-2:]
        keys = np.asarray([zlib.crc32(image.numpy().tobytes()) for image in inputs.float().cpu()])
        noise = uniform(self.seed, keys[:, None], np.arange(height * width)).reshape(-1, height, width)
        return torch.as_tensor(noise, dtype=torch.float32, device=inputs.device)
