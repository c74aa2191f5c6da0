"""The evaluation of several models on the same images: Lightning's test loop for each, then tables and pages."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from interp_models.core.digests import network_digest
from interp_models.core.errors import InputError
from interp_models.core.files import folder_of_several, locked, write_whole
from interp_models.data.module import DataModule
from interp_models.evaluation.answer import in_words
from interp_models.evaluation.callback import ExplanationEvaluation, Judged
from interp_models.evaluation.comparison import (
    FIGURE_ROWS,
    Compared,
    write_comparison,
    write_figure,
    write_local,
    write_page,
)
from interp_models.evaluation.config import EvaluateConfig
from interp_models.evaluation.logged import log_evaluation
from interp_models.evaluation.part_sheets import write_part_sheets
from interp_models.evaluation.plan import explainer_specs, resolve_grid
from interp_models.evaluation.prototypes import PrototypeEvaluation
from interp_models.evaluation.shown import Gallery, gallery_of, prototypes_shown, shown_by
from interp_models.evaluation.tables import Provenance, read_prototypes, read_tables
from interp_models.prototypes.parts import PartModel
from interp_models.report.published import Beside, beside, check_published
from interp_models.report.text import text_table
from interp_models.report.views import ImageView, RunSummary
from interp_models.training.epoch_times import training_cost
from interp_models.training.loggers import check_loggers, close, log_pictures, make_loggers
from interp_models.training.module import InterpModule
from interp_models.training.tasks import MEASURES
from interp_models.training.trainer import check_trainer, make_trainer, seed_everything, tell_data

REFUSED = dict.fromkeys(("limit_test_batches", "fast_dev_run"), "n_images= says how many images are judged")
ADVICE = "wait for its end, or evaluate one model to a folder of its own with out=FOLDER"


@dataclass(frozen=True)
class Judging:
    """A model to judge, with its origin, its images and the folder of its results."""

    name: str
    """Name in the tables."""
    model: nn.Module
    num_classes: int
    data: DataModule
    """The images to judge it on."""
    results: Path
    """Folder of its results."""
    selection: str
    """How its weights were selected."""
    seed: int | None
    """Seed of its training; None if unknown."""
    described: str
    """Kind of model, for the page."""
    transform: Mapping[str, Any]
    """Options that say how its images are prepared."""
    folder: Path | None = None
    """Its run folder; None for a network that was not trained here."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Resolved config of its run; empty for a network that was not trained here."""
    checkpoint: Path | None = None
    """The file of its weights; None for a network that was not trained here."""

    @property
    def knows_labels(self) -> bool:
        """Whether the model and the data have the same number of classes, so that labels have a meaning for it."""
        return self.num_classes == len(self.data.classes) > 0


