"""The page and the table that put evaluated runs side by side."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from interp_models.core.errors import InputError
from interp_models.core.files import short, write_json
from interp_models.core.outputs import InterpOutput
from interp_models.core.scoring import evaluating, full_float32
from interp_models.data.base import collate
from interp_models.data.choice import spread
from interp_models.data.module import DataModule
from interp_models.evaluation.results import SCHEMA_VERSION, read_prototypes
from interp_models.prototypes.sources import has_prototypes
from interp_models.report import visual
from interp_models.report.gallery import patches, save
from interp_models.report.page import SIDE, write_report
from interp_models.report.part_sheets import has_parts, part_panels, write_part_sheets
from interp_models.report.tree_drawing import tree_svg
from interp_models.report.views import ImageView, MapView, Panel, PrototypeView, RunSummary
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config
from interp_models.training.module import InterpModule

FIGURE_ROWS = 8
"""Images in a figure."""
Gallery = Mapping[int, visual.Picture]
"""The patch of every prototype."""


class Evaluated(NamedTuple):
    """A run, its model, the images as it sees them, and the folder of its evaluation."""

    folder: Path
    model: InterpModule
    data: DataModule
    results: Path


def compare(
    evaluated: Sequence[Evaluated], out: Path, n_images: int, figure: Sequence[str] = ()
) -> tuple[Path, list[ImageView]]:
    """Write `report.html` of evaluated runs to a folder, and for several runs `results.json` with all rows.

    Args:
        evaluated: the runs.
        out: the folder.
        n_images: images that are shown, spread evenly over those judged.
        figure: explainers of the first run that `figure.png` shows; none draws none.

    Returns:
        The path of the page, and the images that it shows.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, str]] = {}
    for run in evaluated:
        results = json.loads((run.results / "results.json").read_text())
        rows += results["rows"]
        left_out[run_name(run.folder)] = results["left_out"]
    if len(evaluated) > 1:
        of_prototypes = [
            {"run": run_name(run.folder), **row}
            for run in evaluated
            for row in read_prototypes(run.results).get("rows", [])
        ]
        results = {
            "schema_version": SCHEMA_VERSION, "rows": rows, "left_out": left_out, "prototypes": of_prototypes,
        }  # fmt: skip
        write_json(out / "results.json", results)
    title = "Explanations of " + ", ".join(run_name(run.folder) for run in evaluated)
    summaries = [_summary(run) for run in evaluated]
    galleries = {run.folder: _patches(run) for run in evaluated}
    images = list(_views(evaluated, n_images, galleries))
    views = [_prototypes(run, images, galleries[run.folder]) for run in evaluated if has_prototypes(run.model)]
    prototypes = [view for view in views if view.rows or view.nearest or view.tree]
    path = out / "report.html"
    write_report(path, title=title, runs=summaries, rows=rows, images=images, prototypes=prototypes, left_out=left_out)
    if len(evaluated) == 1:
        shutil.rmtree(out / "local", ignore_errors=True)  # of other images or weights
        _write_local(images, out / "local")
    (out / "figure.png").unlink(missing_ok=True)
    _write_parts(evaluated, images, out / "parts")
    if figure and images:
        _write_figure(images, summaries, figure, out / "figure.png")
    return path, images


def _write_local(images: Sequence[ImageView], folder: Path) -> None:
    """A picture `<image>.jpg` of the reasons for each image that has some."""
    for view in images:
        for run, panels in view.reasons.items():
            if not panels:
                continue
            folder.mkdir(exist_ok=True)
            predicted, probability = view.predictions[run]
            title = f"{view.image_id}: {predicted}, {100 * probability:.0f} %. {view.totals[run]}"
            picture = visual.strip([(f"{p.kind} {p.number}", p.picture, p.remark) for p in panels], title)
            save(folder / f"{short(view.image_id.replace('/', '_').removesuffix('.jpg'))}.jpg", picture)


def _write_figure(
    images: Sequence[ImageView], summaries: Sequence[RunSummary], explainers: Sequence[str], path: Path
) -> None:
    """Maps side by side on the same images (tutorial, figure 8): post-hoc ones of the first run, and every run's own,
    several maps as red, green and blue."""
    models = [run.model for run in summaries]
    titles = models if len(set(models)) == len(models) else [run.name for run in summaries]
    first = summaries[0].name
    chosen = spread(len(images), FIGURE_ROWS)
    columns: dict[str, list[visual.Picture]] = {}
    for view in (images[number] for number in chosen):
        maps = {(shown.run, shown.explainer): shown.heatmap for shown in view.maps}
        cells = {"image": view.image}
        for explainer in explainers:
            if (first, explainer) in maps:  # else it does not apply
                cells[explainer] = visual.drawn(view.own[first], maps[first, explainer])[0]
        for run, title in zip(summaries, titles, strict=True):
            if run.name in view.parts:
                cells[title] = visual.drawn(view.own[run.name], view.parts[run.name])[0]
            elif (run.name, "intrinsic") in maps:
                cells[title] = visual.drawn(view.own[run.name], maps[run.name, "intrinsic"])[0]
        for title, picture in cells.items():
            columns.setdefault(title, []).append(visual.fitted(picture, (SIDE, SIDE)))
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    visual.contact_sheet(rows, [images[number].label for number in chosen], list(columns), path)


