"""FullGrad: terms by networks written out with a zero added at each place of a bias, by hand, and by their sum."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

from interp_models import EXPLAINERS, NotApplicable
from interp_models.core.classifier import Classifier
from interp_models.explainers.fullgrad import FullGrad, SmoothFullGrad
from tests.mutation import mutated


class Mixed(nn.Module):
    """Modules in another order than they are used, one used twice, activations as functions and in place, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(6, 4)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.plain = nn.Conv2d(6, 6, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / 0.25
        x = F.relu_(self.first(x))
        y = F.relu(self.norm(self.plain(x)), inplace=True)
        y = F.relu6(20 * self.twice(y))
        y = self.twice(y) + x + 0.125
        y = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
        return self.head(y.mean(dim=(2, 3)))

    def with_zeros(self, x: Tensor, zero: Callable[[Tensor | float, Tensor], Tensor]) -> Tensor:
        """The same, out of place; `zero(bias, output)` returns the output with a zero added."""
        x = zero(-0.4, x - 0.4) / 0.25
        x = zero(self.first.bias.view(-1, 1, 1), self.first(x)).relu()
        scale = self.norm.weight / (self.norm.running_var + 1e-5).sqrt()
        y = self.plain(x) * scale.view(-1, 1, 1)
        shift = (self.norm.bias - self.norm.running_mean * scale).view(-1, 1, 1)
        y = zero(shift, y + shift).relu()
        y = 20 * zero(self.twice.bias.view(-1, 1, 1), self.twice(y))
        cut = torch.where(y > 6, 6.0, 0.0).to(y.dtype)
        y = zero(cut, torch.where(y > 6, 6.0, y.relu()))
        y = zero(self.twice.bias.view(-1, 1, 1), self.twice(y)) + x
        y = zero(0.125, y + 0.125)
        y = F.max_pool2d(torch.where(y > 0, y, 0.1 * y), 2)
        return zero(self.head.bias, self.head(y.mean(dim=(2, 3))))


def terms_of(net: Mixed, image: Tensor, c: int) -> tuple[list[Tensor], float]:
    """The terms of one image and of each bias, and the logit."""
    biases: list[Tensor | float] = []
    zeros: list[Tensor] = []

    def zero(bias: Tensor | float, output: Tensor) -> Tensor:
        biases.append(bias)
        zeros.append(torch.zeros_like(output).requires_grad_(True))
        return output + zeros[-1]

    x = image[None].clone().requires_grad_(True)
    y = net.with_zeros(x, zero)[0, c]
    gradients = torch.autograd.grad(y, [x, *zeros])
    return [(g * b).detach() for g, b in zip(gradients, [x, *biases], strict=True)], float(y.detach())


def psi(terms: Tensor, size: tuple[int, int]) -> Tensor:
    """The authors' post-processing, channel by channel."""
    terms = terms.abs()[0]
    low, high = float(terms.min()), float(terms.max())
    total = torch.zeros(size, dtype=terms.dtype)
    for channel in terms:
        scaled = (channel - low) / (high - low) if high > low else channel * 0
        total += F.interpolate(scaled[None, None], size=size, mode="bilinear", align_corners=True)[0, 0]
    return total


def example() -> tuple[Mixed, Tensor]:
    net = Mixed().double().eval()
    return net, torch.rand(3, 3, 21, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def check(cls: type) -> None:
    net, images = example()
    found = cls(net).attribute(images, torch.tensor([0, 3, 1]))
    for i, c in enumerate((0, 3, 1)):
        terms, y = terms_of(net, images[i], c)
        assert abs(sum(float(x.sum()) for x in terms) - y) < 1e-10 < 1e-2 < abs(y), "the written-out net is wrong"
        assert float(terms[5].abs().max()) > 0, "nothing is cut at 6"
        expected = torch.stack([psi(x, (21, 26)) for x in terms if x.dim() == 4]).sum(dim=0)
        torch.testing.assert_close(found[i], expected.float())


def test_terms_of_a_network_written_out() -> None:
    check(FullGrad)
    for right, wrong in (
        ("-mean / (variance + eps).sqrt()", "0 * mean"),
        ("(1, alpha if name in ADD else -alpha)", "(1, alpha)"),
        ("cut | (output >= high)", "cut"),
        ("name in (*ADD, *SUBTRACT, *REVERSED)", "name in REVERSED"),
        (
            "amin(dim=(1, 2, 3), keepdim=True), terms.amax(dim=(1, 2, 3)",
            "amin(dim=(2, 3), keepdim=True), terms.amax(dim=(2, 3)",
        ),
        ("align_corners=True", "align_corners=False"),
    ):
        with pytest.raises((AssertionError, NotApplicable)):
            check(mutated("interp_models.explainers.fullgrad", right, wrong).FullGrad)


def test_a_network_of_two_layers_by_hand() -> None:
    """y = 2 ReLU(x + 1) at the left pixel, 2 ReLU(x - 3) at the right one, of one colour that counts."""
    first, second = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, 0] = 1.0
        first.bias.copy_(torch.tensor([1.0, -3.0]))
        second.weight.fill_(2.0)
    net = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(2, 2, bias=False))
    net[4].weight.data = torch.eye(2)
    x = torch.zeros(1, 3, 1, 2)
    x[0, 0, 0] = torch.tensor([4.0, 1.0])  # left: 2 (4 + 1) + 2 (4 - 3) = 12
    # Left: x g = 4 · 4 = 16, biases 2 · 1 = 2 and 2 · -3 = -6, together 12. Scaled by 16 and by 6, the largest terms.
    expected = torch.tensor([[[16 / 16 + 2 / 6 + 6 / 6, 0.0]]])
    assert float(net(x)[0, 0]) == 12
    torch.testing.assert_close(FullGrad(net).attribute(x, 0), expected)


