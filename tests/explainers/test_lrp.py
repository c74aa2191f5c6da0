"""LRP against loops over the inputs and outputs of small layers as matrices, and what it conserves."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.gradients import GradXInput
from interp_models.explainers.lrp import LRP
from tests.mutation import mutated

COMPOSITES = ("epsilon", "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_plus_flat")
EPSILON, GAMMA = 0.01, 0.3


class Net(nn.Module):
    """Everything once: batch norms, a residual sum in place, a ReLU that is used twice, functions, both pools."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.third, self.head = nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1), nn.Linear(5, 3)
        for norm in (self.norm1, self.norm2):
            for values in (norm.weight.data, norm.running_var):
                values.uniform_(0.5, 1.5)
            for values in (norm.bias.data, norm.running_mean):
                values.uniform_(-0.3, 0.3)

    def forward(self, x):
        a = self.relu(self.norm1(self.first((x - 0.4) / 0.3)))
        b = self.norm2(self.second(a))
        b += a
        b = F.max_pool2d(self.relu(b), 2)
        return self.head(self.relu(self.third(b)).mean(dim=(2, 3)))


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def matrix(layer, shape):
    """A layer without its bias as a matrix (inputs, outputs), column by column of its inputs."""
    basis = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
    return layer(basis).flatten(1).detach().numpy()


def share(rule, x, w, b, r, low=None, high=None):
    """R of the inputs x of one layer with weights w (inputs, outputs), an output at a time."""
    found = np.zeros_like(x)
    for j in range(w.shape[1]):
        z, total = x * w[:, j], (x * w[:, j]).sum() + b[j]
        if rule == "epsilon":
            c, below = z, total + EPSILON * (1 if total >= 0 else -1)
        elif rule == "plus":
            c, below = np.maximum(z, 0), np.maximum(z, 0).sum() + max(b[j], 0)
        elif rule == "alpha2_beta1":
            up, down = np.maximum(z, 0), np.minimum(z, 0)
            up_sum, down_sum = up.sum() + max(b[j], 0), down.sum() + min(b[j], 0)
            found += 2 * up * r[j] / (up_sum or 1) - down * r[j] / (down_sum or 1)
            continue
        elif rule == "gamma":
            clip = np.maximum if total > 0 else np.minimum
            c = z + GAMMA * clip(z, 0)
            below = c.sum() + b[j] + GAMMA * clip(b[j], 0)
        elif rule == "box":
            c = z - low * np.maximum(w[:, j], 0) - high * np.minimum(w[:, j], 0)
            below = c.sum()
        else:
            c = (w[:, j] != 0).astype(float)
            below = c.sum()
        found += c * r[j] / below if below else 0
    return found