def _write_parts(evaluated: Sequence[Evaluated], images: Sequence[ImageView], folder: Path) -> None:
    """Sheets of the parts of models that decide by some, for the classes of the first images."""
    of_parts = [(run_name(run.folder), run.model, run.data) for run in evaluated if has_parts(run.model)]
    shutil.rmtree(folder, ignore_errors=True)
    if of_parts:
        names = list(dict.fromkeys(view.label for view in images))[:FIGURE_ROWS]
        write_part_sheets(of_parts, [evaluated[0].data.classes.index(name) for name in names], folder)


def check_same_images(folders: Sequence[Path], modules: Sequence[DataModule]) -> None:
    """Raise `InputError` unless all runs are judged on the same images of the same classes."""
    first = modules[0]
    for folder, other in zip(folders[1:], modules[1:], strict=True):
        same = other.classes == first.classes and _ids(other) == _ids(first)
        if not same or other.contents("test") != first.contents("test"):
            raise InputError(f"runs {folders[0]} and {folder} have different test images and cannot be compared")


def _ids(data: DataModule) -> list[str]:
    return [data.test_images.image_id(int(index)) for index in data.test_indices]


def _summary(run: Evaluated) -> RunSummary:
    config = run_config(run.folder)
    path = run.folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    judged = json.loads((run.results / "results.json").read_text())["rows"][0]
    table = pd.read_parquet(run.results / "per_image.parquet").drop_duplicates("index")
    return RunSummary(
        name=run_name(run.folder),
        model=config["model"]["name"],
        dataset=config["data"]["dataset"]["name"],
        accuracy=metrics.get("test/acc"),
        n=int(metrics.get("test/n", 0)),
        accuracy_judged=float((table["prediction"] == table["label"]).mean()),
        n_judged=len(table),
        seed=int(config["seed"]),
        selection=judged["selection"],
    )


def _views(evaluated: Sequence[Evaluated], n_images: int, galleries: Mapping[Path, Gallery]) -> Iterator[ImageView]:
    tables = {run.folder: pd.read_parquet(run.results / "per_image.parquet") for run in evaluated}
    listing = pd.read_csv(evaluated[0].results / "maps" / "index.csv")
    datasets = {run.folder: run.data.dataset("test") for run in evaluated}
    for row in spread(len(listing), n_images):
        index = int(listing["index"][row])
        maps: list[MapView] = []
        predictions, parts, pixels, reasons, totals = {}, {}, {}, {}, {}
        for folder, model, data, results in evaluated:
            name = run_name(folder)
            dataset = datasets[folder]
            sample = dataset[0, int(np.flatnonzero(dataset.indices == index)[0])]
            pixels[name] = visual.to_uint8(sample.image)
            table = tables[folder]
            of_image = table[table["index"] == index]
            first = of_image.iloc[0]
            predictions[name] = (data.classes[int(first["prediction"])], float(first["confidence"]))
            for explainer, values in of_image.groupby("explainer", sort=False):
                heatmap = np.load(results / "maps" / f"{explainer}.npy", mmap_mode="r")[row]
                pairs = zip(values["metric"], values["value"], strict=True)
                scores = {str(key): None if np.isnan(value) else float(value) for key, value in pairs}
                maps.append(MapView(name, str(explainer), np.asarray(heatmap), scores))
            with torch.no_grad(), evaluating(model), full_float32():
                output = model(collate([sample]).image.to(model.device))
                several = model.display(output, output.logits.argmax(dim=1))[0]
                reasons[name], totals[name] = _reasons(model, output, pixels[name], galleries[folder])
            if len(several) > 1:
                parts[name] = several.float().cpu().numpy()
        label = data.classes[int(sample.label)]
        image_id = str(listing["image_id"][row])
        image = next(iter(pixels.values()))
        yield ImageView(image, image_id, label, predictions, maps, parts, pixels, reasons, totals)


def _patches(run: Evaluated) -> Gallery:
    """The patches of a model's prototypes; none, with a warning, if they are of other images than the data module's."""
    return patches(run.model.sources, run.data) if has_prototypes(run.model) else {}


def _reasons(
    model: InterpModule, output: InterpOutput, image: visual.Picture, gallery: Gallery
) -> tuple[list[Panel], str]:
    """What the model found in the image, prototypes beside it, and what that comes to."""
    if has_parts(model):
        return part_panels(model, output, image)
    if not has_prototypes(model) or not gallery:
        return [], ""
    size = (image.shape[0], image.shape[1])
    (reading,) = model.readings(output, output.logits.argmax(dim=1), size)
    panels = []
    for match in reading.matches:
        seen = image if match.box is None else visual.boxed(image, match.box)
        pair = [seen, visual.fitted(gallery[match.prototype], size)]
        panels.append(Panel(match.prototype, np.concatenate(pair, axis=1), match.text))
    return panels, reading.total


def _prototypes(run: Evaluated, images: Sequence[ImageView], gallery: Gallery) -> PrototypeView:
    """The prototypes of a run: how good they are, what is nearest to those that explain the images, and the tree."""
    name, folder = run_name(run.folder), run.results
    shown = {panel.number for view in images for panel in view.reasons.get(name, ())}
    nearest = {}
    for path in (folder / "prototypes").glob("*/*.jpg"):
        if int(path.stem) in shown:
            nearest[int(path.stem)] = np.asarray(Image.open(path))
    tree = getattr(run.model, "tree", None)
    drawing = tree_svg(tree(run.data.classes), gallery) if tree else ""
    return PrototypeView(name, read_prototypes(folder).get("rows", []), dict(sorted(nearest.items())), drawing)