def check_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Check what can be checked before a model is built; returns the options of the trainer.

    Raises:
        InputError: for options of the trainer, loggers or the page that do not work.
    """
    options, _ = check_trainer(config.trainer, REFUSED)
    check_loggers(config.logger)
    if config.report_images < 0:
        raise InputError(f"report_images must be at least 0; got {config.report_images}")
    check_published(config.published)
    labels = [label for label, _, _ in explainer_specs(config.explainers)]
    if missing := [label for label in config.figure if label not in labels]:
        raise InputError(f"figure: {missing[0]!r} is not among the explainers ({', '.join(labels)})")
    if config.figure and "intrinsic" not in labels:
        raise InputError("figure: shows every run's own map, so that explainers must have intrinsic")
    if config.figure and not config.report_images:
        raise InputError("figure: shows images of the page, so that report_images must be at least 1")
    return options


Further = Callable[[Sequence[Judging], Sequence[Compared], Path], None]
"""What else is made of judged models, in the folder of the report."""


def evaluate_models(
    judged: Sequence[Judging],
    config: EvaluateConfig,
    options: Mapping[str, Any],
    further: Further | None = None,
) -> Path:
    """Evaluate models on the same images.

    Each model has a folder for its results, maps and page. Several models also get one together. The folders are locked
    for other processes.

    Args:
        judged: the models.
        config: explainers, metrics and output.
        options: of the trainer, from `check_evaluation`.
        further: makes something else of the judged models, on the first rank.

    Returns:
        The path of the report.

    Raises:
        InputError: for a target that a model does not have, a grid that cannot be resolved, or a folder in use.
    """
    for one in judged:
        if isinstance(config.target, int) and not 0 <= config.target < one.num_classes:
            raise InputError(
                f"target {config.target} is out of range: the model has classes 0 to {one.num_classes - 1}"
            )
        if config.target == "label" and not one.knows_labels:
            raise InputError(f"target label: {one.name} has other classes than the data set; target=prediction works")
        if config.target == "label" and not one.data.has_labels:
            raise InputError("target label: the images have no labels; target=prediction works")
    grids = [resolve_grid(config.grid, one.model, _example(one)) or (1, 1) for one in judged]
    if config.grid is None:  # one grid per table: the coarsest of the models'
        config = dataclasses.replace(config, grid=list(min(grids, key=math.prod)))
    out = folder_of_several(config.out, "comparisons") if len(judged) > 1 and is_first_process() else None
    with ExitStack() as locks:
        try:
            for one in judged if is_first_process() else []:
                try:
                    one.results.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    why = f"{error.strerror}; out=FOLDER names another"
                    raise InputError(f"{one.results} cannot be made: {why}") from None
                locks.enter_context(locked(one.results, "an evaluation", ADVICE))
        except InputError:
            if out is not None:
                out.rmdir()
            raise
        return _evaluate(judged, config, options, out, further)


def is_first_process() -> bool:
    """Whether this process is rank 0, which writes the results; known before the process group exists."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]  # Lightning sets it


def _example(one: Judging) -> torch.Tensor:
    return torch.zeros(1, 3, one.data.image_size, one.data.image_size)


def _evaluate(
    judged: Sequence[Judging],
    config: EvaluateConfig,
    options: Mapping[str, Any],
    out: Path | None,
    further: Further | None,
) -> Path:
    compared: list[Compared] = []
    galleries: dict[str, Gallery] = {}
    for one in judged:
        trainer = _run(one, judged, config, options)
        if trainer.is_global_zero:
            galleries[one.name] = gallery_of(one.model, one.data)
            compared.append(_compared(one, galleries[one.name]))
            published = _published(config, compared) if out is None else None
            images = _write_page([one], compared[-1:], one.results, config, galleries, published)
            shutil.rmtree(one.results / "local", ignore_errors=True)  # of other images or weights
            write_local(images, one.results / "local")
            words = in_words(compared[-1].tables.rows, compared[-1].tables.differences)
            log_evaluation(trainer.loggers, compared[-1].tables, words, images, _files(one))
            for key in ("local", "parts"):
                log_pictures(trainer.loggers, key, sorted((one.results / key).glob("*.jpg")))
            print("\n\n".join(filter(None, [text_table(compared[-1].tables.rows), words])))
        close(trainer.loggers)
    report = (judged[0].results if out is None else out) / "report.html"
    if compared:
        if out is not None:
            rows = [{"run": one.name, **row} for one in judged for row in read_prototypes(one.results).get("rows", [])]
            write_comparison(compared, rows, out / "results.json")
            _write_page(judged, compared, out, config, galleries, _published(config, compared))
        if (published := _published(config, compared)) is not None:
            write_whole(report.parent / "published.md", f"{published}\n")
            print(f"\n{published}\n")
        print(f"report: {report}")
        if further is not None:
            further(judged, compared, report.parent)
    return report


def _published(config: EvaluateConfig, compared: Sequence[Compared]) -> Beside | None:
    """Published numbers beside those of the judged models, if the config has some."""
    of_models = {(one.summary.name, one.summary.model): one.tables.rows for one in compared}
    return beside(config.published, of_models) if config.published else None


def _files(one: Judging) -> dict[str, list[Path]]:
    """Files of the artifacts in Weights & Biases: the page and the tables, and the config of a run."""
    names = ("report.html", "results.json", "per_image.parquet")
    found = {"evaluation": [one.results / name for name in names]}
    config = None if one.folder is None else one.folder / "config.yaml"
    if one.checkpoint is not None and config is not None:
        found["model"] = [one.checkpoint, config]
    return found


