"""Draw maps over images, on NumPy arrays.

A map is a 2-D array of real numbers on any grid; it can have negative values. Its colours are scaled by its own
minimum and maximum. So colours compare places within a map, not maps with each other.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from interp_models.core.errors import InputError

Picture = NDArray[np.uint8]
Map = NDArray[np.float32]

# Lightness increases steadily from black to pale yellow. So the order of values is visible in grey print and with
# colour blindness, and unimportant places are dark. Jet and turbo are lightest in the middle of their range.
CMAP = "inferno"
SIGNED = "berlin"
"""Colour map for maps with negative values: black at 0, red above, blue below."""
MANY = 64 * 64
"""Minimum number of cells of a fine map. A few extreme values would leave all others of such a map in one colour, so
its values are clipped at the percentiles 0.5 and 99.5."""

_GREY = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601
_SMALLEST_CELL = 96  # pixels; a contact sheet enlarges smaller pictures so that their labels fit


def to_uint8(image: torch.Tensor | NDArray[np.floating]) -> Picture:
    """Convert an image (3, H, W) with values in [0, 1] to a picture, uint8 (H, W, 3). Values outside are clipped.

    Raises:
        InputError: for another shape or a value that is not a finite number.
    """
    array = _array(image)
    if array.ndim != 3 or array.shape[0] != 3:
        raise InputError(f"expected an image of shape (3, H, W), got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("the image holds values that are not finite numbers")
    return _round(np.moveaxis(array, 0, 2) * 255.0)


def as_picture(image: object) -> Picture:
    """Convert an image to a picture, uint8 (H, W, 3).

    Args:
        image: a PIL image of 8 bits, or a tensor or array (3, H, W) or (H, W, 3) of uint8 or of floats in [0, 1], or a
            batch of one such image. If both shapes fit, tensors have their channels first, arrays last.

    Raises:
        InputError: for anything else, such as floats outside [0, 1].
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise InputError(f"expected a picture of 8 bits, got a PIL image of mode {image.mode}")
        return np.asarray(image.convert("RGB"))
    array = _array(image)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    first, last = (array.ndim == 3 and array.shape[axis] == 3 for axis in (0, 2))
    if not (first or last):
        raise InputError(f"expected a picture of shape (H, W, 3) or (3, H, W), got {array.shape}")
    if first and (isinstance(image, torch.Tensor) or not last):
        array = np.moveaxis(array, 0, 2)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"expected a picture of uint8, or of floats in [0, 1], got {array.dtype}")
    if not (array.size and array.min() >= -1e-3 and array.max() <= 1 + 1e-3):  # nor NaN
        found = f"{array.min():.3g} to {array.max():.3g}" if array.size else "none"
        raise InputError(f"expected a picture of uint8, or of floats in [0, 1], got floats from {found}")
    return _round(array * 255.0)


