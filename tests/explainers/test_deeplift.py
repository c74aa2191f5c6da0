"""DeepLIFT: what its contributions add up to, by hand, of linear networks, and captum's where that is right."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.deeplift import DeepLIFT, check_complete
from tests.mutation import mutated


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Sum(nn.Module):
    """o = 1 - ReLU(1 - i₁ - i₂), the example of the paper's figure 1 that gradients miss."""

    def forward(self, x):
        h = (1 - x.sum(dim=(1, 2, 3))).relu()
        return torch.stack([1 - h, h + 3], dim=1)  # no probabilities


def test_the_papers_example():
    """With i₁ = i₂ = 1 the output rises by 1, of which each input gives a half; the gradient is 0."""
    x = torch.ones(1, 1, 1, 2)
    maps = DeepLIFT(Sum()).attribute(x, 0)
    torch.testing.assert_close(maps, torch.full((1, 1, 2), 0.5))


def test_linear_networks_have_their_weights():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).double(), images()
    z = torch.zeros(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (weight,) = torch.autograd.grad(net(z)[0, 1], z)
    maps = DeepLIFT(net, baseline=0.25).attribute(x, 1)
    torch.testing.assert_close(maps, (weight * (x - 0.25)).sum(1).float())


class Excited(nn.Module):
    """A gate on two features and a softmax over them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gate, self.head = nn.Linear(6, 2), nn.Linear(2, 2), nn.Linear(2, 3)

    def forward(self, x):
        a = self.first(x.flatten(1)).tanh()
        return self.head((a * self.gate(a).sigmoid()).softmax(dim=1))


def excited_by_hand(net, image, target, baseline):
    """Multipliers from the score down, one operation at a time."""
    w = [layer.weight.detach().numpy() for layer in (net.first, net.gate, net.head)]
    b = [layer.bias.detach().numpy() for layer in (net.first, net.gate, net.head)]
    steps = []
    for x in (image.numpy().ravel(), np.full(6, baseline)):
        z = w[0] @ x + b[0]
        a = np.tanh(z)
        u = w[1] @ a + b[1]
        gate = 1 / (1 + np.exp(-u))
        steps.append((x, z, a, u, gate, a * gate))
    shift = np.maximum(steps[0][5].max(), steps[1][5].max())
    e = [np.exp(step[5] - shift) for step in steps]
    m_s = w[2][target]
    of_sum = -(m_s * (e[0] + e[1]) / 2).sum() / (e[0].sum() * e[1].sum())
    m_e = m_s * (1 / e[0].sum() + 1 / e[1].sum()) / 2 + of_sum
    m_p = m_e * (e[0] - e[1]) / (steps[0][5] - steps[1][5])
    m_a = m_p * (steps[0][4] + steps[1][4]) / 2
    m_u = m_p * (steps[0][2] + steps[1][2]) / 2 * (steps[0][4] - steps[1][4]) / (steps[0][3] - steps[1][3])
    m_a = m_a + w[1].T @ m_u
    m_z = m_a * (steps[0][2] - steps[1][2]) / (steps[0][1] - steps[1][1])
    return (w[0].T @ m_z) * (steps[0][0] - steps[1][0])


def check_products(cls=DeepLIFT):
    net, x = Excited().double(), torch.rand(3, 3, 1, 2, dtype=torch.float64)
    maps = cls(net, baseline=0.3).attribute(x, 2)
    for image, found in zip(x, maps, strict=True):
        expected = excited_by_hand(net, image, 2, 0.3).reshape(3, 1, 2).sum(0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_products_gates_and_softmax_by_hand():
    check_products()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("kept = [_mids(x.detach()) for x", "kept = [x.detach() for x"),
        ("m * _mids(1 / total) + of_total", "m * _mids(1 / total)"),
        ("(c - d) / torch.where(same, 1.0, a - b)", "at_zero"),
        ("multipliers * (x - x.roll(n, 0))", "multipliers * x"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises((AssertionError, InputError)):
        check_products(mutated("interp_models.explainers.deeplift", right, wrong).DeepLIFT)


NETS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
    "convnext": lambda: timm.create_model("test_convnext", num_classes=4),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=4),
    "timm's vit": lambda: timm.create_model("test_vit", img_size=64, num_classes=4),
    "torchvision's vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 24, num_classes=4),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=4),
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 5, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    ),
    "glu": lambda: nn.Sequential(nn.Conv2d(3, 8, 9, 9), nn.GLU(dim=1), nn.Flatten(), nn.LazyLinear(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_contributions_add_up(name):
    torch.manual_seed(0)
    net, x = NETS[name]().double().eval(), images(size=64)
    for module in net.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, nn.LazyLinear):
            nn.init.normal_(module.weight, std=0.3)
    net(x)
    for score in ("logit", "probability"):
        maps = DeepLIFT(net, baseline=0.5, score=score).attribute(x, 1)
        both = (net(x), net(torch.full_like(x, 0.5)))
        ends = [(z.softmax(1) if score == "probability" else z)[:, 1] for z in both]
        due = (ends[0] - ends[1]).float()
        found, most = maps.double().sum(dim=(1, 2)).float(), float(maps.abs().max())
        torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5 * most)


def test_captum_where_it_is_right():
    """A network of modules used once, and pools that do not overlap."""
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(5), nn.Sigmoid(), nn.Linear(5, 3),
    ).double().eval()  # fmt: skip
    x = images(size=16)
    net(x)
    theirs = captum.DeepLift(net).attribute(x, torch.full_like(x, 0.2), target=1)
    torch.testing.assert_close(DeepLIFT(net, baseline=0.2).attribute(x, 1), theirs.sum(1).detach().float())


def test_functions_and_shared_modules_are_as_modules():
    torch.manual_seed(0)
    first, second, head, relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3), nn.ReLU()

    class Written(nn.Module):
        def __init__(self, one, two):
            super().__init__()
            self.first, self.second, self.head, self.one, self.two = first, second, head, one, two

        def forward(self, x):
            return self.head(self.two(self.second(self.one(self.first(x)))).mean(dim=(2, 3)))

    x = images()
    expected = DeepLIFT(Written(nn.ReLU(), nn.ReLU()).double()).attribute(x, 1)
    for one, two in ((relu, relu), (F.relu, F.relu_), (lambda a: torch.maximum(a, torch.zeros_like(a)), torch.relu)):
        torch.testing.assert_close(DeepLIFT(Written(one, two).double()).attribute(x, 1), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a * (a > 0.2), lambda a: a.cumprod(dim=1), lambda a: a.flip(0),
        lambda a: torch.maximum(a, a.flip(1)), torch.jit.script(F.relu),
    ],
)  # fmt: skip
def test_what_would_not_add_up_is_refused(change):
    class Changed(nn.Module):
        def __init__(self, change):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head, self.change = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), change

        def forward(self, x):
            return self.head(self.change(self.first(x).relu()).square().mean(dim=(2, 3)))

    assert float(DeepLIFT(Changed(torch.square).double()).attribute(images(), 1).abs().max()) > 0
    with pytest.raises(NotApplicable, match="deeplift"):
        DeepLIFT(Changed(change).double()).attribute(images(), 1)


def test_rounding_is_named_where_contributions_do_not_add_up():
    torch.manual_seed(0)
    net = nn.Sequential(*[part for _ in range(30) for part in (nn.Conv2d(3, 3, 3, 1, 1), nn.GELU())])
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(192, 3))
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.dirac_(part.weight)
            part.weight.data.mul_(1.5)
    DeepLIFT(net).attribute(images().float(), 1)
    with pytest.raises(NotApplicable, match=r"or rounds too much in torch\.bfloat16: use float32"):
        DeepLIFT(net.bfloat16()).attribute(images().bfloat16(), 1)


def test_a_change_within_the_rounding_of_the_scores_is_accepted():
    """The scores 1 + 1e-9 f(x) are all 1 in float32, and the contributions are those of 1e-9 f(x)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))
    net[-1].weight.data.mul_(1e-9)
    exact, x = copy.deepcopy(net).double(), images()
    net[-1].bias.data.fill_(1)
    assert net(x.float()).eq(1).all()
    found = DeepLIFT(net).attribute(x.float(), 1)
    torch.testing.assert_close(found, DeepLIFT(exact).attribute(x, 1), rtol=1e-3, atol=1e-14)


def test_a_difference_above_the_rounding_of_the_scores_is_refused():
    contributions = torch.tensor([[1e-9, 2e-9]])
    check_complete("deeplift", nn.ReLU(), contributions, torch.tensor([1.0]), torch.tensor([1.0]))
    with pytest.raises(NotApplicable, match=r"add up to 3e-09, the score changes by 2\.384e-07"):
        check_complete("deeplift", nn.ReLU(), contributions, torch.tensor([1 + 2**-22]), torch.tensor([1.0]))
