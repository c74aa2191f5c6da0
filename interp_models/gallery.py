"""Pictures of prototypes, drawn from their sources."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pytorch_lightning.utilities import rank_zero_warn

from interp_models import visual
from interp_models.data.module import DataModule
from interp_models.files import whole
from interp_models.projection import Sources

SIDE = 128
"""Pixels of a picture on a sheet."""


def patches(sources: Sources, data: DataModule) -> dict[int, visual.Picture]:
    """The patch of every prototype that is one, cut out of its image by its activation box.

    If the training images are not those of the sources, there are none, with a warning.
    """
    found: dict[int, visual.Picture] = {}
    if not _known(sources, data):
        return found
    for image, numbers in _by_image(sources, range(len(sources.image)), data):
        for number in numbers:
            x0, y0, x1, y1 = sources.activation_box[number].tolist()
            found[number] = image[y0:y1, x0:x1]
    return found


def draw_sheets(sources: Sources, sheets: Mapping[str, Sequence[int]], data: DataModule, folder: Path) -> list[Path]:
    """Write a sheet `<name>.jpg` of the prototypes under each name, and return their paths.

    Above each patch, cut out by its activation box, stands its image with that box in yellow and the receptive one in
    white. If the training images are not those of the sources, nothing is drawn, with a warning.
    """
    paths: list[Path] = []
    if not _known(sources, data):
        return paths
    for name, numbers in sheets.items():
        cells: dict[int, visual.Picture] = {}
        for image, of_image in _by_image(sources, numbers, data):
            for number in of_image:
                cells[number] = _cell(image, sources, number, data)
        if cells:
            path = folder / f"{name}.jpg"
            with whole(path) as partial:
                sheet = np.concatenate([cells[number] for number in sorted(cells)], axis=1)
                Image.fromarray(sheet).save(partial, format="JPEG", quality=90)
            paths.append(path)
    return paths


def _known(sources: Sources, data: DataModule) -> bool:
    """Whether the training images are those of the sources; warns if not."""
    known = int(sources.images) < 0 or data.fingerprint("train") == int(sources.images)
    if not known:
        rank_zero_warn("prototypes are patches of other training images than these; they are not drawn")
    return known


def _by_image(sources: Sources, numbers: Iterable[int], data: DataModule) -> Iterator[tuple[visual.Picture, list[int]]]:
    """Every image that some of the prototypes come from, read once, with their numbers."""
    dataset = data.dataset("train", augment=False)
    position = {int(index): place for place, index in enumerate(dataset.indices)}
    of_image: dict[int, list[int]] = {}
    for number in numbers:
        if (index := int(sources.image[number])) >= 0:
            of_image.setdefault(index, []).append(number)
    for index, found in sorted(of_image.items()):
        yield visual.to_uint8(dataset[0, position[index]].image), found


def _cell(image: visual.Picture, sources: Sources, number: int, data: DataModule) -> visual.Picture:
    """One prototype: title, image with boxes, patch."""
    box = tuple(sources.activation_box[number].tolist())
    seen = visual.boxed(visual.boxed(image, sources.receptive_box[number].tolist(), (255, 255, 255)), box)
    cell = Image.new("RGB", (SIDE + 4, 2 * SIDE + 20), "white")
    cell.paste(Image.fromarray(visual.fitted(seen, (SIDE, SIDE))), (2, 16))
    x0, y0, x1, y1 = box
    cell.paste(Image.fromarray(visual.fitted(image[y0:y1, x0:x1], (SIDE, SIDE))), (2, 18 + SIDE))
    stem = Path(data.train_images.image_id(int(sources.image[number]))).stem
    ImageDraw.Draw(cell).text((2, 2), f"{number}: {stem}"[: SIDE // 6], fill="black")
    return np.asarray(cell)
