"""Pictures of prototypes, drawn from their source images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from interp_models.core.boxes import activation_boxes
from interp_models.core.files import short, whole
from interp_models.data.module import DataModule
from interp_models.prototypes.search import Patches
from interp_models.prototypes.sources import Sources
from interp_models.report import visual

SIDE = 128
"""Side in pixels of a picture on a sheet."""
ROW = 16
"""Number of prototypes in a row of a sheet."""
LONGEST = 256
"""Maximum number of prototypes on a sheet: JPEG allows 65,500 pixels."""


def patches(sources: Sources, data: DataModule) -> dict[int, visual.Picture]:
    """The patches of all prototypes that have a source image, cut out by their activation boxes.

    If the training images are not those of the sources, the result is empty, and a warning says so.
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
    """Write sheets of prototypes.

    Each prototype is shown by its source image and, below it, its patch. The image has the activation box in yellow and
    the receptive box in white; if that is the whole image, as for the tokens of a transformer, the title says "sees
    all". If the training images are not those of the sources, nothing is drawn, and a warning says so.

    Args:
        sources: sources of the prototypes.
        sheets: numbers of the prototypes by name of the sheet. Sheet `<name>.jpg` has 256 prototypes; further ones
            follow on `<name>-2.jpg`, and so on.
        data: the data module.
        folder: folder of the sheets.

    Returns:
        The paths of the sheets.
    """
    paths: list[Path] = []
    if not _known(sources, data):
        return paths
    for name, numbers in _pages(sheets):
        cells: dict[int, visual.Picture] = {}
        for image, of_image in _by_image(sources, numbers, data):
            for number in of_image:
                cells[number] = _cell(image, sources, number, data)
        if cells:
            save(folder / f"{short(name)}.jpg", _in_rows([cells[number] for number in sorted(cells)]))
            paths.append(folder / f"{short(name)}.jpg")
    return paths


def draw_nearest(
    train: Patches,
    test: Patches,
    similarity: Callable[[Tensor], Tensor],
    sheets: Mapping[str, Sequence[int]],
    data: DataModule,
    folder: Path,
) -> list[Path]:
    """Write the nearest images of each prototype as a row `<sheet>/<number>.jpg`, with their activation boxes.

    A row has training images and, after a gap, test images, each below the name of its class. All rows of a sheet
    together are written to `<sheet>.jpg`.

    Args:
        train: nearest training images.
        test: nearest test images.
        similarity: maps distances to similarities.
        sheets: numbers of the prototypes by name of the sheet.
        data: the data module.
        folder: folder of the pictures.

    Returns:
        The paths of the sheets.
    """
    paths: list[Path] = []
    for name, numbers in _pages(sheets):
        left = _tiles("train", train, numbers, similarity, data)
        right = _tiles("whole_test", test, numbers, similarity, data)
        (folder / short(name)).mkdir(parents=True, exist_ok=True)
        rows = []
        for number in numbers:
            gap = np.full((SIDE + 18, 24, 3), 255, np.uint8)
            rows.append(np.concatenate([*left[number], gap, *right[number]], axis=1))
            save(folder / short(name) / f"{number}.jpg", rows[-1])
        save(folder / f"{short(name)}.jpg", np.concatenate(rows))
        paths.append(folder / f"{short(name)}.jpg")
    return paths


def _pages(sheets: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Sequence[int]]]:
    """The sheets without empty ones; long sheets are split."""
    for name, numbers in sheets.items():
        for first in range(0, len(numbers), LONGEST):
            yield f"{name}-{first // LONGEST + 1}" if first else name, numbers[first : first + LONGEST]


def _in_rows(cells: Sequence[visual.Picture]) -> visual.Picture:
    """Arrange pictures of the same size in rows; the last row is filled with white."""
    rows = []
    for first in range(0, len(cells), ROW):
        row = [*cells[first : first + ROW]]
        if len(cells) > ROW:
            row += [np.full_like(cells[0], 255)] * (ROW - len(row))
        rows.append(np.concatenate(row, axis=1))
    return np.concatenate(rows)


