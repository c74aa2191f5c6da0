"""What docs/backbones.md says of timm's families is so."""

import pytest
import timm
import torch
from torch import nn

from interp_models.nn.backbone import Backbone
from tests.conftest import TINY
from tests.trunk_families import check_places, families, listed, smallest, verdict


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families())
def test_every_family_is_taken_or_refused_as_the_table_says(family):
    table = listed()
    if family in table:
        name, said = table[family]
        assert verdict(name) == said
    else:  # of a timm that is newer than the table
        assert verdict(smallest(family))


def test_the_table_is_whole():
    table = listed()
    assert len(table) > 80
    if timm.__version__ == "1.0.31":
        assert table.keys() == set(families())
    assert all(name in timm.list_models(module=family) for family, (name, _) in table.items())
    for _, said in table.values():
        assert said.startswith(("refused: ", "not tried: ")) or said.split(" ")[1].startswith("channels")


class Turned(nn.Module):
    """A backbone whose map is turned in some way."""

    def __init__(self, turn):
        super().__init__()
        self.inner, self.turn = Backbone(TINY, weights=None), turn

    def forward(self, images):
        return self.turn(self.inner(images))


@pytest.mark.parametrize(
    "turn",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(2),
        lambda x: x.flip(3),
        lambda x: x.mean(dim=(2, 3), keepdim=True).expand_as(x),
    ],
)
def test_a_map_that_does_not_lie_on_the_image_is_found(turn):
    torch.manual_seed(0)
    check_places(Turned(lambda x: x), 128)
    with pytest.raises(AssertionError):
        check_places(Turned(turn), 128)
