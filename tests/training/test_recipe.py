"""The timeline of a training and the learning rates on it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from interp_models.core.errors import InputError
from interp_models.training.recipe import Phase, Recipe
from tests.conftest import Cub, fit, tiny_config

PROGRESS = [step / 40 for step in range(40)]


def test_constant() -> None:
    assert [Phase().factor(p) for p in PROGRESS] == [1.0] * 40


@pytest.mark.parametrize("warmup", [0.1, 0.25, 0.5])
def test_warmup_rises_linearly_from_zero(warmup: float) -> None:
    for schedule in ("constant", "cosine"):
        phase = Phase(schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
        for p in PROGRESS:
            if p < warmup:
                assert phase.factor(p) == pytest.approx(p / warmup)
        assert phase.factor(0) == 0
        assert phase.factor(warmup) == pytest.approx(1)
    assert all(Phase(warmup=warmup).factor(p) == 1 for p in PROGRESS if p >= warmup)


def test_cosine_falls_to_zero() -> None:
    for p in PROGRESS:
        assert Phase(schedule="cosine").factor(p) == pytest.approx(math.cos(math.pi * p / 2) ** 2)
        if p >= 0.25:
            expected = math.cos(math.pi / 2 * (p - 0.25) / 0.75) ** 2
            assert Phase(schedule="cosine", warmup=0.25).factor(p) == pytest.approx(expected)
    assert Phase(schedule="cosine", warmup=0.3).factor(1 - 1e-9) == pytest.approx(0, abs=1e-12)


def test_timeline() -> None:
    recipe = Recipe([Phase("a", 2), Phase("none", 0), Phase("b", 1), Phase("c", 3)])
    places = [recipe.at(epoch) for epoch in range(recipe.epochs)]
    assert [(phase.name, at) for phase, at in places] == [
        ("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2)
    ]  # fmt: skip
    assert recipe.epochs == 6
    assert Recipe([]).epochs == 0


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases: at least one phase is needed"),
        ([Phase(lrs={"head": 1}, epochs=-1)], "phases[0]: epochs must be 0 or more and warmup in [0, 1)"),
        ([Phase(lrs={"head": 1}, warmup=1)], "phases[0]: epochs must be 0 or more and warmup in [0, 1)"),
        ([Phase(lrs={"head": 1}, warmup=-0.1)], "phases[0]: epochs must be 0 or more and warmup in [0, 1)"),
        ([Phase(lrs={"head": 1}), Phase()], "phases[1].lrs: a learning rate is needed for at least one group of trunk"),
        ([Phase(lrs={"head": 1}, gamma=-1)], "phases[0].gamma must be above 0 and finite; got -1"),
        ([Phase(lrs={"head": 1}, gamma=0)], "phases[0].gamma must be above 0 and finite; got 0"),
        ([Phase(lrs={"head": 1}, gamma=math.nan)], "phases[0].gamma must be above 0 and finite; got nan"),
        ([Phase(lrs={"head": 1}, gamma=math.inf)], "phases[0].gamma must be above 0 and finite; got inf"),
        ([Phase(lrs={"head": 1}, milestones=[3, -1])], "phases[0].milestones must be epochs, 0 or more; got -1"),
        ([Phase(lrs={"hed": 1})], "unknown parameter group in phases[0].lrs: 'hed'; did you mean 'head'?"),
        (
            [Phase(lrs={"head": 1}, eval_modules=["trunk.bm"])],
            "unknown module in phases[0].eval_modules: 'trunk.bm'; did you mean 'trunk.bn'",
        ),
    ],
)
def test_unsound_recipes(phases: list[Phase], message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe(phases).check(["trunk", "head"], ["trunk", "trunk.bn", "head"])
    assert str(error.value).startswith(message)


def test_epochs_of_earlier_phases_of_the_same_name() -> None:
    phases = [Phase("a", 2), Phase("b", 1), Phase("none", 0), Phase("a", 3), Phase("b", 2), Phase("a", 1)]
    recipe = Recipe(phases)
    number = [number for number, phase in enumerate(phases) for _ in range(phase.epochs)]
    for epoch in range(recipe.epochs):  # the definition: count single epochs
        name = phases[number[epoch]].name
        assert recipe.before(epoch) == sum(phases[k].name == name and k < number[epoch] for k in number)
    assert Recipe([phases[0]] * 2).before(3) == 2  # one object twice
    assert Recipe([Phase("a", 10**20), Phase("a", 10**20)]).before(10**20) == 10**20


def test_sound_recipes() -> None:
    Recipe([Phase(lrs={"head": 1}, schedule="step", milestones=[0, 2], gamma=0.5)]).check(["head"], ["head"])
    Recipe([Phase(epochs=0), Phase(lrs={"head": 1}, warmup=0.9, eval_modules=["trunk.bn"])]).check(
        ["trunk", "head"], ["trunk", "trunk.bn", "head"]
    )


class Rates(pl.Callback):
    """Notes the learning rates that each step was made with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})


