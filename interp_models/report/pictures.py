"""The data of one image for the page: its pictures, its maps as bytes, and its scores. The page's script draws them."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from interp_models.report import visual
from interp_models.report.agreement import mean_of_pairs, of_maps, of_metrics
from interp_models.report.numbers import percent
from interp_models.report.views import ImageView, MapView, RunSummary

SIDE = 224
"""Maximum side in pixels of a picture of the input; it keeps the page small."""
FINE = 96
"""Maximum side in pixels of a map that is finer than `BYTES`."""
BYTES = 28
"""A map with at most so many rows and columns is written as plain bytes, and a finer one as a grey JPEG."""
PANEL = 336
"""Maximum side in pixels of a picture of prototypes or parts."""
UNKNOWN = "?"
"""Label of an image whose class is unknown."""


def data_of(view: ImageView, summaries: Sequence[RunSummary], directions: Mapping[str, bool]) -> dict[str, Any]:
    """The data of one image for the template and the script.

    A prediction is right or wrong only if the label is known, and is one of the model's classes. Of several labels, it
    is right if it is one of them; for an image without a label, it is neither.
    """
    unknown = view.label == UNKNOWN if view.labels is None else not view.labels
    names = [run.name for run in summaries]
    without_labels = {run.name for run in summaries if run.accuracy_judged is None}
    first = visual.shrunk(view.image, SIDE)
    present = [*view.predictions, *(shown.run for shown in view.maps), *view.parts]
    runs = []
    for run in sorted(dict.fromkeys(present), key=lambda run: names.index(run) if run in names else len(names)):
        own = visual.shrunk(view.own[run], SIDE) if run in view.own else first
        maps = [shown for shown in view.maps if shown.run == run]
        predicted, probability = view.predictions.get(run, (None, None))
        right = None if run in without_labels or unknown or predicted is None else view.is_right(run)
        same = own is first or (own.shape == first.shape and np.array_equal(own, first))
        runs.append(
            {
                "name": run,
                "predicted": predicted,
                "probability": percent(probability),
                "right": right,
                "total": view.totals.get(run, ""),
                "script": {
                    "run": run,
                    "input": None if same else visual.jpeg_uri(own),
                    "confidence": _finite(probability),
                    "right": right,
                    "maps": [_map(shown, directions) for shown in maps],
                    "panels": _panels(view, run, own),
                    "alike": _alike([shown.heatmap for shown in maps]),
                    "agreement": _agreement(maps, directions),
                },
            }
        )
    return {
        "id": view.image_id,
        "label": view.label,
        "several": view.labels is not None,
        "explained": view.explained,
        "uri": visual.jpeg_uri(first),
        "runs": runs,
        "script": {
            "id": view.image_id,
            "classes": [view.label] if view.labels is None else list(view.labels),
            "runs": [run["script"] for run in runs],
        },
    }


def _map(shown: MapView, directions: Mapping[str, bool]) -> dict[str, Any]:
    """A map for the script, with its scores in the order of the metrics (NaN is null) and its curves as bytes."""
    scores = [_finite(shown.scores.get(metric)) for metric in directions]
    found: dict[str, Any] = {"explainer": shown.explainer, "scores": scores, **_encoded(shown.heatmap)}
    if shown.curves:
        found["curves"] = {key: _curve(own) for key, own in shown.curves.items() if np.isfinite(own[1]).all()}
    if shown.of_label is not None:
        found["label"] = _encoded(shown.of_label)
    return found


def _encoded(map: ArrayLike) -> dict[str, Any]:
    """A map (h, w) as 8 bits: as bytes row by row, or as a grey JPEG; and the name of its colours. A map that shows
    nothing has a remark."""
    values = np.asarray(map)
    if not np.isfinite(values).all():
        return {"remark": "not drawn: some values are not finite"}
    fine = max(values.shape) > BYTES
    if fine:  # averaged before it is coloured: afterwards, noise of both signs would be grey
        scale = min(1.0, FINE / max(values.shape))
        values = visual.resize(values, (max(1, round(len(values) * scale)), max(1, round(values.shape[1] * scale))))
    heat, colours = visual.heat(values)
    grey = np.rint(heat * 255).astype(np.uint8)
    found: dict[str, Any] = {"colours": colours, "remark": "constant map" if np.ptp(values) == 0 else ""}
    if not fine:
        return found | {"size": list(grey.shape), "bytes": base64.b64encode(grey.tobytes()).decode()}
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=80, optimize=True)
    return found | {"jpeg": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()}


def _curve(curve: NDArray[np.floating]) -> dict[str, Any]:
    """A curve (2, T): where it ends, and its scores as bytes; 255 is 1."""
    scores = np.rint(np.clip(curve[1], 0, 1) * 255).astype(np.uint8)
    at = [round(float(curve[0, 0]), 4), round(float(curve[0, -1]), 4)]
    return {"from": at[0], "to": at[1], "scores": base64.b64encode(scores.tobytes()).decode()}


def _panels(view: ImageView, run: str, own: NDArray[np.uint8]) -> list[dict[str, str]]:
    """Pictures that are no maps: the model's own maps in one picture, and what it found in the image."""
    found = []
    if run in view.parts:
        picture, remark = visual.drawn(own, view.parts[run])
        found.append({"name": "attention maps", "uri": visual.jpeg_uri(picture)})
        found[-1]["remark"] = remark or "red, green, blue"
    for panel in view.reasons.get(run, ()):
        uri = visual.jpeg_uri(visual.shrunk(panel.picture, PANEL))
        found.append({"name": f"{panel.kind} {panel.number}", "uri": uri, "remark": panel.remark})
    return found


def _alike(maps: Sequence[NDArray[np.floating]]) -> list[float | None]:
    """Spearman's correlations of all pairs of maps, row by row of the upper triangle."""
    correlations = of_maps(maps)
    pairs = correlations[np.triu_indices(len(maps), 1)]
    return [round(float(value), 3) if np.isfinite(value) else None for value in pairs]


def _agreement(maps: Sequence[MapView], directions: Mapping[str, bool]) -> float | None:
    """How alike the metrics rank the explainers on this image: the mean Spearman correlation of all pairs."""
    metrics = {key: {shown.explainer: shown.scores.get(key) for shown in maps} for key in directions}
    known = {key: own for key, own in metrics.items() if any(value is not None for value in own.values())}
    mean = mean_of_pairs(of_metrics(known, directions)) if len(known) > 1 else None
    return None if mean is None else round(mean, 3)


def _finite(value: float | None) -> float | None:
    return round(float(value), 5) if value is not None and math.isfinite(value) else None
