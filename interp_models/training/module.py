"""`InterpModule`, the abstract LightningModule of all architectures."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric, Metric, SumMetric

from interp_models.core.errors import InputError, unknown
from interp_models.core.outputs import InterpOutput, LabelOutput
from interp_models.core.registry import Registry
from interp_models.core.traits import Trait
from interp_models.data.base import Sample
from interp_models.data.module import data_of
from interp_models.nn.attention import find_transformer
from interp_models.training.distillation import Distillation
from interp_models.training.metrics_file import row_of
from interp_models.training.optimizers import layer_decay_hints, make_optimizer
from interp_models.training.recipe import Recipe, check_groups
from interp_models.training.schedule import PhaseSchedule
from interp_models.training.tasks import MEASURES, Measure, Task, cross_entropy, measure_of

FORMAT_VERSION = 1  # of the keys that we add to checkpoints
LABELS_VERSION = 2  # of checkpoints of the task `labels`, which older versions would read by a softmax


class InterpModule(pl.LightningModule, ABC):
    """An image classifier that explains itself.

    Abstract: an architecture implements `forward`, `loss`, `parameter_groups`, `feature_layer` and `explain`. It is
    final: no architecture subclasses another. `forward` is the same in training and in evaluation; differences belong
    in `loss`. `forward` logs nothing and does not use the trainer.

    Args:
        num_classes: number of classes, at least 2.

    Raises:
        InputError: if there are fewer than 2 classes.
    """

    unit_images: ClassVar[bool] = True
    """The model takes images in [0, 1] and normalises them inside; see `inputs.check_images_for`."""
    additive: ClassVar[bool] = False
    """Whether each logit is a sum over the maps; then `evidence` returns what each map adds."""
    actions: ClassVar[tuple[str, ...]] = ("reset_optimizer",)
    """Methods that a phase can call at its start or end. Each takes the data module and runs on all ranks."""
    pushed_by: ClassVar[str | None] = None
    """The action that replaces prototypes by patches of training images; an epoch without it must not be selected."""
    after_push: ClassVar[tuple[str, ...]] = ()
    """Parameter groups that can still be trained after `pushed_by`."""
    explanations: ClassVar[tuple[str, ...]]
    """The kinds of map that `explain` returns, the default first."""
    statistics: ClassVar[tuple[str, ...]] = ()
    """Names of the values that `measure` returns."""
    signed_maps: bool = False
    """Whether `InterpOutput.maps` can have negative values."""
    class_maps: ClassVar[bool] = False
    """Whether the default kind of `explain` depends on the class."""
    tasks: ClassVar[tuple[Task, ...]] = ("classes",)
    """What the model can learn; `labels` needs a loss that takes several labels per image, see `cross_entropy`, and
    outputs made by `output`."""
    offers: ClassVar[tuple[Trait, ...]] = ("any_size", "explain")
    """Traits that explainers can rely on, see `TRAITS`. The backbone alone decides about `relu`."""
    small: ClassVar[Mapping[str, Any]] = {"backbone": "test_efficientnet", "weights": None, "output_stride": 16}
    """Options that make the model small enough for tests."""
    untrained: ClassVar[Mapping[str, Any]] = {}
    """Options with which the actions work on a model that is hardly trained, for tests."""
    amplifies_rounding: ClassVar[bool] = False
    """Whether gradients change so fast with the images that tests of gradients need small steps and float64."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise InputError(f"a classifier needs at least 2 classes; the data set has {num_classes}")
        self.num_classes = num_classes
        self.classes: tuple[str, ...] = ()
        """Class names by label; empty unless the model was loaded from a run."""
        self.recipe = Recipe()
        """Phases and optimizer of the training."""
        self.distillation: Distillation | None = None
        """The teacher and its weight in the loss."""
        self.config: dict[str, Any] = {}
        """The resolved config of the run, in plain containers; checkpoints hold it."""
        self.images: dict[str, list[Any]] = {}
        """Numbers and digests of the training and validation images; checkpoints hold them."""
        self.learn("classes")
        # Lightning's own mean over ranks is wrong if their last batches differ in size. A loss of NaN stays NaN.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.counts = nn.ModuleDict({stage: SumMetric(nan_strategy="disable") for stage in ("val", "test")})
        self.means = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in self.statistics}
        )

    def learn(self, task: Task) -> None:
        """Set the task, before the training: loss, measure, and how the outputs are read.

        Raises:
            InputError: if the model cannot learn this task.
        """
        if task not in self.tasks:
            raise InputError(
                f"{type(self).__name__} learns one class per image, as its loss needs; it cannot learn several labels"
            )
        self.task: Task = task
        stages = ("val", "test")
        self.accuracy = nn.ModuleDict({f"{stage}_acc": measure_of(task, self.num_classes) for stage in stages})

    @property
    def measured(self) -> Measure:
        """The number that tells how good the model is: accuracy or, for several labels, mean average precision."""
        return MEASURES[self.task]

    def output(self, logits: Tensor, maps: Tensor, aux: Mapping[str, Tensor] = MappingProxyType({})) -> InterpOutput:
        """The output of `forward`, of the type that says how its logits are read: for several labels a `LabelOutput`.

        Only a model that can learn `labels` needs it; the arguments are the fields of `InterpOutput`.
        """
        kind = LabelOutput if self.task == "labels" else InterpOutput
        return kind(logits, maps, dict(aux))  # a read-only mapping would not be a pytree

    def cross_entropy(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The cross-entropy of the task, see `tasks.cross_entropy`."""
        return cross_entropy(self.task, logits, targets, label_smoothing)

    @abstractmethod
    def forward(self, images: Tensor) -> InterpOutput:
        """Compute logits and maps.

        Args:
            images: (B, 3, H, W) in [0, 1].
        """

    @abstractmethod
    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name.

        Args:
            output: what `forward` returned.
            targets: class labels, int64 (B,); of the task `labels`, bool (B, K).

        Returns:
            Scalar terms, already multiplied by their weights. The training minimises their sum.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters in named, disjoint groups. A phase gives each group its learning rate, or freezes it."""

    def optimizer_hints(self) -> dict[nn.Parameter, tuple[float, bool]]:
        """For single parameters: a factor of the learning rate, and whether weight decay applies.

        Parameters that are not named get the factor 1 and weight decay.
        """
        return {}

    @property
    @abstractmethod
    def feature_layer(self) -> nn.Module:
        """The module whose output is the last feature map (B, C, h, w) or, in vision transformers of timm, the last
        tokens (B, T, C)."""

    @abstractmethod
    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """The model's explanation of a class.

        Args:
            output: what `forward` returned for the images.
            targets: class to explain for each image, int64 (B,).
            kind: one of `explanations`; None takes the first.

        Returns:
            One map per image, (B, h, w), on the model's grid and not normalised. A larger value means more evidence for
            the class.
        """

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The maps (B, n, h, w), n <= 3, to show as red, green and blue; by default the first ones."""
        return output.maps[:, :3]

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """What each map adds to the logit of the target class.

        Returns:
            (B, N). The sum over the N maps is the logit up to a constant per class.

        Raises:
            InputError: if the model is not `additive`.
        """
        raise InputError(f"the logits of {type(self).__name__} are not a sum over its maps")

    def observe(self, output: InterpOutput, targets: Tensor) -> None:
        """Update state that the optimizer does not, such as running centres.

        It is called after the loss of each training batch, without gradients, on all ranks. By default it does nothing.
        """

    def measure(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """The `statistics` of the predictions by name, a value per image (B,); validation and test log their means."""
        return {}

    def check_recipe(self) -> None:
        """Raise `InputError` unless parameter groups are disjoint and complete, all actions are methods, and all names
        in the recipe exist."""
        groups = self.parameter_groups()
        check_groups(self, groups)
        for action in self.actions:
            if not callable(getattr(self, action, None)):
                known = ", ".join(one for one in self.actions if callable(getattr(self, one, None)))
                raise InputError(f"{type(self).__name__} has no method for its action {action!r}; known: {known}")
        self.recipe.check(list(groups), [name for name, _ in self.named_modules() if name], self.actions)
        if self.recipe.optimizer.layer_decay < 1:
            transformer = find_transformer(self)
            if transformer is None:
                raise InputError(f"optimizer.layer_decay: {type(self).__name__} has no transformer of plain blocks")
            if not self.optimizer_hints().keys().isdisjoint(transformer.parameters()):
                raise InputError(f"optimizer.layer_decay: {type(self).__name__} has its own option, model.layer_decay")

    def check_selection(self, *, selecting: bool) -> None:
        """Raise `InputError` if an epoch could be selected whose prototypes are not patches of training images.

        Args:
            selecting: whether there are validation images; without them, the last epoch is selected.
        """
        if self.pushed_by is not None:
            norms = [name for name, part in self.named_modules() if isinstance(part, _BatchNorm)]
            self.recipe.check_pushed(self.pushed_by, self.after_push, norms, selecting=selecting)

    def check_kind(self, kind: str | None) -> str:
        """`kind`, or the default if it is None.

        Raises:
            InputError: for an unknown kind.
        """
        if kind is not None and kind not in self.explanations:
            raise unknown(f"kind of explanation of {type(self).__name__}:", kind, self.explanations)
        return kind or self.explanations[0]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """The sum of the loss terms. Logs `train/loss`, each term as `train/<term>`, and for classes `train/acc`."""
        output = self(batch.image)
        terms = self.loss(output, batch.label)
        if self.distillation is not None:
            terms = self.distillation.terms(terms, output.logits, batch.image)
        loss = torch.stack(list(terms.values())).sum()
        with torch.no_grad():
            self.observe(output, batch.label)
            logged = dict(terms)
            if self.task == "classes":  # the mean over batches of the average precision would not be that of all images
                logged["acc"] = (output.logits.argmax(dim=1) == batch.label).float().mean()
        size = len(batch.label)
        for name, value in logged.items():  # training batches of all ranks have the same size
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Sample, batch_idx: int) -> InterpOutput:  # type: ignore[override]
        """Log `val/loss`, `val/acc` (or `mean_ap`), `val/n` and the statistics; returns the output for callbacks."""
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Sample, batch_idx: int) -> InterpOutput:  # type: ignore[override]
        """Log `test/acc` (or `mean_ap`), `test/n` and the statistics; returns the output for callbacks."""
        return self._evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log what was measured, on all ranks or, if no image has a label as in a folder of files, on none."""
        if float(cast(Metric, self.counts["test"]).compute()):
            self._log_measured("test")

    def _evaluation_step(self, batch: Sample, stage: str) -> InterpOutput:
        output: InterpOutput = self(batch.image)
        size = len(batch.label)
        known, targets = torch.ones(size, dtype=torch.bool, device=batch.label.device), batch.label
        if batch.label.dim() == 1:  # image files have no labels to measure by: they get the weight 0
            known, targets = batch.label >= 0, batch.label.clamp(min=0)
        count = cast(SumMetric, self.counts[stage])
        if self.task == "labels" and batch.label.dim() == 1:
            count.update(0)
            return output
        if stage == "val":
            loss = torch.stack(list(self.loss(output, batch.label).values())).sum()
            self.val_loss.update(loss.expand(size))  # once per image: nan_strategy="disable" ignores weights
            self.log("val/loss", self.val_loss, batch_size=size)
        cast(Metric, self.accuracy[f"{stage}_acc"]).update(output.logits, batch.label)
        for name, values in self.measure(output, targets).items():
            cast(MeanMetric, self.means[f"{stage}_{name}"]).update(values, known.to(values))
        count.update(known.sum())
        if stage == "val":
            self._log_measured(stage)
        return output

    def _log_measured(self, stage: str) -> None:
        """Log the measure, the statistics and the number of images with labels; they are computed after the epoch."""
        accuracy = cast(Metric, self.accuracy[f"{stage}_acc"])
        self.log(f"{stage}/{self.measured.key}", accuracy, prog_bar=True, batch_size=1)
        for name in self.statistics:
            self.log(f"{stage}/{name}", cast(MeanMetric, self.means[f"{stage}_{name}"]), batch_size=1)
        self.log(f"{stage}/n", cast(SumMetric, self.counts[stage]), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer with the named parameter groups. `PhaseSchedule` sets their learning rates."""
        hints, decay = self.optimizer_hints(), self.recipe.optimizer.layer_decay
        if decay < 1:
            hints = layer_decay_hints(find_transformer(self), decay) | hints
        return make_optimizer(self.recipe.optimizer, self.parameter_groups(), hints)

    def reset_optimizer(self, data: pl.LightningDataModule) -> None:
        """Action: reset the optimizer's state (its moments), as in papers that start a stage with a new optimizer."""
        self.trainer.optimizers[0].state.clear()

    def on_fit_start(self) -> None:
        """Refuse a trainer without `PhaseSchedule`: it would train at a learning rate of 0."""
        if not any(isinstance(callback, PhaseSchedule) for callback in getattr(self.trainer, "callbacks", ())):
            raise InputError("the trainer needs callbacks=[PhaseSchedule()], which sets the phases' learning rates")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add our own entry: format version, classes, digests of images and teacher, resolved config, name of the
        phase, and the epoch's row of `metrics.csv`. It holds plain containers only."""
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
        if self.task != "classes":
            checkpoint["interp_models"] |= {"format_version": LABELS_VERSION, "task": self.task}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another teacher."""
        before = checkpoint["interp_models"].get("teacher")
        if before and self.distillation and self.distillation.digest != before:
            raise InputError("distillation.teacher: its weights differ from those that this training began with")


def check_fraction(**values: float) -> None:
    """Raise `InputError` unless every value is in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"model.{name} must be in [0, 1); got {value}")


def check_not_negative(**values: float) -> None:
    """Raise `InputError` if a value, such as the weight of a loss term, is negative, infinite or NaN."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"model.{name} must be at least 0, and finite; got {value}")


MODELS: Registry[InterpModule] = Registry("model", "interp_models.models.MODELS")
