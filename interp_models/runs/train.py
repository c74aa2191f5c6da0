"""A training from its config to its run folder."""

import copy
import functools
import operator
import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from interp_models.config.loading import as_dict, save_yaml
from interp_models.core.command import command
from interp_models.core.errors import InputError, first_line
from interp_models.core.files import locked, write_json
from interp_models.core.scoring import evaluating
from interp_models.core.stopping import goes_on_by
from interp_models.data.module import DataModule
from interp_models.data.transforms import TRANSFORMS
from interp_models.evaluation.callback import ExplanationValidation
from interp_models.models.cnn import CNN
from interp_models.nn.backbone import Backbone
from interp_models.runs.building import build_data, build_model, resolve
from interp_models.runs.config import TrainConfig
from interp_models.runs.folders import run_folder
from interp_models.runs.loading import checkpoint_path, load, run_config, selection
from interp_models.runs.resume import (
    check_config,
    check_epochs,
    check_same_classes,
    check_same_data,
    images_of,
    keep_places,
)
from interp_models.training.attention_logger import AttentionLogger
from interp_models.training.checkpoints import WholeCheckpointIO, checkpoints, load_weights, read_checkpoint
from interp_models.training.class_report import ClassReport
from interp_models.training.distillation import Distillation
from interp_models.training.feature_cache import FeatureCache
from interp_models.training.loggers import check_loggers, close, make_loggers
from interp_models.training.metrics_file import MetricsFile
from interp_models.training.module import InterpModule
from interp_models.training.progress_bar import ProgressBar
from interp_models.training.prototype_gallery import PrototypeGallery
from interp_models.training.schedule import PhaseSchedule, check_strategy
from interp_models.training.trainer import (
    check_data,
    check_trainer,
    make_trainer,
    quiet,
    seed_everything,
    tell_data,
)

REFUSED = {
    **dict.fromkeys(("max_steps", "max_time", "min_epochs", "min_steps"), "phases say how long a training is"),
    **dict.fromkeys(("fast_dev_run", "barebones"), "try phases[0].epochs=1 trainer.limit_train_batches=2"),
    "overfit_batches": "try trainer.limit_train_batches=2",
    "val_check_interval": "every epoch ends with its validation",
    "check_val_every_n_epoch": "every epoch ends with its validation",
    "enable_checkpointing": "every epoch is saved",
}


def train(config: TrainConfig, resume: Path | None = None) -> Path:
    """Fit, select on validation, test; returns the run folder.

    Args:
        config: the resolved config.
        resume: an existing run folder, whose broken epoch is repeated from its start.
    """
    with ExitStack() as locks:
        if resume is not None:
            lock(resume, locks)  # before its checkpoint is read
        return _train(config, resume, locks)


@rank_zero_only
def lock(run: Path, locks: ExitStack) -> None:
    """Let no other training write to a run folder; raises `InputError` if one does."""
    locks.enter_context(locked(run, "a training", "wait for its end"))


