"""Where a run's numbers go: `metrics.csv` always, Weights & Biases and TensorBoard as asked."""

import base64
import csv
import importlib.util
import io
import json
import netrc
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.errors import InputError
from interp_models.core.files import write_whole
from interp_models.report import visual
from interp_models.report.views import ImageView
from interp_models.training.config import LoggerConfig, Mode


def wandb_mode(config: LoggerConfig) -> str:
    """The mode of Weights & Biases: `WANDB_MODE` if it is set, but what the config disables stays so.

    Raises:
        InputError: for an unknown `WANDB_MODE`.
    """
    given = os.environ.get("WANDB_MODE", "")
    if config.wandb == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    mode = {"": config.wandb, "dryrun": "offline", "run": "online"}.get(given, given)  # Lightning sets dryrun
    if mode not in get_args(Mode):
        raise InputError(f"WANDB_MODE={given} must be one of {', '.join(get_args(Mode))}")
    return mode


@rank_zero_only
def check_loggers(config: LoggerConfig) -> None:
    """Raise `InputError` if a logger could not work: an extra, a login or the network is missing; made to be early."""
    if config.tensorboard and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise InputError("logger.tensorboard=true needs the extra: pip install 'interp_models[tensorboard]'")
    if wandb_mode(config) != "online":
        return
    import wandb  # slow, and only needed here

    settings = wandb.setup().settings
    url, instead = settings.base_url.rstrip("/"), "or use logger.wandb=offline"
    key = os.environ.get("WANDB_API_KEY") or settings.api_key or _netrc_key(url)
    if not key and not os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        raise InputError(f"logger.wandb=online: no login for {url}; run wandb login, set WANDB_API_KEY, {instead}")
    request = Request(f"{url}/graphql", json.dumps({"query": "query { viewer { id } }"}).encode())
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}")
    try:
        with urlopen(request, timeout=5) as answer:
            known = b'"viewer":null' not in answer.read().replace(b" ", b"")
    except HTTPError as error:  # the server is there
        known = error.code not in (401, 403)
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(
            f"logger.wandb=online: {url} cannot be reached ({' '.join(str(error).split())}); connect, {instead}"
        ) from None
    if key and not known:
        raise InputError(f"logger.wandb=online: {url} does not know the API key; run wandb login --relogin, {instead}")


def _netrc_key(url: str) -> str | None:
    """The password that `wandb login` wrote."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")).authenticators(
            urlsplit(url).hostname or ""
        )
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


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
    mode = wandb_mode(config)
    if mode != "disabled":
        loggers.append(
            WandbLogger(
                project=config.project,
                save_dir=run,
                offline=mode == "offline",
                id=_wandb_id(run, job),
                resume="allow",
                group=group,
                job_type=job,
                name=f"{run.parent.name}/{run.name}",
            )
        )
    if config.tensorboard:
        # Its own metric of hyperparameters would be -1 for every run
        loggers.append(TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False))
    return loggers


def log_results(loggers: Iterable[Logger], rows: Sequence[Mapping[str, Any]]) -> None:
    """Send an evaluation's scores to Weights & Biases as a table: a row per explainer, and for each metric the mean,
    the standard deviation over the images, and the number of images where it is defined."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        cells = table.setdefault(row["explainer"], {"explainer": row["explainer"]})
        key = row["metric"]
        cells |= {key: row["mean"], f"{key} std": row["std"], f"{key} n": row["n"] - row["n_undefined"]}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("results", dataframe=pd.DataFrame(list(table.values())))


def log_map_table(loggers: Iterable[Logger], images: Sequence[ImageView]) -> None:
    """Send the images that a page shows to Weights & Biases as a table: a row per image, a column per explainer."""
    sending = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not sending or not images:
        return
    import wandb

    explainers = list(dict.fromkeys(shown.explainer for view in images for shown in view.maps))
    rows = []
    for view in images:
        (run,) = view.predictions
        predicted, probability = view.predictions[run]
        own = view.own.get(run, view.image)
        maps = {shown.explainer: wandb.Image(visual.drawn(own, shown.heatmap)[0]) for shown in view.maps}
        about = [view.image_id, view.label, predicted, probability, predicted == view.label, wandb.Image(own)]
        rows.append([*about, *(maps.get(explainer) for explainer in explainers)])
    columns = ["image", "class", "prediction", "probability", "right", "pixels", *explainers]
    for logger in sending:
        logger.log_table("maps", columns=columns, data=rows)


def log_pictures(loggers: Iterable[Logger], key: str, paths: Sequence[Path], step: int = 0) -> None:
    """Send picture files to Weights & Biases, with their names as captions, and to TensorBoard as `<key>/<name>`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and paths:
            logger.log_image(key, [str(path) for path in paths], caption=[path.stem for path in paths])
        elif isinstance(logger, TensorBoardLogger):
            for path in paths:
                _add_picture(logger, f"{key}/{path.stem}", path, step)


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
            _add_picture(logger, "attention", sheet, step)


def _add_picture(logger: TensorBoardLogger, tag: str, path: Path, step: int) -> None:
    picture = np.asarray(Image.open(path).convert("RGB"))
    logger.experiment.add_image(tag, picture, step, dataformats="HWC")


def close(loggers: Iterable[Logger]) -> None:
    """End runs of Weights & Biases: a process has one at a time, and the next logger would write to it too."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


class MetricsFile(Logger):
    """`metrics.csv`: one row per epoch with what training and validation logged, written whole whenever that grows.

    Phases, which Lightning logs as numbers, stand there by name. Results on test images are in `metrics.json` alone, as
    no epoch is to be chosen by them.

    Args:
        run: the run folder.
        phases: names of the phases on the timeline.
        epochs: epochs already done by the run that goes on, whose rows are kept; None begins anew.
        last: the row of the last of them, which is filled in if the run was stopped before all of it was written.
    """

    name, version = "metrics", ""

    def __init__(
        self, run: Path, phases: Sequence[str] = (), epochs: int | None = None, last: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.path, self.phases = run / "metrics.csv", phases
        self.rows: dict[int, dict[str, Any]] = {}
        """By epoch."""
        if epochs is not None and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a cut one lacks cells
            for row in rows:  # earlier versions wrote several rows for an epoch
                if row.get("epoch", "").isdecimal() and int(row["epoch"]) < epochs:
                    self._fill(int(row["epoch"]), {key: value for key, value in row.items() if value})
        if last:
            self.log_metrics(last, int(last["step"]))

    @property
    def save_dir(self) -> str:
        """The run folder, where Lightning's profilers write too."""
        return str(self.path.parent)

    def _fill(self, epoch: int, values: Mapping[str, Any]) -> None:
        self.rows[epoch] = {**self.rows.get(epoch, {}), **values}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Fill in the row of the epoch that the metrics name."""
        row = {key: value for key, value in metrics.items() if not key.startswith("test/")}
        if row.keys() == {"epoch"}:
            return
        if isinstance(row.get("phase"), float):
            row["phase"] = self.phases[int(row["phase"])]
        self._fill(int(row["epoch"]), {**row, "step": step})
        text = io.StringIO()
        rows = [self.rows[epoch] for epoch in sorted(self.rows)]
        writer = csv.DictWriter(text, sorted({key for row in rows for key in row}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path, text.getvalue())

    def log_hyperparams(self, params: Any) -> None:
        """They are in `config.yaml`."""


def _wandb_id(run: Path, job: str) -> str:
    """The identity of the run in Weights & Biases, the same when it is resumed."""
    path = run / f".wandb-{job}"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
