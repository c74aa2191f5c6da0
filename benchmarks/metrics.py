"""Time of every metric of maps on timm's EfficientNet-Lite0 with ImageNet weights ÷ the passes that it makes.

Metrics pass images through the model's prepared copy, as in an evaluation, and the floor through the model as it is.
Metrics without a pass are divided by one pass. Dropping patches is measured on ViT-S/16.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from benchmarks.harness import (
    CLOCKS,
    Bench,
    Memory,
    Timing,
    Work,
    imagenet_network,
    load_images,
    parse,
    parser,
    peak_memory,
    tiny_model,
    write,
)
from benchmarks.tables import show
from interp_models.core.passes import counted_passes
from interp_models.core.prepared import prepare
from interp_models.core.scoring import logits, probabilities
from interp_models.core.truth import Truth, in_boxes
from interp_models.metrics.base import METRICS
from interp_models.metrics.case import Case
from interp_models.nn.dropping import PatchScores

GROWING = ("deletion_insertion", "road", "monotonicity", "sensitivity_n", "f_fidelity", "box_accuracy")
"""Metrics whose memory is measured for maps of several sizes."""


def case_of(model: nn.Module, images: Tensor, grid: int) -> Case:
    """Random maps with everything that a metric can need; the clean score is known, as in an evaluation."""
    maps = torch.rand(len(images), grid, grid, generator=torch.Generator().manual_seed(0))
    side = images.shape[-1]
    boxes = torch.tensor([[side / 4, side / 4, side / 2, side / 2]] * len(images))
    parts = boxes.view(-1, 2, 2)
    truth = Truth(boxes, in_boxes(boxes[:, None], (side, side))[:, 0], None, parts)
    score_fn = probabilities(model)
    scores, target = score_fn(images).max(dim=1)
    return Case(
        images, maps, target, score_fn, scores, truth, torch.ones(len(images)), lambda x: x.mean(dim=1), logits(model)
    )


def work_of(name: str, case: Case, batch: int | None) -> Work:
    """One evaluation of a metric; nothing is shared with an earlier one."""
    metric = METRICS.get(name)(grid=(case.maps.shape[1], case.maps.shape[2]), batch=batch)
    return lambda: metric.score(replace(case, shared={}))


def timings(bench: Bench, names: Sequence[str], grid: int, batch: int | None, label: str = "") -> list[Timing]:
    """One row per metric."""
    prepared = prepare(bench.model, bench.images)
    case = case_of(prepared, bench.images, grid)
    rows = []
    for name in names:
        if "patch_scores" in METRICS.get(name).needs:
            case = replace(case, patch_scores=PatchScores(prepared, bench.images))
        work = work_of(name, case, batch)
        with counted_passes(prepared) as counted:
            work()
        passes = counted.images
        row = bench.compare(f"{label}{name}", "its passes" if passes else "1 pass", work, passes or len(bench.images))
        rows.append(replace(row, passes=passes / len(bench.images), flops=None))
    return rows


def growth(name: str, grid: int) -> Work:
    """A metric of 4 maps of grid × grid cells on a tiny model."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 224, 224)
    metric = METRICS.get(name)(max_steps=grid**2)
    return partial(metric.score, case_of(tiny_model(), images, grid))


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(7, 14, 28))
    p.add_argument("--grid", type=int, default=7, help="cells per side of the maps")
    args = parse(p, "metrics", argv)
    images, described = load_images(args)
    of_patches = [name for name in METRICS.names() if "patch_scores" in METRICS.get(name).needs]
    others = [name for name in METRICS.names() if name not in of_patches]
    bench = Bench(imagenet_network(), images, args.pairs, args.seconds, CLOCKS[args.clock])
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224", num_classes=10, img_size=args.size).eval()
    second = Bench(vit, images, args.pairs, args.seconds, CLOCKS[args.clock])
    memory = [
        Memory(name, f"{grid}×{grid} cells", peak_memory(growth, name, grid))
        for name in GROWING
        for grid in args.memory
    ]
    rows = timings(bench, others, args.grid, args.batch)
    rows += timings(second, of_patches, args.grid, args.batch, "ViT-S/16, ")
    return write("metrics", args, described, [*rows, *memory, *bench.values()])


if __name__ == "__main__":
    print(show(main()))
