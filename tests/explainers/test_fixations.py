"""CNN Fixations against a loop over points in NumPy, and networks whose paths are known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.fixations import CNNFixations, _Recorder
from tests.mutation import mutated

MODULE = "interp_models.explainers.fixations"


class Branches(nn.Module):
    """A strided and padded convolution, batch norm, a residual sum in place, a grouped and dilated convolution, a
    concatenation, maximum and mean, and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.one = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(6).eval()
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.three = nn.Conv2d(6, 4, 3, dilation=2, groups=2)
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 5)
        self.norm.running_mean.uniform_(-0.3, 0.3)
        self.norm.weight.data.uniform_(0.5, 1.5)

    def forward(self, x):
        a = F.relu_(self.norm(self.one((x - 0.45) / 0.2)))
        b = F.max_pool2d(a, 3, 2, 1)
        c = self.two(b)
        c += b
        c = F.relu_(c)
        d = torch.cat([self.three(c), F.avg_pool2d(c, 5, 1)], 1)
        return self.second(F.relu(self.first(F.adaptive_avg_pool2d(d, 1).flatten(1))))


def by_points(model, image, c):
    """The same in NumPy, point by point."""
    with torch.no_grad():
        x = ((image - 0.45) / 0.2)[None]
        pre = model.norm(model.one(x))
        a = pre.relu()
        b = F.max_pool2d(a, 3, 2, 1)
        residual = model.two(b)
        s = (residual + b).relu()
        d = torch.cat([model.three(s), F.avg_pool2d(s, 5, 1)], 1)
        pooled = d.mean(dim=(2, 3))
        hidden = model.first(pooled).relu()
    x, a, b, residual, s, d, pooled, hidden = (one[0].numpy() for one in (x, a, b, residual, s, d, pooled, hidden))

    def conv(values, layer, o, i, j):
        w = layer.weight.detach().numpy()[o]
        stride, pad, dilation = layer.stride[0], layer.padding[0], layer.dilation[0]
        per_group = layer.out_channels // layer.groups
        first = o // per_group * w.shape[0]
        sums, best = {}, {}
        for ch in range(w.shape[0]):
            for ky in range(w.shape[1]):
                for kx in range(w.shape[2]):
                    y, u = i * stride - pad + ky * dilation, j * stride - pad + kx * dilation
                    if 0 <= y < values.shape[1] and 0 <= u < values.shape[2]:
                        term = w[ch, ky, kx] * values[first + ch, y, u]
                        sums[ch] = sums.get(ch, 0) + term
                        if ch not in best or term > best[ch][0]:
                            best[ch] = (term, y, u)
        ch = max(sums, key=sums.get)
        return first + ch, *best[ch][1:]

    def window(values, ch, top, bottom, left, right):
        cells = [(y, u) for y in range(max(top, 0), min(bottom, values.shape[1]))
                 for u in range(max(left, 0), min(right, values.shape[2]))]  # fmt: skip
        return (ch, *max(cells, key=lambda cell: values[ch][cell]))

    one = {n for n in range(12) if model.second.weight[c, n] * hidden[n] > 0}
    two = {n for h in one for n in range(10) if model.first.weight[h, n] * pooled[n] > 0}
    three = {window(d, ch, 0, 99, 0, 99) for ch in two}
    four = set()
    for ch, i, j in three:
        four.add(conv(s, model.three, ch, i, j) if ch < 4 else window(s, ch - 4, i, i + 5, j, j + 5))
    five = {p if b[p] > residual[p] else conv(b, model.two, *p) for p in four}
    six = {window(a, ch, 2 * i - 1, 2 * i + 2, 2 * j - 1, 2 * j + 2) for ch, i, j in five}
    return {conv(x, model.one, *p)[1:] for p in six}


def painted(points, height, width, sigma):
    points = sorted(points)
    kept = [
        p for p in points
        if sum(math.dist(p, q) < 0.1 * math.hypot(height, width) for q in points) > 0.05 * len(points)
    ]  # fmt: skip
    y, x = np.mgrid[:height, :width]
    return sum(np.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * sigma**2)) for i, j in kept)


