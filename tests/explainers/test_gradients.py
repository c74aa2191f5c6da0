"""Gradients and their rules against finite differences, chains of matrices by hand, and torch's own derivative."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError, NotApplicable
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


class AtZero(nn.Threshold):
    def __init__(self):
        super().__init__(0, 0)


def masked_in_place(x):
    x = x * 1
    x[x < 0] = 0
    return x


ACTIVATIONS = {
    "torch.maximum": (lambda: lambda x: torch.maximum(x, torch.zeros_like(x)), np.inf),
    "torch.maximum with a number": (lambda: lambda x: torch.maximum(torch.tensor(0.0, dtype=x.dtype), x), np.inf),
    "torch.clip": (lambda: lambda x: torch.clip(x, 0), np.inf),
    "torch.clip to 6": (lambda: lambda x: torch.clip(x, min=0, max=6), 6.0),
    "clamp_min": (lambda: lambda x: x.clamp_min(0), np.inf),
    "torch.where": (lambda: lambda x: torch.where(x > 0, x, 0), np.inf),
    "torch.where with a tensor": (lambda: lambda x: torch.where(x >= 0, x, torch.zeros_like(x)), np.inf),
    "x * (x > 0)": (lambda: lambda x: x * (x > 0), np.inf),
    "x * (x > 0).float()": (lambda: lambda x: (x > 0).to(x.dtype) * x, np.inf),
    "masked_fill": (lambda: lambda x: x.masked_fill(~(x > 0), 0), np.inf),
    "x[x < 0] = 0": (lambda: masked_in_place, np.inf),
    "F.threshold": (lambda: lambda x: F.threshold(x, 0, 0), np.inf),
    "nn.Threshold": (lambda: AtZero(), np.inf),
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
    for rule, cls in (("deconvnet", deconvnet), ("guided_backprop", guided)):
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
        ("0.0, high).clamp_(min=0) if", "0.0, high) if", "nn.ReLU"),
        ("if kept else m.clamp(min=0)]", "if kept else m]", "nn.ReLU"),
        ("[hardtanh_backward(m, kept[0].value, 0.0, high).clamp_", "[m.clamp", "nn.ReLU"),
        ("hardtanh_backward(m, kept[0].value, 0.0, high)", "hardtanh_backward(m, kept[0].value, 0.0, 9.0)", "nn.ReLU6"),
    ],
)
def test_mutations_of_rules_are_rejected(right, wrong, name, monkeypatch):
    copy = mutated("interp_models.explainers.guided_rules", right, wrong)
    monkeypatch.setattr("interp_models.explainers.gradients.backward_rule", copy.backward_rule)
    with pytest.raises((AssertionError, InputError)):
        check_rules(name)


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("ctx.back(multipliers[0])[0])", "multipliers[0])", "x.relu_ as a statement"),
        ("return target.copy_(made)", "return target", "a view in place"),
        ("else target.copy_(result)", "else target", "x[x < 0] = 0"),
    ],
)
def test_mutations_of_calls_are_rejected(right, wrong, name, monkeypatch):
    copy = mutated("interp_models.explainers.calls", right, wrong)
    monkeypatch.setattr("interp_models.explainers.rules.Call", copy.Call)
    monkeypatch.setattr("interp_models.explainers.guided_rules.InPlace", copy.InPlace)
    with pytest.raises((AssertionError, InputError)):
        check_rules(name)


def test_a_mutation_of_relu_by_a_mask_is_rejected(monkeypatch):
    copy = mutated("interp_models.explainers.rules", "positive and len(args) == 2", "False")
    monkeypatch.setattr("interp_models.explainers.rules.Rules._as_relu", copy.Rules._as_relu)
    with pytest.raises((AssertionError, InputError)):
        check_rules("x * (x > 0)")


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
    with pytest.raises(InputError, match="is an activation that guided_backprop has no rule for"):
        GuidedBackprop(net).attribute(images(), 1)


class Doubled(torch.autograd.Function):
    """A ReLU in a function of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


def gated(x):
    return torch.einsum("bc,bc->bc", x, (x > 0.1).to(x.dtype))