def _array(values: object) -> NDArray[Any]:
    """Convert a tensor (on any device, with or without a graph) or anything else to an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        return (values.float() if values.is_floating_point() else values).cpu().numpy()
    return np.asarray(values)


def _map(map: ArrayLike | torch.Tensor, dtype: type[np.floating] = np.float64) -> NDArray[Any]:
    """Convert a map (h, w), or a batch of one, to an array (h, w)."""
    array = _array(map).astype(dtype)
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def normalise(map: ArrayLike | torch.Tensor) -> Map:
    """Scale a map to [0, 1] by its minimum and maximum. A constant map becomes 0.

    Args:
        map: a tensor, an array or lists of numbers, (h, w) or a batch of one, (1, h, w).

    Raises:
        InputError: for another shape or a value that is not a finite number.
    """
    array = _map(map)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"expected a map of shape (h, w) or (1, h, w), got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("the map holds values that are not finite numbers")
    lowest, highest = array.min(), array.max()
    if lowest == highest:
        return np.zeros(array.shape, np.float32)
    stretched: Map = ((array - lowest) / (highest - lowest)).astype(np.float32)
    return stretched


def resize(map: ArrayLike | torch.Tensor, size: tuple[int, int]) -> Map:
    """Resize a map bilinearly to `size` = (H, W), with antialiasing if it becomes smaller."""
    picture = Image.fromarray(_map(map, np.float32))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.float32)


def heat(map: ArrayLike | torch.Tensor) -> tuple[Map, str]:
    """Scale a map (h, w) for drawing.

    Returns:
        Values in [0, 1] and the name of their colour map. A map with negative values is scaled symmetrically, so that
        0 becomes 0.5, the middle of `SIGNED`.

    Raises:
        InputError: as `normalise`.

    >>> heat([[-1.0, 0.0, 4.0]])[0].tolist()
    [[0.375, 0.5, 1.0]]
    """
    stretched, array = normalise(map), _map(map)  # `normalise` refuses wrong shapes and values
    low, high = np.percentile(array, [0.5, 99.5])
    if array.size >= MANY and low < high:
        array = np.clip(array, low, high)
        stretched = normalise(array)
    if array.min() >= 0 or not stretched.any():
        return stretched, CMAP
    return (0.5 + 0.5 * array / np.abs(array).max()).astype(np.float32), SIGNED


def overlay(image: object, map: ArrayLike | torch.Tensor, alpha: float = 0.5) -> Picture:
    """Draw a map over an image.

    Args:
        image: an image, see `as_picture`.
        map: a map (h, w) or (1, h, w), resized to the image and coloured by `heat`.
        alpha: weight of the map's colours, from 0 (only the image) to 1 (only the map).

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: for a map that `normalise` refuses, or an image that `as_picture` refuses.
    """
    picture = as_picture(image)
    values, cmap = heat(map)
    colours = matplotlib.colormaps[cmap](resize(values, (picture.shape[0], picture.shape[1])), bytes=True)[..., :3]
    return _round((1 - alpha) * picture + alpha * colours)


def drawn(image: Picture, maps: ArrayLike) -> tuple[Picture, str]:
    """Draw one map (h, w), or several maps (N, h, w) as red, green and blue, over a picture.

    Returns:
        The picture, and a remark if the map is constant. Maps with values that are not finite are not drawn.
    """
    values = np.asarray(maps)
    if not np.isfinite(values).all():
        return image, "not drawn: some values are not finite"
    if values.ndim == 3:
        return rgb(values, image), ""
    return overlay(image, values), "constant map" if np.ptp(values) == 0 else ""


def rgb(maps: ArrayLike | torch.Tensor, image: object = None, alpha: float = 0.65) -> Picture:
    """Draw the first three of several maps as red, green and blue; each is scaled to [0, 1] on its own.

    Args:
        maps: (N, h, w). With fewer than three maps, the remaining channels are 0.
        image: an image, see `as_picture`. The maps are resized to it and drawn over its grey version, so places without
            attention are dark grey. None draws the maps alone.
        alpha: weight of the maps' colours, from 0 to 1.

    Returns:
        uint8, (H, W, 3) with an image, (h, w, 3) without.

    Raises:
        InputError: for maps of another shape or that `normalise` refuses, or an image that `as_picture` refuses.
    """
    stack, picture = _array(maps), None if image is None else as_picture(image)
    if stack.ndim != 3:
        raise InputError(f"expected maps of shape (N, h, w), got {stack.shape}")
    size = stack.shape[1:] if picture is None else picture.shape[:2]
    colours = np.zeros((*size, 3), np.float32)
    for channel, map in enumerate(stack[:3]):
        colours[..., channel] = resize(normalise(map), (size[0], size[1]))
    if picture is None:
        return _round(colours * 255.0)
    grey = (picture @ np.asarray(_GREY, np.float32))[..., None]
    return _round((1 - alpha) * grey + alpha * colours * 255.0)


def boxed(image: object, box: Sequence[int], colour: tuple[int, int, int] = (255, 255, 0)) -> Picture:
    """Draw a box (XYXY in pixels, right and lower edges exclusive) into a copy of a picture (H, W, 3)."""
    x0, y0, x1, y1 = box
    drawn = as_picture(image).copy()
    width = max(1, max(drawn.shape[:2]) // 112)
    inner = drawn[y0 + width : y1 - width, x0 + width : x1 - width].copy()
    drawn[y0:y1, x0:x1] = colour
    drawn[y0 + width : y1 - width, x0 + width : x1 - width] = inner
    return drawn


def shrunk(image: object, side: int) -> Picture:
    """Shrink a picture (H, W, 3) so that its longer side is at most `side` pixels."""
    full = Image.fromarray(as_picture(image))
    scale = min(1.0, side / max(full.size))
    return np.asarray(full.resize((max(1, round(full.width * scale)), max(1, round(full.height * scale)))))


def fitted(image: object, size: tuple[int, int]) -> Picture:
    """Resize a picture (H, W, 3) to fit into `size`; it keeps its aspect ratio, and white fills the rest."""
    picture = as_picture(image)
    scale = min(size[0] / picture.shape[0], size[1] / picture.shape[1])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    sheet = np.full((*size, 3), 255, np.uint8)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    sheet[:height, :width] = np.asarray(resized)[: size[0], : size[1]]
    return sheet


def jpeg_uri(image: object) -> str:
    """Encode a picture (H, W, 3) as a data: URI with a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(as_picture(image)).save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip(pictures: Sequence[tuple[str, Picture, str]], title: str, height: int = 160) -> Picture:
    """Draw pictures side by side at the same height, each with its name above and its remark below, under a title."""
    cells = []
    for name, image, remark in pictures:
        width = max(1, round(image.shape[1] * height / image.shape[0]))
        cell = Image.new("RGB", (width + 8, height + 36), "white")
        cell.paste(Image.fromarray(as_picture(image)).resize((width, height)), (4, 18))
        draw = ImageDraw.Draw(cell)
        draw.text((4, 4), name, fill="black")
        draw.text((4, height + 20), remark, fill="black")
        cells.append(np.asarray(cell))
    row = np.concatenate(cells, axis=1)
    head = Image.new("RGB", (row.shape[1], 18), "white")
    ImageDraw.Draw(head).text((4, 4), title, fill="black")
    return np.concatenate([np.asarray(head), row])


