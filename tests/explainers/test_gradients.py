"""Gradients and their rules against finite differences, chains of matrices by hand, and torch's own derivative."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp_models.core.errors import InputError
from interp_models.explainers.gradients import Deconvnet, Gradient, GradXInput, GuidedBackprop
from interp_models.models.cnn import CNN
from tests.mutation import mutated


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def smooth_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()


def differences(net, image, target):
    """Central differences by every colour of every pixel."""
    found = np.zeros(image.shape)
    for place in np.ndindex(*image.shape):
        scores = []
        for step in (1e-5, -1e-5):
            moved = image.clone()
            moved[place] += step
            scores.append(net(moved[None])[0, target].item())
        found[place] = (scores[0] - scores[1]) / 2e-5
    return found


REDUCED = {
    "sum": lambda g: g.sum(0),
    "mean": lambda g: g.sum(0) / 3,
    "abs_sum": lambda g: np.abs(g).sum(0),
    "max_abs": lambda g: np.maximum(np.maximum(np.abs(g[0]), np.abs(g[1])), np.abs(g[2])),
}


def check_gradients(gradient=Gradient, product=GradXInput):
    net = smooth_net()
    for i, image in enumerate(images()):
        expected = differences(net, image, 1)
        for channels, function in REDUCED.items():
            for cls, raw in ((gradient, expected), (product, expected * image.numpy())):
                maps = cls(net, channels=channels).attribute(images(), 1)
                np.testing.assert_allclose(maps[i], function(raw), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(gradient(net).attribute(images(), 1)[i], REDUCED["max_abs"](expected), rtol=1e-4)


def test_gradients_are_finite_differences():
    check_gradients()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.score) * inputs", "self.score)"),
        ("return raw.mean(dim=1)", "return raw.amax(dim=1)"),
        ("raw.abs().sum(dim=1) if", "raw.sum(dim=1) if"),
        ("else raw.abs().amax(dim=1)", "else raw.amax(dim=1)"),
        ("score, target).sum()", "score, 0).sum()"),
    ],
)  # fmt: skip
def test_mutations_are_rejected(right, wrong):
    copy = mutated("interp_models.explainers.gradients", right, wrong)
    with pytest.raises(AssertionError):
        check_gradients(copy.Gradient, copy.GradXInput)


def test_grad_x_input_adds_up_without_biases():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3, bias=False)).double()
    maps = GradXInput(net).attribute(images(), 2)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), net(images())[:, 2].detach().float(), rtol=1e-4, atol=1e-5)


# --- Rules at activations ---


class ByHand(nn.Module):
    """Two layers of matrices on the pixels, so that every way back can be written down."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(192, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        self.activation = activation
        if isinstance(activation, nn.Module):
            self.a, self.b = activation, type(activation)()

    def forward(self, x):
        if isinstance(self.activation, nn.Module):
            return self.head(self.b(self.second(self.a(20 * self.first(x.flatten(1))))))
        return self.head(self.activation(self.second(self.activation(20 * self.first(x.flatten(1))))))


def in_place_statement(x):
    x = x.clone()
    x.relu_()
    return x


def functional_in_place(x):
    x = x * 1
    F.relu(x, inplace=True)
    return x


def views_in_place(x):
    x = x * 1
    for part in (x[:, :3], x[:, 3:]):
        part.relu_()
    return x


ACTIVATIONS = {
    "x.clamp": (lambda: lambda x: x.clamp(min=0), np.inf),
    "torch.clamp to 6": (lambda: lambda x: torch.clamp(x, 0, 6), 6.0),
    "a view in place": (lambda: views_in_place, np.inf),
    "nn.ReLU": (lambda: nn.ReLU(), np.inf),
    "nn.ReLU in place": (lambda: nn.ReLU(inplace=True), np.inf),
    "nn.ReLU6": (lambda: nn.ReLU6(), 6.0),
    "F.relu": (lambda: F.relu, np.inf),
    "F.relu6": (lambda: F.relu6, 6.0),
    "torch.relu": (lambda: torch.relu, np.inf),
    "x.relu": (lambda: torch.Tensor.relu, np.inf),
    "x.relu_ as a statement": (lambda: in_place_statement, np.inf),
    "F.relu in place": (lambda: functional_in_place, np.inf),
    "F.hardtanh": (lambda: lambda x: F.hardtanh(x, 0.0, 6.0), 6.0),
}


def by_hand(net, image, target, rule, high):
    w = [layer.weight.detach().numpy() for layer in (net.first, net.second, net.head)]
    b = [layer.bias.detach().numpy() for layer in (net.first, net.second)]
    z1 = 20 * (w[0] @ image.numpy().ravel() + b[0])
    z2 = w[1] @ np.clip(z1, 0, high) + b[1]
    r = w[2][target]
    for z, weight in ((z2, w[1]), (z1, 20 * w[0])):
        r = r * (r > 0) * (1.0 if rule == "deconvnet" else ((z > 0) & (z < high)))
        r = weight.T @ r
    return r.reshape(image.shape)


