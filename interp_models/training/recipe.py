"""How a model is trained: a sequence of phases and one optimizer. Both are plain data."""

from __future__ import annotations  # torch is imported for types only: a config is checked without it

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from interp_models.core.errors import InputError, Misfit, unfit

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Phase:
    """A sequence of epochs with one learning rate per parameter group."""

    name: str = "train"
    """Name of the phase; several phases can share it."""
    epochs: int = 1
    """Number of epochs."""
    lrs: dict[str, float] = field(default_factory=dict)
    """Peak learning rate of each parameter group; groups that are not named are frozen."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate over the phase: `cosine` falls from the peak to 0; `step` is multiplied by `gamma` at each of the
    `milestones`."""
    warmup: float = 0.0
    """Fraction of the phase, in [0, 1), over which the learning rate first rises linearly from 0."""
    milestones: list[int] = field(default_factory=list)
    """Epochs at which `step` lowers the learning rate, counted from 0 over all phases of this name."""
    gamma: float = 0.1
    """Factor of the `step` schedule at each milestone."""
    eval_modules: list[str] = field(default_factory=list)
    """Submodules kept in eval mode, such as a frozen backbone whose batch-norm statistics must not change."""
    on_start: list[str] = field(default_factory=list)
    """Actions of the model to call before the first step of the phase."""
    on_end: list[str] = field(default_factory=list)
    """Actions of the model, such as `push`, to call after the last step of the phase and before its validation."""
    select: Literal["every", "last", "none"] = "every"
    """Epochs of the phase that can become the best checkpoint; use `last` if `on_end` has the push of prototypes."""

    def factor(self, epoch: float, before: int = 0) -> float:
        """The factor by which the peak learning rates are multiplied.

        Args:
            epoch: number of epochs of the phase that are finished; a fraction counts the steps within an epoch.
            before: number of epochs in earlier phases of the same name.

        >>> [round(Phase(schedule="cosine", warmup=0.5).factor(p), 2) for p in (0.0, 0.25, 0.5, 0.75)]
        [0.0, 0.5, 1.0, 0.5]
        >>> [Phase(epochs=4, schedule="step", milestones=[1, 3], gamma=0.5).factor(k) for k in range(4)]
        [1.0, 0.5, 0.5, 0.25]
        """
        progress = epoch / self.epochs
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return self.gamma ** sum(milestone <= before + int(epoch) for milestone in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))

    def set_modes(self, module: nn.Module) -> None:
        """Put a module into train mode and its `eval_modules` into eval mode."""
        module.train()
        for name in self.eval_modules:
            module.get_submodule(name).eval()


@dataclass
class Optimizer:
    """The one optimizer of a training."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    """Algorithm."""
    weight_decay: float = 0.0
    """Weight decay of all parameter groups."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Weight decay of single parameter groups, in place of `weight_decay`."""
    eps: float = 1e-8
    """Term in the denominator of `adam` and `adamw`."""
    momentum: float = 0.9
    """Momentum of `sgd`."""
    layer_decay: float = 1.0
    """Factor d of layer-wise learning-rate decay in a vision transformer: the rate of its last block is multiplied by
    d, that of the block before by d², and so on. 1 has one rate for all. `vit_cls` has `model.layer_decay` instead."""


