"""The abstract LightningModule of every architecture."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from interp_models.core.errors import InputError, unknown
from interp_models.core.outputs import InterpOutput
from interp_models.core.registry import Registry
from interp_models.core.traits import Trait
from interp_models.data.base import Sample
from interp_models.data.module import data_of
from interp_models.training.distillation import Distillation
from interp_models.training.metrics_file import row_of
from interp_models.training.optimizers import make_optimizer
from interp_models.training.recipe import Recipe, check_groups
from interp_models.training.schedule import PhaseSchedule

FORMAT_VERSION = 1  # of what checkpoints hold beside Lightning's own keys


class InterpModule(pl.LightningModule, ABC):
    """An image classifier that explains itself.

    Abstract: an architecture implements `forward`, `loss`, `parameter_groups`, `feature_layer` and `explain`, and is
    itself final (no architecture subclasses another). Whatever differs between a training and an evaluation belongs
    to the loss, so `forward` is the same in both, logs nothing and knows no trainer.
    """

    unit_images: ClassVar[bool] = True  # explainers and `probabilities` refuse others, see `inputs.check_images_for`
    additive: ClassVar[bool] = False
    """Whether logits are sums over the maps, and `evidence` says what each adds."""
    actions: ClassVar[tuple[str, ...]] = ("reset_optimizer",)
    """Methods that a phase may call when it ends, each with the data module, on all ranks."""
    pushed_by: ClassVar[str | None] = None
    """The action that makes prototypes patches of training images, without which no epoch is to be selected."""
    after_push: ClassVar[tuple[str, ...]] = ()
    """Parameter groups that can be trained after that."""
    explanations: ClassVar[tuple[str, ...]]
    """The kinds of map that `explain` gives, the default first."""
    statistics: ClassVar[tuple[str, ...]] = ()
    """What `measure` gives."""
    signed_maps: bool = False
    """Whether `InterpOutput.maps` may be below 0."""
    class_maps: ClassVar[bool] = False
    """Whether the default kind of `explain` depends on the class."""
    offers: ClassVar[tuple[Trait, ...]] = ("explain",)
    """What explainers can count on, see `TRAITS`; its trunk alone decides about `relu`."""
    small: ClassVar[Mapping[str, Any]] = {"backbone": "test_efficientnet", "weights": None, "output_stride": 16}
    """Options that make it small enough for a test."""
    untrained: ClassVar[Mapping[str, Any]] = {}
    """Options with which its actions work on a model that has hardly learnt."""
    amplifies_rounding: ClassVar[bool] = False
    """Whether its gradient changes so fast with the images that tests of gradients need small steps and float64."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"a classifier needs at least 2 classes; the data set has {num_classes}")
        self.num_classes = num_classes
        self.classes: tuple[str, ...] = ()
        """Class names by label, of a model that was loaded from a run."""
        self.recipe = Recipe()
        self.distillation: Distillation | None = None
        self.config: dict[str, Any] = {}
        """The resolved config of the run, plain containers, stored in checkpoints."""
        self.images: dict[str, list[Any]] = {}
        """What tells the images that it is trained on from others, stored in checkpoints."""
        self.accuracy = nn.ModuleDict(
            {f"{stage}_acc": MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")}
        )
        # Lightning's own mean over ranks is wrong where their last batches differ in size. A loss of NaN stays NaN.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.means = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in self.statistics}
        )

    @abstractmethod
    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) in [0, 1] -> logits and maps."""

    @abstractmethod
    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Named terms, already weighted; their sum is minimised. `targets` is int64 (B,)."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups, disjoint and complete, each with its own learning rate in a phase."""

    def optimizer_hints(self) -> dict[nn.Parameter, tuple[float, bool]]:
        """By what a parameter's learning rate is multiplied, and whether weight decay applies; 1 and yes by default."""
        return {}

    @property
    @abstractmethod
    def feature_layer(self) -> nn.Module:
        """The module whose output is the last map of features (B, C, h, w), or tokens (B, T, C) of timm's."""

    @abstractmethod
    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """One map (B, h, w) per image on the model's grid, not normalised; larger is more evidence for the target.

        Args:
            output: what `forward` returned for the images.
            targets: class to explain, int64 (B,).
            kind: one of `explanations`; None is the first.
        """

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The maps (B, n, h, w), n <= 3, that are shown as red, green and blue: the first ones by default."""
        return output.maps[:, :3]

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """What each map adds to the target's logit, (B, N); the sum is the logit, but for a constant of the class.

        Raises:
            InputError: by default, and unless the model is `additive`.
        """
        raise InputError(f"the logits of {type(self).__name__} are no sum over its maps")

    def observe(self, output: InterpOutput, targets: Tensor) -> None:
        """Update state that the optimizer does not, by a batch of a training; called without gradient on all ranks."""

    def measure(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """What the architecture says of its predictions, the `statistics` by name, a value per image (B,)."""
        return {}

    def check_recipe(self) -> None:
        """Raise `InputError` unless the groups are sound and the recipe names groups and modules that exist."""
        groups = self.parameter_groups()
        check_groups(self, groups)
        self.recipe.check(list(groups), [name for name, _ in self.named_modules() if name], self.actions)

    def check_selection(self, *, selecting: bool) -> None:
        """Raise `InputError` if an epoch could be selected (or, without validation, is the last) that should not."""
        if self.pushed_by is not None:
            norms = [name for name, part in self.named_modules() if isinstance(part, _BatchNorm)]
            self.recipe.check_pushed(self.pushed_by, self.after_push, norms, selecting=selecting)

    def check_kind(self, kind: str | None) -> str:
        """The kind of explanation asked for; an unknown one raises `InputError`."""
        if kind is not None and kind not in self.explanations:
            raise unknown(f"kind of explanation of {type(self).__name__}:", kind, self.explanations)
        return kind or self.explanations[0]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """The sum of the loss terms, each logged as `train/<term>`, and the accuracy as `train/acc`."""
        output = self(batch.image)
        terms = self.loss(output, batch.label)
        if self.distillation is not None:
            terms = self.distillation.terms(terms, output.logits, batch.image)
        loss = torch.stack(list(terms.values())).sum()
        with torch.no_grad():
            self.observe(output, batch.label)
            right = (output.logits.argmax(dim=1) == batch.label).float().mean()
        size = len(batch.label)
        for name, value in (*terms.items(), ("acc", right)):  # in training all ranks have batches of one size
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Sample, batch_idx: int) -> InterpOutput:  # type: ignore[override]
        """Logs `val/loss`, `val/acc` and `val/n`; returns the output for callbacks."""
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Sample, batch_idx: int) -> InterpOutput:  # type: ignore[override]
        """Logs `test/acc` and `test/n`; returns the output for callbacks."""
        return self._evaluation_step(batch, "test")

    def _evaluation_step(self, batch: Sample, stage: str) -> InterpOutput:
        output: InterpOutput = self(batch.image)
        size = len(batch.label)
        if stage == "val":
            loss = torch.stack(list(self.loss(output, batch.label).values())).sum()
            self.val_loss.update(loss.expand(size))  # once per image: weights are forgotten with "disable"
            self.log("val/loss", self.val_loss, batch_size=size)
        accuracy = cast(MulticlassAccuracy, self.accuracy[f"{stage}_acc"])
        accuracy.update(output.logits, batch.label)
        self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=size)
        for name, values in self.measure(output, batch.label).items():
            mean = cast(MeanMetric, self.means[f"{stage}_{name}"])
            mean.update(values)
            self.log(f"{stage}/{name}", mean, batch_size=size)
        self.log(f"{stage}/n", float(size), reduce_fx="sum", sync_dist=True, batch_size=size)
        return output

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer with the named parameter groups; their learning rates are set by `PhaseSchedule`."""
        return make_optimizer(self.recipe.optimizer, self.parameter_groups(), self.optimizer_hints())

    def reset_optimizer(self, data: pl.LightningDataModule) -> None:
        """Forget the moments, as papers do that begin a stage with a new optimizer."""
        self.trainer.optimizers[0].state.clear()

    def on_fit_start(self) -> None:
        """Refuse a trainer that would train at a learning rate of 0."""
        if not any(isinstance(callback, PhaseSchedule) for callback in getattr(self.trainer, "callbacks", ())):
            raise InputError("the trainer needs callbacks=[PhaseSchedule()], which sets the phases' learning rates")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the format version, the resolved config, the name of the phase and the epoch's row of `metrics.csv`, as
        plain containers."""
        phase = self.recipe.at(self.current_epoch)[0].name
        checkpoint["interp_models"] = {
            "format_version": FORMAT_VERSION,
            "num_classes": self.num_classes,
            "classes": list(data_of(self.trainer).classes),
            "images": self.images,
            "teacher": self.distillation and self.distillation.digest,
            "config": self.config,
            "phase": phase,
            "metrics": row_of(self.trainer, phase),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with a teacher that has learnt since."""
        before = checkpoint["interp_models"].get("teacher")
        if before and self.distillation and self.distillation.digest != before:
            raise InputError("distillation.teacher: its weights are not those that this training began with")


def check_fraction(**values: float) -> None:
    """Raise `InputError` unless every value is in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"model.{name} must be in [0, 1); got {value}")


def check_not_negative(**values: float) -> None:
    """Raise `InputError` if a value is below 0 or infinite, as weights of terms of a loss must not be."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"model.{name} must be at least 0, and finite; got {value}")


MODELS: Registry[InterpModule] = Registry("model", "interp_models.models.MODELS")
