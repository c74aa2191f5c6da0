"""A model's own explanations of single images for the page: its maps, its parts, its prototypes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from interp_models.core.modes import evaluating, full_float32
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample, collate
from interp_models.data.module import DataModule, TransformedDataset
from interp_models.evaluation.comparison import Shown
from interp_models.evaluation.part_sheets import part_panels
from interp_models.evaluation.tables import read_prototypes
from interp_models.prototypes.parts import PartModel
from interp_models.prototypes.sources import Prototypical
from interp_models.report import visual
from interp_models.report.gallery import patches
from interp_models.report.tree_drawing import tree_svg
from interp_models.report.views import ImageView, Panel, PrototypeView
from interp_models.training.module import InterpModule

Gallery = Mapping[int, visual.Picture]
"""Patch of the training image of every prototype, by number."""


def gallery_of(model: nn.Module, data: DataModule) -> Gallery:
    """The patches of a model's prototypes. If they come from other images than the data module's, it is empty, and a
    warning says so."""
    return patches(model.sources, data) if isinstance(model, Prototypical) else {}


def shown_by(model: nn.Module, data: DataModule, gallery: Gallery) -> Callable[[int], Shown]:
    """A function that shows the test image with an index as the model sees it.

    For models of this package, it adds their own explanation of the prediction.
    """
    dataset = data.dataset("test")

    def show(index: int) -> Shown:
        sample = sample_of(dataset, index)
        picture = visual.to_uint8(sample.image)
        if not isinstance(model, InterpModule):
            return Shown(picture)
        with torch.no_grad(), evaluating(model), full_float32():
            output = model(collate([sample]).image.to(model.device))
            several = model.display(output, output.logits.argmax(dim=1))[0]
            reasons, total = _reasons(model, output, picture, gallery)
        return Shown(picture, several.float().cpu().numpy() if len(several) > 1 else None, reasons, total)

    return show


def sample_of(dataset: TransformedDataset, index: int) -> Sample:
    """The image with an index, of a split whose images are always the same."""
    return dataset[0, int(np.flatnonzero(dataset.indices == index)[0])]


def _reasons(
    model: InterpModule, output: InterpOutput, image: visual.Picture, gallery: Gallery
) -> tuple[list[Panel], str]:
    """The parts or prototypes that the model found in the image, and a line that sums them up."""
    if isinstance(model, PartModel):
        return part_panels(model, output, image)
    if not isinstance(model, Prototypical) or not gallery:
        return [], ""
    size = (image.shape[0], image.shape[1])
    (reading,) = model.readings(output, output.logits.argmax(dim=1), size)
    panels = []
    for match in reading.matches:
        seen = image if match.box is None else visual.boxed(image, match.box)
        pair = [seen, visual.fitted(gallery[match.prototype], size)]
        panels.append(Panel(match.prototype, np.concatenate(pair, axis=1), match.text))
    return panels, reading.total


def prototypes_shown(
    name: str, model: Any, data: DataModule, folder: Path, images: Sequence[ImageView], gallery: Gallery
) -> PrototypeView | None:
    """The prototypes of a run for the page: their metrics, the nearest patches of those that explain the shown images,
    and the tree. None if there is nothing to show."""
    if not isinstance(model, Prototypical):
        return None
    shown = {panel.number for view in images for panel in view.reasons.get(name, ())}
    nearest = {}
    for path in (folder / "prototypes").glob("*/*.jpg"):
        if int(path.stem) in shown:
            nearest[int(path.stem)] = np.asarray(Image.open(path))
    tree = getattr(model, "tree", None)
    drawing = tree_svg(tree(data.classes), gallery) if tree else ""
    rows = read_prototypes(folder).get("rows", [])
    return PrototypeView(name, rows, dict(sorted(nearest.items())), drawing) if rows or nearest or drawing else None
