"""Train a model.

python train.py [CONFIG.yaml] [key=value ...]   (without a config: configs/quickstart.yaml)
python train.py resume=RUN [phases[0].epochs=... trainer.*=... logger.*=...]
python train.py --list-runs [FOLDER]            (without a folder: runs)
"""

import functools
import shlex
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from interp_models import runs
from interp_models.callbacks.attention_logger import AttentionLogger
from interp_models.callbacks.explanation_evaluation import ExplanationEvaluation
from interp_models.callbacks.feature_cache import FeatureCache, check_features
from interp_models.callbacks.progress_bar import ProgressBar
from interp_models.callbacks.prototype_gallery import PrototypeGallery
from interp_models.cli import (
    check_trainer,
    config_path,
    make_trainer,
    quiet,
    run_script,
    seed_everything,
    taken,
    tell_skipped,
)
from interp_models.config import TrainConfig, configured, plain, save_yaml
from interp_models.data.module import DataModule
from interp_models.errors import InputError
from interp_models.files import write_json
from interp_models.loggers import check_loggers, close, make_loggers
from interp_models.run_list import run_list
from interp_models.scoring import evaluating
from interp_models.stopping import goes_on_by
from interp_models.training.distillation import Distillation
from interp_models.training.module import InterpModule
from interp_models.written import expanded

LIST = "--list-runs"
RESUMABLE = ("phases", "trainer", "logger")
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
    quiet()
    seed_everything(config.seed)
    options = check_trainer(config.trainer, REFUSED)
    check_loggers(config.logger)
    config = runs.resolve(config)
    data = runs.build_data(plain(config))
    tell_skipped(data)
    model = runs.build_model(plain(config), len(data.classes))
    model.distillation = build_distillation(config, data)
    model.check_selection(selecting=len(data.val_indices) > 0)
    check_features(config, model)
    check_image_size(model, data.image_size)
    if not model.recipe.epochs:
        raise InputError("phases: at least one epoch is needed")
    run = runs.run_folder(config, resume)
    if run is not None:
        goes_on_by(functools.partial(way_on, run, model.recipe.epochs))
    last = None if resume is None else resume / "checkpoints" / "last.ckpt"
    resuming = last is not None and last.is_file()
    done, row = runs.epochs_done(last, config) if last and resuming else (None, None)

    def keep_config(*_: object) -> None:
        if run is not None:
            save_yaml(run / "config.yaml", plain(config))

    trainer = make_trainer(
        default_root_dir=run,
        logger=False,
        callbacks=[
            *([ProgressBar()] if options.get("enable_progress_bar", True) else []),
            # Of a resumed run only what can be trained is kept, so that a mistake in what it changes does not stay
            pl.callbacks.LambdaCallback(on_train_start=keep_config),
            *runs.checkpoints(run, selecting=len(data.val_indices) > 0),
            *AttentionLogger.of(config.attention, run),
            PrototypeGallery(run),
            *ExplanationEvaluation.of(config.evaluation, config.seed),
            *FeatureCache.of(config.feature_cache),
        ],
        plugins=[runs.WholeCheckpointIO()],
        use_distributed_sampler=False,
        max_epochs=model.recipe.epochs,
        **{"log_every_n_steps": 1, "num_sanity_val_steps": 0, **options},
    )
    trainer.loggers = make_loggers(
        config.logger,
        run,
        group=config.experiment,
        epochs=done,
        last=row,
        phases=[phase.name for phase in model.recipe.phases],
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(plain(config))
    if resume is None:
        keep_config()
    trainer.fit(model, data, ckpt_path=last if resuming else None)
    run = Path(str(trainer.strategy.broadcast(run)))
    best = runs.read_checkpoint(runs.checkpoint_path(run, "best"))
    runs.load_weights(model, best, str(run))
    metrics = trainer.test(model, data, verbose=False)[0]
    if trainer.is_global_zero:
        write_json(
            run / "metrics.json", {**metrics, "epoch": best["epoch"], "selection": runs.selection(plain(config))}
        )
        print(f"test accuracy {100 * metrics['test/acc']:.2f} % on {metrics['test/n']:.0f} images: {run}")
    close(trainer.loggers)
    return run


def check_image_size(model: InterpModule, size: int) -> None:
    """Raise `InputError` if a model cannot take square images of this size."""
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, 3, size, size))
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"data.image_size={size}: {type(model).__name__} cannot take such images ({first})") from None


def build_distillation(config: TrainConfig, data: DataModule) -> Distillation | None:
    """The teacher of a training, if it has one.

    Raises:
        InputError: if it is no run, or of other classes, or images of another form.
    """
    path = config.distillation.teacher
    if path is None:
        return None
    try:
        teacher, _ = runs.load(path)
        own = runs.read_checkpoint(runs.checkpoint_path(Path(path), "best"))["interp_models"]
    except InputError as error:
        raise InputError(f"distillation.teacher: {error}") from None
    if own.get("classes", data.classes) != data.classes or teacher.num_classes != len(data.classes):
        raise InputError(
            f"distillation.teacher: {path} knows {teacher.num_classes} classes, the data set has {len(data.classes)}; "
            "they must be the same, in the same order"
        )
    of_teacher = runs.run_config(Path(path))["data"]
    for key in ("image_size", "crop_to_box"):
        if of_teacher.get(key) not in (None, config.data[key]):
            raise InputError(f"distillation.teacher: {path} has data.{key}={of_teacher[key]}, not {config.data[key]}")
    return Distillation(teacher, temperature=config.distillation.temperature, weight=config.distillation.weight)


def way_on(run: Path, epochs: int) -> str:
    """How a training that was stopped goes on."""
    last = run / "checkpoints" / "last.ckpt"
    done = int(runs.read_checkpoint(last)["epoch"]) + 1 if last.is_file() else 0
    return f"{shlex.quote(f'resume={run}')} goes on with {f'epoch {done}' if done < epochs else 'the test'}"


def main(positional: list[str], overrides: list[str]) -> Path | None:
    """Read the config, apply the overrides, train."""
    goes_on_by(lambda: "nothing was trained yet")
    if LIST in positional:
        folders = [name for name in positional if name != LIST]
        if len(folders) > 1 or overrides:
            raise InputError(f"{LIST} takes one folder at most; got {' '.join([*folders, *overrides])}")
        print(run_list(Path(expanded(folders[0] if folders else "runs"))))
        return None
    resume, overrides = taken(overrides, "resume")
    if len(positional) > 1 or (resume and positional):
        raise InputError(f"one config at most, and none with resume=; got {' '.join(positional)}")
    if resume is None:
        path = config_path(positional[0] if positional else "configs/quickstart.yaml")
        return train(configured(TrainConfig, path, overrides))
    for assignment in overrides:
        if not assignment.startswith(RESUMABLE):
            raise InputError(f"{assignment}: a resumed run can change {', '.join(RESUMABLE)} only")
    run = Path(expanded(resume))
    return train(configured(TrainConfig, runs.run_config(run), overrides), run)


if __name__ == "__main__":
    sys.exit(run_script(__doc__, TrainConfig, main))