def test_the_smooth_one_averages_the_signed_terms_of_the_copies_that_it_passes() -> None:
    def check_smooth(cls: type) -> None:
        net, images = example()
        passed: list[Tensor] = []
        handle = net.register_forward_pre_hook(lambda module, args: passed.extend(args[0].detach().clone()))
        smooth = cls(net, samples=3, batch=2, noise=0.1, seed=4)
        smooth.attribute(images[:2], 1)  # the places of the layers are tried once
        passed.clear()
        found = smooth.attribute(images[:2], 1)
        handle.remove()
        for i in range(2):
            copies = [x for x in passed if 0 < float((x - images[i]).abs().mean()) < 0.2]
            assert len(copies) == 3
            spread = images[i].max() - images[i].min()
            assert abs(float((torch.stack(copies) - images[i]).std() / spread) - 0.1) < 0.005
            each = [terms_of(net, x, 1)[0] for x in copies]
            means = [torch.stack(x).mean(dim=0) for x in zip(*each, strict=True)]
            expected = torch.stack([psi(x, (21, 26)) for x in means if x.dim() == 4]).sum(dim=0)
            torch.testing.assert_close(found[i], expected.float())

    check_smooth(SmoothFullGrad)
    with pytest.raises(AssertionError):
        check_smooth(
            mutated("interp_models.explainers.fullgrad", "some = terms.sum(", "some = terms.abs().sum(").SmoothFullGrad
        )
    net, images = example()
    torch.testing.assert_close(
        SmoothFullGrad(net, samples=2, noise=0).attribute(images), FullGrad(net).attribute(images)
    )


