"""Where the class token's attention looks before and after fine-tuning: pointing and energy, by head and of their mean.

python -m studies.class_token --runs runs/cub_vit_cls_dinov2/0-0 [...]

*Before* is the model as its config builds it. Pointing: share of images on which the centre of the highest patch lies
in the box. Energy: share of the map in the box; a patch counts by the part of it that lies in the box.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from interp_models import InterpModule, load
from interp_models.data.module import DataModule
from interp_models.runs.building import build_data, build_model
from interp_models.runs.loading import run_config


def covered(boxes: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The part of each cell that lies in the box, (B, h, w).

    Args:
        boxes: (B, 4), XYXY in pixels.
        size: height and width of the images.
        grid: h and w.

    >>> covered(torch.tensor([[0.0, 0.0, 3.0, 4.0]]), (4, 4), (2, 2)).tolist()
    [[[1.0, 0.5], [1.0, 0.5]]]
    """
    parts = []
    for low, high, pixels, cells in ((1, 3, size[0], grid[0]), (0, 2, size[1], grid[1])):
        edges = torch.linspace(0, pixels, cells + 1)
        ends = torch.minimum(edges[1:], boxes[:, high, None]) - torch.maximum(edges[:-1], boxes[:, low, None])
        parts.append(ends.clamp(min=0) * cells / pixels)
    return parts[0][:, :, None] * parts[1][:, None, :]


def in_box(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pointing hits and energies of maps (B, N, h, w), each (B, N)."""
    height, width = maps.shape[2:]
    share = covered(boxes, size, (height, width))[:, None]
    energy = (maps * share).sum(dim=(2, 3)) / maps.sum(dim=(2, 3))
    place = maps.flatten(2).argmax(dim=2)
    y, x = (place // width + 0.5) * size[0] / height, (place % width + 0.5) * size[1] / width
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).float(), energy


@torch.no_grad()
def attention(model: InterpModule, data: DataModule, what: str) -> list[Row]:
    """Means over the test images: of the mean over heads, then of each head."""
    model.eval()
    hits, energies = [], []
    for batch in tqdm(data.test_dataloader(), desc=what, leave=False):
        if batch.box is None:
            raise SystemExit("--runs: the data have no boxes")
        heads = model(batch.image).maps
        maps = torch.cat([heads.mean(dim=1, keepdim=True), heads], dim=1)
        found = in_box(maps, batch.box, (batch.image.shape[2], batch.image.shape[3]))
        hits.append(found[0])
        energies.append(found[1])
    rows: list[Row] = []
    for name, values in (("pointing", hits), ("energy", energies)):
        means = (100 * torch.cat(values).mean(dim=0)).tolist()
        labels = ["mean over heads", *(f"head {number}" for number in range(len(means) - 1))]
        rows += [Value(f"{what}: {name}, {label}", mean, "%") for label, mean in zip(labels, means, strict=True)]
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--runs", type=Path, nargs="+", required=True, help="runs of `vit_cls`")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.command = f"python -m studies.class_token --runs {' '.join(map(str, args.runs))}"
    rows: list[Row] = []
    before: set[str] = set()
    for folder in args.runs:
        config = run_config(folder)
        data = build_data(config)
        if config["experiment"] not in before:
            before.add(config["experiment"])
            torch.manual_seed(0)
            untrained = build_model(config, len(data.classes))
            rows += attention(untrained, data, f"{config['experiment']}, before")
            sizes = [covered(b.box, (b.image.shape[2], b.image.shape[3]), (64, 64)) for b in data.test_dataloader()]
            rows.append(
                Value(f"{config['experiment']}: box, share of the image", 100 * float(torch.cat(sizes).mean()), "%")
            )
        rows += attention(load(folder)[0], data, f"{config['experiment']}, seed {config['seed']}")
    return write("class_token", args, "test images of the runs", rows)


if __name__ == "__main__":
    print(main())
