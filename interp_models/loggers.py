"""Where a run's numbers go: `metrics.csv` always, Weights & Biases and TensorBoard as asked."""

import csv
import io
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from interp_models.config import LoggerConfig
from interp_models.errors import InputError
from interp_models.files import write_whole


def make_loggers(
    config: LoggerConfig,
    run: Path | None,
    *,
    group: str,
    job: str = "train",
    epochs: int | None = None,
    last: Mapping[str, Any] | None = None,
    phases: Sequence[str] = (),
) -> list[Logger]:
    """The loggers of a run; none on ranks that know no run folder, as only rank 0 logs.

    Args:
        config: which.
        run: the run folder, or None.
        group: group in Weights & Biases.
        job: kind of job, `train` or `evaluate`.
        epochs: epochs already done by the run that goes on, see `MetricsFile`.
        last: see `MetricsFile`.
        phases: names of the phases on the timeline.
    """
    if run is None:
        return []
    loggers: list[Logger] = []
    if job == "train":
        loggers.append(MetricsFile(run, phases, epochs, last))
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
            # Its own metric of hyperparameters would be -1 for every run
            loggers.append(TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False))
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


def log_pictures(loggers: Iterable[Logger], key: str, paths: Sequence[Path], step: int = 0) -> None:
    """Send picture files to Weights & Biases, with their names as captions, and to TensorBoard as `<key>/<name>`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and paths:
            logger.log_image(key, [str(path) for path in paths], caption=[path.stem for path in paths])
        elif isinstance(logger, TensorBoardLogger):
            for path in paths:
                picture = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image(f"{key}/{path.stem}", picture, step, dataformats="HWC")


def log_maps(
    loggers: Iterable[Logger], pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str], sheet: Path, step: int
) -> None:
    """Send pictures of the model's own maps: to Weights & Biases each with its caption, to TensorBoard the sheet.

    Args:
        loggers: any.
        pictures: (H, W, 3), one for each image.
        captions: what is said of each.
        sheet: the file of all of them.
        step: of the training.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("attention", list(pictures), caption=list(captions))
        elif isinstance(logger, TensorBoardLogger):
            picture = np.asarray(Image.open(sheet).convert("RGB"))
            logger.experiment.add_image("attention", picture, step, dataformats="HWC")


def close(loggers: Iterable[Logger]) -> None:
    """End runs of Weights & Biases: a process has one at a time, and the next logger would write to it too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


class MetricsFile(Logger):
    """`metrics.csv`, written whole whenever a row is added, with the names of phases, which Lightning logs as numbers.

    Args:
        run: the run folder.
        phases: names of the phases on the timeline.
        epochs: epochs already done by the run that goes on, whose rows are kept; None begins anew.
        last: the row that the last of them ends with, which is added if the run was stopped before it was written.
    """

    name, version = "metrics", ""

    def __init__(
        self, run: Path, phases: Sequence[str] = (), epochs: int | None = None, last: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.path, self.phases = run / "metrics.csv", phases
        self.rows: list[dict[str, Any]] = []
        if epochs is not None and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a cut one lacks cells
            rows = [row for row in rows if row.get("epoch", "").isdecimal() and int(row["epoch"]) < epochs]
            self.rows = [{key: value for key, value in row.items() if value} for row in rows]
        if last and not any(row["epoch"] == str(last["epoch"]) and row.get("train/loss") for row in self.rows):
            self.log_metrics(last, int(last["step"]))

    @property
    def save_dir(self) -> str:
        """The run folder, where Lightning's profilers write too."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row: dict[str, Any] = {**metrics, "step": step}
        if isinstance(row.get("phase"), float):
            row["phase"] = self.phases[int(row["phase"])]
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, sorted({key for row in self.rows for key in row}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, text.getvalue())

    def log_hyperparams(self, params: Any) -> None:
        """They are in `config.yaml`."""


def _wandb_id(run: Path, job: str) -> str:
    """The identity of the run in Weights & Biases, the same when it is resumed."""
    path = run / f".wandb-{job}"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
