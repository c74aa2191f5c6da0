"""An evaluation of runs, from their folders to their pages."""

import dataclasses
import hashlib
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from interp_models.core.digests import weights_digest
from interp_models.core.errors import InputError
from interp_models.core.files import LOCK, locked
from interp_models.data.choice import draw
from interp_models.data.module import DataModule
from interp_models.evaluation.callback import ExplanationEvaluation
from interp_models.evaluation.comparison import Evaluated, check_same_images, compare
from interp_models.evaluation.plan import explainer_specs, resolve_grid
from interp_models.evaluation.prototypes import PrototypeEvaluation
from interp_models.evaluation.results import Provenance
from interp_models.prototypes.sources import has_prototypes
from interp_models.report.text import text_table
from interp_models.runs.building import build_data, data_options
from interp_models.runs.config import EvaluateConfig
from interp_models.runs.ensemble import Predictions, write_ensemble
from interp_models.runs.folders import folder_of_several, run_name
from interp_models.runs.loading import load, run_config, selection
from interp_models.training.loggers import check_loggers, close, log_map_table, log_pictures, log_results, make_loggers
from interp_models.training.module import InterpModule
from interp_models.training.trainer import check_trainer, make_trainer, quiet, seed_everything, tell_data

REFUSED = dict.fromkeys(("limit_test_batches", "fast_dev_run"), "n_images= says how many images are judged")


def evaluate(folders: list[Path], config: EvaluateConfig) -> Path:
    """Evaluate runs on the same images; returns the path of the report.

    Each run gets `evaluation/` with its results, maps and report, or a single one the folder `config.out`; several runs
    also get a report together. Nobody else writes to these folders meanwhile.
    """
    quiet()
    options, _ = check_trainer(config.trainer, REFUSED)
    check_loggers(config.logger)
    if config.report_images < 0:
        raise InputError(f"report_images must be at least 0; got {config.report_images}")
    labels = [label for label, _, _ in explainer_specs(config.explainers)]
    if missing := [label for label in config.figure if label not in labels]:
        raise InputError(f"figure: {missing[0]!r} is not among the explainers ({', '.join(labels)})")
    if config.figure and "intrinsic" not in labels:
        raise InputError("figure: shows every run's own map, so that explainers must have intrinsic")
    if config.figure and not config.report_images:
        raise InputError("figure: shows images of the page, so that report_images must be at least 1")
    evaluated = _loaded(folders, config)
    for run in evaluated:
        if isinstance(config.target, int) and not 0 <= config.target < run.model.num_classes:
            last = run.model.num_classes - 1
            raise InputError(f"target {config.target} is out of range: the model has classes 0 to {last}")
    grids = [resolve_grid(config.grid, run.model, run.data.image_size) or (1, 1) for run in evaluated]
    if config.grid is None:  # one grid per table: the coarsest of the models'
        config = dataclasses.replace(config, grid=list(min(grids, key=math.prod)))
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    out = folder_of_several(config.out, "comparisons") if len(folders) > 1 else None
    with ExitStack() as locks:
        try:
            for run in evaluated if is_first else []:
                advice = "wait for its end, or evaluate one run to a folder of its own with out=FOLDER"
                locks.enter_context(locked(run.results, "an evaluation", advice))
        except InputError:
            if out is not None:
                out.rmdir()
            raise
        return _evaluate(evaluated, config, options, out)


def _evaluate(evaluated: list[Evaluated], config: EvaluateConfig, options: dict[str, Any], out: Path | None) -> Path:
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    for run in evaluated:
        folder, model, data, results = run
        node = run_config(folder)
        seed_everything(config.seed)
        of_data = data_options(node, **_changes(config))
        transform = {key: of_data[key] for key in ("image_size", "crop_to_box", "transforms")}
        # Of the weights in memory: those in the file may be another epoch's by now, if a training goes on.
        judged = [weights_digest(model), model.classes, node["model"], transform]
        digest = hashlib.sha256(json.dumps(judged, sort_keys=True, default=str).encode()).hexdigest()
        callback = ExplanationEvaluation(
            config,
            folder=results,
            provenance=Provenance(run_name(folder), selection(node, config.ckpt), int(node["seed"])),
            weights_and_transform=digest,
        )
        trainer = make_trainer(
            default_root_dir=results,
            logger=make_loggers(
                config.logger,
                (results if results != folder / "evaluation" else folder) if is_first else None,
                group=node["experiment"],
                job="evaluate",
            ),
            callbacks=[callback, PrototypeEvaluation(config.prototype_metrics, results, digest)],
            use_distributed_sampler=False,
            **{"enable_progress_bar": False, **options},
        )
        if data is evaluated[0].data:  # all checks have passed
            tell_data(*(one.data for one in evaluated))
        trainer.test(model, data, verbose=False)
        if trainer.is_global_zero:
            report, shown = compare([run], results, config.report_images, config.figure)
            rows = json.loads((results / "results.json").read_text())["rows"]
            log_results(trainer.loggers, rows)
            log_map_table(trainer.loggers, shown)
            for key in ("local", "parts"):
                log_pictures(trainer.loggers, key, sorted((results / key).glob("*.jpg")))
            print(text_table(rows))
        close(trainer.loggers)
    if not trainer.is_global_zero:
        return evaluated[0].results / "report.html"
    if out is not None:
        report, _ = compare(evaluated, out, config.report_images, config.figure)
    print(f"report: {report}")
    return report


