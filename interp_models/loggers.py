"""Where a run's numbers go: `metrics.csv` always, Weights & Biases and TensorBoard as asked."""

import csv
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from interp_models.config import LoggerConfig
from interp_models.errors import InputError


def make_loggers(
    config: LoggerConfig,
    run: Path | None,
    *,
    group: str,
    job: str = "train",
    epochs: int | None = None,
    phases: Sequence[str] = (),
) -> list[Logger]:
    """The loggers of a run; none on ranks that know no run folder, as only rank 0 logs.

    Args:
        config: which.
        run: the run folder, or None.
        group: group in Weights & Biases.
        job: kind of job, `train` or `evaluate`.
        epochs: epochs already done by the run that goes on, whose rows of `metrics.csv` are kept.
        phases: names of the phases on the timeline.
    """
    if run is None:
        return []
    loggers: list[Logger] = []
    if job == "train":
        loggers.append(_csv(run, epochs, phases))
    if config.wandb != "disabled":
        loggers.append(
            WandbLogger(
                project=config.project,
                save_dir=run,
                offline=config.wandb == "offline",
                id=_wandb_id(run, job),
                resume="allow",
                group=group,
                job_type=job,
                name=f"{run.parent.name}/{run.name}",
            )
        )
    if config.tensorboard:
        try:
            loggers.append(TensorBoardLogger(save_dir=run, name="", version="tensorboard"))
        except ModuleNotFoundError:
            raise InputError(
                "logger.tensorboard=true needs the extra: pip install 'interp_models[tensorboard]'"
            ) from None
    return loggers


def log_results(loggers: Iterable[Logger], rows: Sequence[Mapping[str, Any]]) -> None:
    """Send an evaluation's mean scores to Weights & Biases as a table, a row per explainer and a column per metric."""
    frame = pd.DataFrame(rows)
    table = frame.pivot_table("mean", "explainer", "metric", dropna=False, sort=False).reset_index()
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("results", dataframe=table)


def log_pictures(loggers: Iterable[Logger], key: str, paths: Sequence[Path]) -> None:
    """Send picture files to Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and paths:
            logger.log_image(key, [str(path) for path in paths])


def close(loggers: Iterable[Logger]) -> None:
    """End runs of Weights & Biases: a process has one at a time, and the next logger would write to it too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


class _PhaseNames(CSVLogger):
    """Writes the name of the phase, which Lightning can only log as a number."""

    phases: Sequence[str] = ()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "phase" in metrics:
            metrics = {**metrics, "phase": self.phases[int(metrics["phase"])]}
        super().log_metrics(metrics, step)


def _csv(run: Path, epochs: int | None, phases: Sequence[str]) -> CSVLogger:
    """`metrics.csv` in the run folder; a new CSVLogger deletes the file it finds, so kept rows are handed over."""
    path, rows = run / "metrics.csv", []
    if epochs is not None and path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("epoch") and int(row["epoch"]) < epochs]
        path.unlink()
    logger = _PhaseNames(save_dir=run, name="", version="")
    logger.phases = phases
    for row in rows:
        kept: dict[str, Any] = {
            key: value if key == "phase" else float(value) for key, value in row.items() if value not in ("", None)
        }
        kept["epoch"] = int(kept["epoch"])
        logger.experiment.log_metrics(kept, int(kept.pop("step")))
    if rows:
        logger.save()
    return logger


def _wandb_id(run: Path, job: str) -> str:
    """The identity of the run in Weights & Biases, the same when it is resumed."""
    path = run / f".wandb-{job}"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
