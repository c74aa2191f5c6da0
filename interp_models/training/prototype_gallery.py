"""Pictures of prototypes: the training image that each comes from, with the patch's box, and the patch."""

import shutil
from pathlib import Path

import pytorch_lightning as pl

from interp_models.data.module import data_of
from interp_models.prototypes.sources import Prototypical
from interp_models.report.gallery import draw_sheets
from interp_models.training.loggers import log_pictures


class PrototypeGallery(pl.Callback):
    """After the test of a training, draws every prototype of the model that was tested, from its source.

    One sheet per class (ProtoPNet) or level of the tree (ProtoTree), `prototypes/<name>.jpg`, also to loggers.

    Args:
        run: the run folder; None on ranks that draw nothing.
    """

    def __init__(self, run: Path | None) -> None:
        self.folder = None if run is None else run / "prototypes"

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw, on rank 0, if the model has prototypes that are patches."""
        if self.folder is None or not isinstance(module, Prototypical) or int(module.sources.images) < 0:
            return
        data = data_of(trainer)
        shutil.rmtree(self.folder, ignore_errors=True)  # of a shorter training
        self.folder.mkdir()
        paths = draw_sheets(module.sources, module.prototype_sheets(data.classes), data, self.folder)
        log_pictures(trainer.loggers, "prototypes", paths)
