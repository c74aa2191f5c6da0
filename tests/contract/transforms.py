"""What every transform promises, as functions that fail with AssertionError."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from interp_models.data.base import Sample
from interp_models.data.transforms import ImageTransform
from tests.contract.explainers import refusal

Make = Callable[[int], ImageTransform]
SIZES = ((70, 100), (100, 70), (48, 48), (200, 60))


def scene(height: int, width: int, *, box: bool = True) -> Sample:
    """A red square on black with its box, its mask and its middle as a part."""
    top, left, side = height // 3, width // 3, min(height, width) // 3
    image, mask = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(1, height, width, dtype=torch.bool)
    image[0, top : top + side, left : left + side] = 255
    mask[0, top : top + side, left : left + side] = True
    canvas = (height, width)
    edges = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    middle = torch.tensor([[left + (side - 1) / 2, top + (side - 1) / 2]])
    return Sample(
        tv_tensors.Image(image),
        0,
        0,
        tv_tensors.BoundingBoxes(edges, format="XYXY", canvas_size=canvas) if box else None,
        tv_tensors.Mask(mask),
        tv_tensors.KeyPoints(middle, canvas_size=canvas),
        torch.tensor([True]),
    )


def passed(transform: Any, sample: Any, seed: int = 0) -> Any:
    """What a transform makes of a sample under a seed."""
    torch.manual_seed(seed)
    return transform(sample)


def check_output(make: Make) -> None:
    """Float32 in [0, 1] of the size that was asked for, of images of any shape; labels stay."""
    for size in (32, 48):
        made = make(size)
        for transform in (made.augmented(), made.evaluation()):
            for shape in SIZES:
                sample = passed(transform, scene(*shape))
                assert sample.image.shape == (3, size, size), "the size is not what was asked for"
                assert sample.image.dtype == torch.float32, "images are not float32"
                low, high = float(sample.image.min()), float(sample.image.max())
                assert -1e-6 <= low <= high <= 1 + 1e-6, f"pixels are from {low} to {high}"
                assert (sample.label, sample.index) == (0, 0), "the label changed"


def check_draws(make: Make) -> None:
    """Training images are drawn anew, by torch's generator alone; others draw nothing."""
    made, sample = make(48), scene(70, 100)
    augmented, evaluation = made.augmented(), made.evaluation()
    images = [passed(augmented, sample, seed).image for seed in range(8)]
    assert any(not torch.equal(images[0], image) for image in images), "augmented images are always the same"
    assert torch.equal(passed(augmented, sample, 3).image, images[3]), "the seed does not decide"
    assert torch.equal(passed(make(48).augmented(), sample, 3).image, images[3]), "the object decides, not the seed"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    image = evaluation(sample).image
    assert torch.equal(torch.get_rng_state(), before), "the evaluation transform draws random numbers"
    assert torch.equal(evaluation(sample).image, image), "images of the evaluation transform differ"


def check_truth(make: Make) -> None:
    """Mask, part and box lie where the image's square is, in training and else."""
    made = make(96)
    for transform in (made.augmented(), made.evaluation()):
        for seed in range(12):
            sample = passed(transform, scene(150, 130), seed)
            assert sample.masks is not None
            assert sample.parts is not None
            assert sample.box is not None
            seen, mask = sample.image.amax(dim=0) > 0.25, sample.masks[0].as_subclass(Tensor)
            if int(mask.sum()) < 100:  # mostly cropped away
                continue
            overlap = float((seen & mask).sum() / (seen | mask).sum())
            assert overlap > 0.8, f"the mask covers {overlap:.2f} of the square"
            x0, y0, x1, y1 = sample.box[0].tolist()
            rows, columns = mask.nonzero().T
            edges = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            assert all(abs(a - b) <= 4 for a, b in zip((x0, y0, x1, y1), edges, strict=True)), (
                f"the box is {(x0, y0, x1, y1)}, the square lies at {edges}"
            )
            inside = min(edges[0], edges[1], 96 - edges[2], 96 - edges[3]) > 0
            x, y = sample.parts[0].tolist()
            middle = (float(columns.float().mean()), float(rows.float().mean()))
            assert not inside or max(abs(x - middle[0]), abs(y - middle[1])) < 4, "the part is not in the middle"


def check_boxes(make: Make) -> None:
    """A transform needs boxes in training exactly if it says that it crops training images; never elsewhere."""
    made, sample = make(48), scene(70, 100, box=False)
    assert made.evaluation()(sample).image.shape == (3, 48, 48)
    line = refusal(lambda: passed(made.augmented(), sample), "an image without a box")
    if not made.crops_training_images:
        assert line is None, f"it does not say that it needs a box: {line}"
    else:
        assert line is not None, "it says that it needs a box, and does without"
        assert "needs a data set with boxes" in line


CHECKS = (check_output, check_draws, check_truth, check_boxes)