def _train(config: TrainConfig, resume: Path | None, locks: ExitStack) -> Path:
    quiet()
    seed_everything(config.seed)
    for key in ("attention.every_n_epochs", "attention.n_images", "evaluation.every_n_epochs"):
        if (value := operator.attrgetter(key)(config)) < 0:
            raise InputError(f"{key} must be 0 or more; got {value}")
    options, trial = check_trainer(config.trainer, REFUSED)
    devices = trial.world_size
    check_loggers(config.logger)
    config = resolve(config)
    last = None if resume is None else resume / "checkpoints" / "last.ckpt"
    if last is not None and not last.is_file() and any(last.parent.glob("*.ckpt")):
        raise InputError(f"{last} is missing, without which the training would begin anew over what is there")
    checkpoint = read_checkpoint(last) if last is not None and last.is_file() else None
    if last is not None and checkpoint is not None:
        check_config(last, checkpoint, config)
    data = build_data(as_dict(config))
    data.check_training(devices)
    check_limits(options, data, devices)
    images = check_same_data(last, checkpoint, data) if last is not None and checkpoint is not None else images_of(data)
    model = build_model(as_dict(config), len(data.classes), trained=checkpoint is not None)
    model.images = images
    model.distillation = build_distillation(config, data)
    model.check_selection(selecting=len(data.val_indices) > 0)
    model.recipe.check_timeline()
    check_features(config, model)
    check_strategy(trial.strategy, model)
    check_images(model, data, devices, synced=bool(options.get("sync_batchnorm")))
    check_data(data, model)
    run = run_folder(config, resume)
    if run is not None:
        if resume is None:
            lock(run, locks)
        goes_on_by(functools.partial(way_on, run, model.recipe.epochs))
    if last is not None and checkpoint is not None:
        check_epochs(last, checkpoint, config)
    table = None if run is None else MetricsFile(run, [phase.name for phase in model.recipe.phases], checkpoint)
    resumed = checkpoint is not None
    del checkpoint  # which holds the optimizer's state

    def keep_config(*_: object) -> None:
        if run is not None:
            node = as_dict(config)
            save_yaml(run / "config.yaml", node if resume is None else keep_places(node, run_config(resume)))

    trainer = make_trainer(
        default_root_dir=run,
        logger=False,
        callbacks=[
            *([ProgressBar()] if options.get("enable_progress_bar", True) else []),
            # Of a resumed run only what can be trained is kept, so that a mistake in what it changes does not stay
            pl.callbacks.LambdaCallback(on_train_start=keep_config),
            *checkpoints(run, selecting=len(data.val_indices) > 0),
            *AttentionLogger.of(config.attention, run),
            PrototypeGallery(run),
            ClassReport(model.num_classes, run),
            *ExplanationValidation.of(config.evaluation, config.seed),
            *FeatureCache.of(config.feature_cache),
            PhaseSchedule(),  # sets the phase before each step; its `on_end` acts after all others have seen the batch
        ],
        plugins=[WholeCheckpointIO()],
        use_distributed_sampler=False,
        max_epochs=model.recipe.epochs,
        **{"log_every_n_steps": 1, "num_sanity_val_steps": 0, **options},
    )
    trainer.loggers = [*([table] if table else []), *make_loggers(config.logger, run, group=config.experiment)]
    for logger in trainer.loggers:
        logger.log_hyperparams(as_dict(config))
    if resume is None:
        keep_config()
    tell_data(data)
    if not resumed:
        tell_head(model, data)
    try:
        trainer.fit(model, data, ckpt_path=last if resumed else None)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    run = Path(str(trainer.strategy.broadcast(run)))
    best = read_checkpoint(checkpoint_path(run, "best"))
    load_weights(model, best, str(run))
    metrics = trainer.test(model, data, verbose=False)[0]
    if table is not None:
        validated = table.validated(best)
        about = {"epoch": best["epoch"], "selection": selection(as_dict(config))}
        write_json(run / "metrics.json", {**metrics, **validated, **about})
        chosen = f"validation accuracy {100 * validated['val/acc']:.2f} %, " if "val/acc" in validated else ""
        print(f"{chosen}test accuracy {100 * metrics['test/acc']:.2f} % on {metrics['test/n']:.0f} images: {run}")
    close(trainer.loggers)
    return run


