"""Published protocols of the metrics."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.core.maps import enlarged
from interp_models.metrics import perturbation


@dataclass(frozen=True)
class Preset:
    """A protocol of the metrics: choices that publications make differently, or do not state.

    `PRESETS` lists them.
    """

    mask: Callable[[Tensor, tuple[int, int]], Tensor]
    """Function of maps (B, h, w) and the image size: soft masks (B, H, W)."""
    blur: Callable[[Tensor], Tensor]
    """Function of images: the blurred images that insertion starts from."""
    blur_name: str
    """Name of the blur in result rows."""
    counts: Callable[[int, int], list[int]]
    """Function of the number of cells and the most steps: number of removed cells at each point of a curve."""
    divide_by_max: bool
    """Whether scores are divided by the curve's maximum before the area under it is computed."""
    clip_add: bool
    """Whether ADD counts only drops, like AD; otherwise a rise counts as a negative drop."""
    fill: tuple[float, ...] = (0.0,)
    """Colour of removed cells: one value for all channels, or one for each."""
    fill_name: str = "black"
    """Its name in result rows."""
    pixels: bool = False
    """Whether curves remove pixels of the upsampled map instead of cells."""
    max_steps: int = 196
    """Most steps of a curve, if no other number is given."""

    def removed(self, images: Tensor) -> Tensor:
        """What removed cells show, (1, C, 1, 1) or (1, 1, 1, 1).

        Raises:
            InputError: if the images have another number of channels than the colour.
        """
        if len(self.fill) not in (1, images.shape[1]):
            raise InputError(f"{self.fill_name} has {len(self.fill)} channels; the images have {images.shape[1]}")
        return images.new_tensor(self.fill).view(1, -1, 1, 1)


def _upsample_then_normalise(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return perturbation.min_max(enlarged(maps, size))


def _normalise_then_upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    normalised = perturbation.min_max(maps)[:, None]
    return F.interpolate(normalised, size=size, mode="bicubic", align_corners=False)[:, 0]


def _even_counts(cells: int, max_steps: int) -> list[int]:
    steps = min(cells, max_steps)
    return [round(step * cells / steps) for step in range(steps + 1)]


def _row_counts(cells: int, max_steps: int) -> list[int]:
    step = -(-cells // max_steps)
    return [*range(0, cells, step), cells]


def _whole_counts(cells: int, max_steps: int) -> list[int]:
    per_step = cells // min(cells, max_steps)
    return [*range(0, cells, per_step), cells]


# Gomez et al. 2023, section 3.1, equations 23 to 26. Where it states nothing we chose: black is 0 in pixel space, the
# blur is that of RISE, ADD is clipped like AD, and curves include the clean (deletion) or blurred start image.
_GOMEZ = Preset(_upsample_then_normalise, perturbation.gaussian, "gaussian blur 11 px σ 5", _even_counts, True, True)
# Curves by pixels in 224 steps, as in the code of RISE (Petsiuk et al. 2018).
_BY_PIXELS = Preset(
    _upsample_then_normalise, perturbation.rise_blur, "gaussian blur of RISE", _row_counts, False, True,
    pixels=True, max_steps=224,
)  # fmt: skip


def _to_mean(preset: Preset) -> Preset:
    """The preset with removed cells that are 0 in images normalised with ImageNet's statistics."""
    return replace(preset, fill=(0.485, 0.456, 0.406), fill_name="ImageNet's mean colour")


PRESETS: dict[str, Preset] = {
    "gomez2023": _GOMEZ,
    # Reproduces the PyPI package saliency-maps-metrics 0.0.26, called one image at a time with given targets.
    "saliency-maps-metrics": Preset(
        _normalise_then_upsample, perturbation.box_blur, "box blur", _whole_counts, False, False
    ),
    "rise": _to_mean(_BY_PIXELS),
    "opticam": _BY_PIXELS,  # Zhang et al. 2023
    "guidance": _BY_PIXELS,  # Fahim et al. 2022: salience and context by the map as a soft mask
    "idsds": _to_mean(_GOMEZ),  # Hesse et al. 2024
}
"""Published protocols by name."""
