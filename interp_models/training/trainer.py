"""Lightning's trainer for the two commands: its options are checked, and it leaves signals alone."""

import inspect
import logging
import os
import sys
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.errors import InputError, unknown
from interp_models.core.schema import parse, schema_of
from interp_models.data.module import DataModule
from interp_models.prototypes.sources import Prototypical
from interp_models.training.module import InterpModule
from interp_models.training.stops_ranks import StopsRanks

SET_BY_SCRIPTS = {"logger", "callbacks", "max_epochs", "default_root_dir", "use_distributed_sampler", "plugins"}


STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "log_every_n_steps": 1, "num_sanity_val_steps": -1}
"""Minimum values of options that Lightning does not check."""


def check_trainer(options: Mapping[str, Any], refused: Mapping[str, str]) -> tuple[dict[str, Any], pl.Trainer]:
    """Check options for `pl.Trainer`.

    The default is one process, so that results do not depend on the machine.

    Args:
        options: the options as given.
        refused: options that the command refuses, each with what to do instead.

    Returns:
        The options with defaults, and an unused trainer made from them.

    Raises:
        InputError: for an option that does not exist, is refused, or is set by the commands themselves, and for a value
            that cannot work.
    """
    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in SET_BY_SCRIPTS]
    for key, value in options.items():
        if key in SET_BY_SCRIPTS:
            raise InputError(f"trainer.{key} is set by the script and cannot be given")
        if key not in known:
            raise unknown("key in trainer:", key, known)
        if key in refused:
            raise InputError(f"trainer.{key} cannot be given; {refused[key]}")
        if key.startswith("limit_") and value == 0:
            raise InputError(f"trainer.{key} must not be 0; data.val_fraction=0 trains without validation")
        if key == "precision" and str(value) in ("bf16-true", "16-true"):
            raise InputError(f"trainer.precision={value} is not supported; bf16-mixed and 16-mixed are")
        if key == "strategy" and isinstance(value, str) and value not in STRATEGIES:
            raise InputError(f"trainer.strategy={value} is not supported; {', '.join(STRATEGIES)} are")
        if key == "deterministic" and value not in (True, False, None, "warn"):
            raise InputError(f"trainer.deterministic must be true, false or warn; got {value!r}")
    options = {"devices": 1, **options, **_checked_types(options)}
    for key, least in LEAST.items():
        if options.get(key) is not None and not options[key] >= least:
            raise InputError(f"trainer.{key} must be at least {least}; got {options[key]}")
    trial = make_trainer(logger=False, enable_checkpointing=False, **options)
    cores = max(2, os.cpu_count() or 1)
    if trial.strategy.root_device.type == "cpu" and trial.num_devices > cores:
        raise InputError(f"trainer.devices={trial.num_devices}: this machine has {cores} CPU cores")
    return options, trial


def _checked_types(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are numbers, booleans or strings, with their types checked; Lightning does not check them."""
    plain = {bool, int, float, str, type(None)}
    hints = typing.get_type_hints(pl.Trainer.__init__)
    other = [name for name, hint in hints.items() if not {*(typing.get_args(hint) or [hint])} <= plain]
    mine = {key: value for key, value in options.items() if key not in other}
    checked = parse(schema_of(pl.Trainer, given=other), mine, "trainer")
    return {key: checked[key] for key in mine}


def make_trainer(*, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """Make a trainer that leaves signals to `run_script`; raises `InputError` for values that Lightning refuses."""
    try:
        trainer = pl.Trainer(callbacks=[*callbacks, StopsRanks()], **options)
    except (MisconfigurationException, ImportError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    # At SIGTERM, Lightning would end a training as if it were finished.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch, in worker processes too."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}; got {seed}")
    pl.seed_everything(seed, workers=True, verbose=False)


def check_data(data: DataModule, model: InterpModule) -> None:
    """Raise `InputError` before the training if image files are missing or broken, or if a class with prototypes has no
    training image to take patches from."""
    data.check_files("train", "val", "test")
    without = data.classes_without("train")
    if without and isinstance(model, Prototypical) and model.class_specific:
        names = f"{', '.join(without[:5])}{', ...' * (len(without) > 5)}"
        raise InputError(f"prototypes of a class need a training image of it; there is none of {len(without)}: {names}")


@rank_zero_only
def tell_data(*modules: DataModule) -> None:
    """Print on stderr which images are used and which are left out; equal data sets are named once."""
    for summary in dict.fromkeys(data.summary() for data in modules):
        print(f"data: {summary}", file=sys.stderr, flush=True)


def quiet() -> None:
    """Silence messages of Lightning that do not apply here."""
    # Notices about devices, products of Lightning's maker, and callbacks of the module.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The user chooses the number of loader processes (data.num_workers), and small data sets have few batches.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A training without validation has an empty validation loader.
    warnings.filterwarnings("ignore", ".*Total length of `list` across ranks is zero.*")
    # Lightning uses a class that torch is about to rename.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    # A resumed run always writes to an existing folder.
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # torchmetrics synchronises the metrics over ranks.
    warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True`.*")