@dataclass
class Recipe:
    """A whole training: its phases in their order, and the optimizer that they share."""

    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def epochs(self) -> int:
        """Total number of epochs."""
        return sum(phase.epochs for phase in self.phases)

    def at(self, epoch: int) -> tuple[Phase, int]:
        """The phase of an epoch (counted from 0), and the epoch's position in this phase.

        >>> phase, k = Recipe([Phase("warm", 2), Phase("joint", 3)]).at(3)
        >>> phase.name, k
        ('joint', 1)
        """
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        return self.phases[-1], self.phases[-1].epochs - 1 + epoch

    def before(self, epoch: int) -> int:
        """Number of epochs in earlier phases that have the same name as the phase of this epoch.

        >>> Recipe([Phase("a", 2), Phase("b", 3), Phase("a", 1)]).before(5)
        2
        """
        name, finished = self.at(epoch)[0].name, 0
        for phase in self.phases[:-1]:
            if epoch < phase.epochs:
                break
            epoch -= phase.epochs
            finished += phase.epochs if phase.name == name else 0
        return finished

    def selectable(self, epoch: int) -> bool:
        """Whether an epoch can become the best checkpoint.

        >>> recipe = Recipe([Phase("joint", 2, select="last")])
        >>> recipe.selectable(0), recipe.selectable(1)
        (False, True)
        """
        phase, position = self.at(epoch)
        return phase.select == "every" or (phase.select == "last" and position == phase.epochs - 1)

    def misfits(self, groups: Sequence[str], modules: Sequence[str], actions: Sequence[str]) -> list[Misfit]:
        """Names in the recipe that the model does not have: each with its kind and the valid names."""
        found: list[Misfit] = [
            ("parameter group in optimizer.weight_decays:", group, groups)
            for group in self.optimizer.weight_decays
            if group not in groups
        ]
        for number, phase in enumerate(self.phases):
            for key, kind, names, known in (
                ("lrs", "parameter group", list(phase.lrs), groups),
                ("on_start", "action", phase.on_start, actions),
                ("on_end", "action", phase.on_end, actions),
                ("eval_modules", "module", phase.eval_modules, modules),
            ):
                where = f"{kind} in phases[{number}].{key}:"
                found += [(where, name, known) for name in names if name not in known]
        return found

    def check(self, groups: Sequence[str], modules: Sequence[str], actions: Sequence[str] = ()) -> None:
        """Raise `InputError` for values out of range, and for names of groups, modules or actions that do not exist."""
        if not self.phases:
            raise InputError("phases: at least one phase is needed")
        if found := self.misfits(groups, modules, actions):
            raise unfit(found)
        for key in ("weight_decay", "momentum"):
            value = getattr(self.optimizer, key)
            if not 0 <= value < math.inf:
                raise InputError(f"optimizer.{key} must be 0 or more; got {value}")
        if not 0 < self.optimizer.eps < math.inf:
            raise InputError(f"optimizer.eps must be above 0; got {self.optimizer.eps}")
        if not 0 < self.optimizer.layer_decay <= 1:
            raise InputError(f"optimizer.layer_decay must be above 0 and at most 1; got {self.optimizer.layer_decay}")
        for group, decay in self.optimizer.weight_decays.items():
            if not 0 <= decay < math.inf:
                raise InputError(f"optimizer.weight_decays.{group} must be 0 or more; got {decay}")
        trained = [phase for phase in self.phases if phase.epochs]
        if trained and trained[-1].select == "none":
            raise InputError("phases: the last one must not have select: none, as its last epoch is the run's")
        for number, phase in enumerate(self.phases):
            where = f"phases[{number}]"
            if phase.epochs < 0 or not 0 <= phase.warmup < 1:
                raise InputError(f"{where}: epochs must be 0 or more and warmup in [0, 1)")
            if not 0 < phase.gamma < math.inf:
                raise InputError(f"{where}.gamma must be above 0 and finite; got {phase.gamma}")
            if phase.milestones and min(phase.milestones) < 0:
                raise InputError(f"{where}.milestones must be epochs, 0 or more; got {min(phase.milestones)}")
            if phase.epochs and not phase.lrs:
                raise InputError(
                    f"{where}.lrs: a learning rate is needed for at least one group of {', '.join(groups)}"
                )
            for group, lr in phase.lrs.items():
                if not 0 <= lr < math.inf:
                    raise InputError(f"{where}.lrs.{group} must be 0 or more; got {lr}")

    def check_timeline(self) -> None:
        """Raise `InputError` if there is no epoch, or a phase with actions has none.

        Only a new training is checked: an older run may have such a phase, whose actions were never called.
        """
        if not self.epochs:
            raise InputError("phases: at least one epoch is needed")
        for number, phase in enumerate(self.phases):
            key, actions = ("on_end", phase.on_end) if phase.on_end else ("on_start", phase.on_start)
            if actions and not phase.epochs:
                raise InputError(
                    f"phases[{number}].{key}: {actions[0]} would never be called, because the phase has epochs=0; give "
                    f"it an epoch, or phases[{number}].{key}=[]"
                )

    def check_pushed(self, action: str, harmless: Sequence[str], norms: Sequence[str], *, selecting: bool) -> None:
        """Raise `InputError` if an epoch could be selected whose prototypes are not patches of training images.

        A recipe that never calls `action` is accepted.

        Args:
            action: the action that replaces prototypes by patches.
            harmless: parameter groups that can be trained after it.
            norms: names of the batch norms; their running statistics change unless a phase keeps them in eval mode.
            selecting: whether there are validation images; without them, the very last epoch is selected.
        """
        phases = [(number, phase) for number, phase in enumerate(self.phases) if phase.epochs]
        if not any(action in (*phase.on_start, *phase.on_end) for _, phase in phases):
            return
        pushed = False
        for number, phase in phases:
            held = tuple(f"{name}." for name in phase.eval_modules)
            moved = [group for group, lr in phase.lrs.items() if lr and group not in harmless]
            moved += [name for name in norms if not f"{name}.".startswith(held)]
            before = (pushed or action in phase.on_start) and not moved
            pushed = before or action in phase.on_end
            at_end = phase.select == "last" or phase.epochs == 1 or not selecting
            wanted = phase.select != "none" if selecting else number == phases[-1][0]
            if wanted and not (before or (pushed and at_end)):
                why = f" ({moved[0]!r} changes)" if moved else ""
                raise InputError(
                    f"phases[{number}].select={phase.select}: an epoch could be selected whose prototypes are not "
                    f"patches of training images{why}; expected select: none, or select: last with {action!r} in on_end"
                )


def check_groups(module: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Raise `InputError` unless the groups hold every parameter of the module exactly once."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen: dict[int, str] = {}
    for group, parameters in groups.items():
        for parameter in parameters:
            if id(parameter) in seen:
                raise InputError(
                    f"parameter {names[id(parameter)]!r} is in groups {seen[id(parameter)]!r} and {group!r}"
                )
            seen[id(parameter)] = group
    left = [name for key, name in names.items() if key not in seen]
    if left:
        raise InputError(f"parameter {left[0]!r} is in no parameter group")