def check_limits(options: Mapping[str, Any], data: DataModule, devices: int) -> None:
    """Raise `InputError` if a share of the batches that `limit_<split>_batches` asks for is none at all."""
    for split, indices in (("train", data.train_indices), ("val", data.val_indices), ("test", data.test_indices)):
        limit, batches = options.get(f"limit_{split}_batches"), -(-len(indices) // (data.batch_size * devices))
        if isinstance(limit, float) and limit < 1 and batches and int(batches * limit) == 0:
            raise InputError(
                f"trainer.limit_{split}_batches={limit} of {batches} batches is none; at least one is needed"
            )


def check_images(model: InterpModule, data: DataModule, devices: int, *, synced: bool = False) -> None:
    """Raise `InputError` if a model cannot take the images of a test, or those of the steps of a phase.

    Batch norms in train mode need two values of a channel: two images, or maps of two cells. A copy of the model tries
    that, so that no weight, statistic or random state changes.

    Args:
        model: with its recipe.
        data: the images.
        devices: among which the training images are dealt out.
        synced: whether batch norms see the images of all devices.
    """
    size, name = data.image_size, type(model).__name__
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, 3, size, size))
    except InputError:
        raise
    except Exception as error:  # any that a timm model's code meets
        raise InputError(f"data.image_size={size}: {name} cannot take such images ({first_line(error)})") from None
    count = min(data.batch_size, -(-len(data.train_indices) // devices))
    seen = min(2, count * devices if synced else count)
    tried = copy.deepcopy(model)
    for number, phase in enumerate(model.recipe.phases):
        if not phase.epochs:
            continue
        phase.set_modes(tried)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                tried.loss(tried(torch.zeros(seen, 3, size, size)), torch.zeros(seen, dtype=torch.long))
        except InputError:
            raise
        except Exception as error:
            advice = "; take more images per step, larger images, or eval_modules that hold its batch norms"
            raise InputError(
                f"phases[{number}]: {name} cannot be trained by steps of {count} image{'s' * (count > 1)} per device "
                f"at data.image_size={size} ({first_line(error)}){advice if seen == 1 else ''}"
            ) from None


def build_distillation(config: TrainConfig, data: DataModule) -> Distillation | None:
    """The teacher of a training, if it has one.

    Raises:
        InputError: if it is no run, or of other classes, or images of another form.
    """
    path = config.distillation.teacher
    if path is None:
        return None
    try:
        teacher, _ = load(path)
    except InputError as error:
        raise InputError(f"distillation.teacher: {error}") from None
    check_same_classes(teacher.classes or data.classes, data.classes, f"distillation.teacher: {path}")
    if teacher.num_classes != len(data.classes):
        raise InputError(
            f"distillation.teacher: {path} knows {teacher.num_classes} classes, the data set has {len(data.classes)}"
        )
    of_teacher = run_config(Path(path))["data"]
    for key in ("image_size", "crop_to_box"):
        if of_teacher.get(key) not in (None, config.data[key]):
            raise InputError(f"distillation.teacher: {path} has data.{key}={of_teacher[key]}, not {config.data[key]}")
    return Distillation(teacher, temperature=config.distillation.temperature, weight=config.distillation.weight)


def way_on(run: Path, epochs: int) -> str:
    """How a training that was stopped goes on."""
    last = run / "checkpoints" / "last.ckpt"
    done = int(read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0
    how = f"{command('train')} {shlex.quote(f'resume={run}')}"
    return f"{how} goes on with {f'epoch {done}' if done < epochs else 'the test'}"


def check_features(config: TrainConfig, module: InterpModule) -> None:
    """Raise `InputError` if the config wants features in place of images, and its training needs more of the images, or
    changes the backbone."""
    if config.feature_cache is None:
        return
    if config.data["augment"]:
        raise InputError("feature_cache needs data.augment=false: every image has its features once")
    transform = config.data["transforms"]["name"]
    crops = TRANSFORMS.get(transform).crops_training_images and not config.data["crop_to_box"]
    if crops and config.data["val_fraction"]:
        raise InputError(
            f"feature_cache: data.transforms={transform} crops training images only; add data.crop_to_box=true"
        )
    if module.distillation is not None:
        raise InputError("feature_cache: distillation.teacher needs images, not features")
    if config.evaluation.every_n_epochs:
        raise InputError("feature_cache: evaluation.every_n_epochs needs images, not features")
    backbone = getattr(module, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise InputError(f"feature_cache: {type(module).__name__} has no convolutional backbone")
    own = {id(parameter) for parameter in backbone.parameters()}
    learning = {name for name, group in module.parameter_groups().items() if own & {id(p) for p in group}}
    for number, phase in enumerate(module.recipe.phases):
        if learning & phase.lrs.keys():
            raise InputError(f"feature_cache: phases[{number}].lrs must not train the backbone")
        if "backbone" not in phase.eval_modules:
            raise InputError(f"feature_cache: phases[{number}].eval_modules must name backbone, whose statistics stay")


def tell_head(model: InterpModule, data: DataModule) -> None:
    """Say on stderr if the classifier of a file of weights was taken for the data's classes."""
    if isinstance(model, CNN) and (line := model.keep_head(data.classes)) is not None:
        rank_zero_only(print)(line, file=sys.stderr)
