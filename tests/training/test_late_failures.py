"""What ends a training late is found before its first epoch, or leaves what was done before it."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from interp_models import MODELS
from interp_models.config.loading import as_dict, check
from interp_models.core import files
from interp_models.core.errors import InputError
from interp_models.runs import preparation
from interp_models.runs.building import build_data, build_model
from interp_models.runs.config import TrainConfig
from interp_models.training.attention_logger import AttentionLogger
from interp_models.training.module import InterpModule
from tests.conftest import CNN_LRS, TINY_CNN, Cub, Script, fit, tiny_config, tiny_options, write_config
from tests.training.test_resume import assert_same_runs

Inject = Callable[..., None]

# A batch of one


def resnet_config(cub: Cub, out: Path, size: int, batch_size: int, **phase: Any) -> dict[str, Any]:
    """A trunk that divides by 32 and ends in a batch norm."""
    node = tiny_config(cub.root, out=str(out), phases=[{"epochs": 1, "lrs": CNN_LRS, **phase}])
    node["model"] = {"name": "cnn", "backbone": "resnet10t", "weights": None}
    node["data"] |= {"image_size": size, "batch_size": batch_size}
    return node


@pytest.mark.parametrize(
    ("size", "batch_size", "phase", "right"),
    [
        (32, 1, {}, False),
        (32, 2, {}, True),
        (64, 1, {}, True),  # maps of 2 x 2
        (32, 1, {"eval_modules": ["backbone"]}, True),
    ],
)
def test_steps_of_one_image_with_batch_norm_on_one_cell(
    script: Script, tiny_cub: Cub, tmp_path: Path, size: int, batch_size: int, phase: dict[str, Any], right: bool
) -> None:
    node = resnet_config(tiny_cub, tmp_path / "run", size, batch_size, **phase)
    outcome = script("train", write_config(tmp_path / "c.yaml", node), "trainer.limit_train_batches=2")
    if right:
        assert outcome.code == 0, outcome.err
        return
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: phases[0]: CNN cannot be trained by steps of 1 image per device at data.image_size=")
    assert "Expected more than 1 value per channel" in line
    assert "; take more images per step, larger images, or eval_modules" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("devices", "synced", "right"), [(1, False, True), (8, False, True), (9, False, False), (9, True, True)]
)
def test_few_images_on_many_devices(tiny_cub: Cub, tmp_path: Path, devices: int, synced: bool, right: bool) -> None:
    """9 images for steps of 4 per device: on 8 devices the last ones make 2 of them, on 9 one each."""
    node = as_dict(check(TrainConfig, resnet_config(tiny_cub, tmp_path, 32, 4)))
    data, model = build_data(node), build_model(node, 3)
    if right:
        preparation.check_images(model, data, devices, synced=synced)
    else:
        with pytest.raises(InputError, match="steps of 1 image per device"):
            preparation.check_images(model, data, devices, synced=synced)


def test_the_second_phase_is_tried_too(tiny_cub: Cub, tmp_path: Path) -> None:
    node = resnet_config(tiny_cub, tmp_path, 32, 1, eval_modules=["backbone"])
    node["phases"].append({"epochs": 1, "lrs": CNN_LRS})
    node = as_dict(check(TrainConfig, node))
    with pytest.raises(InputError, match=r"phases\[1\]: CNN cannot be trained"):
        preparation.check_images(build_model(node, 3), build_data(node), 1)


@pytest.mark.parametrize("name", MODELS.names())
def test_trying_changes_nothing(tiny_cub: Cub, tmp_path: Path, name: str) -> None:
    node = tiny_config(tiny_cub.root, model={"name": name, **tiny_options(name)})
    if name == "cal":
        node["model"]["dropout"] = 0.5
    groups = MODELS.build(name, tiny_options(name), num_classes=3).parameter_groups()
    node["phases"] = [{"epochs": 1, "lrs": dict.fromkeys(groups, 0.1)}]
    node = as_dict(check(TrainConfig, node))
    model, data = build_model(node, 3), build_data(node)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    preparation.check_images(model, data, 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())


# Actions


def test_a_phase_without_epochs_has_no_actions(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    node = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=TINY_CNN)
    node["phases"] = [{"epochs": 1, "lrs": CNN_LRS}, {"epochs": 0, "lrs": CNN_LRS, "on_end": ["reset_optimizer"]}]
    config = write_config(tmp_path / "c.yaml", node)
    outcome = script("train", config)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        "error: phases[1].on_end: reset_optimizer would never be called, because the phase has epochs=0"
    )
    assert not (tmp_path / "run").exists()
    assert script("train", config, "phases[1].on_end=[]").code == 0


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"accumulate_grad_batches": 3}, 1),  # of 2 batches
        ({"accumulate_grad_batches": 2, "limit_train_batches": 3}, 2),
        ({"limit_train_batches": 0.5}, 2),
        ({"limit_train_batches": 1}, 1),
    ],
)
def test_actions_happen_once_after_the_last_step(
    tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any], steps: int
) -> None:
    happened: list[tuple[int, int]] = []

    def reset(self: InterpModule, data: pl.LightningDataModule) -> None:
        happened.append((self.current_epoch, self.global_step))

    monkeypatch.setattr(InterpModule, "reset_optimizer", reset)
    phases = [{"epochs": 2, "lrs": CNN_LRS, "on_end": ["reset_optimizer"]}, {"epochs": 1, "lrs": CNN_LRS}]
    node = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=TINY_CNN, phases=phases)
    node["data"]["batch_size"] = 2 if "limit_train_batches" in trainer else 4
    node["trainer"] |= trainer
    fit(node)
    assert happened == [(1, 2 * steps)]


def test_no_batch_within_the_limit(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=TINY_CNN))
    outcome = script("train", config, "phases=[{epochs: 1, lrs: {head: 0.1}}]", "trainer.limit_train_batches=0.1")
    assert outcome.code == 2
    assert outcome.err == "error: trainer.limit_train_batches=0.1 of 3 batches is none; at least one is needed\n"
    assert not (tmp_path / "run").exists()


# A disk that is full


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left in a/b"),
        (errno.EDQUOT, "the disk quota is used up in a/b"),
        (errno.EROFS, "a/b is on a file system that is read-only"),
        (errno.EACCES, None),
    ],
)
def test_the_line(number: int, message: str | None) -> None:
    error = OSError(number, os.strerror(number), "a/b/c")
    assert files.unwritable(error) == message
    after = RuntimeError("unexpected pos 576 vs 534")  # torch.save's, while it tidies up
    assert files.unwritable(after) is None
    after.__context__ = error
    assert files.unwritable(after) == message


def test_memory_that_loaders_share_is_named() -> None:
    error = RuntimeError(
        "Caught RuntimeError in worker\nunable to write to file </torch_1>: No space left on device (28)"
    )
    assert files.unwritable(error) == "no space left: unable to write to file </torch_1>: No space left on device (28)"


def test_a_file_that_could_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")

    def write() -> None:
        with files.whole(tmp_path / "file") as partial:
            partial.write_text("af")
            raise OSError(errno.ENOSPC, "No space left on device")  # as of writing: it names no file

    with pytest.raises(OSError, match="No space") as error:
        write()
    assert files.unwritable(error.value) == f"no space left in {tmp_path}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def small_config(cub: Cub, out: Path) -> dict[str, Any]:
    node = tiny_config(cub.root, out=str(out), model=TINY_CNN, phases=[{"epochs": 3, "lrs": CNN_LRS}])
    return node | {"attention": {"every_n_epochs": 1, "n_images": 1}}


@pytest.fixture(scope="module")
def whole_run(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that is never short of space."""
    return fit(small_config(tiny_cub, tmp_path_factory.mktemp("whole") / "run"))


