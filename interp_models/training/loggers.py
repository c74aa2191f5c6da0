"""Weights & Biases and TensorBoard: loggers beside the files of a run."""

import base64
import importlib.util
import json
import netrc
import os
import uuid
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import get_args
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.errors import InputError
from interp_models.training.config import LoggerConfig, Mode


def wandb_mode(config: LoggerConfig) -> str:
    """The mode of Weights & Biases: `disabled` if the config or `WANDB_DISABLED` says so, else `WANDB_MODE` if it is
    set, else that of the config.

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
    """Raise `InputError` early if a logger cannot work because an extra, a login or the network is missing."""
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
    except HTTPError as error:  # the server was reached
        known = error.code not in (401, 403)
    except (OSError, HTTPException, ValueError) as error:
        raise InputError(
            f"logger.wandb=online: {url} cannot be reached ({' '.join(str(error).split())}); connect, {instead}"
        ) from None
    if key and not known:
        raise InputError(f"logger.wandb=online: {url} does not know the API key; run wandb login --relogin, {instead}")


def _netrc_key(url: str) -> str | None:
    """The API key that `wandb login` wrote."""
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
) -> list[Logger]:
    """Make the loggers that a config asks for.

    Args:
        config: the options of the loggers.
        run: the run folder; None, on ranks above 0, makes no logger.
        group: group in Weights & Biases.
        job: kind of job, `train` or `evaluate`.
    """
    if run is None:
        return []
    loggers: list[Logger] = []
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
        # The default `hp_metric` would be -1 for every run
        loggers.append(TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False))
    return loggers


def log_pictures(loggers: Iterable[Logger], key: str, paths: Sequence[Path], step: int = 0) -> None:
    """Send picture files to Weights & Biases, with file names as captions, and to TensorBoard as `<key>/<name>`."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and paths:
            logger.log_image(key, [str(path) for path in paths], caption=[path.stem for path in paths])
        elif isinstance(logger, TensorBoardLogger):
            for path in paths:
                add_picture(logger, f"{key}/{path.stem}", path, step)


def log_maps(
    loggers: Iterable[Logger], pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str], sheet: Path, step: int
) -> None:
    """Send pictures of the model's own maps: single pictures to Weights & Biases, the sheet to TensorBoard.

    Args:
        loggers: the loggers.
        pictures: one picture (H, W, 3) for each image.
        captions: a caption for each picture.
        sheet: the file that shows all of them.
        step: the epoch.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("attention", list(pictures), caption=list(captions))
        elif isinstance(logger, TensorBoardLogger):
            add_picture(logger, "attention", sheet, step)


def add_picture(logger: TensorBoardLogger, tag: str, path: Path, step: int) -> None:
    """Send a picture file to TensorBoard."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    logger.experiment.add_image(tag, picture, step, dataformats="HWC")


def close(loggers: Iterable[Logger]) -> None:
    """Finish runs of Weights & Biases: a process has one run at a time, and the next logger would write to it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _wandb_id(run: Path, job: str) -> str:
    """The id of the run in Weights & Biases; a resumed run has the same."""
    path = run / f".wandb-{job}"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()
