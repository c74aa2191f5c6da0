"""The page and the table that put evaluated runs side by side."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp_models import runs, visual
from interp_models.data.base import collate
from interp_models.data.module import DataModule
from interp_models.errors import InputError
from interp_models.files import write_json
from interp_models.report import ImageView, MapView, RunSummary, write_report
from interp_models.results import SCHEMA_VERSION
from interp_models.scoring import evaluating
from interp_models.training.module import InterpModule


def compare(evaluated: Sequence[tuple[Path, InterpModule]], out: Path, data: DataModule, n_images: int) -> Path:
    """Write `report.html` of evaluated runs to a folder, and for several runs `results.json` with all rows.

    Args:
        evaluated: run folders with their `evaluation/`, and their models.
        out: the folder.
        data: the data module of the images.
        n_images: images that are shown, spread evenly over those judged.

    Returns:
        The path of the page.
    """
    rows: list[dict[str, Any]] = []
    for folder, _ in evaluated:
        rows += json.loads((folder / "evaluation" / "results.json").read_text())["rows"]
    if len(evaluated) > 1:
        write_json(out / "results.json", {"schema_version": SCHEMA_VERSION, "rows": rows})
    title = "Explanations of " + ", ".join(runs.run_name(folder) for folder, _ in evaluated)
    summaries = [_summary(folder) for folder, _ in evaluated]
    images = _views(evaluated, data, n_images)
    write_report(out / "report.html", title=title, runs=summaries, rows=rows, images=images)
    return out / "report.html"


def check_same_images(folders: Sequence[Path], modules: Sequence[DataModule]) -> None:
    """Raise `InputError` unless all runs are judged on the same images of the same classes."""
    first = modules[0]
    for folder, other in zip(folders[1:], modules[1:], strict=True):
        same = other.classes == first.classes and _ids(other) == _ids(first)
        if not same:
            raise InputError(f"runs {folders[0]} and {folder} have different test images and cannot be compared")


def _ids(data: DataModule) -> list[str]:
    return [data.test_images.image_id(int(index)) for index in data.test_indices]


def _summary(folder: Path) -> RunSummary:
    config = runs.run_config(folder)
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    judged = json.loads((folder / "evaluation" / "results.json").read_text())["rows"][0]
    table = pd.read_parquet(folder / "evaluation" / "per_image.parquet").drop_duplicates("index")
    return RunSummary(
        name=runs.run_name(folder),
        model=config["model"]["name"],
        dataset=config["data"]["dataset"]["name"],
        accuracy=metrics.get("test/acc"),
        n=int(metrics.get("test/n", 0)),
        accuracy_judged=float((table["prediction"] == table["label"]).mean()),
        n_judged=len(table),
        seed=int(config["seed"]),
        selection=judged["selection"],
    )


def _views(evaluated: Sequence[tuple[Path, InterpModule]], data: DataModule, n_images: int) -> Iterator[ImageView]:
    tables = {folder: pd.read_parquet(folder / "evaluation" / "per_image.parquet") for folder, _ in evaluated}
    listing = pd.read_csv(evaluated[0][0] / "evaluation" / "maps" / "index.csv")
    shown = np.unique(np.linspace(0, len(listing) - 1, min(n_images, len(listing))).round().astype(int))
    dataset = data.dataset("test")
    for row in shown:
        index = int(listing["index"][row])
        sample = dataset[0, int(np.flatnonzero(dataset.indices == index)[0])]
        maps: list[MapView] = []
        predictions, parts = {}, {}
        for folder, model in evaluated:
            name = runs.run_name(folder)
            table = tables[folder]
            of_image = table[table["index"] == index]
            first = of_image.iloc[0]
            predictions[name] = (data.classes[int(first["prediction"])], float(first["confidence"]))
            for explainer, values in of_image.groupby("explainer", sort=False):
                heatmap = np.load(folder / "evaluation" / "maps" / f"{explainer}.npy", mmap_mode="r")[row]
                pairs = zip(values["metric"], values["value"], strict=True)
                scores = {str(key): None if np.isnan(value) else float(value) for key, value in pairs}
                maps.append(MapView(name, str(explainer), np.asarray(heatmap), scores))
            with torch.no_grad(), evaluating(model):
                output = model(collate([sample]).image.to(model.device))
                several = model.display(output, output.logits.argmax(dim=1))[0]
            if len(several) > 1:
                parts[name] = several.float().cpu().numpy()
        label = data.classes[int(sample.label)]
        image_id = str(listing["image_id"][row])
        yield ImageView(visual.to_uint8(sample.image), image_id, label, predictions, maps, parts)
