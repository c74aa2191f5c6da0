"""What is found out about a model before its outputs are read: by few passes, and not from a refused image."""

import pytest
import torch
from torch import Tensor, nn

from interp_models import InputError
from interp_models.core.modes import evaluating
from interp_models.core.reading import typed_logits
from interp_models.core.scoring import read_as

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
sizes: list[int] = []
"""Number of images of each pass. It is no attribute of the network, whose state must not change."""


class Watched(nn.Module):
    """A network that notes its passes, and refuses images of other sides than 8."""

    def __init__(self, *, by_batch: bool = False) -> None:
        super().__init__()
        self.layer, self.by_batch = nn.Conv2d(3, 2, 4, stride=4), by_batch

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2)."""
        sizes.append(len(images))
        if images.shape[-1] != 8:
            raise InputError("images must have sides of 8 pixels")
        logits: Tensor = self.layer(images).mean(dim=(2, 3)) - 5
        return logits + (len(images) if self.by_batch else 0)


def test_one_pass_tells_logits_and_their_type_and_begins_the_check() -> None:
    model = Watched()
    sizes.clear()
    with evaluating(model):
        assert typed_logits(model, IMAGES) is False
        assert sizes == [1, 1, 3]
        assert typed_logits(model, IMAGES) is False
    assert sizes == [1, 1, 3]


def test_images_that_a_network_refuses_do_not_switch_the_check_off() -> None:
    model = Watched(by_batch=True)
    with evaluating(model):
        with read_as(model, torch.rand(1, 3, 9, 9), "logit"):
            pass
        with pytest.raises(InputError, match=r"changes by .* with its batch"), read_as(model, IMAGES, "logit"):
            pass
