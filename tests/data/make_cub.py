"""Small trees in the layout of CUB-200-2011, drawn from known ground truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# fmt: off
PARTS = [
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye",
    "right leg", "right wing", "tail", "throat",
]
# fmt: on


@dataclass(frozen=True)
class Bird:
    """What the lists say of one image."""

    path: str
    label: int
    """From 0."""
    train: bool
    size: tuple[int, int]
    """Height and width."""
    box: tuple[float, float, float, float]
    """x, y, width and height."""
    parts: list[tuple[float, float]]
    """x and y; (0, 0) where not visible, as in the data set."""
    visible: list[bool]

    @property
    def rows(self) -> slice:
        """Rows of pixels that the bird fills."""
        return slice(int(self.box[1]), int(self.box[1] + self.box[3]))

    @property
    def columns(self) -> slice:
        """Columns of pixels that the bird fills."""
        return slice(int(self.box[0]), int(self.box[0] + self.box[2]))


def make_cub(
    root: Path, classes: int = 3, per_class: int = 4, size: tuple[int, int] = (60, 80), segmentations: bool = False
) -> list[Bird]:
    """Write `root/images.txt` and the rest; returns the birds in the order of `images.txt`.

    Images are up to 4 rows and 6 columns larger than `size` (at least 24 by 24). Every second image of a class is for
    training. A bird is a rectangle in its class's colour on noise. In its mask the bird is at 204 (4 of 5 annotators),
    with a rim of 102 (2 of 5) above and below it.
    """
    birds = []
    for number in range(classes * per_class):
        label, position = divmod(number, per_class)
        rng = np.random.default_rng(number)
        height, width = size[0] + int(rng.integers(5)), size[1] + int(rng.integers(7))
        x, y = rng.integers(2, 2 * width // 5), rng.integers(2, 2 * height // 5)
        w, h = rng.integers(width // 4, width // 2) + 0.5, rng.integers(height // 4, height // 2) + 0.5
        visible = [bool(seen) for seen in rng.random(len(PARTS)) < 0.7]
        visible[1] = True  # the beak always shows
        spots = np.round((x, y) + rng.random((len(PARTS), 2)) * (w, h), 1)
        name = f"{label + 1:03}.Kind_{label + 1}"
        bird = Bird(
            path=f"{name}/Kind_{label + 1}_{position:04}.jpg",
            label=label,
            train=position % 2 == 0,
            size=(height, width),
            box=(float(x), float(y), float(w), float(h)),
            parts=[(float(a), float(b)) if seen else (0.0, 0.0) for (a, b), seen in zip(spots, visible, strict=True)],
            visible=visible,
        )
        birds.append(bird)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[bird.rows, bird.columns] = np.random.default_rng((label, 1)).integers(0, 256, 3)
        target = root / "images" / bird.path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, quality=95, subsampling=0)
        if segmentations:
            mask = np.zeros((height, width), dtype=np.uint8)
            mask[bird.rows.start - 1 : bird.rows.stop + 1, bird.columns] = 102
            mask[bird.rows, bird.columns] = 204
            target = (root / "segmentations" / bird.path).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)

    numbered = list(enumerate(birds, start=1))
    _write(root / "images.txt", [f"{i} {bird.path}" for i, bird in numbered])
    _write(root / "image_class_labels.txt", [f"{i} {bird.label + 1}" for i, bird in numbered])
    _write(root / "train_test_split.txt", [f"{i} {bird.train:d}" for i, bird in numbered])
    _write(root / "bounding_boxes.txt", [" ".join(map(str, (i, *bird.box))) for i, bird in numbered])
    _write(root / "classes.txt", [f"{k} {k:03}.Kind_{k}" for k in range(1, classes + 1)])
    _write(root / "parts/parts.txt", [f"{p} {name}" for p, name in enumerate(PARTS, start=1)])
    locations = [
        f"{i} {p} {a} {b} {seen:d}"
        for i, bird in numbered
        for p, ((a, b), seen) in enumerate(zip(bird.parts, bird.visible, strict=True), start=1)
    ]
    _write(root / "parts/part_locs.txt", locations)
    return birds


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
