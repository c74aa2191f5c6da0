"""The page that shows judged models side by side, and its pictures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from interp_models.core.files import short, write_json
from interp_models.data.subsets import spread
from interp_models.evaluation.answer import answer
from interp_models.evaluation.tables import SCHEMA_VERSION, Tables
from interp_models.explainers.controls import is_control
from interp_models.report import visual
from interp_models.report.gallery import save
from interp_models.report.page import write_report
from interp_models.report.pictures import SIDE
from interp_models.report.published import Beside
from interp_models.report.views import ImageView, MapView, Panel, PrototypeView, RunResults, RunSummary

FIGURE_ROWS = 8
"""Maximum number of images (rows) of a figure."""


class Shown(NamedTuple):
    """One image as a model sees it, and the model's own explanation of its prediction."""

    picture: visual.Picture
    parts: NDArray[np.float32] | None = None
    """Two or three of the model's own maps, (n, h, w), to draw as red, green and blue."""
    reasons: Sequence[Panel] = ()
    """Pictures of the parts or prototypes that explain the prediction."""
    total: str = ""
    """One line that sums up the reasons."""


class Compared(NamedTuple):
    """A judged model, with the data that a page shows."""

    summary: RunSummary
    tables: Tables
    class_name: Callable[[int], str]
    """Name of the class with a label."""
    show: Callable[[int], Shown]
    """Shows the image with an index."""


def write_page(
    compared: Sequence[Compared],
    path: Path,
    n_images: int,
    indices: Sequence[int] | None = None,
    prototypes: Callable[[Sequence[ImageView]], Sequence[PrototypeView]] = lambda images: (),
    published: Beside | None = None,
) -> list[ImageView]:
    """Write the page of judged models; the file is written whole or not at all.

    Args:
        compared: the models, judged on the same images.
        path: file of the page.
        n_images: maximum number of images to show, spread evenly over the judged ones.
        indices: indices of the images that can be shown; None allows all.
        prototypes: returns the views of the models' prototypes for the shown images.
        published: published numbers beside those of the models.

    Returns:
        The images that the page shows.
    """
    names = [one.summary.name for one in compared]
    images = list(_views(compared, n_images, indices))
    write_report(
        path,
        title="Explanations of " + ", ".join(names),
        runs=[one.summary for one in compared],
        results=[results_of(one.summary.name, one.tables) for one in compared],
        images=images,
        prototypes=prototypes(images),
        published=published,
    )
    return images


def results_of(run: str, tables: Tables) -> RunResults:
    """What was measured of one model, and what it says, for the page."""
    said = answer(tables.rows, tables.differences)
    names = {row["explainer"]: row["options"]["name"] for row in tables.rows}
    return RunResults(
        run=run,
        rows=tables.rows,
        costs=tables.costs,
        mean_ranks=tables.mean_ranks,
        differences=tables.differences,
        headline="" if said is None else said.headline,
        groups=() if said is None else said.groups,
        notes=() if said is None else said.notes,
        curves=tables.curves,
        controls=[label for label, name in names.items() if is_control(name)],
        left_out={**tables.left_out, **tables.unmeasured},
    )


def write_comparison(compared: Sequence[Compared], prototypes: Sequence[Any], path: Path) -> None:
    """Write the rows of several models to one `results.json`.

    Args:
        compared: the models.
        prototypes: rows of prototype metrics, each with the name of its run.
        path: the file.
    """
    results = {
        "schema_version": SCHEMA_VERSION,
        "rows": [row for one in compared for row in one.tables.rows],
        "differences": [{"run": one.summary.name, **each} for one in compared for each in one.tables.differences],
        "left_out": {one.summary.name: one.tables.left_out for one in compared},
        "unmeasured": {one.summary.name: dict(one.tables.unmeasured) for one in compared},
        "prototypes": list(prototypes),
    }
    write_json(path, results)


