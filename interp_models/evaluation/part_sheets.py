"""Pictures for models that decide by parts: the parts of a class, and the parts found in an image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from interp_models.core.files import short
from interp_models.core.modes import evaluating, full_float32
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import collate, labels_of
from interp_models.data.module import DataModule
from interp_models.prototypes.parts import PartModel
from interp_models.report import visual
from interp_models.report.gallery import save
from interp_models.report.views import Panel

PARTS = 6
"""Number of parts to show for a class or an image."""
CELL = 112
"""Side in pixels of a picture on a sheet."""


def part_panels(model: PartModel, output: InterpOutput, image: visual.Picture) -> tuple[list[Panel], str]:
    """Pictures of the parts with the largest contributions to the predicted class of one image, and a line with the
    sum over all parts."""
    target = int(output.logits[0].argmax())
    weights, scores = model.part_weights[target].detach(), model.best(output)[0].detach()
    terms, boxes = weights * scores, model.boxes(output)[0]
    panels = []
    for part in terms.topk(min(PARTS, len(terms))).indices.tolist():
        seen = visual.boxed(image, _pixels(boxes[part], image))
        remark = f"{float(weights[part]):.2f} × {float(scores[part]):.2f} = {float(terms[part]):.2f}"
        panels.append(Panel(part, seen, remark, kind="part"))
    return panels, f"All {len(terms)} parts come to the logit {float(terms.sum()):.2f}."


def write_part_sheets(
    runs: Sequence[tuple[str, PartModel, DataModule]], labels: Sequence[int], folder: Path
) -> list[Path]:
    """Write `<class>.jpg` for each label, with a row per run.

    A row shows the parts with the largest weights for the class. Each part is shown in the test image of the class
    where its score is highest: the image with the box of the best region, and this region alone.
    """
    paths = []
    for label in labels:
        strips = [visual.strip(list(_cells(model, data, label)), name, 2 * CELL) for name, model, data in runs]
        width = max(strip.shape[1] for strip in strips)
        padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{short(runs[0][2].classes[label].replace('/', '_'))}.jpg")
        save(paths[-1], np.concatenate(padded))
    return paths


def _cells(model: PartModel, data: DataModule, label: int) -> Iterator[tuple[str, visual.Picture, str]]:
    dataset = data.dataset("whole_test")
    positions = np.flatnonzero([label in labels_of(dataset.images, index) for index in dataset.indices.tolist()])
    weights = model.part_weights[label].detach()
    parts = weights.topk(min(PARTS, len(weights))).indices
    highest, chosen = torch.full((len(parts),), -torch.inf), [(0, torch.zeros(4))] * len(parts)
    for start in range(0, len(positions), data.batch_size):
        batch = positions[start : start + data.batch_size]
        with torch.no_grad(), evaluating(model), full_float32():
            output = model(collate([dataset[0, position] for position in batch.tolist()]).image.to(weights.device))
        found, boxes = model.best(output)[:, parts].cpu(), model.boxes(output)[:, parts].cpu()
        top = found.max(dim=0)
        for number in (top.values > highest).nonzero()[:, 0].tolist():
            row = int(top.indices[number])
            highest[number], chosen[number] = found[row, number], (int(batch[row]), boxes[row, number])
    for part, (position, box) in zip(parts.tolist(), chosen, strict=True):
        image = visual.to_uint8(dataset[0, position].image)
        x0, y0, x1, y1 = _pixels(box, image)
        whole, alone = visual.boxed(image, (x0, y0, x1, y1)), image[y0:y1, x0:x1]
        cell = np.concatenate([visual.fitted(picture, (CELL, CELL)) for picture in (whole, alone)])
        yield f"part {part}", cell, f"weight {float(weights[part]):.2f}"


def _pixels(box: Tensor, image: visual.Picture) -> tuple[int, int, int, int]:
    """Convert a box from fractions of the image to pixels."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (round(float(v) * side) for v, side in zip(box, (width, height, width, height), strict=True))
    return x0, y0, x1, y1