def check_loop(cls=CNNFixations):
    model = Branches().double().eval()
    x = torch.rand(4, 3, 37, 46, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    explainer = cls(model, sigma=3.0)
    for c in range(5):
        found = explainer.attribute(x, c)
        for image, map_ in zip(x, found, strict=True):
            points = by_points(model, image, c)
            expected = painted(points, 37, 46, 3.0) if points else np.zeros((37, 46))
            np.testing.assert_allclose(map_, expected, rtol=1e-4, atol=1e-6)


def test_fixations_are_those_of_a_loop():
    check_loop()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(contributions > 0)", "(contributions < 0)"),
        ("contributions.sum(dim=(2, 3))", "contributions.amax(dim=(2, 3))"),
        ("contributions[each, channel].masked_fill", "read[each, channel].masked_fill"),
        ("torch.ge(", "torch.lt("),
        ("* stride[n] - padding[n])", "* stride[n])"),
        ("dilation[n] * torch", "torch"),
        ("o // (len(weight) // groups) * weight.shape[1]", "0 * o"),
        ("value[b, c, top:bottom, left:right].argmax()", "value[b, c, top:bottom, left:right].argmin()"),
        ("values = tuple(x.clone() for x in known)", "values = tuple(known)"),
        ("self.sigma**2)", "self.sigma)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_loop(mutated(MODULE, right, wrong).CNNFixations)


def points_of(model, x, c):
    with torch.no_grad(), _Recorder(x) as recorder:
        logits = model(x)
    return recorder.traced(logits, torch.tensor([[0, c]]))[:, 2:].tolist()


def test_a_network_with_a_known_path():
    """One bright pixel in the second channel; a linear layer that reads the cells takes the largest alone."""
    convolution = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    convolution.weight.data.zero_()
    convolution.weight.data[1, 1, 0, 2] = 1.0  # channel 1 is green, from the right upper neighbour
    linear = nn.Linear(2 * 4 * 4, 2, bias=False)
    linear.weight.data.fill_(1.0)
    model = nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear).eval()
    x = torch.zeros(1, 3, 8, 8)
    x[0, 1, 3, 6], x[0, 1, 6, 2], x[0, 0, 1, 1] = 0.9, 0.5, 1.0
    assert points_of(model, x, 0) == [[3, 6]]
    # Where it reads channels, all that contribute are followed.
    pooled = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    with pytest.raises(NotApplicable, match="Sequential computes adaptive_max_pool2d, which"):
        CNNFixations(pooled.eval()).attribute(x)
    pooled[2] = nn.AdaptiveAvgPool2d(1)
    pooled[4].weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert points_of(pooled, x, 0) == [[3, 6]]
    assert points_of(pooled, x, 1) == []
    assert not CNNFixations(pooled).attribute(x, 1).any()


def test_lonely_fixations_are_left_out():
    """Twenty fixations side by side, and one far away."""
    near = [[20, 20 + n] for n in range(21)]
    points = torch.tensor([*near, [90, 90]])
    map_ = CNNFixations(nn.Identity(), sigma=2.0)._map(points, torch.zeros(1, 3, 100, 100))
    np.testing.assert_allclose(map_, painted({tuple(p) for p in near}, 100, 100, 2.0), atol=1e-6)
    assert float(map_[80:, 80:].max()) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("densenet121", "googlenet", "mobilenet_v2", "vgg11_bn")),
    ],
)
def test_networks_that_it_traces(name):
    """Paths of images in a batch are those of each alone."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=4, **options).double().eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    maps = CNNFixations(model).attribute(x, torch.tensor([0, 3]))
    alone = torch.cat([CNNFixations(model).attribute(image[None], c) for image, c in zip(x, (0, 3), strict=True)])
    torch.testing.assert_close(maps, alone)
    assert float(maps.amax()) > 0.9


def test_others_are_refused():
    with pytest.raises(NotApplicable, match="MobileNetV3 computes hardswish_, which cnn_fixations cannot trace back"):
        CNNFixations(torchvision.models.mobilenet_v3_small(weights=None).eval()).attribute(torch.rand(1, 3, 64, 64))

    class Outside(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.mean(dim=(2, 3)).numpy().copy())

    with pytest.raises(NotApplicable, match="cnn_fixations cannot see how Outside computes its logits"):
        CNNFixations(Outside()).attribute(torch.rand(1, 3, 8, 8), 0)
    with pytest.raises(InputError, match="sigma must be above 0; got 0"):
        CNNFixations(nn.Identity(), sigma=0.0)


def test_padding_by_an_operation_of_its_own_is_as_that_of_a_convolution():
    torch.manual_seed(0)
    inside = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    outside = nn.Conv2d(3, 4, 3, stride=2)
    outside.load_state_dict({key: value.abs_() for key, value in inside.state_dict().items()})  # none prefers a zero
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(2, 3, 15, 16)
    own, other = (nn.Sequential(*layers, head).eval() for layers in ([inside], [nn.ZeroPad2d((1, 1, 1, 1)), outside]))
    assert torch.equal(own(x), other(x))
    maps = [CNNFixations(model).attribute(x, 1) for model in (own, other)]
    assert torch.equal(*maps)
    assert float(maps[0].std()) > 0
    uneven = nn.Sequential(nn.ZeroPad2d((0, 3, 2, 0)), outside, head).eval()
    padded = torch.nn.functional.pad(x, (0, 3, 2, 0))
    plain = CNNFixations(nn.Sequential(outside, head).eval()).attribute(padded, 1)
    assert torch.allclose(CNNFixations(uneven).attribute(x, 1), plain[:, 2:, :16])


def test_channels_last_change_nothing():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.rand(2, 3, 16, 16)
    expected = CNNFixations(model).attribute(x, 1)
    assert float(expected.std()) > 0
    assert torch.equal(CNNFixations(model).attribute(x.to(memory_format=torch.channels_last), 1), expected)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(CNNFixations(model).attribute(x, 1), expected)