def by_hand(net, image, target, composite):
    conv = {
        "epsilon": "epsilon", "epsilon_plus": "plus", "epsilon_gamma_box": "gamma",
        "epsilon_alpha2_beta1": "alpha2_beta1", "epsilon_plus_flat": "plus",
    }[composite]  # fmt: skip
    first = {"epsilon_gamma_box": "box", "epsilon_plus_flat": "flat"}.get(composite, conv)

    def merged(conv, norm, shape):
        w = matrix(lambda x: F.conv2d(x, conv.weight, None, conv.stride, conv.padding), shape)
        cells = w.shape[1] // len(norm.weight)
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        bias = 0 if conv.bias is None else conv.bias.detach().numpy()
        shift = norm.bias.detach().numpy() + (bias - norm.running_mean.numpy()) * scale
        return w * np.repeat(scale, cells), np.repeat(shift, cells)

    x = ((image.numpy() - 0.4) / 0.3).ravel()
    w1, b1 = merged(net.first, net.norm1, (3, 8, 8))
    a = np.maximum(x @ w1 + b1, 0)
    w2, b2 = merged(net.second, net.norm2, (4, 4, 4))
    c = a @ w2 + b2
    s = np.maximum(c + a, 0).reshape(4, 4, 4)
    winners, p = {}, np.zeros((4, 2, 2))
    for k in range(4):
        for i in range(2):
            for j in range(2):
                window = s[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                di, dj = np.unravel_index(window.argmax(), (2, 2))
                winners[k, i, j], p[k, i, j] = (k, 2 * i + di, 2 * j + dj), window.max()
    w3 = matrix(lambda x: F.conv2d(x, net.third.weight), (4, 2, 2))
    b3 = np.repeat(net.third.bias.detach().numpy(), 4)
    d = np.maximum(p.ravel() @ w3 + b3, 0)
    pooled = d.reshape(5, 4).mean(1)
    w4, b4 = net.head.weight.detach().numpy().T, net.head.bias.detach().numpy()
    r = np.zeros(3)
    r[target] = (pooled @ w4 + b4)[target]

    r = share("epsilon", pooled, w4, b4, r)
    cells = d.reshape(5, 4)
    r = np.concatenate([part / part.sum() * whole if whole else part * 0 for part, whole in zip(cells, r, strict=True)])
    r = share(conv, p.ravel(), w3, b3, r).reshape(4, 2, 2)
    down = np.zeros((4, 4, 4))
    for place, winner in winners.items():
        down[winner] += r[place]
    down = down.ravel()
    total = np.where(c + a == 0, 1, c + a)
    r = share(conv, a, w2, b2, down * c / total) + down * a / total
    pixels = share(first, x, w1, b1, r, np.full(192, -0.4 / 0.3), np.full(192, 0.6 / 0.3))
    return pixels.reshape(3, 8, 8)


def check_lrp(cls=LRP):
    net = Net().double().eval()
    for composite in COMPOSITES:
        maps = cls(net, composite=composite, epsilon=EPSILON, gamma=GAMMA).attribute(images(), 1)
        for i, image in enumerate(images()):
            expected = by_hand(net, image, 1, composite).sum(0)
            np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_lrp_is_the_rules_of_each_layer():
    check_lrp()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.alpha * found - self.beta", "self.alpha * found + self.beta"),
        ("above, below = w + self.gamma * w.clamp(min=0)", "above, below = w + w.clamp(min=0)"),
        ("(-low, w.clamp(min=0))", "(low, w.clamp(min=0))"),
        ("[(torch.ones_like(layer.x), torch", "[(layer.x, torch"),
        ("torch.where(x < 0, multipliers[1], found)", "found"),
    ],
)
def test_mutations_of_rules_of_layers_are_rejected(right, wrong, monkeypatch):
    copy = mutated("interp_models.explainers.layer_rules", right, wrong)
    for name in ("AlphaBeta", "Box", "Composite", "Epsilon", "Flat", "Gamma"):
        monkeypatch.setattr(f"interp_models.explainers.lrp.{name}", getattr(copy, name))
    for name in ("Box", "Epsilon"):
        monkeypatch.setattr(f"interp_models.explainers.relevance.{name}", getattr(copy, name))
    with pytest.raises((AssertionError, InputError)):
        check_lrp()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("[m * share(z.value, z.value, epsilon)]", "[m]"),
        ("weight = w.double() * scale.view", "weight = w.double() * 0 + scale.view"),
    ],
)
def test_mutations_of_relevance_are_rejected(right, wrong, monkeypatch):
    copy = mutated("interp_models.explainers.relevance", right, wrong)
    monkeypatch.setattr("interp_models.explainers.lrp.Relevance", copy.Relevance)
    with pytest.raises((AssertionError, InputError)):
        check_lrp()


def without_biases(net):
    for module in net.modules():
        for name in ("bias", "running_mean"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                getattr(module, name).data.zero_()
    return net.double().eval()


RELU = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=4),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=4, aux_logits=False, init_weights=True),
    "regnet": lambda: timm.create_model("test_resnet", num_classes=4),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "regnet" else pytest.mark.slow) for name in RELU]
)
def test_without_biases_and_epsilon_it_is_gradient_times_input_and_adds_up(name):
    torch.manual_seed(0)
    net, x = without_biases(RELU[name]()), images(size=64)
    score = net(x)[:, 1].detach().float()
    maps = LRP(net, composite="epsilon", epsilon=0.0).attribute(x, 1)
    expected = GradXInput(net).attribute(x, 1)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(maps.sum(dim=(1, 2)), score, rtol=1e-4, atol=1e-12)
    for composite in ("epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box"):
        maps = LRP(net, composite=composite, epsilon=0.0).attribute(x, 1)
        torch.testing.assert_close(maps.sum(dim=(1, 2)), score, rtol=1e-3, atol=1e-12)


