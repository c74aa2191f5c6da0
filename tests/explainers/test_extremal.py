"""Extremal perturbations: bumps, blur and optimisation written out, and a model that reads one place."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp_models.core.errors import InputError
from interp_models.explainers import extremal
from interp_models.explainers.extremal import ExtremalPerturbation
from tests.mutation import mutated

MODULE = "interp_models.explainers.extremal"


def images(n=2, height=30, width=37):
    return torch.rand(n, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 6, 5, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh()]
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)).double()
    model[-1].weight.data *= 20
    return model


def by_pixels(heights, size, cell, sigma):
    """The mask with its margin: of each pixel, the smooth maximum of the bumps that it reads."""
    around, rows, columns = 1 + math.ceil(sigma / cell), *heights.shape[-2:]
    out_rows = (rows + 2 * (1 + math.ceil(2 * sigma / cell)) - 2 * around) * cell - cell + 1
    out_columns = (columns + 2 * (1 + math.ceil(2 * sigma / cell)) - 2 * around) * cell - cell + 1
    first = 1 + math.ceil(2 * sigma / cell)
    made = torch.zeros(out_rows, out_columns, dtype=heights.dtype)
    values = []
    for v in range(out_rows):
        for u in range(out_columns):
            some = []
            for ky in range(2 * around + 1):
                for kx in range(2 * around + 1):
                    i, j = v // cell + ky - first, u // cell + kx - first
                    d = math.hypot(v - (sigma + cell * i), u - (sigma + cell * j)) / sigma
                    bump = math.exp(-2 * max(d - 0.5, 0) ** 2)
                    inside = 0 <= i < rows and 0 <= j < columns
                    some.append(bump * heights[i, j] if inside else heights.new_zeros(()))
            a = torch.stack(some)
            values.append((a * (20 * a).softmax(0)).sum())
    made = torch.stack(values).view(out_rows, out_columns)
    return made, made[sigma : sigma + size[0], sigma : sigma + size[1]]


def blurred(image, sigma):
    """A direct convolution in two dimensions."""
    if sigma == 0:
        return image
    reach = math.ceil(4 * sigma)
    line = torch.tensor([math.exp(-(t**2) / (2 * sigma**2)) for t in range(-reach, reach + 1)], dtype=torch.float64)
    kernel = torch.outer(line, line) / line.sum() ** 2
    large = F.pad(image[None], (reach,) * 4, mode="replicate")[0]
    return F.conv2d(large[:, None], kernel[None, None])[:, 0]


def check_parts(module=extremal):
    heights = torch.rand(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = images(2, 13, 23)
    bumps = module.Bumps(x, 3, 4)
    assert bumps.cells == (5, 8)
    masks = bumps.masks(heights)
    for one, found, inner in zip(heights, masks, bumps.cropped(masks), strict=True):
        whole, cropped = by_pixels(one, (13, 23), 3, 4)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(inner, cropped)
    small = module.Bumps(images(1, 4, 6), 3, 2)
    assert torch.autograd.gradcheck(small.masks, heights[:1, :2, :2].clone().requires_grad_(), fast_mode=True)
    assert torch.autograd.gradcheck(small.masks, heights[:1, :2, :2].clone().requires_grad_())
    levels = module.pyramid(x)
    for image, found in zip(x, levels, strict=True):
        for number in range(8):
            torch.testing.assert_close(found[number], blurred(image, 20 * (1 - number / 7)))
    at = torch.rand(2, 13, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    at[0, 0, 0], at[0, 1, 1] = 0.0, 1.0
    found = module.blended(levels, at)
    for b, c, v, u in ((0, 1, 0, 0), (0, 2, 1, 1), (1, 0, 7, 20), (1, 2, 12, 3)):
        expected = np.interp(float(at[b, v, u]) * 7, range(8), levels[b, :, c, v, u])
        assert float(found[b, c, v, u]) == pytest.approx(expected)


def optimised(model, image, c, area, steps, variant, score):
    """One image, by the formulas, with a dense matrix of bumps and the update of SGD written out."""
    cell, sigma = 7, 21
    rows, columns = (math.ceil(n / cell) for n in image.shape[1:])
    bumps = extremal.Bumps(image[None], cell, sigma)  # checked above
    levels = torch.stack([blurred(image, 20 * (1 - number / 7)) for number in range(8)])
    m = torch.ones(1, rows, columns, dtype=torch.float64, requires_grad=True)
    momentum, weight = None, 300.0
    for step in range(steps):
        whole = bumps.masks(m)[0]
        mask = whole[sigma : sigma + image.shape[1], sigma : sigma + image.shape[2]]
        at = (mask if variant == "preserve" else 1 - mask) * 7
        seen = sum(levels[n] * (1 - (at - n).abs()).clamp(min=0) for n in range(8))
        seen = seen[:, :, torch.arange(image.shape[2] - 1, -1, -1)] if step % 2 == 0 else seen
        y = model(seen[None])[0]
        y = (y if score == "logit" else y.softmax(0))[c]
        y = y if variant == "preserve" else -y
        values, total = (
            whole.flatten()[torch.from_numpy(np.argsort(whole.detach().flatten().numpy(), kind="stable"))],
            0.0,
        )
        for rank, value in enumerate(values):
            total = total + (value - (0.0 if rank < int(len(values) * (1 - area)) else 1.0)) ** 2
        (g,) = torch.autograd.grad(y - weight * total / len(values), m)
        momentum = g if momentum is None else 0.9 * momentum + 0.1 * g
        m = (m.detach() + 0.01 * momentum).clamp(0, 1).requires_grad_()
        weight = 300 * 1.0035 ** (step + 1)
    return mask.detach()


def check_steps(cls=ExtremalPerturbation):
    model, x = net(), images(2, 16, 23)
    for variant, score in (("preserve", "probability"), ("delete", "logit")):
        explainer = cls(model, areas=(0.2, 0.4), steps=5, variant=variant, score=score, batch=3)
        found = explainer.attribute(x, torch.tensor([3, 1]))
        for image, c, map_ in zip(x, (3, 1), found, strict=True):
            masks = [optimised(model, image, c, area, 5, variant, score) for area in (0.2, 0.4)]
            torch.testing.assert_close(map_, ((masks[0] + masks[1]) / 2).float(), rtol=1e-5, atol=1e-6)


def test_bumps_blur_and_levels():
    check_parts()


def test_steps_are_those_written_out():
    check_steps()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("- sigma - cell *", "- cell *"),
        ("(distances - 0.5)", "(distances - 0.4)"),
        ("COLDNESS = 20.0", "COLDNESS = 10.0"),
        ("mul_(COLDNESS).add_(1)", "mul_(COLDNESS)"),
        ("BLUR * (1 - level / (LEVELS - 1))", "BLUR * (1 - level / LEVELS)"),
        ("(2 * sigma**2)", "sigma**2"),
        ("above - below)", "above)"),
        ("F.pad(heights, (self.padding,) * 4)", "F.pad(heights, (self.padding,) * 4, value=1.0)"),
    ],
)  # fmt: skip
def test_mutations_of_parts_are_rejected(right, wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        check_parts(mutated(MODULE, right, wrong))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weight *= 1.0035", "weight *= 1.35"),
        ("momentum=0.9, dampening=0.9", "momentum=0.9"),
        ("(1 - area)) for", "area) for"),
        ("if step % 2 else", "if not step % 2 else"),
        ("heights.clamp_(0, 1)", "heights.clamp_(0, 2)"),
        ("else 1 - inner", "else inner"),
        ("else -y", "else y"),
        ("return total / len(self.areas)", "return total"),
        ("masks.flatten(1).sort(dim=1, stable=True).values", "masks.flatten(1)"),
    ],
)
@pytest.mark.slow
def test_mutations_of_steps_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_steps(mutated(MODULE, right, wrong).ExtremalPerturbation)


class Texture(nn.Module):
    """The contrast of neighbours in one place; blur takes it away. Class 1 reads another place."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        def contrast(part):
            across = (part[:, :, :, 1:] - part[:, :, :, :-1]).square().mean(dim=(1, 2, 3))
            return self.gain * across

        # both places lie symmetrically, so that the mirror does not matter
        top = contrast(x[:, :, 8:28, 24:56])
        bottom = contrast(x[:, :, 52:72, 24:56])
        return torch.stack([top, bottom], dim=1)


