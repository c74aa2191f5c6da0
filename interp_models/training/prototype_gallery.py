"""Pictures of prototypes: their source images with the box of the patch, and the patch itself."""

import shutil
from pathlib import Path

import pytorch_lightning as pl

from interp_models.data.module import data_of
from interp_models.prototypes.sources import Prototypical
from interp_models.report.gallery import draw_sheets
from interp_models.training.loggers import log_pictures


class PrototypeGallery(pl.Callback):
    """Draws every prototype of the model after the test, from the training image that it comes from.

    There is one sheet per class (ProtoPNet) or level of the tree (ProtoTree), `prototypes/<name>.jpg`. Sheets are also
    sent to the loggers.

    Args:
        run: the run folder; None on ranks that do not draw.
    """

    def __init__(self, run: Path | None) -> None:
        self.folder = None if run is None else run / "prototypes"

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw on rank 0, if the model has prototypes that are patches of training images."""
        if self.folder is None or not isinstance(module, Prototypical) or int(module.sources.images) < 0:
            return
        data = data_of(trainer)
        shutil.rmtree(self.folder, ignore_errors=True)  # may hold pictures of an earlier, shorter training
        self.folder.mkdir()
        paths = draw_sheets(module.sources, module.prototype_sheets(data.classes), data, self.folder)
        log_pictures(trainer.loggers, "prototypes", paths)
