"""Time of faithfulness metrics on timm's EfficientNet-Lite0 with ImageNet weights ÷ the passes that they make.

Curves and masked confidence are given the clean score, as in an evaluation. `all metrics` includes its computation.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

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
from interp_models.core.prepared import prepare
from interp_models.core.scoring import ScoreFn, probabilities
from interp_models.metrics.base import METRICS
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import curve, gaussian, ranks, score_all


def timings(bench: Bench, grid: int, batch: int | None = None) -> list[Timing]:
    """One row per metric on random maps of grid × grid cells, then the same with the model's prepared copy."""
    plain = works(bench.images, probabilities(bench.model), grid, batch)
    rows = [bench.compare(what, f"{floor}, T = {grid**2}", work) for what, (floor, work) in plain.items()]
    prepared = works(bench.images, probabilities(prepare(bench.model, bench.images)), grid, batch)
    for row, (floor, work) in zip(list(rows), prepared.values(), strict=True):
        assert row.passes is not None
        passes = round(row.passes * len(bench.images))
        copy = bench.compare(f"{row.what}, prepared", f"{floor}, T = {grid**2}", work, passes)
        rows.append(replace(copy, passes=row.passes, flops=None))  # torch counts no FLOPs of fused kernels
    return rows


TWO_CURVES = ["dauc", "dc", "iauc", "ic"]
"""Keys of deletion and insertion, without the reverse order."""


def works(images: Tensor, score_fn: ScoreFn, grid: int, batch: int | None) -> dict[str, tuple[str, Work]]:
    """By name: what the floor counts, and the work."""
    maps = torch.rand(len(images), grid, grid, device=images.device)
    target = score_fn(images).argmax(dim=1)
    clean = score_all(score_fn, images, target)
    curves = METRICS.get("deletion_insertion")(batch=batch, wanted=TWO_CURVES)
    masked = METRICS.get("masked_confidence")(batch=batch)
    counts = list(range(grid**2 + 1))

    def everything() -> None:
        known = score_all(score_fn, images, target, batch)
        curves.score(Case(images, maps, target, score_fn, known))
        masked.score(Case(images, maps, target, score_fn, known))

    return {
        "deletion curve": (
            "T passes",
            lambda: curve(score_fn, images, torch.zeros_like(images), ranks(maps), counts[1:], target, batch),
        ),
        "insertion curve": (
            "T passes",
            lambda: curve(score_fn, gaussian(images), images, ranks(maps), counts[:-1], target, batch),
        ),
        "deletion and insertion": ("2 T passes", partial(curves.score, Case(images, maps, target, score_fn, clean))),
        "masked confidence": ("2 passes", partial(masked.score, Case(images, maps, target, score_fn, clean))),
        "all metrics": ("2 T + 3 passes", everything),
    }


def curves_of_size(grid: int) -> Work:
    """Deletion and insertion curves of 4 images in grid² steps, on a tiny model."""
    torch.manual_seed(0)
    images, maps = torch.rand(4, 3, 224, 224), torch.rand(4, grid, grid)
    metric = METRICS.get("deletion_insertion")(max_steps=grid**2, wanted=TWO_CURVES)
    target = torch.zeros(4, dtype=torch.long)
    return partial(metric.score, Case(images, maps, target, probabilities(tiny_model())))


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(7, 14, 28))
    p.add_argument("--grid", type=int, default=7, help="cells per side of the maps")
    args = parse(p, "faithfulness", argv)
    images, described = load_images(args)
    bench = Bench(imagenet_network(), images, args.pairs, args.seconds, CLOCKS[args.clock])
    memory = [
        Memory("deletion and insertion", f"{grid}×{grid} cells, {grid**2} steps", peak_memory(curves_of_size, grid))
        for grid in args.memory
    ]
    return write("faithfulness", args, described, [*timings(bench, args.grid, args.batch), *memory, *bench.values()])


if __name__ == "__main__":
    print(show(main()))
