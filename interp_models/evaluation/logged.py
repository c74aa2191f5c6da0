"""What Weights & Biases and TensorBoard get of an evaluation: tables, curves, pictures and files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from interp_models.evaluation.tables import Tables
from interp_models.report import visual
from interp_models.report.curves import common, mean_band
from interp_models.report.text import markdown_table
from interp_models.report.views import ImageView

CELLS = ("mean", "low", "high", "std", "rank", "p")
"""Numbers of each metric in the table of results, beside the number of images."""


def log_evaluation(
    loggers: Iterable[Logger],
    tables: Tables,
    answer: str,
    images: Sequence[ImageView],
    files: Mapping[str, Sequence[Path]],
) -> None:
    """Send an evaluation of one model to the loggers.

    - Weights & Biases gets the table of results (a row per explainer), the paired differences, a row per image with its
      maps and scores, the mean curves as charts, the page, and artifacts of files.
    - TensorBoard gets the answer with the table of results as text, and a picture of each image with its maps.

    Args:
        loggers: the loggers.
        tables: the tables.
        answer: the answer in words.
        images: the images of the page.
        files: files of each artifact, by its type; the first file of type `evaluation` is the page.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, tables, answer, images, files)
        elif isinstance(logger, TensorBoardLogger):
            paragraphs = answer.replace("\n", "\n\n")  # Markdown would join the lines
            text = markdown_table(tables.rows, tables.costs)
            logger.experiment.add_text("results", "\n\n".join(filter(None, [paragraphs, text])))
            for view in images:
                picture = _with_maps(view)
                logger.experiment.add_image(f"maps/{_name_of(view)}", picture, 0, dataformats="HWC")


def _to_wandb(
    logger: WandbLogger, tables: Tables, answer: str, images: Sequence[ImageView], files: Mapping[str, Sequence[Path]]
) -> None:
    import wandb

    logger.log_table("results", dataframe=results_table(tables))
    if tables.differences:
        logger.log_table("differences", dataframe=pd.DataFrame(tables.differences))
        logger.experiment.summary["answer"] = answer
    if images:
        columns, rows = map_table(images)
        logger.log_table("maps", columns=columns, data=rows)
    for key in dict.fromkeys(key for own in tables.curves.values() for key in own):
        of_key = {name: own[key] for name, own in tables.curves.items() if key in own}
        if (used := common(of_key)).any():
            bands = {name: mean_band(own, used) for name, own in of_key.items()}
            xs, ys = ([band[part].tolist() for band in bands.values()] for part in (0, 1))
            chart = wandb.plot.line_series(xs, ys, keys=list(bands), title=key, xname="share of the image")
            logger.experiment.log({f"curves/{key}": chart})
    if page := next(iter(files.get("evaluation", ())), None):
        logger.experiment.log({"page": wandb.Html(page.read_text("utf-8"), inject=False)})
    for kind, paths in files.items():
        artifact = wandb.Artifact(f"{kind}-{logger.experiment.id}", type=kind)
        for path in paths:
            artifact.add_file(str(path), name=path.name)
        logger.experiment.log_artifact(artifact)


def results_table(tables: Tables) -> pd.DataFrame:
    """A row per explainer: for each metric the mean, its interval, the standard deviation over images, the rank, the
    p-value against the control and the number of images with a value; then passes and seconds per image."""
    found: dict[str, dict[str, Any]] = {}
    for row in tables.rows:
        cells = found.setdefault(row["explainer"], {"explainer": row["explainer"]})
        key = row["metric"]
        cells |= {key if name == "mean" else f"{key} {name}": row.get(name) for name in CELLS}
        cells[f"{key} n"] = row["n"] - row["n_undefined"]
    for explainer, cells in found.items():
        cells |= tables.costs.get(explainer, {})
    return pd.DataFrame(list(found.values()))


def map_table(images: Sequence[ImageView]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table for Weights & Biases: for each image its prediction, pixels, maps and scores."""
    import wandb

    explainers = list(dict.fromkeys(shown.explainer for view in images for shown in view.maps))
    metrics = list(dict.fromkeys(key for view in images for shown in view.maps for key in shown.scores))
    rows = []
    for view in images:
        (run,) = view.predictions
        predicted, probability = view.predictions[run]
        own = view.own.get(run, view.image)
        maps = {shown.explainer: wandb.Image(visual.drawn(own, shown.heatmap)[0]) for shown in view.maps}
        scores = {(shown.explainer, key): value for shown in view.maps for key, value in shown.scores.items()}
        about = [_name_of(view), view.label, predicted, probability, view.is_right(run), wandb.Image(own)]
        values = [scores.get((explainer, key)) for explainer in explainers for key in metrics]
        rows.append([*about, *(maps.get(explainer) for explainer in explainers), *values])
    columns = ["image", "class", "prediction", "probability", "right", "pixels", *explainers]
    return columns + [f"{explainer} {key}" for explainer in explainers for key in metrics], rows


def _name_of(view: ImageView) -> str:
    """The name of an image and, if each of several labels has maps of its own, of the class that is explained."""
    return f"{view.image_id}: {view.explained}" if view.explained else view.image_id


def _with_maps(view: ImageView) -> visual.Picture:
    """The image and its maps side by side, under its name and prediction."""
    (run,) = view.predictions
    predicted, probability = view.predictions[run]
    own = view.own.get(run, view.image)
    cells = [("image", np.asarray(own), view.label)]
    cells += [(shown.explainer, *visual.drawn(own, shown.heatmap)) for shown in view.maps]
    return visual.strip(cells, f"{_name_of(view)}: {predicted}, {100 * probability:.0f} %")
