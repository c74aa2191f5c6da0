"""What the two scripts share: arguments, `--help`, and one clear line for bad input."""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from interp_models.config import describe
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.errors import InputError
from interp_models.explainers.base import EXPLAINERS
from interp_models.files import unwritable
from interp_models.metrics.base import METRICS
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS
from interp_models.models.cnn import CNN
from interp_models.projection import needs_every_class
from interp_models.registry import Registry, schema_of, unknown
from interp_models.training.module import MODELS, InterpModule


def run_script(
    usage: str | None,
    schema: type,
    run: Callable[[list[str], list[str]], object],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a script's function on its arguments without `=` and its overrides; returns the exit code.

    Bad input ends in one line on stderr and exit code 2, without a traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text(usage or "", schema))
        return 0
    positional = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    try:
        for argument in positional:
            if argument.startswith("-"):
                raise InputError(f"unknown option {argument}; options are written key=value, see --help")
        run(positional, overrides)
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if (line := unwritable(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def one_line(error: BaseException) -> str:
    """The error's own line; an error raised in a loader's worker process carries that process's traceback before it."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{InputError.__module__}.").removeprefix("InputError: ")


def help_text(usage: str, schema: type) -> str:
    """Usage, the keys of the config, and everything registered with its options."""
    parts = [usage.strip(), "\nKeys (key=value, lists as phases[0].epochs=1):", describe(schema)]
    parts += ["\ndata.", describe(schema_of(DataModule))]
    registries: list[tuple[str, Registry[Any], tuple[str, ...]]] = [
        ("data.dataset.name", DATASETS, ("split",)),
        ("model.name", MODELS, ("num_classes",)),
        ("explainers", EXPLAINERS, ("model",)),
    ]
    for title, registry, given in registries:
        for name in registry.names():
            parts += [f"\n{title}: {name}", *filter(None, [describe(schema_of(registry.get(name), given))])]
    parts.append("\nphases[i].then")
    parts += [f"  of {name}: {', '.join(MODELS.get(name).actions)}" for name in MODELS.names()]
    keys = ", ".join(key for name in METRICS.names() for key in METRICS.get(name).keys)
    return "\n".join([*parts, f"\nmetrics: {keys}", f"\nprototype_metrics: {', '.join(PROTOTYPE_METRICS.names())}"])


SET_BY_SCRIPTS = {"logger", "callbacks", "max_epochs", "default_root_dir", "use_distributed_sampler", "plugins"}


def check_trainer(options: Mapping[str, Any], refused: Mapping[str, str]) -> dict[str, Any]:
    """Options for `pl.Trainer`: one process by default, so that a result does not depend on the machine.

    Args:
        options: as given.
        refused: option -> what to do instead.

    Raises:
        InputError: for an option that does not exist, is refused, or is the scripts' own affair.
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
    return {"devices": 1, **options}


def make_trainer(**options: Any) -> pl.Trainer:
    """A trainer; `InputError` for values that Lightning refuses."""
    try:
        return pl.Trainer(**options)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, also of worker processes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}; got {seed}")
    pl.seed_everything(seed, workers=True, verbose=False)


def check_data(data: DataModule, model: InterpModule) -> None:
    """Raise `InputError`, before any training, for files that are missing or broken, and for classes without a training
    image whose prototypes are to become patches of one."""
    data.check_files("train", "val", "test")
    without = data.classes_without("train")
    if without and needs_every_class(model):
        names = f"{', '.join(without[:5])}{', ...' * (len(without) > 5)}"
        raise InputError(f"prototypes of a class need a training image of it; there is none of {len(without)}: {names}")


@rank_zero_only
def tell_data(*modules: DataModule) -> None:
    """Say on stderr which images are worked on and what is left out, once of data sets that are the same."""
    for summary in dict.fromkeys(data.summary() for data in modules):
        print(f"data: {summary}", file=sys.stderr, flush=True)


def tell_head(model: InterpModule, data: DataModule) -> None:
    """Say on stderr if the classifier of a file of weights was taken for the data's classes."""
    if isinstance(model, CNN) and (line := model.keep_head(data.classes)) is not None:
        rank_zero_only(print)(line, file=sys.stderr)


def quiet() -> None:
    """Hush advice that does not apply here."""
    # Lightning's notices: which devices it found, products of its maker, that a callback of the module is used.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The number of loader processes is a choice (data.num_workers), and small data sets have few batches.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A training without validation has an empty validation loader.
    warnings.filterwarnings("ignore", ".*Total length of `list` across ranks is zero.*")
    # Lightning's use of a class that torch is about to rename.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    # That is what resuming means.
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # Metrics are synchronised by torchmetrics, whose n the results record.
    warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True`.*")
