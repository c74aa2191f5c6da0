"""Time of push and projection of prototype models ÷ a pass of the backbone, time of their heads, memory of statistics.

`push` and `project` run on a model in eval mode and on training images, equally many of every class, that are held in
memory, decoded. The floor is one pass of the backbone over the same batches. With pictures, one sheet per class is
drawn too, for which images are read again from their files. Heads are measured as in `bap`: forward, loss and backward
to parameters and features, with the update of the tree's leaves.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.bap import timing
from benchmarks.harness import (
    CLOCKS,
    Memory,
    Row,
    Timing,
    Work,
    count_passes,
    interleaved,
    parse,
    parser,
    peak_memory,
    summary,
    write,
)
from benchmarks.tables import show
from interp_models.data.base import Sample
from interp_models.data.module import DataModule
from interp_models.metrics.prototype_usage import PrototypeSpread, PrototypeUsage
from interp_models.models.protopnet import ProtoPNet
from interp_models.models.prototree import ProtoTree
from interp_models.report.gallery import draw_sheets


class Held(DataModule):
    """Training images, equally many of every class, in batches that are held in memory.

    Args:
        dataset: see `DataModule`.
        size: side of the images.
        batch: images per pass.
        count: number of images; None is all.
    """

    def __init__(self, dataset: dict[str, Any], size: int, batch: int, count: int | None) -> None:
        super().__init__(dataset=dataset, image_size=size, batch_size=batch, num_workers=0, val_fraction=0.0)
        by_class = np.argsort(self.train_images.labels, kind="stable")
        count = min(count or len(by_class), len(by_class))
        self.train_indices = np.sort(by_class[np.arange(count) * len(by_class) // count])
        self.held = list(super().loader("train", augment=False))

    def loader(self, split: str, *, shuffle: bool = False, augment: bool = True) -> DataLoader[Sample]:
        """The batches in memory, whatever the arguments."""
        return self.held  # type: ignore[return-value]  # callers only iterate over it


def timed(what: str, model: ProtoPNet | ProtoTree, data: Held, work: Work, pairs: int, clock: str) -> Timing:
    """Time of a work on all images ÷ one pass of the backbone over them, in the same batches."""

    @torch.no_grad()
    def floor() -> None:
        for batch in data.held:
            model.backbone(batch.image)

    with count_passes(model.backbone) as passes:
        work()
    floor()
    seconds = interleaved(work, floor, pairs, CLOCKS[clock])
    count = len(data.train_indices)
    floor_counts = f"a pass of the backbone, {count} images"
    # No FLOPs: torch's counter fails on the derivatives that find receptive fields.
    return Timing(what, floor_counts, passes.images / count, None, summary(seconds), 1, seconds)


def protopnet(data: Held, prototypes_of_all: int) -> ProtoPNet:
    """A model with about so many prototypes, equally many of every class."""
    classes = len(data.classes)
    per_class = max(1, prototypes_of_all // classes)
    return ProtoPNet(classes, weights="bundled", prototypes_per_class=per_class).eval()


def informed_tree(data: Held, depth: int) -> ProtoTree:
    """A tree whose leaves predict one class each, in turn."""
    tree = ProtoTree(len(data.classes), weights="bundled", depth=depth).eval()
    leaves = torch.arange(2**depth)
    tree.leaves[leaves, leaves % tree.num_classes] = 5.0
    return tree


def push_and_draw(model: ProtoPNet, data: Held, folder: Path) -> None:
    """`push`, then draw a sheet of pictures for every class."""
    model.push(data)
    draw_sheets(model.sources, model.prototype_sheets(data.classes), data, folder)


def sources(few: Held, whole: Held, numbers: Sequence[int], depth: int, pairs: int, clock: str) -> list[Row]:
    """`push` and `project` on `few`; `push` with pictures on `whole`, with the smallest number of prototypes."""
    rows: list[Row] = []
    for number in numbers:
        model = protopnet(few, number)
        what = f"ProtoPNet push, {len(model.prototypes)} prototypes of {model.num_classes} classes"
        rows.append(timed(what, model, few, partial(model.push, few), pairs, clock))
    tree = informed_tree(few, depth)
    what = f"ProtoTree project, {int(tree.nodes_kept.sum())} nodes"
    rows.append(timed(what, tree, few, partial(tree.project, few), pairs, clock))
    model = protopnet(whole, min(numbers))
    with tempfile.TemporaryDirectory() as folder:
        work = partial(push_and_draw, model, whole, Path(folder))
        what = f"ProtoPNet push with pictures, {len(model.prototypes)} prototypes of {model.num_classes} classes"
        rows.append(timed(what, model, whole, work, pairs, clock))
    return rows


def heads(data: Held, classes: int, depth: int, pairs: int, seconds: float, clock: str) -> list[Row]:
    """Training steps of both heads, on the first batch."""
    images, rows = data.held[0].image, list[Row]()
    ppnet = ProtoPNet(classes, weights="bundled")
    tree = ProtoTree(classes, weights="bundled", depth=depth)
    tree._leaving = torch.zeros_like(tree.leaves)  # as at the start of the first epoch
    for name, model in (
        (f"ProtoPNet head, {len(ppnet.prototypes)} prototypes", ppnet),
        (f"ProtoTree head, depth {depth}", tree),
    ):
        rows += timing(name, model, images, pairs, seconds, clock)
    return rows


def statistics(count: int) -> Work:
    """Usage and spread of so many prototypes: duplicates, and distances between all pairs."""
    model = ProtoPNet(200, backbone="test_efficientnet", weights=None, prototypes_per_class=count // 200)
    return lambda: [metric(model) for metric in (PrototypeUsage, PrototypeSpread)]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(2000,))
    p.add_argument(
        "--prototypes", type=int, nargs="+", default=[200, 1000, 2000], help="numbers of prototypes of ProtoPNet"
    )
    p.add_argument("--depth", type=int, default=9, help="depth of the tree")
    p.add_argument("--classes", type=int, default=200, help="classes of the heads")
    p.add_argument("--pictures", type=int, help="number of images of the push with pictures; default: all")
    p.set_defaults(count=256)
    args = parse(p, "prototypes", argv)
    dataset = {"name": "part_birds"} if args.images == "part_birds" else {"name": "cub", "root": args.images}
    few, whole = (Held(dataset, args.size, args.batch or 16, count) for count in (args.count, args.pictures))
    rows: list[Row] = [
        *sources(few, whole, args.prototypes, args.depth, args.pairs, args.clock),
        *heads(few, args.classes, args.depth, args.pairs, args.seconds, args.clock),
        *(Memory("usage and spread", f"{n} prototypes", peak_memory(statistics, n)) for n in args.memory),
    ]
    described = f"{len(whole.train_indices)} training images of {args.source or dataset['name']}"
    return write("prototypes", args, described, rows)


if __name__ == "__main__":
    print(show(main()))
