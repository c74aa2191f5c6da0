"""Bad input of the two scripts: one line that says what, where and what was expected, and nothing lost."""

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import typing
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from interp_models import DATASETS, EXPLAINERS, METRICS, MODELS
from interp_models.commands.cli import run_script, separated
from interp_models.config.loading import load_yaml
from interp_models.core.errors import InputError
from interp_models.core.registry import Registry
from interp_models.core.schema import schema_of
from interp_models.data import TRANSFORMS
from interp_models.data.decoding import looks_whole
from interp_models.data.module import DataModule
from interp_models.evaluation.config import EvaluateConfig
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS
from interp_models.runs.config import TrainConfig
from interp_models.runs.folders import run_folder
from interp_models.runs.networks import NetworkConfig
from interp_models.training import loggers
from interp_models.training.config import LoggerConfig
from interp_models.userstudy import TASKS
from tests.conftest import (
    BCNN_LRS,
    QUICK_EVALUATION,
    TINY_CNN,
    Cub,
    Outcome,
    Script,
    copy_run,
    tiny_config,
    tiny_options,
    write_config,
)
from tests.data.make_cub import make_cub

ROOT = Path(__file__).parents[1]


def refused(outcome: Outcome, *parts: str, late: bool = False) -> None:
    """Exit code 2 and one line on stderr that holds all parts; `late` allows lines of a progress bar before it."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2
    assert outcome.err.endswith("\n")
    assert lines[-1].startswith("error: ")
    for part in parts:
        assert part in lines[-1]
    assert "Traceback" not in outcome.err
    if late:
        assert not any("error" in line for line in lines[:-1])
    else:
        assert len(lines) == 1
        assert outcome.out == ""


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files, but for hidden ones: locks, and what interrupted evaluations leave."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# train.py


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Keys, at every level
        ("sed=1", "unknown key in config: 'sed'; did you mean 'seed'?"),
        ("data.batchsize=1", "unknown key in data: 'batchsize'; did you mean 'batch_size'?"),
        ("data.dataset.rot=x", "unknown key in dataset 'cub': 'rot'; did you mean 'root'?"),
        ("model.backbon=x", "unknown key in model 'bcnn': 'backbon'; did you mean 'backbone'?"),
        ("phases[0].epoch=1", "unknown key in config.phases[0]: 'epoch'; did you mean 'epochs'?"),
        ("phases[0].lrs.hed=1", "unknown parameter group in phases[0].lrs: 'hed'; did you mean 'head'?"),
        (
            "phases[0].eval_modules=[backbon]",
            "unknown module in phases[0].eval_modules: 'backbon'; did you mean 'backbone'",
        ),
        ("optimizer.nam=sgd", "unknown key in config.optimizer: 'nam'; did you mean 'name'?"),
        ("trainer.max_step=1", "unknown key in trainer: 'max_step'; did you mean 'max_steps'"),
        ("logger.wanbd=online", "unknown key in config.logger: 'wanbd'; did you mean 'wandb'?"),
        ("attention.n_image=1", "unknown key in config.attention: 'n_image'; did you mean 'n_images'?"),
        ("evaluation.grids=null", "unknown key in config.evaluation: 'grids'; did you mean 'grid'?"),
        # Names
        ("model.name=cnnn", "unknown model 'cnnn'; did you mean 'cnn' or 'bcnn'?"),
        ("model={}", f"model.name must be given: one of {', '.join(MODELS)}"),
        ("data.dataset.name=cup", "unknown dataset 'cup'; did you mean 'cub'?"),
        (
            "data.dataset={}",
            f"data.dataset.name must be given: one of {', '.join(DATASETS.names())}",
        ),
        ("data.dataset={name: cub}", "dataset 'cub': 'root' has no default and must be given"),
        ("model.backbone=resnt18", "unknown timm model 'resnt18'; did you mean 'resnet18'"),
        ("optimizer.name=sdg", "config.optimizer.name: Invalid value 'sdg', expected one of ['adam', 'adamw', 'sgd']"),
        # Types and values
        ("seed=one", "config.seed: Value 'one' of type 'str' could not be converted to Integer"),
        ("seed=-1", "seed must be from 0 to 4294967295; got -1"),
        ("data=cub", "config.data: Cannot assign str to Dict[str, Any]"),
        ("data.dataset=cub", "data.dataset: expected keys and values (name and options), got 'cub'"),
        ("data.batch_size=four", "data.batch_size: Value 'four' of type 'str' could not be converted to Integer"),
        ("data.batch_size=0", "data.batch_size must be at least 1; got 0"),
        ("data.image_size=0", "data.image_size must be at least 1; got 0"),
        (
            "model={name: bcnn, backbone: inception_v3, weights: null}",
            "data.image_size=64: BCNN cannot take such images (",
        ),
        ("data.num_workers=-1", "data.num_workers must be at least 0; got -1"),
        ("data.val_fraction=1", "data.val_fraction must be in [0, 1); got 1.0"),
        ("data.val_fraction=0.1", "data.val_fraction=0.1 leaves no validation image; use 0 or a larger fraction"),
        ("data.dataset.download=maybe", "dataset 'cub'.download: Value 'maybe' is not a valid bool"),
        ("model=cnn", "config.model: Cannot assign str to Dict[str, Any]"),
        ("model.n_maps=few", "model 'bcnn'.n_maps: Value 'few' of type 'str' could not be converted to Integer"),
        ("model.output_stride=7", "does not offer output_stride 7; it offers 4, 8, 16, 32"),
        ("model.weights=none.pth", "weights file none.pth does not exist"),
        ("phases=[]", "phases: at least one phase is needed"),
        ("phases[0].epochs=0", "phases: at least one epoch is needed"),
        ("phases[0].epochs=-1", "phases[0]: epochs must be 0 or more and warmup in [0, 1)"),
        ("phases[0].warmup=1", "phases[0]: epochs must be 0 or more and warmup in [0, 1)"),
        (
            "phases[0].lrs={}",
            "phases[0].lrs: a learning rate is needed for at least one group of backbone, attention, ",
        ),
        (
            "phases[0].lrs.head=fast",
            "config.phases[0].lrs.head: Value 'fast' of type 'str' could not be converted to F",
        ),
        ("phases[1].epochs=1", "override 'phases[1].epochs=1' cannot be applied: list index out of range"),
        ("phases=5", "config.phases: expected a list, got 5"),
        ("logger=5", "config.logger: expected keys and values (wandb, project, tensorboard), got 5"),
        ("logger.wandb=sometimes", "config.logger.wandb: Invalid value 'sometimes', expected one of ['offline', 'onli"),
        ("trainer=5", "config.trainer: Cannot assign int to Dict[str, Any]"),
        ("trainer.logger=true", "trainer.logger is set by the script and cannot be given"),
        ("trainer.max_epochs=3", "trainer.max_epochs is set by the script and cannot be given"),
        ("trainer.accelerator=gpuu", "trainer: You selected an invalid accelerator name: `accelerator='gpuu'`."),
        ("trainer.strategy=dpd", "trainer.strategy=dpd is not supported; auto, ddp, ddp_find_unused_p"),
        ("trainer.devices=none", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("trainer.enable_checkpointing=false", "trainer.enable_checkpointing cannot be given; every epoch is saved"),
        ("trainer.val_check_interval=3", "trainer.val_check_interval cannot be given; every epoch ends with its valid"),
        ("trainer.fast_dev_run=true", "trainer.fast_dev_run cannot be given; try phases[0].epochs=1 trainer.limit_tra"),
        ("trainer.overfit_batches=1", "trainer.overfit_batches cannot be given; try trainer.limit_train_batches=2"),
        (
            "trainer.limit_test_batches=0.01",
            "trainer.limit_test_batches=0.01 of 3 batches is none; at least one is nee",
        ),
        (
            "trainer.limit_val_batches=0.01",
            "trainer.limit_val_batches=0.01 of 1 batches is none; at least one is needed",
        ),
        ("attention.every_n_epochs=-1", "attention.every_n_epochs must be 0 or more; got -1"),
        ("trainer=[]", "config.trainer: expected dict[str, typing.Any], got []"),
        ("out=r\udce9t", "r\\udce9t: a name given here must be UTF-8, as config.yaml is"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches must not be 0; data.val_fraction=0 trains without"),
        ("trainer.precision=bf16-true", "trainer.precision=bf16-true is not supported; bf16-mixed and 16-mixed are"),
        (
            "trainer.strategy=ddp_spawn",
            "trainer.strategy=ddp_spawn is not supported; auto, ddp, ddp_find_un",
        ),
        ("trainer.strategy=ddp_notebook_find_unused_parameters_true", "is not supported; auto, ddp, ddp_find_unused_p"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp is not supported; auto, ddp, "),
        ("trainer.devices=0", "trainer: `Trainer(devices=0)` value is not a valid input using cpu accelerator."),
        ("trainer.devices=-2", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
        ("trainer.devices=9999", "trainer.devices=9999: this machine has "),
        ("trainer.num_nodes=0", "trainer: `num_nodes` must be a positive integer, but got 0."),
        ("trainer.precision=foo", "trainer: Precision 'foo' is invalid."),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1; got 0"),
        ("trainer.accumulate_grad_batches=two", "trainer.accumulate_grad_batches: Value 'two' of type 'str' could not"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be at least 0; got -1"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps must be at least 1; got 0"),
        ("trainer.limit_train_batches=2.5", "trainer: You have passed invalid value 2.5 for limit_train_batches"),
        ("trainer.deterministic=perhaps", "trainer.deterministic must be true, false or warn; got 'perhaps'"),
        ("trainer.sync_batchnorm=perhaps", "trainer.sync_batchnorm: Value 'perhaps' is not a valid bool"),
        ("out=", "'out=' has no value; write key=value, without spaces around =; out=null means none"),
        ("phases[0].lrs.head=-1", "phases[0].lrs.head must be 0 or more; got -1.0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be 0 or more; got -1.0"),
        ("optimizer.weight_decays={head: -1}", "optimizer.weight_decays.head must be 0 or more; got -1.0"),
        ("optimizer.eps=0", "optimizer.eps must be above 0; got 0.0"),
        ("distillation={teacher: none}", "distillation.teacher: none is not a run folder"),
        ("model.n_maps=0", "model.n_maps must be at least 1; got 0"),
        ("model.dropout=2", "model.dropout must be in [0, 1); got 2.0"),
        ("model.label_smoothing=2", "model.label_smoothing must be in [0, 1); got 2.0"),
        ("data.dataset.root=${nowhere}", "config.data.dataset.root: Interpolation key 'nowhere' not found"),
        ("--sed=1", "unknown key in config: '--sed'; did you mean 'seed'?"),
        ("--seed", "unknown option --seed; options are written key=value, see --help"),
        ("=1", "'=1' is not an override; write key=value"),
    ],
)
def test_train_refuses(script: Script, tiny_cub: Cub, tmp_path: Path, override: str, message: str) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root))
    refused(script("train", config, f"out={tmp_path}/run", override), message)
    assert contents(tmp_path / "run") == {}  # so that the same out= can be given again
    if override.startswith(("trainer.", "out=")):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["explainers=[gradcm]"], "unknown explainer 'gradcm'; did you mean 'gradcam'"),
        (["explainers=[{name: rise, mask: 3}]"], "unknown key in explainer 'rise': 'mask'; did you mean 'masks'?"),
        (["metrics=[dau]"], "unknown metric 'dau'; did you mean 'dauc'"),
        (["target=lable"], "target must be 'prediction', 'label' or a class number; got 'lable'"),
    ],
)
def test_train_refuses_an_evaluation_that_cannot_be(
    script: Script, tiny_cub: Cub, tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root))
    changes = [f"evaluation.{override}" for override in ["every_n_epochs=1", *overrides]]
    refused(script("train", config, f"out={tmp_path}/run", *changes), message)
    assert contents(tmp_path / "run") == {}


def test_missing_and_malformed_configs(script: Script, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: [\n")
    refused(
        script("train", tmp_path / "b.yaml"), f"config {tmp_path}/b.yaml does not exist; found there: {tmp_path}/c.yaml"
    )
    refused(script("train", tmp_path / "c.yaml"), f"config {tmp_path}/c.yaml is not valid yaml", "line 2")
    refused(script("train", tmp_path / "c.yaml", tmp_path / "d.yaml"), "one config at most, and none with resume=; got")
    refused(script("evaluate", tmp_path, f"config={tmp_path}/b.yaml"), f"config {tmp_path}/b.yaml does not exist")


@pytest.fixture
def own_cub(tmp_path: Path) -> Path:
    make_cub(tmp_path / "cub", per_class=8)
    return tmp_path / "cub"


def train_images(root: Path, train: bool = True) -> list[Path]:
    flags = [line.split()[1] == "1" for line in (root / "train_test_split.txt").read_text().splitlines()]
    paths = [root / "images" / line.split()[1] for line in (root / "images.txt").read_text().splitlines()]
    return [path for path, flag in zip(paths, flags, strict=True) if flag == train]


def train_on(script: Script, root: Path, *overrides: str) -> Outcome:
    config = write_config(root.parent / "c.yaml", tiny_config(root, out=str(root.parent / "run")))
    return script("train", config, *overrides)


def test_missing_data(script: Script, own_cub: Path) -> None:
    (own_cub / "parts/part_locs.txt").unlink()
    refused(train_on(script, own_cub), f"{own_cub}/parts/part_locs.txt is missing")
    shutil.rmtree(own_cub)
    refused(train_on(script, own_cub), f"{own_cub}/CUB_200_2011/images.txt is missing; {own_cub} or its folder ")


def test_listed_image_missing(script: Script, own_cub: Path) -> None:
    path = train_images(own_cub)[3]
    path.unlink()
    refused(train_on(script, own_cub), f"image {path} is missing; the data set's lists name it")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(script: Script, own_cub: Path, workers: int) -> None:
    """One that looks whole from outside is found when it is read."""
    path = train_images(own_cub)[3]
    Image.open(path).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:500] + bytes(100) + path.read_bytes()[600:])
    assert looks_whole(path)
    outcome = train_on(script, own_cub, f"data.num_workers={workers}")
    refused(outcome, f"error: image {path} cannot be decoded (", "; data.skip_corrupt=true leaves", late=True)


def test_files_that_are_not_whole_are_found_before_the_training(script: Script, own_cub: Path) -> None:
    train, test = train_images(own_cub), train_images(own_cub, train=False)
    train[3].write_bytes(train[3].read_bytes()[:-100])
    refused(
        train_on(script, own_cub), f"error: image {train[3]} cannot be decoded (", "; data.skip_corrupt=true leaves"
    )
    test[2].write_bytes(b"")
    test[7].unlink()
    refused(train_on(script, own_cub), f"error: 3 images cannot be used; the first: image {train[3]} cannot be decoded")
    assert not (own_cub.parent / "run").exists()


@pytest.mark.parametrize("model", ["protopnet", "prototree", "bcnn"])
def test_a_class_without_a_training_image(script: Script, own_cub: Path, model: str) -> None:
    lines = (own_cub / "image_class_labels.txt").read_text().split()
    second = set(lines[:-1:2]) & {image for image, label in zip(lines[::2], lines[1::2], strict=True) if label == "2"}
    split = own_cub / "train_test_split.txt"
    rows = [line.split() for line in split.read_text().splitlines()]
    split.write_text("".join(f"{image} {0 if image in second else flag}\n" for image, flag in rows))
    options = tiny_options(model) | ({"depth": 2} if model == "prototree" else {})
    phases = {
        "bcnn": {"lrs": {"head": 0.01}},
        "protopnet": {"lrs": {"prototypes": 0.01}, "on_end": ["push"], "select": "last"},
        "prototree": {"lrs": {"prototypes": 0.01}, "on_end": ["prune", "project"], "select": "last"},
    }
    config = write_config(
        own_cub.parent / "c.yaml",
        tiny_config(own_cub, model={"name": model, **options}, phases=[{"epochs": 1, **phases[model]}]),
    )
    outcome = script("train", config, f"out={own_cub.parent / 'run'}")
    if model == "bcnn":
        assert outcome.code == 0
        told = "6 training, 2 validation, 16 test images; classes without a training image: 1 (002.Kind_2)\n"
        assert outcome.err == f"data: 3 classes; {told}"
    else:
        refused(outcome, "prototypes of a class need a training image of it; there is none of 1: 002.Kind_2")
        assert not (own_cub.parent / "run").exists()


def test_skip_corrupt_counts_and_names(script: Script, own_cub: Path) -> None:
    broken = [train_images(own_cub)[3], train_images(own_cub, train=False)[7]]
    broken[0].write_bytes(b"junk")
    broken[1].unlink()
    names = [str(path.relative_to(own_cub / "images")) for path in broken]
    left_out = (
        f"left out: images that cannot be decoded: 1 ({names[0]}); the first: image {broken[0]} cannot be decoded "
        f"(cannot identify image file {str(broken[0])!r}), images that are missing: 1 ({names[1]}); the first: image "
        f"{broken[1]} is missing; the data set's lists name it\n"
    )
    outcome = train_on(script, own_cub, "data.skip_corrupt=true")
    assert outcome.code == 0
    assert outcome.err == f"data: 3 classes; 8 training, 3 validation, 11 test images; {left_out}"
    assert "on 11 images" in outcome.out
    outcome = script("evaluate", own_cub.parent / "run", *QUICK_EVALUATION)
    assert outcome.code == 0
    assert outcome.err.startswith(f"data: 3 classes; 8 training, 3 validation, 11 test images; {left_out}")
    rows = yaml.safe_load((own_cub.parent / "run/evaluation/results.json").read_text())["rows"]
    assert {row["n"] for row in rows} == {11}
    for path in train_images(own_cub):
        path.write_bytes(b"junk")
    shutil.rmtree(own_cub.parent / "run")
    refused(
        train_on(script, own_cub, "data.skip_corrupt=true"), "no train image of 12 can be loaded; the first: image "
    )


def test_empty_data_set(script: Script, own_cub: Path) -> None:
    split = own_cub / "train_test_split.txt"
    split.write_text(split.read_text().replace(" 0\n", " 1\n"))
    refused(train_on(script, own_cub), "data set 'cub' has no test images")


def test_one_class(script: Script, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "data" / split / "only"
        folder.mkdir(parents=True)
        for n in range(8):
            Image.new("RGB", (80, 80), (n, 0, 0)).save(folder / f"{n}.jpg")
    node = tiny_config("")
    node["data"]["dataset"] = {"name": "image_folder", "root": str(tmp_path / "data")}
    refused(script("train", write_config(tmp_path / "c.yaml", node)), "needs at least 2 classes; the data set has 1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.safetensors", "cannot be read as tensors"),
        ("tensor.pt", "must hold named tensors; it holds a Tensor"),
    ],
)
def test_weights_that_are_none(script: Script, tiny_cub: Cub, tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(torch.zeros(3), path)
    else:
        path.write_bytes(b"no tensors")
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root))
    refused(script("train", config, f"model.weights={path}"), f"weights file {path} {message}")


@pytest.mark.parametrize("judged", [0, 1])
def test_a_training_that_diverges_stops_and_keeps_its_last_sound_weights(
    script: Script, tiny_cub: Cub, tmp_path: Path, judged: int
) -> None:
    run = tmp_path / "run"
    phases = [
        {"name": "sound", "epochs": 1, "lrs": {"head": 1e-3}},
        {"name": "wild", "epochs": 3, "lrs": {"backbone": 1e30, "attention": 1e30, "head": 1e30}},
    ]
    node = tiny_config(tiny_cub.root, out=str(run), phases=phases, attention={"every_n_epochs": 1, "n_images": 2})
    node["evaluation"] = {"every_n_epochs": judged, "explainers": ["intrinsic"], "metrics": ["ad"]}
    outcome = script("train", write_config(tmp_path / "c.yaml", node))
    refused(outcome, "the training loss of epoch ", "is nan; lower the learning rates", late=True)
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last["state_dict"].values())


def test_out_is_never_overwritten(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    before = contents(tmp_path)
    refused(script("train", config, f"out={tmp_path}/run"), f"out={tmp_path}/run is not empty; runs are never overwr")
    refused(script("train", config, f"out={tmp_path}/c.yaml"), f"out={tmp_path}/c.yaml cannot be made: ")
    assert contents(tmp_path) == before


# resume=


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed=3: a resumed run can change phases, trainer, logger, data.dataset.root, data.num_workers, "),
        (
            "seed=3",
            "feature_cache, plugins only (the split, the order and the augmentation of the images are drawn by it)",
        ),
        ("model.name=cnn", "model.name=cnn: a resumed run can change phases, "),
        ("model.name=cnn", " only (the checkpoint holds this model)"),
        ("data.batch_size=1", "data.batch_size=1: a resumed run can change phases, "),
        ("data.batch_size=1", " only (the steps of an epoch and the images of each step would change)"),
        ("data.augment=false", " only (the images or their form would change in the middle of the training)"),
        ("data={}", " only (the images or their form would change in the middle of the training)"),
        ("optimizer.eps=1", " only (the checkpoint holds the state of this optimizer)"),
        ("distillation.weight=1", " only (the loss would change in the middle of the training)"),
        ("out=x", "out=x: a resumed run can change phases, "),
        ("trainers=1", "trainers=1: a resumed run can change phases, "),
        ("phases[0].lrs.hed=1", "unknown parameter group in phases[0].lrs: 'hed'; did you mean 'head'?"),
        ("phases[0].epochs=0", "4 epochs are done, the phases have 0"),
        ("phases[0].epochs=2", "last.ckpt: 4 epochs are done, the phases have 2"),
        ("trainer.val_check_interval=1000", "trainer.val_check_interval cannot be given"),
        ("trainer.devices=none", "trainer: `devices` selected with"),
        ("logger.wanbd=offline", "unknown key in config.logger: 'wanbd'; did you mean 'wandb'?"),
    ],
)
def test_resume_refuses_and_leaves_the_run_as_it_was(
    script: Script, bcnn_run: Path, tmp_path: Path, override: str, message: str
) -> None:
    run = copy_run(bcnn_run, tmp_path / "run")
    before = contents(run)
    refused(script("train", f"resume={run}", override), message)
    assert contents(run) == before


def test_resume_of_another_training(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    run = copy_run(bcnn_run, tmp_path / "run")
    config = load_yaml(run / "config.yaml")
    config["optimizer"]["name"] = "sgd"
    write_config(run / "config.yaml", config)
    refused(
        script("train", f"resume={run}"),
        "last.ckpt: was trained with optimizer.name 'adamw', the config now says 'sgd'; ",
    )


def test_resume_of_no_run(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    refused(script("train", f"resume={tmp_path}"), f"{tmp_path} is not a run folder: it holds no config.yaml")
    refused(script("train", "resume="), "'resume=' has no value; write key=value, without spaces around =")
    refused(script("train", f"resume={bcnn_run}", f"resume={tmp_path}"), "resume= is given twice: resume=")
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        refused(script("train", f"resume={tmp_path}/{name}"), f"{tmp_path}/{name} is not a run folder")
    refused(script("train", "a.yaml", f"resume={bcnn_run}"), "one config at most, and none with resume=; got a.yaml")


def test_resume_from_a_broken_checkpoint(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    run = copy_run(bcnn_run, tmp_path / "run")
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:9999])
    before = contents(run)
    refused(script("train", f"resume={run}"), f"checkpoint {last} cannot be read (")
    assert contents(run) == before


# evaluate.py


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "unknown key in config: 'max_step'; did you mean 'max_steps'?"),
        ("dataset.rot=x", "unknown key in dataset 'cub': 'rot'; did you mean 'root'?"),
        ("logger.wanbd=online", "unknown key in config.logger: 'wanbd'; did you mean 'wandb'?"),
        ("trainer.device=1", "unknown key in trainer: 'device'; did you mean 'devices'?"),
        ("trainer.strategy=dpd", "trainer.strategy=dpd is not supported; auto, ddp, ddp_find_unused_p"),
        ("explainers=[gradcm]", "unknown explainer 'gradcm'; did you mean 'gradcam'"),
        ("explainers=gradcam", "config.explainers: expected a list, got 'gradcam'"),
        ("explainers=[]", "explainers and metrics: at least one of each is needed"),
        (
            "explainers=[{nam: rise}]",
            "an explainer is a name, or a mapping with 'name' and options; got {'nam': 'rise'}",
        ),
        ("explainers=[{name: rise, mask: 3}]", "unknown key in explainer 'rise': 'mask'; did you mean 'masks'?"),
        (
            "explainers=[{name: rise, masks: few}]",
            "explainer 'rise'.masks: Value 'few' of type 'str' could not be conv",
        ),
        ("explainers=[random, random]", "explainer 'random' is listed twice; give one of them another label"),
        (
            "explainers=[{name: random, label: a/b}]",
            "explainer label 'a/b' is used as a file name; it must not have '/'",
        ),
        ("explainers=[{name: random, label: ''}]", "explainer label '' is used as a file name"),
        ("explainers=[{name: [rise]}]", "an explainer is a name, or a mapping with 'name' and options"),
        ("trainer.limit_test_batches=1", "trainer.limit_test_batches cannot be given; n_images= says how many images"),
        ("metrics=[daux]", "unknown metric 'daux'; did you mean 'dauc'"),
        ("metrics=[]", "explainers and metrics: at least one of each is needed"),
        ("target=lable", "target must be 'prediction', 'label' or a class number; got 'lable'"),
        ("ckpt=bst", "config.ckpt: Invalid value 'bst', expected one of ['best', 'last']"),
        ("batch_size=0", "data.batch_size must be at least 1; got 0"),
        ("n_images=0", "n_images must be at least 1; got 0"),
        ("n_images=-3", "n_images must be at least 1; got -3"),
        ("report_images=-1", "report_images must be at least 0; got -1"),
        ("seed=-1", "seed must be from 0 to 4294967295; got -1"),
        (
            "dataset.root=/nowhere",
            "/nowhere/CUB_200_2011/images.txt is missing; /nowhere or its folder CUB_200_2011 must",
        ),
    ],
)
def test_evaluate_refuses(script: Script, bcnn_run: Path, override: str, message: str) -> None:
    refused(script("evaluate", bcnn_run, *QUICK_EVALUATION, override), message)


@pytest.fixture(scope="module")
def judged_run(bcnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation that later commands must not harm."""
    from interp_models.config.loading import check, override
    from interp_models.runs import evaluate

    run = copy_run(bcnn_run, tmp_path_factory.mktemp("judged") / "run")
    evaluate.evaluate([run], check(EvaluateConfig, override({}, QUICK_EVALUATION)))
    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset=gomez", "unknown preset 'gomez'; did you mean 'gomez2023'?"),
        ("target=3", "target 3 is out of range: the model has classes 0 to 2"),
        ("target=-1", "target -1 is out of range: the model has classes 0 to 2"),
        ("grid=[0, 3]", "grid must be [rows, columns], 'native' or null; got [0, 3]"),
        ("grid=[3]", "grid must be [rows, columns], 'native' or null; got [3]"),
        ("grid=natve", "grid must be [rows, columns], 'native' or null; got 'natve'"),
        ("max_steps=0", "max_steps must be at least 1; got 0"),
        ("batch=0", "batch must be at least 1; got 0"),
        ("explainers=[{name: gradcam, layer: backbon}]", "unknown layer 'backbon'; did you mean 'backbone'"),
        (
            "explainers=[{name: intrinsic, kind: klass}]",
            "unknown kind of explanation of BCNN: 'klass'; did you mean 'class'?",
        ),
        (
            "explainers=[{name: rise, masks: 0}]",
            "rise needs masks, cells, batch >= 1 and 0 < p1 < 1; got 0, 7, None, 0.5",
        ),
    ],
)
def test_what_the_model_refuses_leaves_earlier_results(
    script: Script, judged_run: Path, override: str, message: str
) -> None:
    before = contents(judged_run)
    assert "evaluation/results.json" in before
    refused(script("evaluate", judged_run, *QUICK_EVALUATION, override), message, late=True)
    assert contents(judged_run) == before