def test_every_step_has_its_rate(tiny_cub: Cub, tmp_path: Path, inject: Callable[..., None]) -> None:
    rates = Rates()
    inject(rates)
    phases = [
        {"epochs": 2, "lrs": {"head": 0.3}, "schedule": "cosine", "warmup": 0.5},
        {"epochs": 1, "lrs": {"backbone": 0.01, "attention": 0.02, "head": 0.03}},
    ]
    fit(tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=phases))
    # 9 images make 2 steps of 4 in each epoch.
    assert [group["head"] for group in rates.seen] == pytest.approx([0, 0.15, 0.3, 0.15, 0.03, 0.03])
    assert [group["backbone"] for group in rates.seen] == [0, 0, 0, 0, 0.01, 0.01]
    assert [group["attention"] for group in rates.seen] == [0, 0, 0, 0, 0.02, 0.02]


ALL, LAST = {"trunk": 1.0, "last": 1.0}, {"last": 1.0}


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase("a", 2, ALL)], None),  # nothing is ever a patch
        ([Phase("a", 2, ALL, select="last", on_end=["push"])], None),
        ([Phase("a", 2, ALL, select="none"), Phase("b", 2, LAST, eval_modules=["net"], on_start=["push"])], None),
        ([Phase("a", 2, ALL, on_start=["push"])], "('trunk' changes)"),
        ([Phase("a", 1, ALL, on_end=["push"])], None),  # its one epoch ends with the push
        ([Phase("a", 2, ALL, select="none"), Phase("b", 1, ALL, select="last", on_end=["push"])], None),
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("b", 3, LAST, eval_modules=["net"])], None),
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("none", 0, ALL)], None),
        ([Phase("a", 2, ALL), Phase("none", 0, ALL, on_end=["push"])], None),  # that never happens
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("b", 3, {"trunk": 0.0, **LAST})], "'net.norm'"),
        ([Phase("a", 2, ALL, on_end=["push"])], "phases[0].select=every"),
        ([Phase("a", 1, ALL), Phase("b", 1, ALL, on_end=["push"])], "phases[0].select=every"),
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("b", 2, ALL, select="last")], "('trunk' changes)"),
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("b", 3, LAST)], "('net.norm' changes)"),
        ([Phase("a", 2, ALL, select="last", on_end=["push"]), Phase("b", 3, LAST, eval_modules=["ne"])], "'net.norm'"),
    ],
)
def test_only_epochs_whose_prototypes_are_patches_can_be_selected(phases: list[Phase], message: str | None) -> None:
    recipe = Recipe(phases)
    if message is None:
        recipe.check_pushed("push", ["last"], ["net.norm"], selecting=True)
    else:
        with pytest.raises(InputError, match=re.escape(message)):
            recipe.check_pushed("push", ["last"], ["net.norm"], selecting=True)
    # The definition: at the end of every epoch that can be selected nothing has moved since a push
    patches, good, last = False, True, True
    for epoch in range(recipe.epochs):
        phase, position = recipe.at(epoch)
        patches = patches or (position == 0 and "push" in phase.on_start)
        patches = patches and set(phase.lrs) == {"last"} and phase.eval_modules == ["net"]
        patches = patches or (position == phase.epochs - 1 and "push" in phase.on_end)
        good = good and (patches or not recipe.selectable(epoch))
        last = patches
    pushes = any([*phase.on_start, *phase.on_end] for phase in phases if phase.epochs)
    assert (good or not pushes) == (message is None)
    if last or not pushes:  # without validation the last epoch alone counts
        recipe.check_pushed("push", ["last"], ["net.norm"], selecting=False)
    else:
        with pytest.raises(InputError, match="not patches"):
            recipe.check_pushed("push", ["last"], ["net.norm"], selecting=False)
