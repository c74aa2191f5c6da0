"""Time of explainers on EfficientNet-Lite0 with ImageNet weights ÷ the passes that their definitions need."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import (
    CLOCKS,
    Bench,
    Memory,
    Row,
    Timing,
    Work,
    load_images,
    parse,
    parser,
    peak_memory,
    tiny_model,
    write,
)
from benchmarks.tables import show
from interp_models.explainers import EXPLAINERS
from interp_models.explainers.base import Explainer
from interp_models.models.bcnn import BCNN
from interp_models.models.cnn import CNN


def timings(bench: Bench, masks: int, batch: int | None = None) -> list[Timing]:
    """One row per explainer, on the model of the bench."""
    one = "1 pass"
    cases: list[tuple[str, str, dict[str, int | None], str, int | None]] = [
        ("Grad-CAM", "gradcam", {}, f"{one}; the backward pass through pool and classifier is on top", None),
        ("activation map", "activation_map", {}, one, None),
        ("intrinsic, cnn", "intrinsic", {}, one, None),
        ("random", "random", {}, f"{one}, for scale: it makes none", len(bench.images)),
        (f"RISE, {masks} masks", "rise", {"masks": masks, "batch": batch}, "N + 1 passes", None),
    ]
    rows = []
    for what, name, options, floor, passes in cases:
        explainer: Explainer = EXPLAINERS.build(name, options, model=bench.model)
        explainer.preparation = "none"  # prepared copies are measured in `posthoc`
        rows.append(bench.compare(what, floor, partial(explainer.attribute, bench.images), passes))
    return rows


def self_explaining(bench: Bench) -> list[Timing]:
    """One row per kind of B-CNN's own maps."""
    assert isinstance(bench.model, BCNN)
    rows = []
    for kind in bench.model.explanations:
        explainer: Explainer = EXPLAINERS.build("intrinsic", {"kind": kind}, model=bench.model)
        work = partial(explainer.attribute, bench.images)
        rows.append(bench.compare(f"intrinsic, bcnn, {kind}", "1 pass of the B-CNN", work))
    return rows


def rise_of_size(masks: int) -> Work:
    """RISE with so many masks, of one image on a tiny model."""
    torch.manual_seed(0)
    explainer: Explainer = EXPLAINERS.build("rise", {"masks": masks}, model=tiny_model())
    return partial(explainer.attribute, torch.rand(1, 3, 224, 224))


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(100, 1000, 8000))
    p.add_argument("--masks", type=int, default=200, help="masks of RISE where time is measured")
    args = parse(p, "explainers", argv)
    images, described = load_images(args)
    settings = (args.pairs, args.seconds, CLOCKS[args.clock])
    cnn = Bench(CNN(1000, weights="bundled"), images, *settings)
    bcnn = Bench(BCNN(1000, weights="bundled"), images, *settings)
    memory = [Memory("RISE", f"{masks} masks", peak_memory(rise_of_size, masks)) for masks in args.memory]
    rows: list[Row] = [*timings(cnn, args.masks, args.batch), *self_explaining(bcnn), *memory]
    return write("explainers", args, described, [*rows, *cnn.values(), *bcnn.values(" of the B-CNN")])


if __name__ == "__main__":
    print(show(main()))
