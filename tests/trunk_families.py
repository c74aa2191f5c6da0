"""The smallest member of each of timm's families as a backbone; writes the table of docs/backbones.md.

python -m tests.trunk_families   (8 minutes on two cores)
"""

from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from interp_models.core.errors import InputError
from interp_models.nn.backbone import Backbone

TABLE = Path(__file__).parents[1] / "docs" / "backbones.md"
MOST = 140
"""Millions of parameters of the largest model that is tried."""


def listed() -> dict[str, tuple[str, str]]:
    """Model and verdict of each family of the table."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {family.strip("`"): (model.strip("`"), verdict) for family, model, verdict in rows}


def millions(name: str) -> float:
    """Parameters of a model, without building it."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6


def smallest(family: str) -> str:
    """The model of a family with the fewest parameters."""
    return min(timm.list_models(module=family), key=millions)


def verdict(name: str) -> str:
    """What comes of a model as a backbone.

    Raises:
        AssertionError: if cells of its map are not where the table's text says.
    """
    if (size := millions(name)) > MOST:
        return f"not tried: {size:.0f} million parameters"
    torch.manual_seed(0)
    try:
        backbone = Backbone(name, weights=None)
    except InputError as error:
        return f"refused: {str(error).removeprefix(f'timm model {name!r} cannot be a backbone: ')}"
    side = images_of(backbone)
    check_places(backbone, side)
    form = backbone.form
    ways = {"whole": [], "features": ["by `forward_features`"], "tokens": ["patch tokens"]}
    notes = ["channels last"] * form.channels_last + ways[form.way]
    notes += [f"images of {side} pixels alone"] * (not takes(backbone, side + 64))
    return f"{form.channels} channels, a cell of {form.stride} pixels" + "".join(f"; {note}" for note in notes)


def takes(backbone: Backbone, side: int) -> bool:
    """Whether it takes square images of this size."""
    try:
        with torch.no_grad():
            backbone.eval()(torch.rand(1, 3, side, side))
    except Exception:
        return False
    return True


def images_of(backbone: Backbone) -> int:
    """A size of images that it takes: one with a grid of some cells, or its own."""
    own: int = backbone.trunk.default_cfg["input_size"][1]  # type: ignore[union-attr, index, assignment]
    return next(side for side in (256, own) if takes(backbone, side))


def check_places(backbone: Backbone, side: int) -> None:
    """A patch that moves down moves the change of the features down and not to a side; one that moves right, right.

    A random start may leave little of a signal: with batch norm's first statistics, or with those of such images.
    """
    found = moves(backbone, side)
    if not all(along > max(2 * across, 0.1) for along, across in found):
        found = moves(backbone, side, adapt=True)
    assert all(along > max(2 * across, 0.1) for along, across in found), found


@torch.no_grad()
def moves(backbone: Backbone, side: int, *, adapt: bool = False) -> list[tuple[float, float]]:
    """How far the change moves along and across the way of a patch that moves down, and of one that moves right."""
    base, patch = torch.rand(4, 3, side, side) * 0.2 + 0.4, torch.rand(4, 3, side, side)
    if adapt:
        for part in backbone.modules():
            if isinstance(part, _BatchNorm):
                part.momentum = 1.0
        backbone.train()(base)
    backbone.eval()
    plain = backbone(base)
    cells, third = plain.shape[2], side // 3
    assert plain.shape[2] == plain.shape[3]

    def centre(row: int, column: int) -> Tensor:
        x = base.clone()
        place = (..., slice(row * third, (row + 1) * third), slice(column * third, (column + 1) * third))
        x[place] = patch[place]
        change = (backbone(x) - plain).square().sum(dim=1)
        change = (change / change.sum(dim=(1, 2), keepdim=True)).mean(dim=0)
        change = (change - change.mean()).relu() ** 2  # gates of channels and attention change every cell
        grid = torch.stack(torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij"))
        return (change * grid).sum(dim=(1, 2)) / change.sum() / cells

    down, right = centre(2, 1) - centre(0, 1), centre(1, 2) - centre(1, 0)
    return [(float(down[0]), abs(float(down[1]))), (float(right[1]), abs(float(right[0])))]


def families() -> list[str]:
    """The families of timm, without ours."""
    return [family for family in timm.list_modules() if family != "small_resnet"]


def main() -> None:
    """Write the table."""
    text = TABLE.read_text()
    start = text.index("| Family")
    rows = ["| Family | Smallest model | As a backbone |", "| --- | --- | --- |"]
    for family in families():
        name = smallest(family)
        try:
            said = verdict(name)
        except AssertionError as error:
            said = f"taken, but cells are not where they should be: {error}"
        rows.append(f"| `{family}` | `{name}` | {said} |")
        print(rows[-1], flush=True)
    TABLE.write_text(text[:start] + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
