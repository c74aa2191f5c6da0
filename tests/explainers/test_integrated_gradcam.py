"""Integrated Grad-CAM, against the sum written out with our own pass of the tail, and a model with a known integral."""

import numpy as np
import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS, InputError
from interp_models.explainers.integrated_gradcam import IntegratedGradCAM
from tests.mutation import mutated


def deep() -> nn.Sequential:
    """A tail that is not linear."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 3),
    ).double()  # fmt: skip


def written_out(
    net: nn.Sequential, image: torch.Tensor, target: int, alphas: list[float], baseline: float
) -> np.ndarray:
    """The mean over the points, channel by channel."""
    maps = []
    for alpha in alphas:
        point = baseline + alpha * (image[None] - baseline)
        a = net[:2](point).detach().requires_grad_(True)
        (g,) = torch.autograd.grad(net[2:](a)[0, target], a)
        found = sum(g[0, k].mean().item() * a[0, k].detach().numpy() for k in range(a.shape[1]))
        maps.append(np.maximum(found, 0))
    return np.mean(maps, axis=0)


def check(cls: type) -> None:
    net, images = deep(), torch.rand(3, 3, 12, 12, dtype=torch.float64)
    for where, alphas in {"left": [0.0, 0.2, 0.4, 0.6, 0.8], "right": [0.2, 0.4, 0.6, 0.8, 1.0]}.items():
        made = cls(net, layer="1", steps=5, points=where, baseline=0.3, batch=4)
        maps = made.attribute(images, torch.tensor([0, 2, 1])).numpy()
        for found, image, target in zip(maps, images, (0, 2, 1), strict=True):
            expected = written_out(net, image, target, alphas, 0.3)
            assert expected.max() > 1e-5
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_it_is_the_mean_over_the_path_written_out() -> None:
    check(IntegratedGradCAM)
    for right, wrong in (
        ("alphas - 1 / self.steps", "alphas"),
        ("self.baseline + alphas", "alphas"),
        ("found.relu() if self.relu", "found if self.relu"),
    ):
        with pytest.raises(AssertionError):
            check(mutated("interp_models.explainers.integrated_gradcam", right, wrong).IntegratedGradCAM)


class Square(nn.Module):
    """y = (mean over cells of A)² / 2 with A = x's first channel: at α x, w = α m / cells and A = α x."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.features(x[:, :1].clone()).mean(dim=(1, 2, 3))
        return torch.stack([m * m / 2, -m], dim=1)


def test_the_integral_of_a_known_function() -> None:
    """∫ (α m / 16) (α x) dα = m x / 48; two Gauss-Legendre points are exact for α²."""
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    made = EXPLAINERS.build(
        "integrated_gradcam", {"layer": "features", "steps": 2, "points": "gauss_legendre"}, model=Square()
    )
    expected = images[:, 0] * images[:, :1].mean(dim=(1, 2, 3))[:, None, None] / 48
    torch.testing.assert_close(made.attribute(images, 0), expected.float())
    assert float(made.attribute(images, 1).max()) == 0  # all evidence is against this class
    made.relu = False
    torch.testing.assert_close(made.attribute(images, 1), -images[:, 0].float() / 32)


def test_options_that_make_no_sense() -> None:
    IntegratedGradCAM(deep(), steps=1, batch=1)
    for options in ({"steps": 0}, {"batch": 0}):
        with pytest.raises(InputError, match="integrated_gradcam: steps and batch must be at least 1"):
            IntegratedGradCAM(deep(), **options)