def test_corrupt_image_in_an_evaluation(script: Script, bcnn_run: Path, own_cub: Path) -> None:
    path = train_images(own_cub, train=False)[5]
    path.write_bytes(b"junk")
    outcome = script("evaluate", copy_run(bcnn_run, own_cub.parent / "r"), *QUICK_EVALUATION, f"dataset.root={own_cub}")
    refused(outcome, f"image {path} cannot be decoded (", late=True)


def test_evaluate_needs_runs(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    refused(script("evaluate"), "no run given; write python evaluate.py RUN [RUN ...] [key=value ...]")
    refused(script("evaluate", tmp_path / "none"), f"{tmp_path}/none is not a run folder: it holds no config.yaml")
    refused(
        script("evaluate", bcnn_run, bcnn_run),
        "two models have the same name, but results are listed by name: tiny/bcnn",
    )
    refused(
        script("evaluate", bcnn_run, f"{bcnn_run}/../bcnn"),
        "two models have the same name, but results are listed by name: tiny/bcnn",
    )


def change_checkpoint(change: str, path: Path, other: Path) -> None:
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "of another model":
        shutil.copy(other, path)
    elif change == "of nobody":
        torch.save([1, 2, 3], path)
    elif change == "pickled code":
        torch.save({"interp_models": {"format_version": 1}, "f": Path("x")}, path)
    else:
        checkpoint = torch.load(path, weights_only=True)
        if change == "foreign":
            del checkpoint["interp_models"]
        elif change == "later format":
            checkpoint["interp_models"]["format_version"] = 99
        elif change == "other shape":
            checkpoint["state_dict"]["attention.weight"] = torch.zeros(5, 256, 1, 1)
        elif change == "too little":
            del checkpoint["state_dict"]["head.bias"]
        elif change == "too much":
            checkpoint["state_dict"]["head.extra"] = torch.zeros(1)
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "run {run} holds no checkpoint checkpoints/best.ckpt"),
        ("truncated", "checkpoint {run}/checkpoints/best.ckpt cannot be read ("),
        ("empty", "checkpoint {run}/checkpoints/best.ckpt cannot be read (EOFError)"),
        ("of another model", "{run}: the checkpoint is of model 'cnn', config.yaml says 'bcnn'"),
        ("of nobody", "checkpoint {run}/checkpoints/best.ckpt was not written by interp_models"),
        ("pickled code", "checkpoint {run}/checkpoints/best.ckpt cannot be read ("),
        ("foreign", "checkpoint {run}/checkpoints/best.ckpt was not written by interp_models"),
        ("later format", "checkpoint {run}/checkpoints/best.ckpt has format 99; this interp_models reads up to 1"),
        (
            "other shape",
            "{run}: the checkpoint does not fit model BCNN: "
            "'attention.weight' has shape (5, 256, 1, 1), not (3, 256, 1, 1)",
        ),
        ("too little", "{run}: the checkpoint does not fit model BCNN: 'head.bias' is missing"),
        ("too much", "{run}: the checkpoint does not fit model BCNN: it has 'head.extra' too"),
    ],
)
def test_evaluate_refuses_checkpoints(
    script: Script, bcnn_run: Path, cnn_run: Path, tmp_path: Path, change: str, message: str
) -> None:
    run = copy_run(bcnn_run, tmp_path / "run")
    change_checkpoint(change, run / "checkpoints/best.ckpt", cnn_run / "checkpoints/best.ckpt")
    refused(script("evaluate", run, *QUICK_EVALUATION), message.format(run=run))
    assert not (run / "evaluation").exists()