class Attention(nn.Module):
    """One head over the four pixels of an image, a gate and a layer norm."""

    def __init__(self, written):
        super().__init__()
        torch.manual_seed(1)
        self.written = written
        self.qkv, self.norm, self.head = nn.Linear(3, 12), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=2)
        if self.written == "fused":
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            y = (q @ k.mT * 0.5).softmax(dim=-1) @ v
        return self.head(self.norm(F.gelu(y)).mean(dim=1))


@pytest.mark.parametrize("written", ["fused", "single"])
def test_attention_has_the_rules_of_attnlrp(written):
    """Propositions 3.1 to 3.4 of Achtibat et al. 2024, a relevance at a time."""
    net, x = Attention(written).double(), images(size=2)
    maps = LRP(net, composite="epsilon", epsilon=0.0).attribute(x, 1)
    w, b = net.qkv.weight.detach().numpy(), net.qkv.bias.detach().numpy()
    for image, found in zip(x, maps, strict=True):
        t = image.numpy().reshape(3, 4).T
        q, k, v = np.split(t @ w.T + b, 3, axis=1)
        logits = q @ k.T / 2
        s = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = s @ v
        g = F.gelu(torch.as_tensor(y)).numpy()
        centred = g - g.mean(1, keepdims=True)
        n = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        gain, shift = net.norm.weight.detach().numpy(), net.norm.bias.detach().numpy()
        out = n * gain + shift
        pooled = out.mean(0)
        head = net.head.weight.detach().numpy()[1]
        r = pooled * head  # ε = 0: R_i = x_i w_i R / z, and R = z
        r = out / 4 / pooled * r  # the mean
        r = np.where(out == 0, 0, r * n * gain / out)  # the shift takes its share
        down = np.zeros_like(g)
        for i in range(4):
            for j in range(4):
                for m in range(4):  # centred_j = g_j - mean of g_m
                    down[i, m] += r[i, j] / centred[i, j] * g[i, m] * ((m == j) - 1 / 4)
        r_y = down  # GELU passes it on
        r_s, r_v = np.zeros((4, 4)), np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                for c in range(4):
                    part = s[i, j] * v[j, c] * r_y[i, c] / (2 * y[i, c])
                    r_s[i, j] += part
                    r_v[j, c] += part
        r_logits = logits * (r_s - s * r_s.sum(1, keepdims=True))
        r_q, r_k = np.zeros((4, 4)), np.zeros((4, 4))
        for i in range(4):
            for j in range(4):
                for c in range(4):
                    part = q[i, c] * k[j, c] / 2 * r_logits[i, j] / (2 * logits[i, j])
                    r_q[i, c] += part
                    r_k[j, c] += part
        r_all, z = np.concatenate([r_q, r_k, r_v], axis=1), np.concatenate([q, k, v], axis=1)
        expected = (t * ((r_all / z) @ w)).sum(1).reshape(2, 2)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_transformers_of_both_libraries_have_rules():
    """timm's, and torchvision's with its attention in one function, which equals its own steps."""
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=4).double().eval()
    nn.init.normal_(net.heads.head.weight)
    x = images(size=32)
    maps = LRP(net).attribute(x, 1)
    one_by_one = torch.cat([LRP(net).attribute(image[None], 1) for image in x])
    torch.testing.assert_close(maps, one_by_one, rtol=1e-4, atol=1e-8)

    class Steps(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.inner = attention

        def forward(self, query, key, value, need_weights=False):
            a = self.inner
            q, k, v = F.linear(query, a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT / 8**0.5).softmax(-1) @ v
            return a.out_proj(y.transpose(1, 2).flatten(2)), None

    for layer in net.encoder.layers:
        layer.self_attention = Steps(layer.self_attention)
    torch.testing.assert_close(LRP(net).attribute(x, 1), maps, rtol=1e-4, atol=1e-8)


def test_pixels_are_those_of_the_normalised_image():
    """The normalisation passes relevance on, in the model or before it; the box is that of black and white."""
    net, x = Net().double().eval(), images()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    inside = Classifier(net, mean=mean, std=std).double()
    normalised = (x - inside.mean) / inside.std
    for composite in ("epsilon", "epsilon_plus", "epsilon_plus_flat"):
        expected = LRP(net, composite=composite).attribute(normalised, 1)
        torch.testing.assert_close(LRP(inside, composite=composite).attribute(x, 1), expected)
    with pytest.raises(InputError, match=r"epsilon_gamma_box needs images in \[0, 1\]"):
        LRP(net, composite="epsilon_gamma_box").attribute(normalised, 1)


def test_relevance_passes_a_batch_norm_without_a_convolution_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    net = net.double().eval()
    net[2].running_var.fill_(0.3)
    alone = nn.Sequential(net[0], net[1], nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    with torch.no_grad():  # the same features at the head, so the same relevance there
        scale = (net[2].running_var + net[2].eps).rsqrt()[0]
        alone[4].weight.copy_(net[5].weight * scale)
        alone[4].bias.copy_(net[5].bias)
    expected = LRP(alone, composite="epsilon_plus").attribute(images(), 1)
    torch.testing.assert_close(LRP(net, composite="epsilon_plus").attribute(images(), 1), expected)


def kept(change):
    """A network whose features pass `change`."""

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(change(self.first(x).relu()).mean(dim=(2, 3)))

    return Changed().double()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.exp(), lambda a: 1 / (a + 1), lambda a: a.cumprod(dim=1), lambda a: a * (a > 0.2),
        lambda a: F.local_response_norm(a, 2), lambda a: a * a.detach(), lambda a: F.instance_norm(a),
        torch.jit.script(F.relu), lambda a: a * a.norm(dim=1, keepdim=True),
    ],
)  # fmt: skip
def test_operations_without_a_rule_are_refused(change):
    assert float(LRP(kept(lambda a: a * a.mean(dim=1, keepdim=True))).attribute(images(), 1).abs().max()) > 0
    with pytest.raises(NotApplicable, match=r"Changed (has|computes|combines|normalises)"):
        LRP(kept(change)).attribute(images(), 1)