def check_rules(name, deconvnet=Deconvnet, guided=GuidedBackprop):
    make, high = ACTIVATIONS[name]
    net = ByHand(make()).double()
    beyond = 20 * net.first(images().flatten(1))
    assert bool((beyond > 6).any()), "nothing is cut off at 6"
    for rule, cls in (("deconvnet", deconvnet), ("guided", guided)):
        maps = cls(net, channels="sum").attribute(images(), 1)
        for i, image in enumerate(images()):
            expected = by_hand(net, image, 1, rule, high).sum(0)
            np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rules_at_modules_and_functions(name):
    check_rules(name)


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("ctx.high).clamp_(min=0)", "ctx.high)", "nn.ReLU"),
        ("return gradients[0].clamp(min=0), None", "return gradients[0].clone(), None", "nn.ReLU"),
        ("torch.ops.aten.hardtanh_backward(gradients[0], y, 0.0, ctx.high)", "gradients[0].clone()", "nn.ReLU"),
        ("gradients[0], y, 0.0, ctx.high", "gradients[0], y, 0.0, torch.inf", "nn.ReLU6"),
        ("gradients[0], y, 0.0, ctx.high", "gradients[0], y, -1.0, ctx.high", "F.relu"),
        ("bool(func in IN_PLACE or", "bool(", "x.relu_ as a statement"),
        ("return x.copy_(_Clamped.apply(x.clone(), high, self.rule, False))", "x.clamp_(0.0)", "a view in place"),
    ],
)
def test_mutations_of_rules_are_rejected(right, wrong, name, monkeypatch):
    copy = mutated("interp_models.explainers.rules", right, wrong)
    monkeypatch.setattr("interp_models.explainers.gradients.backward_rule", copy.backward_rule)
    with pytest.raises(AssertionError):
        check_rules(name)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_combination_papers_rule_at_any_named_activation(in_place):
    """R where R > 0 and f > 0, without the activation's own slope (Nielsen et al., equation 4), at SELU."""
    net = ByHand(nn.SELU()).double()
    net.a.inplace = net.b.inplace = in_place
    maps = GuidedBackprop(net, activations=["SELU"], channels="sum").attribute(images(), 1)
    for i, image in enumerate(images()):
        with torch.no_grad():
            z1 = 20 * net.first(image.flatten()[None])[0]
            z2 = net.second(F.selu(z1))
        r = net.head.weight[1].detach().numpy()
        for z, weight in ((z2, net.second.weight), (z1, 20 * net.first.weight)):
            r = weight.detach().numpy().T @ (r * (r > 0) * (z.numpy() > 0))
        np.testing.assert_allclose(maps[i], r.reshape(3, 8, 8).sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "other", [F.gelu, F.silu, torch.sigmoid, F.leaky_relu, lambda x: x.tanh(), lambda x: F.hardtanh(x, -1.0, 1.0)]
)
def test_functions_without_a_rule_are_refused_beside_a_relu(other):
    net = ByHand(lambda x: other(x).relu()).double()
    with pytest.raises(InputError, match="is an activation that guided has no rule for"):
        GuidedBackprop(net).attribute(images(), 1)


def test_a_named_relu_keeps_its_rule():
    net = ByHand(nn.ReLU6()).double()
    named = GuidedBackprop(net, activations=["ReLU6"]).attribute(images(), 1)
    assert torch.equal(named, GuidedBackprop(net).attribute(images(), 1))


def test_refusals():
    with pytest.raises(InputError, match="Sequential has activations Hardtanh, which guided has no rule for"):
        GuidedBackprop(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Hardtanh(), nn.Linear(192, 3)).double()).attribute(
            images()
        )
    with pytest.raises(InputError, match=r"Sequential has activations Softplus, which guided has no rule for"):
        GuidedBackprop(smooth_net()).attribute(images())
    with pytest.raises(InputError, match="unknown activation of Sequential: 'SELU'"):
        GuidedBackprop(smooth_net(), activations=["SELU"]).attribute(images())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    with pytest.raises(InputError, match="Sequential has no ReLU to apply deconvnet to"):
        Deconvnet(linear).attribute(images())

    class Cut(nn.Module):
        def forward(self, x):
            return x.detach().mean(dim=(2, 3))

    with pytest.raises(InputError, match="no gradient path from the score back to the images"):
        Gradient(Cut()).attribute(images())


def test_guided_is_not_the_gradient_on_relu6():
    """captum's is, without a word."""
    net = ByHand(nn.ReLU6()).double()
    guided = GuidedBackprop(net, channels="sum").attribute(images(), 1)
    assert not torch.allclose(guided, Gradient(net, channels="sum").attribute(images(), 1), atol=1e-3)


def test_rules_apply_to_our_models_on_a_trunk_of_relu6():
    """EfficientNet-Lite0's ReLU6 lie inside timm's batch norms."""
    torch.manual_seed(0)
    net = CNN(3, backbone="tf_efficientnet_lite0", weights=None).eval()
    x = torch.rand(1, 3, 64, 64)
    plain = Gradient(net).attribute(x)
    for cls in (Deconvnet, GuidedBackprop):
        maps = cls(net).attribute(x)
        assert float(maps.abs().max()) > 0
        assert not torch.allclose(maps / maps.max(), plain / plain.max(), atol=1e-2)