def _views(compared: Sequence[Compared], n_images: int, indices: Sequence[int] | None) -> Iterator[ImageView]:
    listing = compared[0].tables.listing
    allowed = listing if indices is None else listing[listing["index"].isin(list(indices))]
    places = spread(len(allowed), n_images) if len(allowed) else []
    rows = allowed["row"].iloc[places]
    by_row = [_by_row(one.tables.per_image, rows) for one in compared]
    for place in places:
        row, index = int(allowed["row"].iloc[place]), int(allowed["index"].iloc[place])
        maps: list[MapView] = []
        predictions, parts, pixels, reasons, totals, right = {}, {}, {}, {}, {}, {}
        for one, tables in zip(compared, by_row, strict=True):
            name, of_image = one.summary.name, tables[row]
            shown = one.show(index)
            pixels[name], reasons[name], totals[name] = shown.picture, shown.reasons, shown.total
            if shown.parts is not None:
                parts[name] = shown.parts
            first = of_image.iloc[0]
            predictions[name] = (one.class_name(int(first["prediction"])), float(first["confidence"]))
            known = first["labels"] if "labels" in first else [first["label"]]
            right[name] = int(first["prediction"]) in [int(label) for label in known]
            maps += _maps_of(one, of_image, row)
        class_name, first = compared[0].class_name, by_row[0][row].iloc[0]
        labels = [class_name(int(label)) for label in first["labels"]] if "labels" in first else None
        label = class_name(int(first["label"])) if labels is None else ", ".join(labels) or "none"
        explained = class_name(int(first["target_class"])) if "target_class" in allowed else ""
        image = next(iter(pixels.values()))
        image_id = str(allowed["image_id"].iloc[place])
        yield ImageView(
            image, image_id, label, predictions, maps, parts, pixels, reasons, totals, labels, explained, right
        )


def _by_row(table: pd.DataFrame, rows: Iterable[int]) -> dict[Any, pd.DataFrame]:
    """The values that belong to each of some rows of the maps, of all explainers and metrics."""
    row = table.groupby(["explainer", "metric"], sort=False).cumcount()
    shown = row.isin(list(rows))
    return dict(iter(table[shown].groupby(row[shown], sort=False)))


def _maps_of(one: Compared, of_image: pd.DataFrame, row: int) -> Iterator[MapView]:
    for explainer, values in of_image.groupby("explainer", sort=False):
        pairs = zip(values["metric"], values["value"], strict=True)
        scores = {str(key): None if np.isnan(value) else float(value) for key, value in pairs}
        curves = {key: own[row] for key, own in one.tables.curves.get(str(explainer), {}).items()}
        heatmap = np.asarray(one.tables.maps[str(explainer)][row])
        of_label = one.tables.of_label.get(str(explainer), {}).get(row)
        yield MapView(one.summary.name, str(explainer), heatmap, scores, curves, of_label)


def write_local(images: Sequence[ImageView], folder: Path) -> None:
    """Write `<image>.jpg`, a picture of the model's reasons, for each image that has some."""
    for view in images:
        for run, panels in view.reasons.items():
            if not panels:
                continue
            folder.mkdir(exist_ok=True)
            predicted, probability = view.predictions[run]
            title = f"{view.image_id}: {predicted}, {100 * probability:.0f} %. {view.totals[run]}"
            picture = visual.strip([(f"{p.kind} {p.number}", p.picture, p.remark) for p in panels], title)
            save(folder / f"{short(view.image_id.replace('/', '_').removesuffix('.jpg'))}.jpg", picture)


def write_figure(
    images: Sequence[ImageView], summaries: Sequence[RunSummary], explainers: Sequence[str], path: Path
) -> None:
    """Draw maps side by side on the same images, as in figure 8 of the tutorial.

    Columns are the post-hoc maps of the first run and the own maps of every run. Two or three own maps are drawn as
    red, green and blue.
    """
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