def edit_config(run: Path, **changes: Any) -> Path:
    """Change the data options of a run."""
    node = load_yaml(run / "config.yaml")
    node["data"] |= changes
    return write_config(run / "config.yaml", node)


def test_evaluate_refuses_broken_run_configs(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    run = copy_run(bcnn_run, tmp_path / "run")
    edit_config(run, batchsize=3)
    refused(script("evaluate", run, *QUICK_EVALUATION), "unknown key in data: 'batchsize'; did you mean 'batch_size'?")
    (run / "config.yaml").write_text("model: {name: [}")
    refused(script("evaluate", run, *QUICK_EVALUATION), f"run {run}: config {run}/config.yaml is not valid yaml")
    (run / "config.yaml").write_text("sed: 1")
    refused(script("evaluate", run, *QUICK_EVALUATION), f"run {run}: unknown key in config: 'sed'; did you mean 'seed'")
    (run / "config.yaml").write_text("")
    refused(script("evaluate", run, *QUICK_EVALUATION), f"run {run}: data.dataset.name must be given")


def test_runs_on_different_images_are_not_compared(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    make_cub(tmp_path / "other", per_class=6)
    run = copy_run(bcnn_run, tmp_path / "run")
    edit_config(run, dataset={"name": "cub", "root": str(tmp_path / "other")})
    refused(
        script("evaluate", bcnn_run, run, *QUICK_EVALUATION),
        f"runs {bcnn_run} and {run} have different test images and cannot be compared",
    )
    assert not (run / "evaluation").exists()
    make_cub(tmp_path / "more", classes=4, per_class=8)
    edit_config(run, dataset={"name": "cub", "root": str(tmp_path / "more")})
    refused(
        script("evaluate", run, *QUICK_EVALUATION),
        f"{run}: the data set has a class '004.Kind_4' that the model was not trained on; it knows '001.Kind_1', ",
    )


def test_a_comparison_is_never_overwritten(script: Script, bcnn_run: Path, cnn_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("precious")
    runs = [copy_run(run, tmp_path / run.name) for run in (bcnn_run, cnn_run)]
    outcome = script("evaluate", *runs, *QUICK_EVALUATION, f"out={tmp_path}/out")
    refused(outcome, f"out={tmp_path}/out is not empty; comparisons are never overwritten")
    assert (tmp_path / "out" / "report.html").read_text() == "precious"
    assert not any((run / "evaluation").exists() for run in runs)  # found before any work


# Loggers


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the server of Weights & Biases does that knows one key."""

    def do_POST(self) -> None:
        known = base64.b64decode(self.headers["Authorization"].split()[1]) == b"api:right"
        answer = json.dumps({"data": {"viewer": {"id": "me"} if known else None}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_wandb_online_needs_a_login_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        settings = SimpleNamespace(base_url=url, api_key=None)
        monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=settings))
        with pytest.raises(InputError, match=f"^logger.wandb=online: no login for {url}; run wandb login, set"):
            loggers.check_loggers(LoggerConfig("online"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password wrong\n")
        with pytest.raises(InputError, match=f"^logger.wandb=online: {url} does not know the API key; run wandb login"):
            loggers.check_loggers(LoggerConfig("online"))
        monkeypatch.setenv("WANDB_API_KEY", "right")
        loggers.check_loggers(LoggerConfig("online"))
        server.shutdown()
    with pytest.raises(InputError, match=rf"^logger.wandb=online: {url} cannot be reached \(.*\); connect, or use"):
        loggers.check_loggers(LoggerConfig("online"))


@pytest.mark.parametrize(
    ("given", "config", "mode"),
    [
        (None, "offline", "offline"),
        ("", "online", "online"),
        ("offline", "online", "offline"),
        ("dryrun", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "offline", "online"),
        ("online", "disabled", "disabled"),
    ],
)
def test_the_mode_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str | None, config: Any, mode: str
) -> None:
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if given is not None:
        monkeypatch.setenv("WANDB_MODE", given)
    assert loggers.wandb_mode(LoggerConfig(config)) == mode
    monkeypatch.setenv("WANDB_MODE", "of")
    if config != "disabled":
        with pytest.raises(InputError, match=r"^WANDB_MODE=of must be one of offline, online, disabled$"):
            loggers.wandb_mode(LoggerConfig(config))


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_without_a_login_nothing_is_made(
    script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(config: LoggerConfig) -> None:
        raise InputError(f"{config.wandb}: no login")

    room = {"train": "runs", "evaluate": "evaluation"}[name]
    monkeypatch.setattr(f"interp_models.{room}.{name}.check_loggers", refuse)
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root, out=str(tmp_path / "run")))
    run = copy_run(bcnn_run, tmp_path / "old")
    before = contents(tmp_path)
    refused(script(name, config if name == "train" else run, "logger.wandb=online"), "online: no login")
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()


# Places


def test_text_and_odd_paths_from_the_command_line_to_the_run(
    script: Script, tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data #1, [b]: é").symlink_to(tiny_cub.root)
    config = write_config(tmp_path / "c.yaml", tiny_config("", phases=[{"epochs": 1, "lrs": BCNN_LRS}]))
    outcome = script("train", "~/c.yaml", "out=~/run #1: a=b", "experiment=007", "data.dataset.root=~/data #1, [b]: é")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run #1: a=b"
    assert (run / "metrics.json").is_file()
    saved = load_yaml(run / "config.yaml")
    assert (saved["experiment"], saved["out"]) == ("007", str(run))
    assert saved["data"]["dataset"]["root"] == str(tmp_path / "data #1, [b]: é")
    assert config.is_file()


@pytest.mark.parametrize("experiment", ["..", ".", "a/../../b", "/elsewhere"])
def test_an_experiment_outside_runs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made = run_folder(TrainConfig(experiment="group/mine", seed=3))
    assert made == Path("runs/group/mine/3-0")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="experiment must be the name of a folder below runs/; got '"):
        run_folder(TrainConfig(experiment=experiment))
    assert sorted(tmp_path.rglob("*")) == before


def test_arguments_longer_than_a_file_name(script: Script) -> None:
    """The system refuses to look for such files; an option may be of any length."""
    explainers = f"explainers=[{', '.join(['gradcam'] * 40)}]"
    for command, option in (("evaluate", explainers), ("train", f"evaluation.{explainers}")):
        assert separated([option]) == ([], [option])
        refused(script(command, option, "sed=1"), "'sed'; did you mean 'seed'?")
        refused(script(command, "x" * 300), f"{'x' * 60}'... is too long: ")
    refused(script("evaluate", "timm:" + "x" * 300), "unknown timm model 'xxx")


def test_a_default_folder_that_cannot_be_made(
    script: Script, tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    config = write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root))
    refused(script("train", config), f"folder {tmp_path}/runs/tiny/0-0 cannot be made: ", "; out= names another")


@pytest.mark.parametrize("arguments", [["out", "=", "x"], ["out=", "x"], ["out", "=x"]])
def test_spaces_around_the_sign(script: Script, arguments: list[str]) -> None:
    refused(script("train", *arguments), "write key=value, without spaces around =")


# The table of runs


def test_runs_side_by_side(script: Script, tmp_path: Path) -> None:
    def run(name: str, config: dict[str, Any], metrics: dict[str, Any] | None, csv: str = "") -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        write_config(folder / "config.yaml", {"experiment": "e", "phases": [{"epochs": 3}], "out": name, **config})
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "metrics.csv").write_text(csv)
        return folder

    table = "epoch,val/acc\n0,0.25\n0,\n1,0.75\n2,0.5\n"
    run("e/0-0", {"seed": 0, "model": {"name": "cnn"}}, {"test/acc": 0.5, "val/acc": 0.625, "epoch": 2}, table)
    judged = run("e/1-0", {"seed": 1, "model": {"name": "bcnn", "n_maps": 3}}, {"test/acc": 0.25, "epoch": 2}, table)
    run("e/2-0", {"seed": 1, "model": {"name": "cnn"}}, None, table)
    (judged / "evaluation").mkdir()
    (judged / "evaluation/results.json").write_text("{}")
    os.utime(judged / "evaluation/results.json", (0, 0))
    broken = run("e/3-0", {}, None)
    (broken / "config.yaml").write_text("a: [")
    outcome = script("train", "--list-runs", tmp_path / "runs")
    assert (outcome.code, outcome.err) == (0, "")
    head, *rows, last = [line.split() for line in outcome.out.splitlines()]
    assert head == ["run", "model.name", "seed", "model.n_maps", "val", "%", "test", "%", "evaluated"]
    day = datetime.fromtimestamp(0).strftime("%Y-%m-%d %H:%M").split()
    assert rows == [
        ["e/0-0", "cnn", "0", "-", "62.50", "50.00", "no"],
        ["e/1-0", "bcnn", "1", "3", "50.00", "25.00", *day],
        ["e/2-0", "cnn", "1", "-", "75.00", "unfinished", "no"],
    ]
    assert " ".join(last).startswith(f"broken: config {broken}/config.yaml is not valid yaml")
    refused(
        script("train", "--list-runs", tmp_path / "none"), f"{tmp_path}/none is not a folder; write --list-runs FOLDER"
    )
    (tmp_path / "empty").mkdir()
    refused(script("train", "--list-runs", tmp_path / "empty"), f"{tmp_path}/empty holds no run")
    refused(script("train", "--list-run"), "unknown option --list-run; options are written key=value, see --help")


# --help and the real thing


def test_help_for_a_reader_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python train.py --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run_script("usage", TrainConfig, lambda *_: None, ["--help"]) == 141
        print("what else is written goes nowhere", flush=True)


def test_a_pipe_that_breaks_elsewhere_is_no_end() -> None:
    def run(*_: list[str]) -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        run_script("usage", TrainConfig, run, [])


def keys_of(schema: type) -> list[str]:
    """The names of all fields, those of nested dataclasses included."""
    names = []
    for name, hint in typing.get_type_hints(schema).items():
        if name not in (item.name for item in dataclasses.fields(schema)):
            continue
        names.append(name)
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                names += keys_of(typing.cast(type, inner))
    return names


@pytest.mark.parametrize(("name", "schema"), [("train", TrainConfig), ("evaluate", EvaluateConfig)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key(script: Script, name: str, schema: type, flag: str) -> None:
    outcome = script(name, "seed=not a number", flag)
    assert outcome.code == 0
    assert outcome.err == ""
    usage, rest = outcome.out.split("\nKeys (key=value, lists as phases[0].epochs=1):\n")
    assert f"python {name}.py" in usage
    keys, names = rest.split("\nNames; --help NAME shows the options of one, --help models those of all models:\n")
    shown = [line.split(":")[0].split(".")[0].split("[i]")[0].strip() for line in keys.strip().splitlines()]
    assert shown == keys_of(schema)
    assert dict(line.strip().split(": ") for line in names.splitlines()) == {
        topic: ", ".join(registry.names()) for topic, registry in REGISTRIES.items()
    }


REGISTRIES: dict[str, Registry[Any]] = {
    "data": DATASETS,
    "transforms": TRANSFORMS,
    "models": MODELS,
    "explainers": EXPLAINERS,
    "metrics": METRICS,
    "prototype_metrics": PROTOTYPE_METRICS,
    "userstudy": TASKS,
}


def test_help_on_a_key_of_a_metric_is_that_of_the_metric(script: Script) -> None:
    found = script("evaluate", "--help", "pointing")
    assert found.out == script("evaluate", "--help", "box_localisation").out
    assert "the pointing game" in found.out


def test_help_on_networks_lists_the_keys_of_one(script: Script) -> None:
    shown = script("evaluate", "--help", "networks").out.partition("Keys of a network:\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in shown] == keys_of(NetworkConfig)


@pytest.mark.parametrize(
    ("topic", "key", "given"),
    [
        ("data", "data.dataset.name", ("split",)),
        ("models", "model.name", ("num_classes",)),
        ("explainers", "explainers", ("model",)),
    ],
)
def test_help_on_all_of_a_kind_shows_their_options(
    script: Script, topic: str, key: str, given: tuple[str, ...]
) -> None:
    outcome = script("train", "--help", topic)
    assert (outcome.code, outcome.err) == (0, "")
    sections = {text.splitlines()[0].split(" (")[0]: text for text in outcome.out.strip().split("\n\n")}
    if topic == "data":
        options = sections.pop("data.").splitlines()[1:]
        assert [line.split(":")[0].strip() for line in options] == keys_of(schema_of(DataModule))
    assert list(sections) == [f"{key}: {name}" for name in REGISTRIES[topic].names()]
    for name in REGISTRIES[topic].names():
        cls = REGISTRIES[topic].get(name)
        text = sections[f"{key}: {name}"]
        options = text.partition("Options:\n")[2].partition("\n  Actions")[0].splitlines()
        assert [line.split(":")[0].strip() for line in options] == keys_of(schema_of(cls, given))
        if topic == "models":
            assert text.endswith(f"Actions of phases[i].on_start and on_end: {', '.join(cls.actions)}")


def test_help_on_one_thing(script: Script) -> None:
    about = script("evaluate", "--help", "rise", "grid")
    assert about.code == 0
    assert about.out.startswith("explainers: rise (interp_models.explainers.rise.RISE)\n  RISE: S(p) = ")
    assert "    masks: int = " in about.out
    assert "\n\n  grid: Any = None   Grid to which every map is brought:" in about.out
    seed, of = (
        "    seed: int = 0   Seed of the noise.\n",
        "    of: Literal['gradient', 'integrated_gradients'] = gradient",
    )
    assert f"{seed}{of}   The maps:" in script("evaluate", "--help", "vargrad").out  # of a base's field, and its own
    metrics = script("evaluate", "--help", "metrics").out
    for name in METRICS:
        for value, meaning in METRICS.get(name).legend.items():
            assert f"  {value}: {meaning}" in metrics
    shipped = script("train", "cub/bcnn_lite0", "--help").out
    assert shipped.startswith(f"{ROOT}/configs/cub/bcnn_lite0.yaml\nB-CNN: bilinear attention pooling with three maps")
    refused(script("train", "--help", "gradcm"), "unknown topic of --help 'gradcm'; did you mean 'gradcam'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train.py", "{tmp}/c.yaml", "phases[0].epoch=1"],
            "unknown key in config.phases[0]: 'epoch'; did you mean 'epoch",
        ),
        pytest.param(
            ["evaluate.py", "{tmp}", "config={root}/configs/eval/faithfulness.yaml"],
            "{tmp} is not a run folder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_real_process(tmp_path: Path, tiny_cub: Cub, arguments: list[str], message: str) -> None:
    write_config(tmp_path / "c.yaml", tiny_config(tiny_cub.root, model=TINY_CNN))
    places = {"tmp": tmp_path, "root": ROOT}
    name, *rest = (argument.format(**places) for argument in arguments)
    done = subprocess.run(
        [sys.executable, ROOT / name, *rest], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    refused(Outcome(done.returncode, done.stdout, done.stderr), message.format(**places))
