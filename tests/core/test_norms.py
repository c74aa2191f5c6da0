"""Gradients of one image are right behind batch norm and instance norm, where torch mixes up cells."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models import EXPLAINERS
from interp_models.core.norms import gradients
from interp_models.core.prepared import prepare

MEANS, VARIANCES = torch.linspace(0.5, 1.5, 8, dtype=torch.float64), torch.linspace(0.6, 1.4, 8, dtype=torch.float64)
NORMS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8),
    "batch_norm": lambda: lambda x: F.batch_norm(x, MEANS, VARIANCES),
    "instance_norm": lambda: F.instance_norm,
    "torch.batch_norm": lambda: lambda x: torch.batch_norm(x, None, None, MEANS, VARIANCES, False, 0.1, 1e-5, False),
}


class Tokens(nn.Module):
    """A convolution, a norm, and tokens of the cells."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.norm = nn.Conv2d(3, 8, 4, stride=4), norm
        self.mixed, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mixed(self.norm(self.features(x)).flatten(2).transpose(1, 2)).relu().mean(dim=1))


def tokens(norm: str) -> Tokens:
    torch.manual_seed(0)
    model = Tokens(NORMS[norm]()).double().eval()
    for x in (*model.parameters(), *model.buffers()):
        if x.is_floating_point():
            nn.init.uniform_(x, 0.5, 1.5)
    nn.init.normal_(model.features.weight)
    nn.init.normal_(model.fc.weight)
    return model


def slopes(model: nn.Module, image: Tensor) -> Tensor:
    """Central differences of a logit, for each value of an image."""
    found, step = torch.zeros(image.numel(), dtype=torch.float64), 1e-6
    with torch.no_grad():
        for number in range(len(found)):
            move = torch.zeros_like(image).view(-1)
            move[number] = step
            up, down = (model(image + sign * move.view_as(image))[0, 2] for sign in (1, -1))
            found[number] = (up - down) / (2 * step)
    return found.view_as(image[0])


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_one_image_is_that_of_finite_differences(norm: str) -> None:
    model, image = tokens(norm), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    expected = slopes(model, image)
    prepare(model, image)  # explainers then find this copy
    for name, due in (("gradient", expected.abs().amax(dim=0)), ("grad_x_input", (expected * image[0]).sum(dim=0))):
        found = EXPLAINERS.build(name, model=model).attribute(image, 2)
        torch.testing.assert_close(found[0], due.float(), rtol=1e-4, atol=1e-6)
    for name in ("layercam", "integrated_gradients"):
        explainer = EXPLAINERS.build(name, model=model)
        one, two = explainer.attribute(image, 2), explainer.attribute(torch.cat([image, 1 - image]), 2)
        torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-6)


def test_graphs_stay_as_they_are() -> None:
    """A kept graph has no hooks afterwards; inputs that nothing depends on have no gradient."""
    x, unused = (torch.rand(1, 8, 3, 3, requires_grad=True) for _ in range(2))
    total = F.batch_norm(x, MEANS.float(), VARIANCES.float()).flatten(2).transpose(1, 2).square()[:, 1:].sum()
    first, nothing = gradients(total, [x, unused], again=True)
    again, _ = gradients(total, [x, unused])
    assert nothing is None
    torch.testing.assert_close(first, again)
