"""Draw a confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from interp_models.core.files import whole

FEW = 30
"""Maximum number of classes for which every cell shows its number."""
MANY = 400
"""Maximum number of classes for which names are shown."""
LONGEST = 28
"""Maximum number of characters of a name."""


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as a PNG file. Colours are fractions of the row.

    Args:
        counts: number of images by class (rows) and predicted class (columns), int64 (K, K).
        classes: names of the classes.
        path: the file; it is written whole or not at all.
    """
    table = counts.numpy()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = len(classes)
    cell = 34 if size <= FEW else 11 if size <= MANY else 2  # pixels
    dpi, side = 100, max(size * cell, 100)
    figure = Figure((side / dpi, side / dpi), dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title("test images by class and predicted class; colour: share of the class", fontsize=9, loc="left")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    if size <= MANY:
        names, font = [_short(name) for name in classes], 9 if size <= FEW else 6
        axes.set_xticks(range(size), names, fontsize=font, rotation=90, parse_math=False)
        axes.set_yticks(range(size), names, fontsize=font, parse_math=False)
        axes.tick_params(length=0)
    if size <= FEW:
        for row, column in np.argwhere(table > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=8, color=colour)
    with whole(path) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.08)


def _short(name: str) -> str:
    """A name that can be drawn; the middle of a long name is left out."""
    name = name.encode(errors="backslashreplace").decode()
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 + 1 :]}"
