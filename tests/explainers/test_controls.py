"""Controls, by their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.truth import Truth
from interp_models.explainers.combinators import Smooth
from interp_models.explainers.controls import CenterGaussian, Edges, FakeCAM, GTBackground, GTBox

NOTHING = nn.Identity()


def test_fakecam_hides_one_pixel():
    maps = FakeCAM(NOTHING).attribute(torch.rand(2, 3, 6, 8))
    assert maps.sum(dim=(1, 2)).tolist() == [47.0, 47.0]
    assert maps[:, 0, 0].tolist() == [0.0, 0.0]


def test_center_gaussian_is_its_formula():
    maps = CenterGaussian(NOTHING, sigma=0.3).attribute(torch.rand(2, 3, 6, 9))
    assert torch.equal(maps[0], maps[1])
    for y, x in ((0, 0), (2, 4), (5, 1)):
        u, v = (y + 0.5) / 6 - 0.5, (x + 0.5) / 9 - 0.5
        assert float(maps[0, y, x]) == pytest.approx(math.exp(-(u * u + v * v) / (2 * 0.3**2)))
    with pytest.raises(InputError, match="sigma > 0"):
        CenterGaussian(NOTHING, sigma=0.0)


def test_edges_of_ramps_and_steps():
    """The slope of a plane, and of a step of height 1 half a pixel's on each of its two sides."""
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    plane = (0.03 * y + 0.04 * x).expand(1, 3, -1, -1)
    maps = Edges(NOTHING).attribute(plane)
    torch.testing.assert_close(maps[0, 1:-1, 1:-1], torch.full((5, 7), 0.05))
    step = (x >= 4).float().expand(1, 3, -1, -1)
    maps = Edges(NOTHING).attribute(step)
    torch.testing.assert_close(maps[0, 3], torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0, 0]))
    one_colour = step.clone()
    one_colour[:, 1:] = 0
    torch.testing.assert_close(Edges(NOTHING).attribute(one_colour) * 3, maps)
    assert float(Edges(NOTHING).attribute(torch.full((1, 3, 5, 5), 0.7)).abs().max()) < 1e-6


def test_edges_do_not_depend_on_the_default_type():
    images = torch.rand(2, 3, 8, 8)
    expected = Edges(nn.Identity()).attribute(images)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(Edges(nn.Identity()).attribute(images), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_ground_truth_is_the_box():
    boxes = torch.tensor([[1.0, 2.0, 4.0, 5.0], [0.0, 0.0, 2.4, 1.6]])
    images = torch.rand(2, 3, 6, 8)
    maps = GTBox(NOTHING).attribute(images, None, Truth(boxes))
    expected = np.zeros((2, 6, 8))
    expected[0, 2:5, 1:4] = 1
    expected[1, 0:2, 0:2] = 1  # pixels whose middle is inside
    np.testing.assert_array_equal(maps, expected)
    np.testing.assert_array_equal(GTBackground(NOTHING).attribute(images, None, Truth(boxes)), 1 - expected)


def test_ground_truth_refuses_without_it():
    images = torch.rand(2, 3, 6, 8)
    with pytest.raises(NotApplicable, match=r"GTBox shows ground truth and needs a box .* of every image; the images"):
        GTBox(NOTHING).attribute(images)
    with pytest.raises(InputError, match=r"boxes must be a tensor \(2, any, 4\); got \(1, 1, 4\)"):
        GTBox(NOTHING).attribute(images, None, Truth(torch.zeros(1, 4)))
    with pytest.raises(NotApplicable, match="GTBackground shows ground truth"):
        Smooth(GTBackground(nn.Sequential(nn.Flatten(), nn.Linear(144, 2)))).attribute(images, 0)