def test_later_changes_in_place_do_not_change_relevance():
    def in_place(a):
        b = a.clone()
        b *= 2.0
        b += a
        F.hardswish(b, inplace=True)
        a.mul_(0.5)
        return b + a

    def out_of_place(a):
        return F.hardswish(a * 2 + a) + a * 0.5

    maps = [LRP(kept(change)).attribute(images(), 1) for change in (in_place, out_of_place)]
    torch.testing.assert_close(*maps)


def test_zennit_on_networks_where_it_is_right():
    composites, attribution = pytest.importorskip("zennit.composites"), pytest.importorskip("zennit.attribution")
    canonizers = pytest.importorskip("zennit.torchvision")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg11_bn(num_classes=4).double().eval()
    resnet = torchvision.models.resnet18(num_classes=4).double().eval()
    for net in (vgg, resnet):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.bias.data.uniform_(-0.1, 0.1)
    x = images(size=64)
    low, high = torch.zeros(1, 3, 1, 1).double(), torch.ones(1, 3, 1, 1).double()
    for net, canonizer in ((vgg, canonizers.VGGCanonizer()), (resnet, canonizers.ResNetCanonizer())):
        for name, composite in (
            ("epsilon_plus", composites.EpsilonPlus(stabilizer=1e-9, canonizers=[canonizer])),
            ("epsilon_plus_flat", composites.EpsilonPlusFlat(stabilizer=1e-9, canonizers=[canonizer])),
            ("epsilon_alpha2_beta1", composites.EpsilonAlpha2Beta1(stabilizer=1e-9, canonizers=[canonizer])),
            ("epsilon_gamma_box", composites.EpsilonGammaBox(low, high, stabilizer=1e-9, canonizers=[canonizer])),
        ):
            maps = LRP(net, composite=name).attribute(x, 1)
            with attribution.Gradient(net, composite) as attributor:
                _, theirs = attributor(x.clone(), lambda out: torch.eye(4, dtype=out.dtype)[[1, 1]] * out.detach())
            expected = theirs.sum(1).float()
            torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
