"""Gradients of one image are right behind batch norm and instance norm, where torch mixes up cells."""

import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS


class Tokens(nn.Module):
    """A convolution, a norm, and tokens of the cells."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), norm)
        self.mixed, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mixed(self.features(x).flatten(2).transpose(1, 2)).relu().mean(dim=1))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("name", ["gradient", "grad_x_input"])
def test_the_gradient_of_one_image_is_that_of_finite_differences(name: str, norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Tokens(norm(8)).double().eval()
    for x in (*model.parameters(), *model.buffers()):
        if x.is_floating_point():
            nn.init.uniform_(x, 0.5, 1.5)
    nn.init.normal_(model.features[0].weight)
    nn.init.normal_(model.fc.weight)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    slopes, step = torch.zeros(3 * 16 * 16, dtype=torch.float64), 1e-6
    with torch.no_grad():
        for number in range(len(slopes)):
            move = torch.zeros_like(image).view(-1)
            move[number] = step
            up, down = (model(image + sign * move.view_as(image))[0, 2] for sign in (1, -1))
            slopes[number] = (up - down) / (2 * step)
    slopes = slopes.view(3, 16, 16)
    expected = slopes.abs().amax(dim=0) if name == "gradient" else (slopes * image[0]).sum(dim=0)
    hooks = [len(part._forward_hooks) for part in model.modules()]
    found = EXPLAINERS.build(name, model=model).attribute(image, 2)
    torch.testing.assert_close(found[0], expected.float(), rtol=1e-4, atol=1e-6)
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