def _changes(config: EvaluateConfig) -> dict[str, Any]:
    """What is changed of the runs' own data options."""
    return {"dataset": config.dataset, **({} if config.batch_size is None else {"batch_size": config.batch_size})}


def _loaded(folders: list[Path], config: EvaluateConfig) -> list[Evaluated]:
    """The runs with their models and the images to judge, which must be the same."""
    names = [run_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"two runs have one name, by which results are told apart: {', '.join(names)}")
    nodes = [run_config(folder) for folder in folders]
    models = [load(folder, config.ckpt)[0] for folder in folders]
    modules = [build_data(node, **_changes(config)) for node in nodes]
    for folder, model, data in zip(folders, models, modules, strict=True):
        if model.classes:
            data.as_classes(model.classes, str(folder))
        elif len(data.classes) != model.num_classes:  # an older checkpoint, which holds no names
            raise InputError(f"{folder}: the model has {model.num_classes} classes, the data set {len(data.classes)}")
        _check_drawn(folder, model, data, moved=bool(config.dataset))
        data.test_indices = draw(data.test_indices, config.n_images, config.seed)
        data.check_files("test", *(("train", "whole_test") if has_prototypes(model) else ()))
    results = [folder / "evaluation" for folder in folders]
    if config.out is not None and len(folders) == 1:
        results = [_own_folder(Path(config.out))]
    for data, memory in zip(modules, results, strict=True):
        data.memory = memory
    check_same_images(folders, modules)
    return [Evaluated(*run) for run in zip(folders, models, modules, results, strict=True)]


def _check_drawn(folder: Path, model: InterpModule, data: DataModule, *, moved: bool) -> None:
    """Refuse test images that were drawn from a folder whose images are no longer those of the training: some may have
    been trained on. Of another folder this is only said."""
    before = model.images.get("train")
    if not data.train_images.note or before is None or before[1] == data.fingerprint("train"):
        return
    why = f"{folder}: {data.train_images.note}, but the training images are others than the run's"
    if not moved:
        raise InputError(f"{why}, so that some were trained on; give folders train/ and test/, or a list with a split")
    rank_zero_warn(f"{why}; if both folders have images in common, some may have been trained on")


def _own_folder(out: Path) -> Path:
    """The folder for one run's evaluation, which may hold one already; raises `InputError` if it holds other things."""
    try:
        full = out.exists() and any(out.iterdir())
        own = any((out / name).exists() for name in (LOCK, ".partial", "results.json"))
        other = full and ((out / "checkpoints").exists() or not own)
    except OSError as error:
        raise InputError(f"out={out} cannot be read: {error.strerror}") from None
    if other:
        raise InputError(
            f"out={out} holds other files than an evaluation's; name a new folder, or that of an evaluation"
        )
    return out


def ensemble(folders: list[Path], config: EvaluateConfig) -> Path:
    """Average the class probabilities of runs on the same images; returns the path of the accuracies."""
    quiet()
    options, _ = check_trainer(config.trainer, REFUSED)
    if not folders:
        raise InputError("ensemble= names no run")
    evaluated = _loaded(folders, config)
    out = folder_of_several(config.out, "ensembles")
    members = []
    for folder, model, data, _ in evaluated:
        seed_everything(config.seed)
        members.append(Predictions())
        trainer = make_trainer(
            default_root_dir=folder,
            logger=False,
            callbacks=members[-1:],
            use_distributed_sampler=False,
            **{"enable_progress_bar": False, **options},
        )
        if data is evaluated[0].data:  # all checks have passed
            tell_data(*(one.data for one in evaluated))
        trainer.test(model, data, verbose=False)
    path = (out or folders[0]) / "metrics.json"
    if out is not None:
        accuracy = write_ensemble(path, [run_name(folder) for folder in folders], members)
        count = len(members[0].labels)
        print(f"test accuracy {100 * accuracy:.2f} % of {len(members)} runs together on {count} images: {out}")
    return path