def _tiles(
    split: str, found: Patches, numbers: Sequence[int], similarity: Callable[[Tensor], Tensor], data: DataModule
) -> dict[int, list[visual.Picture]]:
    """Pictures of the nearest images of each prototype, the nearest first."""
    dataset = data.dataset(split, augment=False)
    size = (data.image_size, data.image_size)
    wanted: dict[int, list[tuple[int, int]]] = {}
    boxes, tiles = {}, {}
    for number in numbers:
        boxes[number] = activation_boxes(similarity(found.distances[number]), size).tolist()
        for place, index in enumerate(found.image[number].tolist()):
            if index >= 0:
                wanted.setdefault(index, []).append((number, place))
    for index, picture in _read(split, wanted, data):
        title = data.classes[dataset.images.labels[index]]
        for number, place in wanted[index]:
            tiles[number, place] = _tile(picture, boxes[number][place], title)
    return {number: [tile for key, tile in sorted(tiles.items()) if key[0] == number] for number in numbers}


def of_these_images(sources: Sources, data: DataModule) -> bool:
    """Whether the training images are those of the sources."""
    known = int(sources.images)
    # Older checkpoints have a fingerprint of names and labels only.
    return known < 0 or known in (data.fingerprint("train", contents=True), data.fingerprint("train"))


def _known(sources: Sources, data: DataModule) -> bool:
    """The result of `of_these_images`, with a warning if it is false."""
    known = of_these_images(sources, data)
    if not known:
        rank_zero_warn("prototypes are patches of other training images than these; they are not drawn")
    return known


def _by_image(sources: Sources, numbers: Iterable[int], data: DataModule) -> Iterator[tuple[visual.Picture, list[int]]]:
    """The source images of prototypes, each read once, with the numbers of its prototypes."""
    of_image: dict[int, list[int]] = {}
    for number in numbers:
        if (index := int(sources.image[number])) >= 0:
            of_image.setdefault(index, []).append(number)
    for index, picture in _read("train", of_image, data):
        yield picture, of_image[index]


def _read(split: str, indices: Iterable[int], data: DataModule) -> Iterator[tuple[int, visual.Picture]]:
    """Pictures of images of a split, without augmentation, sorted by index."""
    dataset = data.dataset(split, augment=False)
    position = {int(index): place for place, index in enumerate(dataset.indices)}
    for index in sorted(indices):
        yield index, visual.to_uint8(dataset[0, position[index]].image)


def _cell(image: visual.Picture, sources: Sources, number: int, data: DataModule) -> visual.Picture:
    """The picture of one prototype: title, image with boxes, patch."""
    box, receptive = sources.activation_box[number].tolist(), sources.receptive_box[number].tolist()
    seen = visual.boxed(image, receptive, (255, 255, 255))
    whole = receptive == [0, 0, image.shape[1], image.shape[0]]  # the patch was computed from all of the image
    stem = Path(data.train_images.image_id(int(sources.image[number]))).stem
    x0, y0, x1, y1 = box
    patch = np.full((SIDE + 4, SIDE + 4, 3), 255, np.uint8)
    patch[2:-2, 2:-2] = visual.fitted(image[y0:y1, x0:x1], (SIDE, SIDE))
    return np.concatenate([_tile(seen, box, f"{number}{' sees all' * whole}: {stem}"), patch])


def _tile(image: visual.Picture, box: Sequence[int], title: str) -> visual.Picture:
    """An image with a box, below a title."""
    tile = Image.new("RGB", (SIDE + 4, SIDE + 18), "white")
    tile.paste(Image.fromarray(visual.fitted(visual.boxed(image, box), (SIDE, SIDE))), (2, 16))
    ImageDraw.Draw(tile).text((2, 2), title[: SIDE // 6], fill="black")
    return np.asarray(tile)


def save(path: Path, picture: visual.Picture) -> None:
    """Write a picture as a JPEG, whole or not at all."""
    with whole(path) as partial:
        Image.fromarray(picture).save(partial, format="JPEG", quality=90)