def test_the_mask_lies_on_what_the_model_reads():
    torch.manual_seed(0)
    x, model = torch.rand(2, 3, 80, 80), Texture()
    targets = torch.tensor([0, 1])
    maps = ExtremalPerturbation(model, areas=(0.1,), steps=200).attribute(x, targets)
    for map_, (top, end), other in zip(maps, ((8, 28), (52, 72)), (slice(48, None), slice(None, 32)), strict=True):
        weight = map_ / map_.sum()
        assert top < float((weight.sum(dim=1) * torch.arange(80)).sum()) < end
        assert abs(float((weight.sum(dim=0) * torch.arange(80)).sum()) - 39.5) < 4
        assert float(map_[top:end, 24:56].mean()) > 0.9
        assert float(map_[other].max()) < 0.5


@pytest.mark.parametrize("area", [0.05, 0.2])
def test_the_area_is_reached(area):
    """Of the mask with its margin."""
    torch.manual_seed(0)
    explainer = ExtremalPerturbation(Texture(), areas=(area,), steps=200)
    x = torch.rand(1, 3, 80, 80)
    map_ = explainer.attribute(x, 0)
    assert float(map_.sum()) / math.prod(extremal.Bumps(x, 7, 21).size) == pytest.approx(area, abs=0.02)


def test_bad_options():
    for options, message in (
        ({"areas": ()}, "areas must be a list of numbers between 0 and 1; got .."),
        ({"areas": (0.1, 1.0)}, "areas must be a list of numbers between 0 and 1; got .0.1, 1.0."),
        ({"areas": 0.1}, "areas must be a list of numbers between 0 and 1; got 0.1"),
        ({"steps": 0}, "needs steps, cell, sigma, batch >= 1; got 0, 7, 21, None"),
        ({"batch": 0}, "needs steps, cell, sigma, batch >= 1; got 800, 7, 21, 0"),
    ):
        with pytest.raises(InputError, match=message):
            ExtremalPerturbation(net(), **options)
