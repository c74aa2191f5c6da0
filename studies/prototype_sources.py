"""Whether the prototypes of trained models equal the recorded patches of training images, and are drawn as such.

python -m studies.prototype_sources --runs RUN [RUN ...]

For each prototype that is left, its image is read and passed through the model, and the prototype is compared with the
patch at the recorded cell. Its picture is read back from the sheet and compared with the image's pixels in the recorded
box.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.harness import STUDIES, Row, Value, plain_parser, write
from benchmarks.tables import show
from interp_models import load
from interp_models.models.protopnet import ProtoPNet
from interp_models.models.prototree import ProtoTree
from interp_models.report import gallery
from interp_models.runs.building import build_data
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config


def classes_of(model: ProtoPNet | ProtoTree) -> Tensor:
    """Classes whose images each prototype may come from, (P, K) bool; no class for removed prototypes."""
    if isinstance(model, ProtoPNet):
        return model.prototype_classes if model.class_specific else model.kept[:, None].expand(-1, model.num_classes)
    says = F.one_hot(model.leaves.argmax(dim=1), model.num_classes).bool() & model.leaf_kept[:, None]
    below = []
    for number in range(len(model.prototypes)):
        level = (number + 1).bit_length() - 1
        width = 2 ** (model.depth - level)
        first = (number + 1 - 2**level) * width
        below.append(says[first : first + width].any(dim=0))
    return torch.stack(below) & model.nodes_kept[:, None]


@torch.no_grad()
def measure(run: Path) -> list[Row]:
    """All rows of a run."""
    model, _ = load(run, "last")
    if not isinstance(model, ProtoPNet | ProtoTree) or bool((model.sources.image < 0).all()):
        raise SystemExit(f"{run}: has no prototypes that are patches of training images")
    data = build_data(run_config(run))
    allowed, sources = classes_of(model), model.sources
    left = allowed.any(dim=1).nonzero()[:, 0].tolist()
    pages = dict(gallery._pages(model.prototype_sheets(data.classes)))
    apart, of_class, held, peaked, shown = [], [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        gallery.draw_sheets(sources, model.prototype_sheets(data.classes), data, Path(folder))
        tiles = {number: tile for name in pages for number, tile in read_back(Path(folder), name, pages[name])}
    for batch in data.loader("train", augment=False):
        wanted = [(n, i) for n in left for i in (batch.index == sources.image[n]).nonzero()[:, 0].tolist()]
        if not wanted:
            continue
        z = model.features(batch.image)
        cell = batch.image.shape[-1] / z.shape[-1]
        for n, i in wanted:
            p, (row, column) = model.prototypes[n], sources.cell[n].tolist()
            apart.append(float((z[i, :, row : row + p.shape[1], column : column + p.shape[2]] - p).abs().max()))
            of_class.append(bool(allowed[n, batch.label[i]]))
            x0, y0, x1, y1 = sources.receptive_box[n].tolist()
            right, low = (column + p.shape[2]) * cell, (row + p.shape[1]) * cell
            held.append(x0 <= column * cell and y0 <= row * cell and x1 >= right and y1 >= low)
            x0, y0, x1, y1 = box = sources.activation_box[n].tolist()
            x, y = right - p.shape[2] / 2 * cell, low - p.shape[1] / 2 * cell
            peaked.append(x0 <= x <= x1 and y0 <= y <= y1)
            shown.append(alike(tiles[n], batch.image[i], box))
    name = run_name(run)
    return [
        Value(f"{name}: prototypes that are left", len(left), ""),
        Value(f"{name}: found at their image and cell", len(apart), ""),
        Value(f"{name}: largest difference to the patch there", max(apart), ""),
        Value(f"{name}: of an image of their class", sum(of_class), ""),
        Value(f"{name}: receptive box holds the patch's cells", sum(held), ""),
        Value(f"{name}: activation box holds their middle", sum(peaked), ""),
        Value(f"{name}: lowest correlation of picture and pixels in the box", min(shown), ""),
    ]


def read_back(folder: Path, name: str, numbers: Sequence[int]) -> list[tuple[int, Image.Image]]:
    """The patches on a sheet, without their frames, by number of the prototype."""
    sheet = Image.open(folder / f"{name}.jpg")
    side = gallery.SIDE
    wide, high = side + 4, 2 * side + 22
    found = []
    for place, number in enumerate(numbers):
        x, y = place % gallery.ROW * wide + 2, place // gallery.ROW * high + side + 20
        found.append((number, sheet.crop((x, y, x + side, y + side))))
    return found


def alike(tile: Image.Image, image: Tensor, box: Sequence[int]) -> float:
    """Correlation of a tile's pixels with those in a box of the image (3, H, W), enlarged to fill the tile."""
    x0, y0, x1, y1 = box
    scale = gallery.SIDE / max(x1 - x0, y1 - y0)
    size = (round((y1 - y0) * scale), round((x1 - x0) * scale))
    expected = F.interpolate(image[None, :, y0:y1, x0:x1], size=size, mode="bilinear", antialias=True)[0]
    pixels = np.asarray(tile, np.float64)[: size[0], : size[1]].transpose(2, 0, 1) / 255
    return float(np.corrcoef(pixels.ravel(), expected.numpy().ravel())[0, 1])


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write `prototype_sources.json`."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs of prototype models")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.command = f"python -m studies.prototype_sources --runs {' '.join(map(run_name, args.runs))}"
    rows = [row for run in args.runs for row in measure(run)]
    return write("prototype_sources", args, "training images of the runs", rows)


if __name__ == "__main__":
    print(show(main()))
