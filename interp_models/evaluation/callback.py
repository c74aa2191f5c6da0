"""Callbacks that evaluate maps in Lightning's test and validation loops."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from interp_models.core.errors import InputError
from interp_models.core.prepared import release
from interp_models.data.base import Sample, rows_of
from interp_models.data.module import DataModule, data_of
from interp_models.data.subsets import Indices, spread, subsample
from interp_models.evaluation.cache import FolderCache, MemoryCache
from interp_models.evaluation.config import ExplanationConfig, ValidationConfig
from interp_models.evaluation.engine import Engine
from interp_models.evaluation.plan import cache_keys, check_plan, make_metrics, metric_keys, resolve_grid
from interp_models.evaluation.tables import Provenance, compare_again, date_of, finished
from interp_models.metrics.base import Grid


class ExplanationEvaluation(pl.Callback):
    """Judges explainers by metrics on test images, with any strategy of Lightning.

    It logs `test/<metric>/<explainer>` and writes tables and maps to a folder. An interrupted evaluation continues
    where it stopped.

    Args:
        plan: explainers, metrics and protocol.
        folder: folder of the results.
        provenance: facts about the model, for the rows of the tables.
        weights_and_transform: digest of the model's weights and its transform; cached results of others are not used.
        same_classes: whether the labels of the images are classes of the model.
        report_images: number of images that the page shows.

    Raises:
        InputError: for an unknown explainer, metric or target, or if there is no explainer or no metric.
    """

    def __init__(
        self,
        plan: ExplanationConfig,
        *,
        folder: Path,
        provenance: Provenance,
        weights_and_transform: str,
        same_classes: bool,
        report_images: int = 0,
    ) -> None:
        self.same_classes, self.report_images = same_classes, report_images
        self._shown: set[int] = set()
        """Indices of the images that the page shows."""
        self.plan, self.folder, self.provenance = plan, folder, provenance
        self.specs, self.keys = check_plan(plan)
        self.weights_and_transform = weights_and_transform
        self._engine: Engine | None = None
        """None if the folder already holds the results."""

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare the evaluation and find its cached batches; a finished evaluation is not repeated."""
        grid = resolve_grid(self.plan.grid, network_of(module), _example(module, data_of(trainer)))
        if not len(self._explained(data_of(trainer))):
            raise InputError("target label: no image has a label; target=prediction works")
        make_metrics(self.plan, self.keys, grid)  # wrong options are refused even if results exist
        cache = self._cache(trainer, grid)
        self._engine = None
        if trainer.strategy.broadcast(finished(self.folder, cache)):
            if trainer.is_global_zero:
                cache.clear()
                date = date_of(self.folder)
                if compare_again(self.folder, self.plan.control, self.plan.reference):
                    print(f"{self.folder}: finished {date}; the explainers are compared with another one")
                else:
                    print(f"{self.folder}: finished {date}, and nothing has changed since; it is not repeated")
            return
        explained = sorted(self._explained(data_of(trainer)).tolist())
        self._shown = {explained[place] for place in spread(len(explained), self.report_images)}
        example = _example(module, data_of(trainer))
        self._engine = Engine(network_of(module), self.plan, example, cache, same_classes=self.same_classes)
        if trainer.is_global_zero:
            self._engine.show_progress(int(trainer.num_test_batches[0]))

    def _explained(self, data: DataModule) -> Indices:
        """The test images that have a row: without those that have no label, if labels are explained."""
        return data.labelled(data.test_indices) if self.plan.target == "label" else data.test_indices

    def _cache(self, trainer: pl.Trainer, grid: Grid | None) -> FolderCache:
        data, plan = data_of(trainer), self.plan
        names = [data.test_images.image_id(int(index)) for index in data.test_indices]
        contents = trainer.strategy.broadcast(data.contents("test") if trainer.is_global_zero else None)
        batches = [data.batch_size, trainer.world_size]
        protocol = [plan.preset, grid, plan.max_steps, plan.target, plan.preparation]
        run = asdict(self.provenance)  # the rows of a run that was copied or renamed have another name
        work = [run, self.weights_and_transform, metric_keys(self.keys), protocol, batches, names, contents]
        return FolderCache(self.folder, work, cache_keys(self.specs))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge the batch."""
        if self._engine is not None:
            self._engine.judge(batch, self._shown)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the results on rank 0, and log the means."""
        engine = self._engine
        if engine is None:
            return
        engine.agree()
        engine.bar.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            data = data_of(trainer)
            indices = self._explained(data)
            without_label = len(data.test_indices) - len(indices)
            engine.tables(indices.tolist(), self.provenance, data.test_images.image_id, self.folder, without_label)
        trainer.strategy.barrier()
        rows = json.loads((self.folder / "results.json").read_text())["rows"]
        with torch.inference_mode(False):
            for row in rows:
                mean = torch.nan if row["mean"] is None else row["mean"]
                module.log(f"test/{row['metric']}/{row['explainer']}", torch.tensor(mean))
        release(network_of(module))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the progress bar, so that the error message has its own line."""
        if self._engine is not None:
            self._engine.bar.close()


class ExplanationValidation(pl.Callback):
    """Judges explainers by metrics on validation images every n epochs, and logs `val/<metric>/<explainer>`.

    Args:
        plan: explainers, metrics, protocol, and the number of epochs from one evaluation to the next.
        seed: seed that draws the validation images.

    Raises:
        InputError: for an unknown explainer, metric or target, or if there is no explainer or no metric.
    """

    def __init__(self, plan: ValidationConfig, seed: int) -> None:
        self.plan, self.seed = plan, seed
        check_plan(plan)
        self._engine: Engine | None = None
        """None in epochs without evaluation."""
        self._indices: set[int] = set()
        self._warned: set[str] = set()

    @classmethod
    def of(cls, config: ValidationConfig, seed: int) -> "list[ExplanationValidation]":
        """A list with the callback if the config asks for it; else an empty list."""
        return [cls(config, seed)] if config.every_n_epochs > 0 else []

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare the evaluation, if this epoch has one."""
        self._engine = None
        if (trainer.current_epoch + 1) % self.plan.every_n_epochs:
            return
        data = data_of(trainer)
        self._indices = set(subsample(data.val_indices, self.plan.n_images, self.seed).tolist())
        cache = MemoryCache(maps=False)
        self._engine = Engine(module, self.plan, _example(module, data), cache, warned=self._warned)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            self._engine.show_progress(int(trainer.num_val_batches[0]))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge those images of the batch that were drawn.

        Batches with NaN or infinite logits are skipped: `PhaseSchedule` stops a diverged training at the epoch's end.
        """
        if self._engine is None or not bool(torch.isfinite(outputs.logits).all()):
            return
        rows = [row for row, number in enumerate(batch.index.tolist()) if number in self._indices]
        if rows:
            self._engine.judge(rows_of(batch, rows))
        else:
            self._engine.bar.update(len(self._engine.labels))

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the means over the drawn images of all ranks."""
        engine = self._engine
        if engine is None:
            return
        engine.bar.close()
        engine.agree()
        assert isinstance(engine.cache, MemoryCache)
        engine.cache.gather()
        with torch.inference_mode(False):
            for (label, key), mean in engine.means(self._indices).items():
                module.log(f"val/{key}/{label}", mean)
        release(module)  # frees memory for the training
        self._engine = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the progress bar, so that the error message has its own line."""
        if self._engine is not None:
            self._engine.bar.close()


class Judged(pl.LightningModule):
    """Wraps a network that was not trained here for Lightning's test loop.

    Args:
        network: any module that returns logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Do nothing: `ExplanationEvaluation` judges the batch."""


def network_of(module: pl.LightningModule) -> nn.Module:
    """The network to judge: the one inside `Judged`, or the module itself."""
    return module.network if isinstance(module, Judged) else module


def _example(module: pl.LightningModule, data: DataModule) -> torch.Tensor:
    return torch.zeros(1, 3, data.image_size, data.image_size, device=module.device)
