"""The evaluation of maps inside Lightning's loops."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from interp_models.core.prepared import release
from interp_models.data.base import Sample, rows_of
from interp_models.data.module import DataModule, data_of
from interp_models.data.subsets import subsample
from interp_models.evaluation.cache import FolderCache, MemoryCache
from interp_models.evaluation.config import ExplanationConfig, ValidationConfig
from interp_models.evaluation.engine import Engine, check_plan
from interp_models.evaluation.plan import make_metrics, resolve_grid
from interp_models.evaluation.tables import Provenance, date_of, finished, make_tables, read_tables
from interp_models.metrics.base import Grid


class ExplanationEvaluation(pl.Callback):
    """Judges explainers by metrics on test images, under any strategy of Lightning's.

    Logs `test/<metric>/<explainer>`, and writes tables and maps to a folder, where an interrupted evaluation finds
    again what it has computed.

    Args:
        plan: explainers, metrics and protocol.
        folder: where results go.
        provenance: what result rows say of the model.
        weights_and_transform: a digest of them; with others, or other images, the work is not taken up again.

    Raises:
        InputError: for an unknown explainer, metric or target, or none.
    """

    def __init__(
        self, plan: ExplanationConfig, *, folder: Path, provenance: Provenance, weights_and_transform: str
    ) -> None:
        self.plan, self.folder, self.provenance = plan, folder, provenance
        self.specs, self.keys = check_plan(plan)
        self.weights_and_transform = weights_and_transform
        self._engine: Engine | None = None
        """None if the work was done before."""

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare, and find what an interrupted evaluation has left; one that came to its end is not repeated."""
        grid = resolve_grid(self.plan.grid, network_of(module), _example(module, data_of(trainer)))
        make_metrics(self.plan, self.keys.values(), grid)  # what is wrong is refused, also where results are there
        cache = self._cache(trainer, grid)
        self._engine = None
        if trainer.strategy.broadcast(finished(self.folder, cache)):
            if trainer.is_global_zero:
                cache.clear()
                date = date_of(self.folder)
                print(f"{self.folder}: finished {date}, and nothing has changed since; it is not repeated")
            return
        self._engine = Engine(network_of(module), self.plan, _example(module, data_of(trainer)), cache)
        if trainer.is_global_zero:
            self._engine.show_progress(int(trainer.num_test_batches[0]))

    def _cache(self, trainer: pl.Trainer, grid: Grid | None) -> FolderCache:
        data, plan = data_of(trainer), self.plan
        names = [data.test_images.image_id(int(index)) for index in data.test_indices]
        contents = trainer.strategy.broadcast(data.contents("test") if trainer.is_global_zero else None)
        batches = [data.batch_size, trainer.world_size]
        protocol = [plan.preset, grid, plan.max_steps, plan.target, plan.preparation]
        run = asdict(self.provenance)  # a run that was copied or renamed has rows of another name
        work = [run, self.weights_and_transform, list(self.keys), protocol, batches, names, contents]
        return FolderCache(self.folder, work, {label: spec for label, *spec in self.specs})

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
            self._engine.judge(batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the results from rank 0, and log."""
        engine = self._engine
        if engine is None:
            return
        engine.agree()
        engine.bar.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            data = data_of(trainer)
            make_tables(
                engine.cache,
                data.test_indices.tolist(),
                engine.applying,
                engine.left_out,
                engine.protocols,
                self.provenance,
                data.test_images.image_id,
                self.folder,
            )
        trainer.strategy.barrier()
        rows = read_tables(self.folder).rows
        with torch.inference_mode(False):
            for row in rows:
                mean = torch.nan if row["mean"] is None else row["mean"]
                module.log(f"test/{row['metric']}/{row['explainer']}", torch.tensor(mean))
        release(network_of(module))

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the line of the progress bar, so that the error has its own."""
        if self._engine is not None:
            self._engine.bar.close()


class ExplanationValidation(pl.Callback):
    """Judges explainers by metrics on validation images, every n epochs of a training; logs
    `val/<metric>/<explainer>`.

    Args:
        plan: explainers, metrics, protocol, and how often.
        seed: of the validation images that are drawn.

    Raises:
        InputError: for an unknown explainer, metric or target, or none.
    """

    def __init__(self, plan: ValidationConfig, seed: int) -> None:
        self.plan, self.seed = plan, seed
        check_plan(plan)
        self._engine: Engine | None = None
        """None in epochs that are not judged."""
        self._indices: set[int] = set()
        self._warned: set[str] = set()

    @classmethod
    def of(cls, config: ValidationConfig, seed: int) -> "list[ExplanationValidation]":
        """The callback that a training's config asks for, if it does."""
        return [cls(config, seed)] if config.every_n_epochs > 0 else []

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare, if this epoch is judged."""
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
        """Judge the batch's images that were drawn; a training that has diverged is told so when its epoch ends."""
        if self._engine is None or not bool(torch.isfinite(outputs.logits).all()):
            return
        rows = [row for row, number in enumerate(batch.index.tolist()) if number in self._indices]
        if rows:
            self._engine.judge(rows_of(batch, rows))
        else:
            self._engine.bar.update(len(self._engine.labels))

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log."""
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
        release(module)  # a training goes on, and has better use for the memory
        self._engine = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the line of the progress bar, so that the error has its own."""
        if self._engine is not None:
            self._engine.bar.close()


class Judged(pl.LightningModule):
    """A network that was not trained here, for Lightning's test loop; a callback does the work.

    Args:
        network: any module that returns logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Nothing."""


def network_of(module: pl.LightningModule) -> nn.Module:
    """The network that is judged: a module of ours is one itself."""
    return module.network if isinstance(module, Judged) else module


def _example(module: pl.LightningModule, data: DataModule) -> torch.Tensor:
    return torch.zeros(1, 3, data.image_size, data.image_size, device=module.device)