def _run(one: Judging, judged: Sequence[Judging], config: EvaluateConfig, options: Mapping[str, Any]) -> pl.Trainer:
    """Judge one model in Lightning's test loop; returns the trainer."""
    seed_everything(config.seed)
    # The digest is of the weights in memory: if a training is running, the file may hold another epoch by now.
    work = [network_digest(one.model), getattr(one.model, "classes", ()), one.config.get("model"), one.transform]
    digest = hashlib.sha256(json.dumps(work, sort_keys=True, default=str).encode()).hexdigest()
    callback = ExplanationEvaluation(
        config,
        folder=one.results,
        provenance=Provenance(one.name, one.selection, one.seed),
        weights_and_transform=digest,
        same_classes=one.knows_labels,
        report_images=config.report_images,
    )
    own = one.folder is not None and one.results == one.folder / "evaluation"
    trainer = make_trainer(
        default_root_dir=one.results,
        logger=make_loggers(
            config.logger,
            (one.folder if own else one.results) if is_first_process() else None,
            group=one.config.get("experiment", one.name),
            job="evaluate",
        ),
        callbacks=[callback, PrototypeEvaluation(config.prototype_metrics, one.results, digest)],
        use_distributed_sampler=False,
        **{"enable_progress_bar": False, **options},
    )
    if one is judged[0]:  # all checks have passed
        tell_data(*(other.data for other in judged))
    module = one.model if isinstance(one.model, InterpModule) else Judged(one.model)
    trainer.test(module, one.data, verbose=False)
    return trainer


def _compared(one: Judging, gallery: Gallery) -> Compared:
    """The summary, tables and pictures of a judged model, for its page."""
    path = None if one.folder is None else one.folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    tables, classes = read_tables(one.results), one.data.classes
    measure = one.model.measured if isinstance(one.model, InterpModule) else MEASURES["classes"]
    summary = RunSummary(
        name=one.name,
        model=one.described,
        dataset=type(one.data.test_images).__name__ if not one.config else one.config["data"]["dataset"]["name"],
        accuracy=metrics.get(f"test/{measure.key}"),
        n=int(metrics.get("test/n", 0)),
        accuracy_judged=tables.accuracy if one.knows_labels else None,
        n_judged=tables.listing["index"].nunique(),
        seed=one.seed,
        selection=one.selection,
        measure=measure.name,
        without_label=tables.without_label,
        training="" if one.folder is None else training_cost(one.folder),
    )
    named = classes if one.knows_labels else ()

    def class_name(label: int) -> str:
        return "?" if label < 0 else named[label] if named else f"class {label}"

    return Compared(summary, tables, class_name, shown_by(one.model, one.data, gallery))


def _write_page(
    judged: Sequence[Judging],
    compared: Sequence[Compared],
    folder: Path,
    config: EvaluateConfig,
    galleries: Mapping[str, Gallery],
    published: Beside | None,
) -> list[ImageView]:
    """Write the page of one or several models and the pictures beside it; returns the images that it shows."""

    def prototypes(images: Sequence[ImageView]) -> list[Any]:
        views = [prototypes_shown(o.name, o.model, o.data, o.results, images, galleries[o.name]) for o in judged]
        return [view for view in views if view is not None]

    images = write_page(
        compared, folder / "report.html", config.report_images, prototypes=prototypes, published=published
    )
    of_parts = [(one.name, one.model, one.data) for one in judged if isinstance(one.model, PartModel)]
    shutil.rmtree(folder / "parts", ignore_errors=True)
    if of_parts:
        labels = (name for view in images for name in ([view.label] if view.labels is None else view.labels))
        names = list(dict.fromkeys(labels))[:FIGURE_ROWS]
        write_part_sheets(of_parts, [judged[0].data.classes.index(name) for name in names], folder / "parts")
    (folder / "figure.png").unlink(missing_ok=True)
    if config.figure and images:
        write_figure(images, [one.summary for one in compared], config.figure, folder / "figure.png")
    return images