def contact_sheet(
    rows: Sequence[Sequence[Picture]], row_labels: Sequence[str], column_labels: Sequence[str], path: Path
) -> None:
    """Write a table of pictures to a PNG file.

    Small pictures are enlarged by an integer factor without smoothing.

    Args:
        rows: pictures of the same size, row by row. A row may be shorter than the labels; its last cells stay white.
        row_labels: a label for each row.
        column_labels: a label for each column.
        path: the file.

    Raises:
        InputError: if there is no picture, sizes differ, or the number of labels does not fit.
    """
    rows = [[as_picture(picture) for picture in row] for row in rows]
    shapes = {picture.shape for row in rows for picture in row}
    if len(shapes) != 1:
        raise InputError(f"expected pictures of one size, got {sorted(shapes)}")
    if len(rows) != len(row_labels) or max(len(row) for row in rows) > len(column_labels):
        raise InputError(f"{len(row_labels)} row and {len(column_labels)} column labels do not fit the pictures")
    height, width, _ = shapes.pop()
    scale = math.ceil(max(1.0, _SMALLEST_CELL / width))
    height, width, gap = height * scale, width * scale, 4
    sheet = np.full((len(rows) * (height + gap), len(column_labels) * (width + gap), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            sheet[y : y + height, x : x + width] = picture.repeat(scale, 0).repeat(scale, 1)

    dpi = 100
    # A Figure of its own draws with Agg and leaves pyplot's global state alone. One image with tick labels, instead
    # of a subplot per picture, keeps the pictures' pixels as they are and takes hundreds of rows.
    figure = Figure((sheet.shape[1] / dpi, sheet.shape[0] / dpi), dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(sheet, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    fits = 7 * max(map(len, column_labels)) <= width  # 9 points are about 7 pixels a character
    centres = np.arange(len(column_labels)) * (width + gap) + width / 2
    # Without parse_math=False a name with two dollar signs would be set as a formula.
    axes.set_xticks(centres, column_labels, parse_math=False)
    if not fits:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)) * (height + gap) + height / 2, row_labels, parse_math=False)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.08)


def _round(values: NDArray[np.floating]) -> Picture:
    rounded: Picture = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded
