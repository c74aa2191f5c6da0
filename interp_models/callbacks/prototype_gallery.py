"""Pictures of prototypes: the training image that each comes from, with the patch's box, and the patch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_warn

from interp_models import visual
from interp_models.data.module import DataModule
from interp_models.files import whole
from interp_models.projection import Sources, has_prototypes

SIDE = 128
"""Pixels of a picture on a sheet."""


class PrototypeGallery(pl.Callback):
    """After the test of a training, draws every prototype of the model that was tested, from its source.

    One sheet per class (ProtoPNet) or level of the tree (ProtoTree), `prototypes/<name>.jpg`, also to W&B.

    Args:
        run: the run folder; None on ranks that draw nothing.
    """

    def __init__(self, run: Path | None) -> None:
        self.folder = None if run is None else run / "prototypes"

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, on rank 0, if the model has prototypes that are patches."""
        if self.folder is None or not has_prototypes(module) or int(module.sources.images) < 0:
            return
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.folder.mkdir(exist_ok=True)
        paths = draw_prototypes(module.sources, module.prototype_sheets(data.classes), data, self.folder)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and paths:
                logger.log_image("prototypes", [str(path) for path in paths])


def draw_prototypes(
    sources: Sources, sheets: Mapping[str, Sequence[int]], data: DataModule, folder: Path
) -> list[Path]:
    """Write a sheet `<name>.jpg` of the prototypes under each name, and return their paths.

    Above each patch, cut out by its activation box, stands the image with that box and, dotted, the receptive one.
    Every image is read once per sheet. If the training images are not those of the sources, nothing is drawn, with a
    warning.
    """
    if data.fingerprint("train") != int(sources.images):
        rank_zero_warn("prototypes are patches of other training images than these; they are not drawn")
        return []
    dataset = data.dataset("train", augment=False)
    position = {int(index): place for place, index in enumerate(dataset.indices)}
    paths = []
    for name, numbers in sheets.items():
        known = [number for number in numbers if int(sources.image[number]) >= 0]
        if not known:
            continue
        images = {
            index: visual.to_uint8(dataset[0, position[index]].image)
            for index in sorted({int(sources.image[number]) for number in known})
        }
        cells = []
        for number in known:
            image, index = images[int(sources.image[number])], int(sources.image[number])
            box = [int(edge) for edge in sources.activation_box[number]]
            receptive = [int(edge) for edge in sources.receptive_box[number]]
            cells.append(_cell(image, box, receptive, f"{number}: {Path(dataset.images.image_id(index)).stem}"))
        path = folder / f"{name}.jpg"
        with whole(path) as partial:
            Image.fromarray(np.concatenate(cells, axis=1)).save(partial, format="JPEG", quality=90)
        paths.append(path)
    return paths


def _cell(image: visual.Picture, box: Sequence[int], receptive: Sequence[int], title: str) -> visual.Picture:
    """One prototype: title, image with boxes, patch."""
    scale = SIDE / max(image.shape[:2])
    cell = Image.new("RGB", (SIDE + 4, 2 * SIDE + 20), "white")
    small = Image.fromarray(image).resize((round(image.shape[1] * scale), round(image.shape[0] * scale)))
    draw = ImageDraw.Draw(small)
    for edges, colour in ((receptive, "white"), (box, "yellow")):
        x0, y0, x1, y1 = (edge * scale for edge in edges)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour)
    patch = Image.fromarray(image[box[1] : box[3], box[0] : box[2]])
    patch.thumbnail((SIDE, SIDE))
    enlarged = patch.resize([max(1, round(side * SIDE / max(patch.size))) for side in patch.size])
    cell.paste(small, (2, 16))
    cell.paste(enlarged, (2, 18 + SIDE))
    ImageDraw.Draw(cell).text((2, 2), title[: SIDE // 6], fill="black")
    return np.asarray(cell)
