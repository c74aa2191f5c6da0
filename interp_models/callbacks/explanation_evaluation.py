"""Where models, explainers and metrics meet: every explainer's maps through every metric, on the same images."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor
from tqdm import tqdm

from interp_models.config import ExplanationConfig
from interp_models.data.base import Sample
from interp_models.data.module import DataModule, draw
from interp_models.errors import InputError
from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.files import write_json, write_whole
from interp_models.metrics.base import METRICS, FaithfulnessMetric, Grid, metric_of
from interp_models.outputs import InterpOutput
from interp_models.scoring import evaluating, probabilities, resolve_target
from interp_models.training.module import InterpModule

SCHEMA_VERSION = 1
"""Of `results.json`."""


class Plan(Protocol):
    """What the callback reads of a config."""

    explainers: list[Any]
    metrics: list[str]
    preset: str
    grid: Any
    max_steps: int
    target: Any
    batch: int | None
    every_n_epochs: int
    n_images: int | None


@dataclass(frozen=True)
class Provenance:
    """What every result row says of its run."""

    run: str
    selection: str
    seed: int
    checkpoint: str
    """Digest of the checkpoint's bytes."""


class ExplanationEvaluation(pl.Callback):
    """Judges explainers by metrics, per image, inside Lightning's evaluation loops and under DDP.

    On test images it writes `results.json`, `per_image.parquet` and `maps/` to a folder; what an interrupted
    evaluation has computed is kept there and found again. On validation images (`every_n_epochs`) it logs alone.
    Values are logged as `test/<metric>/<explainer>` or `val/<metric>/<explainer>`.

    Args:
        plan: explainers, metrics and protocol.
        folder: where results go; None logs alone.
        provenance: what result rows say of the run.
        seed: of the images that are drawn in validation.

    Raises:
        InputError: for an unknown explainer, metric, option, preset or target.
    """

    def __init__(
        self, plan: Plan, folder: Path | None = None, provenance: Provenance | None = None, seed: int = 0
    ) -> None:
        self.plan = plan
        self.specs = [_spec(item) for item in plan.explainers]
        labels = [label for label, _, _ in self.specs]
        for label in labels:
            if labels.count(label) > 1:
                raise InputError(f"explainer {label!r} is listed twice; give one of them another label")
        self.keys = [metric_of(str(key)) for key in plan.metrics]
        if not (plan.target in ("prediction", "label") or isinstance(plan.target, int)):
            raise InputError(f"target must be 'prediction', 'label' or a class number; got {plan.target!r}")
        self.folder, self.provenance, self.seed = folder, provenance, seed
        self._explainers: dict[str, Explainer] = {}
        self._metrics: dict[str, dict[str, FaithfulnessMetric]] = {}
        self._grid: Grid | None = None
        self._wanted: set[int] | None = None
        self._bar: tqdm[Any] | None = None

    @classmethod
    def of(cls, config: ExplanationConfig, seed: int) -> "list[ExplanationEvaluation]":
        """The callback for validation that a training's config asks for, if it does."""
        return [cls(config, seed=seed)] if config.every_n_epochs > 0 else []

    # Validation: log every n epochs.

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare, if this epoch is judged."""
        if self._judges(trainer):
            data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
            self._wanted = set(draw(data.val_indices, self.plan.n_images, self.seed).tolist())
            self._start(trainer, module, data.image_size, batches=0)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge the batch's images that were drawn."""
        if self._judges(trainer):
            self._batch(module, outputs, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log `val/<metric>/<explainer>`."""
        if self._judges(trainer):
            self._log(module, "val")
            self._wanted = None

    def _judges(self, trainer: pl.Trainer) -> bool:
        every = self.plan.every_n_epochs
        return self.folder is None and every > 0 and (trainer.current_epoch + 1) % every == 0

    # Test: log and write.

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare explainers and metrics."""
        if self.folder is not None:
            data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
            self._start(trainer, module, data.image_size, batches=int(trainer.num_test_batches[0]))

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
        if self.folder is not None:
            self._batch(module, outputs, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log `test/<metric>/<explainer>`, and write the results from rank 0."""
        if self.folder is None:
            return
        self._log(module, "test")
        if self._bar is not None:
            self._bar.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
            self._write(data)

    # The work.

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, size: int, batches: int) -> None:
        assert isinstance(module, InterpModule)
        with torch.inference_mode(False):
            self._explainers = {
                label: EXPLAINERS.build(name, options, model=module) for label, name, options in self.specs
            }
            self._grid = resolve_grid(self.plan.grid, module, size)
            options = {"preset": self.plan.preset, "max_steps": self.plan.max_steps, "batch": self.plan.batch}
            names = dict.fromkeys(name for name, _ in self.keys)
            self._metrics = {
                label: {name: METRICS.get(name)(grid=self._grid, **options).to(module.device) for name in names}
                for label in self._explainers
            }
        if self.folder is not None:
            self._partial.mkdir(parents=True, exist_ok=True)
            total = batches * len(self._explainers)
            self._bar = tqdm(total=total, disable=not trainer.is_global_zero, desc="explanations", unit="batch")

    def _batch(self, module: pl.LightningModule, output: InterpOutput, batch: Sample) -> None:
        """All explainers and metrics on one batch; each explainer's values and maps are kept as soon as they are there."""
        # Lightning evaluates in inference mode, whose tensors must not end in states or graphs.
        with torch.inference_mode(False), torch.no_grad(), evaluating(module):
            keep = self._chosen(batch.index)
            if not len(keep):
                return
            images, labels, index = (value.clone()[keep] for value in (batch.image, batch.label, batch.index))
            logits = output.logits.clone()[keep]
            target = self._target(logits, labels)
            score_fn = probabilities(module)
            everything = logits.float().softmax(dim=1)
            clean = everything.gather(1, target[:, None])[:, 0]
            confidence, predicted = everything.max(dim=1)
            common = {"index": index, "label": labels, "prediction": predicted, "confidence": confidence}
            common |= {"target": target, "probability": clean}
            for label, explainer in self._explainers.items():
                metrics = self._metrics[label]
                done = self._restore(label, index)
                if done is None:
                    maps = explainer.attribute(images, target)
                    values = {
                        name: metric.score(score_fn, images, maps, target, clean) for name, metric in metrics.items()
                    }
                    done = {"common": common, "maps": maps, "values": values}
                    self._keep(label, index, done)
                for name, metric in metrics.items():
                    metric.add({key: value.to(module.device) for key, value in done["values"][name].items()})
                if self._bar is not None:
                    self._bar.set_postfix_str(label)
                    self._bar.update()

    def _chosen(self, index: Tensor) -> Tensor:
        if self._wanted is None:
            return torch.arange(len(index), device=index.device)
        return torch.tensor([i for i, n in enumerate(index.tolist()) if n in self._wanted], device=index.device, dtype=torch.long)

    def _target(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.plan.target == "label":
            return labels
        return resolve_target(None if self.plan.target == "prediction" else int(self.plan.target), logits).clone()

    def _log(self, module: pl.LightningModule, stage: str) -> None:
        with torch.inference_mode(False):
            for label, metrics in self._metrics.items():
                means = {name: metric.compute() for name, metric in metrics.items()}
                for name, key in self.keys:
                    module.log(f"{stage}/{key}/{label}", means[name][key], rank_zero_only=False)

    # What an interrupted evaluation leaves, one file per batch and explainer.

    @property
    def _partial(self) -> Path:
        """A folder for exactly this work: another checkpoint, protocol or option has another."""
        assert self.folder is not None and self.provenance is not None
        work = [self.provenance.checkpoint, self.specs, self.keys, self.plan.preset, self._grid, self.plan.max_steps]
        text = json.dumps([*work, self.plan.target], default=str)
        return self.folder / ".partial" / hashlib.sha256(text.encode()).hexdigest()[:16]

    def _file(self, label: str, index: Tensor) -> Path:
        return self._partial / f"{label}-{int(index[0])}-{len(index)}.pt"

    def _keep(self, label: str, index: Tensor, done: dict[str, Any]) -> None:
        if self.folder is None:
            return
        path = self._file(label, index)
        partial = path.with_suffix(".partial")
        torch.save(_to_cpu(done), partial)
        partial.replace(path)

    def _restore(self, label: str, index: Tensor) -> dict[str, Any] | None:
        if self.folder is None or not self._file(label, index).is_file():
            return None
        done: dict[str, Any] = torch.load(self._file(label, index), weights_only=True)
        return done if torch.equal(done["common"]["index"], index.cpu()) else None

    def _parts(self, label: str) -> list[dict[str, Any]]:
        files = self._partial.glob(f"{label}-*.pt")
        parts = [torch.load(file, weights_only=True) for file in files]
        return sorted(parts, key=lambda part: int(part["common"]["index"][0]))

    # Results.

    def _write(self, data: DataModule) -> None:
        assert self.folder is not None and self.provenance is not None
        tables = []
        for label in self._explainers:
            parts = self._parts(label)
            table = pd.concat([self._table(label, part, data) for part in parts], ignore_index=True)
            order = np.argsort(table["index"].to_numpy()[:: len(self.keys)], kind="stable")
            tables.append(table)
            self._write_maps(label, parts, order, data)
        per_image = pd.concat(tables, ignore_index=True)
        per_image = per_image.sort_values(["explainer", "metric", "index"], ignore_index=True)
        path = self.folder / ".per_image.parquet.partial"
        per_image.to_parquet(path)
        path.replace(self.folder / "per_image.parquet")
        rows = list(self._rows(per_image))
        write_json(self.folder / "results.json", {"schema_version": SCHEMA_VERSION, "rows": rows})
        shutil.rmtree(self.folder / ".partial")

    def _table(self, label: str, part: dict[str, Any], data: DataModule) -> pd.DataFrame:
        """Long rows of one batch, image by image."""
        common = {key: value.numpy() for key, value in part["common"].items()}
        n = len(common["index"])
        frame = pd.DataFrame(
            {
                **{key: np.repeat(value, len(self.keys)) for key, value in common.items()},
                "metric": [key for _, key in self.keys] * n,
                "value": np.stack([part["values"][name][key].numpy() for name, key in self.keys], axis=1).ravel(),
            }
        )
        frame.insert(0, "image_id", [data.test_images.image_id(int(i)) for i in frame["index"]])
        constants = self._constants(label)
        for position, (key, value) in enumerate(constants.items()):
            frame.insert(position, key, value)
        described = [self._protocol(label, name, key) for name, key in self.keys]
        for field in described[0]:
            frame[field] = [row[field] for row in described] * n
        return frame

    def _constants(self, label: str) -> dict[str, Any]:
        assert self.provenance is not None
        return {
            "run": self.provenance.run,
            "explainer": label,
            "preset": self.plan.preset,
            "selection": self.provenance.selection,
            "seed": self.provenance.seed,
        }

    def _protocol(self, label: str, name: str, key: str) -> dict[str, Any]:
        """What a row says of how its metric was measured."""
        metric = self._metrics[label][name]
        if self._grid is None:
            shape = self._parts(label)[0]["maps"].shape
            grid = (int(shape[-2]), int(shape[-1]))
        else:
            grid = self._grid
        steps, fill = metric.protocol(key, grid)
        return {
            "grid": f"{grid[0]}x{grid[1]}",
            "steps": steps,
            "fill": fill,
            "explained": str(self.plan.target),
            "higher_is_better": metric.better[key],
        }

    def _rows(self, per_image: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """Long rows of `results.json`; the standard deviation is that of the images judged (divisor n)."""
        for label in self._explainers:
            for name, key in self.keys:
                values = per_image.query("explainer == @label and metric == @key")["value"].to_numpy(np.float64)
                defined = values[~np.isnan(values)]
                described = self._protocol(label, name, key)
                described["target"] = described.pop("explained")
                yield {
                    **self._constants(label),
                    "metric": key,
                    "mean": None if not len(defined) else float(defined.mean()),
                    "std": None if not len(defined) else float(defined.std()),
                    "n": len(values),
                    "n_undefined": int(len(values) - len(defined)),
                    **described,
                }

    def _write_maps(self, label: str, parts: list[dict[str, Any]], order: Any, data: DataModule) -> None:
        assert self.folder is not None
        folder = self.folder / "maps"
        folder.mkdir(exist_ok=True)
        index = np.concatenate([part["common"]["index"].numpy() for part in parts])[order]
        shape = (len(index), *parts[0]["maps"].shape[1:])
        partial = folder / f".{label}.npy.partial"
        maps = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        positions, first = np.argsort(order), 0
        for part in parts:
            n = len(part["maps"])
            maps[positions[first : first + n]] = part["maps"].numpy()
            first += n
        maps.flush()
        partial.replace(folder / f"{label}.npy")
        listing = pd.DataFrame({"row": np.arange(len(index)), "index": index})
        listing["image_id"] = [data.test_images.image_id(int(i)) for i in index]
        write_whole(folder / "index.csv", listing.to_csv(index=False))


def _spec(item: Any) -> tuple[str, str, dict[str, Any]]:
    """Label, name and options of one explainer of a config."""
    if isinstance(item, str):
        EXPLAINERS.get(item)
        return item, item, {}
    if not isinstance(item, dict) or "name" not in item:
        raise InputError(f"an explainer is a name, or a mapping with 'name' and options; got {item!r}")
    options = {key: value for key, value in item.items() if key not in ("name", "label")}
    EXPLAINERS.get(item["name"])
    label = str(item.get("label", item["name"]))
    if "/" in label or label.startswith("."):
        raise InputError(f"label {label!r} of an explainer names files and keys; it must not hold '/' or begin with '.'")
    return label, str(item["name"]), options


def resolve_grid(grid: Any, model: InterpModule, image_size: int) -> Grid | None:
    """Cells that maps are brought to: as given, None for `native`, or by default the model's last feature grid.

    Raises:
        InputError: unless it is [rows, columns], `native` or null.
    """
    if grid == "native":
        return None
    if grid is None:
        with torch.no_grad(), evaluating(model):
            maps = model(torch.zeros(1, 3, image_size, image_size, device=model.device)).maps
        return int(maps.shape[-2]), int(maps.shape[-1])
    if isinstance(grid, list | tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid):
        return int(grid[0]), int(grid[1])
    raise InputError(f"grid must be [rows, columns], 'native' or null; got {grid!r}")


def _to_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    return value.cpu()


def defined(value: float) -> float | None:
    """None for NaN, as json and tables want it."""
    return None if math.isnan(value) else value
