"""`PhaseSchedule`, the callback that carries out the phases of a recipe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy

from interp_models.core.distributed import share_buffers
from interp_models.core.errors import InputError
from interp_models.core.modes import evaluating
from interp_models.core.rng import seed_of
from interp_models.data.module import data_of

if TYPE_CHECKING:
    from interp_models.training.module import InterpModule


class PhaseSchedule(pl.Callback):
    """Sets frozen groups, eval modes, learning rates and the random seed, and calls the actions of phases.

    All are pure functions of the epoch. The callback has no state, so a run can resume at any epoch. Groups are frozen
    after DDP has wrapped the module: DDP does not register parameters that are frozen before, and ranks would diverge.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse overlapping groups, unknown names, and a DDP strategy that cannot skip frozen groups."""
        module = cast("InterpModule", module)
        module.check_recipe()
        check_strategy(trainer.strategy, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Freeze groups and set modes as the phase says; seed dropout by seed, epoch and rank."""
        module = cast("InterpModule", module)
        phase, position = module.recipe.at(trainer.current_epoch)
        for name, parameters in module.parameter_groups().items():
            for parameter in parameters:
                parameter.requires_grad_(name in phase.lrs)
        phase.set_modes(module)
        torch.manual_seed(seed_of(int(module.config.get("seed", 0)), trainer.current_epoch, trainer.global_rank))
        if position == 0 and phase.on_start:
            self._act(trainer, module, phase.on_start)
        module.log("phase", float(module.recipe.phases.index(phase)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the `on_end` actions after the last step of a phase, so that its validation and checkpoint follow."""
        module = cast("InterpModule", module)
        phase, position = module.recipe.at(trainer.current_epoch)
        if position == phase.epochs - 1 and batch_idx == trainer.num_training_batches - 1:
            self._act(trainer, module, phase.on_end)

    def _act(self, trainer: pl.Trainer, module: "InterpModule", actions: Sequence[str]) -> None:
        """Call actions of the model in eval mode, with the buffers of rank 0 on all ranks."""
        share_buffers(module)
        for action in actions:
            with torch.no_grad(), evaluating(module):
                getattr(module, action)(data_of(trainer))

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Copy the buffers of rank 0 to all ranks."""
        share_buffers(module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop a training whose loss is NaN or infinite, before its weights are saved."""
        for key, name in (("train/loss", "training"), ("val/loss", "validation")):
            loss = trainer.callback_metrics.get(key)
            if loss is not None and not bool(torch.isfinite(loss)):
                raise InputError(
                    f"the {name} loss of epoch {trainer.current_epoch} is {float(loss)}; lower the learning rates"
                )

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of every group for this step.

        The mean over the epoch is logged as `lr/<group>`, before `optimizer_hints` scale it.
        """
        module = cast("InterpModule", module)
        phase, epoch = module.recipe.at(trainer.current_epoch)
        before = module.recipe.before(trainer.current_epoch)
        factor = phase.factor(epoch + batch_idx / trainer.num_training_batches, before)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = phase.lrs.get(group["name"], 0.0) * factor * group.get("scale", 1.0)
        for name in module.parameter_groups():
            rate = phase.lrs.get(name, 0.0) * factor
            module.log(f"lr/{name}", rate, on_step=False, on_epoch=True, batch_size=1)


def check_strategy(strategy: Strategy, module: "InterpModule") -> None:
    """Raise `InputError` if a phase freezes groups and the DDP strategy cannot skip them."""
    groups = module.parameter_groups()
    frozen = any(set(phase.lrs) != set(groups) for phase in module.recipe.phases if phase.epochs)
    finds_unused = not isinstance(strategy, DDPStrategy) or strategy._ddp_kwargs.get("find_unused_parameters")
    if frozen and not finds_unused:
        raise InputError("phases that freeze groups need trainer.strategy=ddp_find_unused_parameters_true")
