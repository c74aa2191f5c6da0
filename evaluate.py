"""Judge the maps of trained models: their own and post-hoc ones, by the same metrics on the same images.

python evaluate.py RUN [RUN ...] [key=value ...]
Defaults are read from configs/eval/faithfulness.yaml, or from config=FILE.
"""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from interp_models import runs
from interp_models.callbacks.explanation_evaluation import ExplanationEvaluation, resolve_grid
from interp_models.cli import check_trainer, make_trainer, quiet, run_script, seed_everything, tell_skipped
from interp_models.comparison import Evaluated, check_same_images, compare
from interp_models.config import EvaluateConfig, check, load_yaml, override
from interp_models.data.module import draw
from interp_models.errors import InputError
from interp_models.loggers import close, log_results, make_loggers
from interp_models.results import Provenance

DEFAULT = "configs/eval/faithfulness.yaml"
REFUSED = dict.fromkeys(("limit_test_batches", "fast_dev_run"), "n_images= says how many images are judged")


def evaluate(folders: list[Path], config: EvaluateConfig) -> Path:
    """Evaluate runs on the same images; returns the path of the report.

    Each run gets `evaluation/` with its results, maps and report; several runs also get a report together.
    """
    quiet()
    options = check_trainer(config.trainer, REFUSED)
    if config.out is not None and len(folders) == 1:
        raise InputError("out= is the folder of a comparison of several runs; the results of one go to RUN/evaluation")
    if config.report_images < 0:
        raise InputError(f"report_images must be at least 0; got {config.report_images}")
    names = [runs.run_name(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"two runs have one name, by which results are told apart: {', '.join(names)}")
    nodes = [runs.run_config(folder) for folder in folders]
    models = [runs.load(folder, config.ckpt)[0] for folder in folders]
    changes = {"dataset": config.dataset, **({} if config.batch_size is None else {"batch_size": config.batch_size})}
    modules = [runs.build_data(node, **changes) for node in nodes]
    for folder, model, data in zip(folders, models, modules, strict=True):
        if len(data.classes) != model.num_classes:
            raise InputError(f"{folder}: the model has {model.num_classes} classes, the data set {len(data.classes)}")
        tell_skipped(data)
        data.test_indices = draw(data.test_indices, config.n_images, config.seed)
    check_same_images(folders, modules)
    if config.grid is None:  # one grid per table: the coarsest of the models'
        pairs = zip(models, modules, strict=True)
        grids = [resolve_grid(None, model, data.image_size) or (1, 1) for model, data in pairs]
        config = dataclasses.replace(config, grid=list(min(grids, key=math.prod)))
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    out = runs.comparison_folder(config.out) if len(folders) > 1 else None
    for folder, node, model, data in zip(folders, nodes, models, modules, strict=True):
        seed_everything(config.seed)
        checkpoint = runs.checkpoint_path(folder, config.ckpt).read_bytes()
        of_data = runs.data_options(node, **changes)
        images = {key: of_data[key] for key in ("dataset", "image_size", "crop_to_box", "transforms")}
        digest = hashlib.sha256(checkpoint + json.dumps(images, sort_keys=True, default=str).encode())
        callback = ExplanationEvaluation(
            config,
            folder=folder / "evaluation",
            provenance=Provenance(runs.run_name(folder), runs.selection(node, config.ckpt), int(node["seed"])),
            weights_and_data=digest.hexdigest(),
        )
        trainer = make_trainer(
            default_root_dir=folder,
            logger=make_loggers(config.logger, folder if is_first else None, group=node["experiment"], job="evaluate"),
            callbacks=[callback],
            use_distributed_sampler=False,
            **{"enable_progress_bar": False, **options},
        )
        trainer.test(model, data, verbose=False)
        if trainer.is_global_zero:
            report = compare([Evaluated(folder, model, data)], folder / "evaluation", config.report_images)
            log_results(trainer.loggers, json.loads((folder / "evaluation/results.json").read_text())["rows"])
        close(trainer.loggers)
    if not trainer.is_global_zero:
        return folders[0] / "evaluation" / "report.html"
    if out is not None:
        report = compare(
            [Evaluated(*run) for run in zip(folders, models, modules, strict=True)], out, config.report_images
        )
    print(f"report: {report}")
    return report


def main(positional: list[str], overrides: list[str]) -> Path:
    """Read the config, apply the overrides, evaluate."""
    if not positional:
        raise InputError("no run given; write python evaluate.py RUN [RUN ...] [key=value ...]")
    source = next((o.partition("=")[2] for o in overrides if o.startswith("config=")), DEFAULT)
    overrides = [o for o in overrides if not o.startswith("config=")]
    return evaluate(
        [Path(run) for run in positional], check(EvaluateConfig, override(load_yaml(Path(source)), overrides))
    )


if __name__ == "__main__":
    sys.exit(run_script(__doc__, EvaluateConfig, main))