@pytest.mark.parametrize("what", ["best.ckpt", "metrics.csv", "epoch-001.png", "confusion.png"])
def test_a_disk_that_is_full_from_some_file_on(
    script: Script, tiny_cub: Cub, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Whatever is written next: one line, the last good checkpoint stays, and the run goes on when there is room."""
    run, fsync, seen = tmp_path / "run", os.fsync, [0]
    most = {"best.ckpt": 1, "metrics.csv": 3}.get(what, 0)  # what is written before

    def full(file: int) -> None:
        seen[0] += f".{what}." in os.readlink(f"/proc/self/fd/{file}")
        if seen[0] > most:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    config = write_config(tmp_path / "c.yaml", small_config(tiny_cub, run))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = script("train", config)
    folder = {"png": run / "attention", "ckpt": run / "checkpoints"}.get(what.split(".")[1], run)
    folder = run if what == "confusion.png" else folder
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == f"error: no space left in {folder}"
    assert "Traceback" not in outcome.err
    done = 1 + int(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"])
    assert done == (3 if what == "confusion.png" else 2 if what == "metrics.csv" else 1)
    assert not (run / "metrics.json").exists()
    assert not list(run.rglob("*.partial"))
    assert script("train", f"resume={run}").code == 0
    assert_same_runs(run, whole_run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can make a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk(script: Script, tiny_cub: Cub, whole_run: Path, small_disk: Path, tmp_path: Path) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    config = write_config(tmp_path / "c.yaml", small_config(tiny_cub, run))

    class Fill(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                size = os.statvfs(small_disk)
                ballast.write_bytes(bytes(size.f_bavail * size.f_frsize - 20_000))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionLogger, "of", lambda config, run: [Fill()])
        outcome = script("train", config)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == f"error: no space left in {run}/checkpoints"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    ballast.unlink()
    assert script("train", f"resume={run}").code == 0
    assert_same_runs(run, whole_run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    outcome = script("train", f"resume={run}", "phases[0].epochs=4")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"error: {run} cannot be written (Read-only file system), which a training needs"
    )
