"""The callback of the phases: actions at a phase's start and end, and a trainer without it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.runs.building import build_data, build_model
from interp_models.training.schedule import PhaseSchedule
from tests.conftest import BCNN_LRS, Cub, tiny_config


def built(cub: Cub, tmp_path: Path) -> tuple[Any, Any, dict[str, Any]]:
    phases = [
        {"name": "a", "epochs": 1, "lrs": BCNN_LRS, "on_end": ["reset_optimizer"]},
        {"name": "b", "epochs": 2, "lrs": BCNN_LRS, "on_start": ["reset_optimizer"]},
    ]
    node = tiny_config(cub.root, phases=phases) | {"optimizer": {"name": "adamw"}}
    options: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 3, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "default_root_dir": tmp_path, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return build_model(node, 3), build_data(node), options


def test_actions_come_before_the_first_and_after_the_last_step(
    tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, options = built(tiny_cub, tmp_path)
    seen: list[str] = []
    cls, step = type(model), type(model).training_step

    def training_step(self: Any, batch: Sample, batch_idx: int) -> torch.Tensor:
        assert self.training
        seen.append(f"step of {self.trainer.current_epoch}")
        return step(self, batch, batch_idx)

    def reset(self: Any, data: pl.LightningDataModule) -> None:
        assert not self.training
        seen.append("reset")

    monkeypatch.setattr(cls, "training_step", training_step)
    monkeypatch.setattr(cls, "reset_optimizer", reset)
    pl.Trainer(callbacks=[PhaseSchedule()], **options).fit(model, data)
    assert list(dict.fromkeys(seen)) == ["step of 0", "reset", "step of 1", "step of 2"]
    assert seen.count("reset") == 2
    first = seen.index("step of 1")
    assert seen[first - 2 : first] == ["reset", "reset"]


def test_a_trainer_without_the_phases_is_refused(tiny_cub: Cub, tmp_path: Path) -> None:
    """All rates would stay at 0."""
    model, data, options = built(tiny_cub, tmp_path)
    with pytest.raises(InputError, match=r"needs callbacks=\[PhaseSchedule"):
        pl.Trainer(**options).fit(model, data)


def test_an_action_without_a_method_is_refused_before_the_training(
    tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, options = built(tiny_cub, tmp_path)
    model.check_recipe()
    monkeypatch.setattr(type(model), "actions", ("reset_optimizer", "puhs"))
    model.recipe.phases[0].on_end = ["puhs"]
    with pytest.raises(InputError, match=r"BCNN has no method for its action 'puhs'; known: reset_optimizer$"):
        pl.Trainer(callbacks=[PhaseSchedule()], **options).fit(model, data)
    assert not any(parameter.grad is not None for parameter in model.parameters())
