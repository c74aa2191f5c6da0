"""Time of drawing an image of `part_birds`: CPU time of the process in milliseconds, median over images."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

from benchmarks.harness import Value, parse, parser, write
from benchmarks.tables import show
from interp_models.data.part_birds.dataset import PartBirds


def milliseconds(size: int, count: int, seed: int) -> list[float]:
    """Milliseconds of each of `count` training images with masks and key points, after two warm-up images."""
    birds = PartBirds(split="train", image_size=size, seed=seed, train_per_class=-(-(count + 2) // 12))
    times = []
    for index in range(count + 2):
        begin = time.process_time()
        birds.load(index)
        times.append(1e3 * (time.process_time() - begin))
    return times[2:]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, model=False)
    p.set_defaults(count=120)
    args = parse(p, "part_birds", argv)
    q1, median, q3 = quantiles(milliseconds(args.size, args.count, args.seed), n=4, method="inclusive")
    what = f"one image of {args.size}×{args.size}"
    rows = [Value(f"{what}, {name}", value, "ms") for name, value in (("median", median), ("q1", q1), ("q3", q3))]
    return write("part_birds", args, f"{args.count} drawn images (part_birds)", rows)


if __name__ == "__main__":
    print(show(main()))
