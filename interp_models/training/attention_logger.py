"""Pictures of the model's own maps during training."""

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from interp_models.core.files import whole
from interp_models.core.modes import evaluating
from interp_models.core.scoring import scores_of
from interp_models.data.base import Sample, collate, labels_of
from interp_models.data.module import DataModule, data_of
from interp_models.data.subsets import spread
from interp_models.report import visual
from interp_models.training.config import AttentionConfig
from interp_models.training.loggers import log_maps
from interp_models.training.module import InterpModule


class AttentionLogger(pl.Callback):
    """Draws the model's own maps on the same few images every n epochs.

    The pictures are written to `attention/epoch-<n>.png` and sent to the loggers. The images are spread evenly over the
    validation set, or over the training set of a run without validation. Each row shows the image, the model's
    explanation of its prediction, and up to three of its maps as red, green and blue.

    Args:
        every_n_epochs: number of epochs from one picture to the next.
        n_images: number of images.
        run: the run folder; None on ranks that do not draw.
    """

    def __init__(self, every_n_epochs: int, n_images: int, run: Path | None) -> None:
        self.every_n_epochs = every_n_epochs
        self.n_images = n_images
        self.folder = None if run is None else run / "attention"
        self._batch: Sample | None = None
        self._image_ids: list[str] = []

    @classmethod
    def of(cls, config: AttentionConfig, run: Path | None) -> "list[AttentionLogger]":
        """A list with the callback if the config asks for it; else an empty list."""
        wanted = config.every_n_epochs > 0 and config.n_images > 0
        return [cls(config.every_n_epochs, config.n_images, run)] if wanted else []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw on rank 0."""
        if self.folder is None or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        assert isinstance(module, InterpModule)
        data = data_of(trainer)
        batch = self._images(data)
        with torch.no_grad(), evaluating(module):
            output = module(batch.image.to(module.device))
            predicted = output.logits.argmax(dim=1)
            maps = module.explain(output, predicted).float().cpu().numpy()
            parts = module.display(output, predicted).float().cpu().numpy()
            probabilities = scores_of(output, "probability").amax(dim=1)
        rows = []
        for image, own, several in zip(batch.image, maps, parts, strict=True):
            pixels = visual.to_uint8(image)
            finite = np.isfinite(own).all() and np.isfinite(several).all()  # `PhaseSchedule` stops a diverged training
            rows.append([pixels, visual.overlay(pixels, own), visual.rgb(several, pixels)] if finite else [pixels])
        labels, captions = [], []
        for image_id, index, guess, chance in zip(
            self._image_ids, batch.index.tolist(), predicted.tolist(), probabilities.tolist(), strict=True
        ):
            own = ", ".join(data.classes[label] for label in labels_of(data.train_images, index)) or "no label"
            labels.append(f"{own}\n→ {data.classes[guess]}")
            captions.append(f"{image_id}: {own} → {data.classes[guess]}, {100 * chance:.0f} %")
        path = self.folder / f"epoch-{trainer.current_epoch:03d}.png"
        self.folder.mkdir(exist_ok=True)
        with whole(path) as partial:
            visual.contact_sheet(rows, labels, ["image", module.explanations[0], "three maps as RGB"], partial)
        joined = [np.concatenate(row, axis=1) for row in rows]
        log_maps(trainer.loggers, joined, captions, path, trainer.current_epoch)

    def _images(self, data: DataModule) -> Sample:
        if self._batch is None:
            split = "val" if len(data.val_indices) else "train"
            dataset = data.dataset(split, augment=False)
            self._batch = collate([dataset[0, position] for position in spread(len(dataset), self.n_images)])
            self._image_ids = [dataset.images.image_id(index) for index in self._batch.index.tolist()]
        return self._batch
