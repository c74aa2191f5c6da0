"""Run a training: from its config to its run folder."""

import functools
import operator
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from interp_models.config.loading import as_dict, save_yaml
from interp_models.core.command import command
from interp_models.core.errors import InputError
from interp_models.core.files import locked, write_json
from interp_models.core.stopping import goes_on_by
from interp_models.data.module import DataModule
from interp_models.evaluation.callback import ExplanationValidation
from interp_models.models.cnn import CNN
from interp_models.runs.config import TrainConfig
from interp_models.runs.folders import run_folder
from interp_models.runs.loading import checkpoint_path, run_config, selection
from interp_models.runs.preparation import prepare
from interp_models.runs.resume import checkpoint_of, keep_places, last_checkpoint
from interp_models.training.attention_logger import AttentionLogger
from interp_models.training.checkpoints import WholeCheckpointIO, checkpoints, load_weights, read_checkpoint
from interp_models.training.class_report import ClassReport
from interp_models.training.epoch_times import EpochTimes
from interp_models.training.feature_cache import FeatureCache
from interp_models.training.loggers import check_loggers, close, make_loggers
from interp_models.training.metrics_file import MetricsFile
from interp_models.training.module import InterpModule
from interp_models.training.progress_bar import ProgressBar
from interp_models.training.prototype_gallery import PrototypeGallery
from interp_models.training.schedule import PhaseSchedule
from interp_models.training.trainer import (
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
    """Train a model, select the best epoch on validation images, and test it.

    Args:
        config: the resolved config.
        resume: folder of a run to resume; the epoch that was interrupted is repeated from its start.

    Returns:
        The run folder.

    Raises:
        InputError: if the config cannot be trained, or another training writes to the folder.
    """
    with ExitStack() as locks:
        if resume is not None:
            lock(resume, locks)  # before its checkpoint is read
        return _train(config, resume, locks)


@rank_zero_only
def lock(run: Path, locks: ExitStack) -> None:
    """Lock a run folder against other trainings; raises `InputError` if another one writes there."""
    locks.enter_context(locked(run, "a training", "wait for its end"))


def _train(config: TrainConfig, resume: Path | None, locks: ExitStack) -> Path:
    quiet()
    seed_everything(config.seed)
    for key in ("attention.every_n_epochs", "attention.n_images", "evaluation.every_n_epochs"):
        if (value := operator.attrgetter(key)(config)) < 0:
            raise InputError(f"{key} must be 0 or more; got {value}")
    options, trial = check_trainer(config.trainer, REFUSED)
    check_loggers(config.logger)
    node = as_dict(config)
    kept = node if resume is None else keep_places(node, run_config(resume))
    resumed = None if resume is None else checkpoint_of(resume, config)
    last, checkpoint = (None, None) if resumed is None else resumed
    data, model = prepare(config, node, options, trial, resumed)
    folder = run_folder(config, resume)  # on rank 0, which alone writes there
    if folder is not None:
        if resume is None:
            lock(folder, locks)
        goes_on_by(functools.partial(way_on, folder, model.recipe.epochs))
    phases = [phase.name for phase in model.recipe.phases]
    table = None if folder is None else MetricsFile(folder, phases, checkpoint)
    del checkpoint, resumed  # they hold the optimizer's state, which is large

    def keep_config(*_: object) -> None:
        if folder is not None:
            save_yaml(folder / "config.yaml", kept)

    trainer = make_trainer(
        default_root_dir=folder,
        logger=False,
        callbacks=[
            EpochTimes(folder),  # the first, so that epochs begin with the actions of their phase
            *([ProgressBar()] if options.get("enable_progress_bar", True) else []),
            # The config of a resumed run is saved when its training starts: a mistake that fails before is not saved
            pl.callbacks.LambdaCallback(on_train_start=keep_config),
            *checkpoints(folder, selecting=len(data.val_indices) > 0, measured=model.measured.key),
            *AttentionLogger.of(config.attention, folder),
            PrototypeGallery(folder),
            *([ClassReport(model.num_classes, folder)] if model.task == "classes" else []),
            *ExplanationValidation.of(config.evaluation, config.seed),
            *FeatureCache.of(config.feature_cache, config.feature_copies),
            PhaseSchedule(),  # the last, so that `on_end` actions follow all other callbacks' hooks for the batch
        ],
        plugins=[WholeCheckpointIO()],
        use_distributed_sampler=False,
        max_epochs=model.recipe.epochs,
        **{"log_every_n_steps": 1, "num_sanity_val_steps": 0, **options},
    )
    trainer.loggers = [*([table] if table else []), *make_loggers(config.logger, folder, group=config.experiment)]
    for logger in trainer.loggers:
        logger.log_hyperparams(node)
    if resume is None:
        keep_config()
    tell_data(data)
    if last is None:
        tell_head(model, data)
    try:
        trainer.fit(model, data, ckpt_path=last)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    run = Path(str(trainer.strategy.broadcast(folder)))
    best = read_checkpoint(checkpoint_path(run, "best"))
    load_weights(model, best, str(run))
    metrics = trainer.test(model, data, verbose=False)[0]
    if table is not None:
        key, measured = model.measured
        validated = table.validated(best, key)
        about = {"epoch": best["epoch"], "selection": selection(node)}
        write_json(run / "metrics.json", {**metrics, **validated, **about})
        value = validated.get(f"val/{key}")
        chosen = "" if value is None else f"validation {measured} {100 * value:.2f} %, "
        print(f"{chosen}test {measured} {100 * metrics[f'test/{key}']:.2f} % on {metrics['test/n']:.0f} images: {run}")
    close(trainer.loggers)
    return run


def way_on(run: Path, epochs: int) -> str:
    """The command that resumes a stopped training, and where it continues."""
    last = last_checkpoint(run)
    done = int(read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0
    how = f"{command('train')} {shlex.quote(f'resume={run}')}"
    return f"{how} goes on with {f'epoch {done}' if done < epochs else 'the test'}"


def tell_head(model: InterpModule, data: DataModule) -> None:
    """Say on stderr what happens to the classifier of a weights file: kept, or initialised again."""
    if isinstance(model, CNN) and (line := model.keep_head(data.classes)) is not None:
        rank_zero_only(print)(line, file=sys.stderr)