COMPLETE = {
    "resnet": lambda: torchvision.models.resnet18(weights=None, num_classes=5),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(weights=None, num_classes=5),
    "lite": lambda: timm.create_model("efficientnet_lite0", num_classes=5),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(weights=None, num_classes=5),
    "normalised": lambda: Classifier(
        torchvision.models.vgg11_bn(weights=None, num_classes=5), mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.3]
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "squeezenet" else pytest.mark.slow) for name in COMPLETE]
)
def test_terms_add_up_to_the_logit_in_real_architectures(name: str) -> None:
    torch.manual_seed(0)
    net = COMPLETE[name]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
    images, totals = torch.rand(2, 3, 64, 64, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    class Summed(FullGrad):
        def _attribute(self, inputs: Tensor, target: object) -> Tensor:
            self._terms(inputs, torch.tensor([1, 2]), lambda number, terms: totals.add_(terms.sum(dim=(1, 2, 3))))
            return inputs[:, 0]

    Summed(net).attribute(images)
    # Terms without cells are those of the last linear layer; the other ones of VGG have biases of 0.
    bias = next(x for x in reversed(list(net.modules())) if isinstance(x, nn.Linear | nn.Conv2d)).bias
    expected = net(images)[[0, 1], [1, 2]] - (0 if name == "squeezenet" else bias[[1, 2]])
    torch.testing.assert_close(totals, expected.detach())


CURVED = {
    "GELU": (nn.GELU(), "Gelu"),
    "SiLU": (nn.SiLU(), "Silu"),
    "softmax": (nn.Softmax(dim=1), "Softmax"),
    "layer norm": (nn.GroupNorm(1, 6), "NativeGroupNorm"),
}


@pytest.mark.parametrize("name", CURVED)
def test_networks_that_are_not_piecewise_linear_are_refused_with_the_reason(name: str) -> None:
    layer, reason = CURVED[name]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    FullGrad(net).attribute(torch.rand(2, 3, 16, 16))
    wrong = copy.deepcopy(net)
    wrong[1] = layer
    for explainer in ("fullgrad", "smooth_fullgrad"):
        with pytest.raises(
            NotApplicable, match=rf"Sequential: .* add up to .*, the logit is .* this one has {reason}$"
        ):
            EXPLAINERS.build(explainer, model=wrong).attribute(torch.rand(2, 3, 16, 16))


def test_scripted_parts_are_named_where_their_biases_cannot_be_seen() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    images = torch.rand(2, 3, 16, 16)
    FullGrad(net).attribute(images)
    with pytest.raises(NotApplicable, match=r"this one has parts made by torch\.jit or torch\.compile"):
        FullGrad(nn.Sequential(torch.jit.trace(net, images))).attribute(images)  # type: ignore[no-untyped-call]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x).relu() * self.b(x).relu()).mean(dim=(2, 3))


def test_products_of_features_and_attention_are_refused() -> None:
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(NotApplicable, match="products of features, or constants that fullgrad does not find"):
        FullGrad(Gated()).attribute(images)
    with pytest.raises(NotApplicable, match=r"VisionTransformer: .* Gelu"):
        FullGrad(timm.create_model("test_vit", img_size=64)).attribute(images)


def test_weights_learn_again_after_a_refusal() -> None:
    net = Gated()
    net.a.weight.requires_grad_(False)
    with pytest.raises(NotApplicable):
        FullGrad(net).attribute(torch.rand(1, 3, 8, 8))
    assert [x.requires_grad for x in net.parameters()] == [False, True, True, True]


class Moving(nn.Module):
    """A network whose features are in another order than the image, from the start or between two layers."""

    def __init__(self, move=lambda x: x, back=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
        self.move, self.back, self.head = move, back, nn.Linear(8, 3)

    def forward(self, x):
        x = self.second(self.move(self.first(self.move(x) if self.back is None else x)))
        return self.head((x if self.back is None else self.back(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["fullgrad", "smooth_fullgrad"])
def test_biases_of_layers_that_do_not_lie_on_the_image_are_not_drawn(name):
    x = torch.rand(1, 3, 32, 32)
    options = {"samples": 2} if name == "smooth_fullgrad" else {}
    assert EXPLAINERS.build(name, options, model=Moving().eval()).attribute(x, 1).std() > 0
    for model in (
        Moving(lambda x: x.roll(16, dims=2)),
        Moving(lambda x: x.flip(3), lambda x: x.flip(3)),
        nn.Sequential(v2.CenterCrop(20), Moving()),
    ):
        with pytest.raises(NotApplicable, match="does not keep the positions of the image, so fullgrad cannot"):
            EXPLAINERS.build(name, options, model=model.eval()).attribute(x, 1)

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Moving()

        def forward(self, x):
            return self.net(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(dim=0)

    with pytest.raises(NotApplicable, match="one row per image"):
        EXPLAINERS.build(name, options, model=Views().eval()).attribute(x, 1)
