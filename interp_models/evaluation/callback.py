"""Where models, explainers and metrics meet: every explainer's maps through every metric, on the same images."""

import json
import sys
from collections import ChainMap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from interp_models.core.distributed import gathered_objects
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.prepared import prepare, release
from interp_models.core.scoring import all_scores, evaluating, full_float32, probabilities, resolve_target
from interp_models.data.base import Sample
from interp_models.data.choice import draw
from interp_models.data.module import DataModule, data_of
from interp_models.evaluation.config import ExplanationConfig, ValidationConfig
from interp_models.evaluation.plan import explainer_specs, resolve_grid
from interp_models.evaluation.results import PartialResults, Protocol, Provenance, write_results
from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.explainers.controls import attribute_with
from interp_models.explainers.features import shared_passes
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid, metrics_of
from interp_models.training.module import InterpModule


class ExplanationEvaluation(pl.Callback):
    """Judges explainers by metrics, per image, inside Lightning's evaluation loops and under DDP.

    On validation images, every n epochs of a training, it logs `val/<metric>/<explainer>`. On test images it logs
    `test/<metric>/<explainer>` and writes tables and maps to a folder, where an interrupted evaluation finds again
    what it has computed. Explainers that do not apply to the model or the data are left out, with the reason.

    Args:
        plan: explainers, metrics and protocol.
        folder: where results of test images go; None leaves test images alone.
        provenance: what result rows say of the run.
        weights_and_transform: a digest of them; with others, or other images, the work is not taken up again.
        every_n_epochs: of a training, in which validation images are judged; 0 never.
        seed: of the validation images that are drawn.

    Raises:
        InputError: for an unknown explainer, metric or target, or none.
    """

    def __init__(
        self,
        plan: ExplanationConfig,
        *,
        folder: Path | None = None,
        provenance: Provenance | None = None,
        weights_and_transform: str = "",
        every_n_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        self.plan = plan
        self.specs = explainer_specs(plan.explainers)
        self.keys = metrics_of(plan.metrics)
        """The registered metric of every key."""
        if plan.target not in ("prediction", "label") and not isinstance(plan.target, int):
            raise InputError(f"target must be 'prediction', 'label' or a class number; got {plan.target!r}")
        if not self.specs or not self.keys:
            raise InputError("explainers and metrics: at least one of each is needed")
        self.folder, self.provenance, self.seed = folder, provenance, seed
        self.weights_and_transform = weights_and_transform
        self.every_n_epochs = every_n_epochs
        self._explainers: dict[str, Explainer] = {}
        self._left_out: dict[str, str] = {}
        self._told: set[str] = set()
        self._metrics: dict[str, dict[str, FaithfulnessMetric]] = {}
        self._grid: Grid | None = None
        self._drawn: set[int] | None = None
        self._partial: PartialResults | None = None
        self._finished = False
        self._bar: Any = None

    @classmethod
    def of(cls, config: ValidationConfig, seed: int) -> "list[ExplanationEvaluation]":
        """The callback for validation that a training's config asks for, if it does."""
        return [cls(config, every_n_epochs=config.every_n_epochs, seed=seed)] if config.every_n_epochs > 0 else []

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare, if this epoch is judged."""
        if self._due(trainer):
            data = data_of(trainer)
            self._drawn = set(draw(data.val_indices, self.plan.n_images, self.seed).tolist())
            self._prepare(module, data)
            self._bar = self._progress(
                int(trainer.num_val_batches[0]), trainer.is_global_zero and trainer.progress_bar_callback is not None
            )

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
        if self._due(trainer) and bool(torch.isfinite(outputs.logits).all()):
            self._judge(module, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log."""
        if self._due(trainer):
            self._bar.close()
            self._log(module, "val")

    def _due(self, trainer: pl.Trainer) -> bool:
        every = self.every_n_epochs
        return self.folder is None and every > 0 and (trainer.current_epoch + 1) % every == 0

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare, and find what an interrupted evaluation has left; one that came to its end is not repeated."""
        if self.folder is None:
            return
        self._drawn = None
        self._prepare(module, data_of(trainer))
        plan = self.plan
        data = data_of(trainer)
        names = [data.test_images.image_id(int(index)) for index in data.test_indices]
        contents = trainer.strategy.broadcast(data.contents("test") if trainer.is_global_zero else None)
        batches = [data.batch_size, trainer.world_size]
        protocol = [plan.preset, self._grid, plan.max_steps, plan.target, plan.scorer]
        assert self.provenance is not None
        run = asdict(self.provenance)  # a run that was copied or renamed has rows of another name
        work = [run, self.weights_and_transform, list(self.keys), protocol, batches, names, contents]
        self._partial = PartialResults(self.folder, work, {label: spec for label, *spec in self.specs})
        self._finished = trainer.strategy.broadcast(self._partial.finished())
        if self._finished:
            if trainer.is_global_zero:
                self._partial.clear()
                print(
                    f"{self.folder}: finished {self._partial.date()}, and nothing has changed since; it is not repeated"
                )
            return
        self._bar = self._progress(int(trainer.num_test_batches[0]), trainer.is_global_zero)

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
        if self.folder is not None and not self._finished:
            self._judge(module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log, and write the results from rank 0."""
        if self.folder is None or self._finished:
            return
        self._log(module, "test")
        self._bar.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            assert self._partial is not None
            assert self.provenance is not None
            data, kept = data_of(trainer), [spec for spec in self.specs if spec[0] in self._explainers]
            write_results(
                self.folder,
                self._partial,
                data.test_indices.tolist(),
                {label: json.dumps({"name": name, **options}) for label, name, options in kept},
                self._left_out,
                self._protocols,
                self.provenance,
                data.test_images.image_id,
            )
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the line of the progress bar, so that the error has its own."""
        if self._bar is not None:
            self._bar.close()

    def _progress(self, batches: int, shown: bool) -> Any:
        total = batches * len(self.specs)
        return tqdm(total=total, disable=not shown, desc="explanations", unit="batch", leave=False)

    def _prepare(self, module: pl.LightningModule, data: DataModule) -> None:
        assert isinstance(module, InterpModule)
        self._explainers, self._left_out = {}, {}
        with torch.inference_mode(False):
            for label, name, options in self.specs:
                try:
                    self._explainers[label] = EXPLAINERS.build(name, options, model=module)
                except NotApplicable as error:
                    self._leave_out(label, str(error))
                else:
                    self._explainers[label].preparation = self.plan.scorer
            self._grid = resolve_grid(self.plan.grid, module, data.image_size)
            plan = self.plan
            self._metrics = {
                label: {
                    name: METRICS.get(name)(
                        preset=plan.preset, grid=self._grid, max_steps=plan.max_steps, batch=plan.batch
                    ).to(module.device)
                    for name in dict.fromkeys(self.keys.values())
                }
                for label, _, _ in self.specs
            }

    def _leave_out(self, label: str, why: str) -> None:
        if label not in self._told:
            rank_zero_only(tqdm.write)(f"left out {label}: {why}", file=sys.stderr)
        self._told.add(label)
        self._left_out[label] = why
        self._explainers.pop(label, None)

    def _judge(self, module: pl.LightningModule, batch: Sample) -> None:
        """All explainers and metrics on one batch; an explainer's values and maps are kept once they are there."""
        # Lightning evaluates in inference mode, whose tensors must end neither in states nor in graphs. Its mixed
        # precision ends before callbacks: clean scores must not come from its pass, where masked ones are of float32.
        with torch.inference_mode(False), torch.no_grad(), evaluating(module), full_float32(), shared_passes():
            rows = [i for i, n in enumerate(batch.index.tolist()) if self._drawn is None or n in self._drawn]
            self._bar.update(len(self.specs) - len(self._explainers) * bool(rows))
            if not rows or not self._explainers:
                return
            images, label, index = (x.clone()[rows] for x in (batch.image, batch.label, batch.index))
            boxes = None if batch.box is None else batch.box.clone()[rows]
            score_fn = probabilities(prepare(module, images, self.plan.scorer))
            chances = all_scores(score_fn, images, self.plan.batch)
            target = self._target(chances, label)
            clean = chances.gather(1, target[:, None])[:, 0]
            confidence, prediction = chances.max(dim=1)
            common = {"index": index, "label": label, "prediction": prediction, "confidence": confidence}
            common |= {"target_class": target, "probability": clean}
            for name, explainer in list(self._explainers.items()):
                self._bar.set_postfix_str(name)
                part = self._partial.find(name, index) if self._partial else None
                if part is None:
                    try:
                        maps = attribute_with(explainer, images, target, boxes)
                    except NotApplicable as error:
                        self._leave_out(name, str(error))
                        self._bar.update()
                        continue
                    values: dict[str, Tensor] = {}
                    for metric in self._metrics[name].values():
                        values |= metric.score(score_fn, images, maps, target, clean)
                    part = {"common": common, "maps": maps, "values": values}
                    if self._partial:
                        self._partial.keep(name, part)
                for metric in self._metrics[name].values():
                    metric.add({key: part["values"][key].to(module.device) for key in metric.keys})
                self._bar.update()

    def _target(self, chances: Tensor, label: Tensor) -> Tensor:
        if self.plan.target == "label":
            return label
        return resolve_target(None if self.plan.target == "prediction" else int(self.plan.target), chances)

    def _log(self, module: pl.LightningModule, stage: str) -> None:
        reasons = ChainMap(*gathered_objects(self._left_out))  # of the first rank that has one
        self._left_out = {label: reasons[label] for label, _, _ in self.specs if label in reasons}
        for label, why in self._left_out.items():
            self._leave_out(label, why)
        if not self._explainers:
            raise InputError(f"no explainer applies: {'; '.join(f'{label}: {why}' for label, why in reasons.items())}")
        with torch.inference_mode(False):
            for explainer, metrics in self._metrics.items():
                if explainer in self._left_out:
                    continue
                means = {key: value for metric in metrics.values() for key, value in metric.compute().items()}
                for key in self.keys:
                    module.log(f"{stage}/{key}/{explainer}", means[key])
        release(module)  # a training goes on, and has better use for the memory

    def _protocols(self, grid: Grid) -> dict[str, Protocol]:
        """The protocol of every key, for maps whose own grid is `grid`."""
        grid = self._grid or grid
        protocols = {}
        for key, name in self.keys.items():
            metric = next(iter(self._metrics.values()))[name]
            steps, fill = metric.protocol(key, grid)
            protocols[key] = Protocol(
                self.plan.preset,
                f"{grid[0]}x{grid[1]}",
                steps,
                fill,
                str(self.plan.target),
                self.plan.scorer,
                metric.better[key],
            )
        return protocols