OTHERS = {
    "clip": lambda x: torch.clip(x, -1, 1),
    "clamp from 1": lambda x: x.clamp(min=1.0),
    "maximum with 1": lambda x: torch.maximum(x, torch.ones_like(x)),
    "a leaky maximum": lambda x: torch.maximum(x, 0.1 * x),
    "threshold": lambda x: F.threshold(x, 0.5, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where above 1": lambda x: torch.where(x > 1, x, 0),
    "a mask of 0.1": lambda x: x * (x > 0.1),
    "a mask of another": lambda x: x * (x.flip(1) > 0),
    "a sign": lambda x: x * x.sign().clamp(min=0),
    "a detached gate": lambda x: x * x.detach().relu(),
    "an einsum gate": gated,
    "glu": lambda x: F.glu(torch.cat([x, x], dim=1), dim=1),
    "a custom function": lambda x: Doubled.apply(x),
    "a scripted function": torch.jit.script(F.relu),
    "abs": lambda x: x.abs(),
    "positive values": lambda x: torch.stack([one + one[one > 0].sum() for one in x]),
}


@pytest.mark.parametrize("cls", [Deconvnet, GuidedBackprop])
@pytest.mark.parametrize("name", OTHERS)
def test_activations_that_are_no_relu_are_refused_however_they_are_written(name, cls):
    cls(ByHand(lambda x: x.relu()).double()).attribute(images(), 1)
    with pytest.raises(NotApplicable, match=r"ByHand (has|computes|combines)"):
        cls(ByHand(lambda x: OTHERS[name](x).relu()).double()).attribute(images(), 1)


class Excited(nn.Module):
    """A squeeze-excitation, and a second output that no score reads."""

    def __init__(self, gate):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.squeeze, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.gate = gate

    def forward(self, x):
        a = self.first(x).relu()
        self.unread = torch.special.i0(a.abs())
        a = a * self.gate(self.squeeze(a.mean(dim=(2, 3), keepdim=True)))
        return self.head(a.mean(dim=(2, 3)))


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Softmax(dim=1), torch.sigmoid, torch.softmax])
def test_the_end_of_a_network_is_no_activation(end):
    """A sigmoid or softmax after the logits only scales the map of an image; one inside is refused."""
    net = Excited(F.relu).double()
    expected = GuidedBackprop(net).attribute(images(), 1)
    ended = nn.Sequential(net, end if isinstance(end, nn.Module) else Applied(end)).double()
    output = "sigmoid" if "igmoid" in repr(end) else "probabilities"
    for model, score in (
        (Classifier(ended, output=output), "logit"),
        (Classifier(ended, output=output), "probability"),
        (net, "probability"),
        (Classifier(net, output="sigmoid"), "probability"),
    ):
        maps = GuidedBackprop(model, score=score).attribute(images(), 1)
        assert float(maps.amax()) > 0
        if output == "sigmoid" and model is not net:
            scaled = [m / m.amax(dim=(1, 2), keepdim=True) for m in (maps, expected)]
            torch.testing.assert_close(*scaled, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotApplicable, match="Excited has the function sigmoid, which is an activation"):
        GuidedBackprop(Excited(torch.sigmoid).double()).attribute(images(), 1)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) if self.function is torch.sigmoid else self.function(x, dim=1)


def test_a_quantised_part_beside_others_is_refused():
    class Part(nn.Module):
        def __init__(self, quantise):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            if quantise:
                self.second = torch.ao.quantization.quantize_dynamic(nn.Sequential(self.second), {nn.Linear})

        def forward(self, x):
            x = self.first(x.flatten(1)).relu()
            return self.head(x + self.second(x).relu())

    GuidedBackprop(Part(False)).attribute(images().float(), 1)
    with pytest.raises(NotApplicable, match="linear_dynamic, an operation that guided_backprop has no rule for"):
        GuidedBackprop(Part(True)).attribute(images().float(), 1)


def test_a_named_relu_keeps_its_rule():
    net = ByHand(nn.ReLU6()).double()
    named = GuidedBackprop(net, activations=["ReLU6"]).attribute(images(), 1)
    assert torch.equal(named, GuidedBackprop(net).attribute(images(), 1))


def test_refusals():
    with pytest.raises(InputError, match="Sequential has activations Hardtanh, which guided_backprop has no rule for"):
        GuidedBackprop(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Hardtanh(), nn.Linear(192, 3)).double()).attribute(
            images()
        )
    with pytest.raises(InputError, match=r"Sequential has activations Softplus, which guided_backprop has no rule for"):
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
