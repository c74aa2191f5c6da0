"""Excitation backpropagation and Relevance-CAM against loops over neurons, and transformer attribution against the
paper's equations in NumPy."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.excitation_backprop import ExcitationBackprop
from interp_models.explainers.relevancecam import RelevanceCAM
from interp_models.explainers.transformers import TransformerAttribution
from tests.mutation import mutated


class Net(nn.Module):
    """A residual sum, a pool and two linear layers after the layer `first`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()), nn.Conv2d(4, 4, 1)
        self.third, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        for layer in (self.first[0], self.second, self.third, self.head):  # few dead neurons, and weights of both signs
            layer.weight.data += 0.1

    def forward(self, x):
        a = self.first(x)
        b = (self.second(a) + a).relu()
        return self.head(self.third(b.mean(dim=(2, 3))).relu())


def images(n=2, size=7):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def safe(a, b):
    return np.where(b == 0, 0, a / np.where(b == 0, 1, b))


def win(x, w, p):
    """Each neuron j passes p_j to its inputs in proportion to what excites it."""
    found = np.zeros_like(x)
    for j in range(w.shape[0]):
        c = np.maximum(x * w[j], 0)
        found += c / c.sum() * p[j] if c.sum() else 0
    return found


def neurons(net, image):
    """Features of every layer, and weights as matrices (outputs, inputs)."""
    with torch.no_grad():
        a = net.first(image[None])[0].numpy()
        c = net.second(torch.as_tensor(a)[None])[0].numpy()
    b = np.maximum(c + a, 0)
    w = [layer.weight.detach().numpy() for layer in (net.second, net.third, net.head)]
    pooled = b.mean(axis=(1, 2))
    hidden = np.maximum(w[1] @ pooled + net.third.bias.detach().numpy(), 0)
    return a, c, b, pooled, hidden, w[0][:, :, 0, 0], w[1], w[2]


def down(net, image, p, positive):
    """From what the hidden layer has to what the layer `first` has (C, h, w). Sums share in proportion to their
    positive summands, or to all."""
    a, c, b, pooled, _, w2, w3, _ = neurons(net, image)
    p = win(pooled, w3, p)
    cells = safe(b, b.sum(axis=(1, 2), keepdims=True)) * p[:, None, None]
    one, two = (np.maximum(c, 0), np.maximum(a, 0)) if positive else (c, a)
    total = np.where(one + two == 0, 1, one + two)
    result = two / total * cells
    for i in range(3):
        for j in range(3):
            result[:, i, j] += win(a[:, i, j], w2, (one / total * cells)[:, i, j])
    return result


def check_excitation(cls=ExcitationBackprop):
    net = Net().double()
    for contrast in (False, True):
        maps = cls(net, layer="first", contrast=contrast).attribute(images(), 1)
        for image, found in zip(images(), maps, strict=True):
            _, _, _, _, hidden, _, _, head = neurons(net, image)
            start = np.array([0.0, 1.0, 0.0])
            p = win(hidden, head, start)
            if contrast:
                p = p - win(hidden, -head, start)
            expected = down(net, image, p, positive=True).sum(0)
            expected = np.maximum(expected, 0) if contrast else expected
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_excitation_is_the_probability_of_winning():
    check_excitation()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if self.contrast and last[0] else", "if self.contrast else"),
        ("AlphaBeta(1.0, 1.0, TINY, bias=False)", "AlphaBeta(1.0, 1.0, TINY)"),
        ("self._last[node][0] = True", "self._last[node][0] = False"),
        ("one.value.clamp(min=0).requires", "one.value.clone().requires"),
    ],
)
def test_mutations_of_excitation_are_rejected(right, wrong):
    with pytest.raises((AssertionError, InputError)):
        check_excitation(mutated("interp_models.explainers.excitation_backprop", right, wrong).ExcitationBackprop)


@pytest.mark.parametrize("layer", ["maxpool", "layer1", "layer4"])
def test_probabilities_add_up_to_one_at_every_layer(layer):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).double().eval()
    maps = ExcitationBackprop(net, layer=layer, contrast=False).attribute(images(size=64), 2)
    assert bool((maps >= 0).all())
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2), rtol=1e-4, atol=1e-5)


def test_excitation_refuses_what_the_paper_excludes():
    def net(*middle):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *middle, nn.Flatten(), nn.LazyLinear(3)).double()

    def explained(model, layer="1"):
        model(images())
        return ExcitationBackprop(model, layer=layer).attribute(images(), 1)

    assert float(explained(net(nn.Sigmoid())).max()) > 0
    for middle, why in (
        (nn.GELU(), "needs activations that are never negative"),
        (nn.Softmax(dim=1), "has softmax"),
        (nn.LayerNorm(5), "has layer_norm"),
    ):
        with pytest.raises(NotApplicable, match=why):
            explained(net(middle))
    with pytest.raises(NotApplicable, match="layer 0 of Sequential has negative values; excitation_backprop needs"):
        explained(net(), layer="0")


def check_relevancecam(cls=RelevanceCAM):
    net = Net().double()
    maps = cls(net, layer="first").attribute(images(), 1)
    for image, found in zip(images(), maps, strict=True):
        a, _, _, _, hidden, _, _, head = neurons(net, image)
        p = win(hidden, head, np.array([-1 / 3, 1.0, -1 / 3]))
        weights = down(net, image, p, positive=False).mean(axis=(1, 2))
        np.testing.assert_allclose(found, np.tensordot(weights, a, 1), rtol=1e-4, atol=1e-8)


def test_relevancecam_weighs_channels_by_their_relevance():
    check_relevancecam()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("r.mean(dim=(2, 3))", "r.amax(dim=(2, 3))"),
        ("TINY, bias=False", "TINY"),
        ("others=None", "others=0.0"),
    ],
)
def test_mutations_of_relevancecam_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_relevancecam(mutated("interp_models.explainers.relevancecam", right, wrong).RelevanceCAM)


# --- Transformer attribution ---


def vit(**options):
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 2, "num_classes": 4}
    net = timm.create_model("vit_tiny_patch16_224", **small, **options).double().eval()
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return net


def linear_back(x, w, r):
    """z⁺ at one linear layer, for tokens (T, in), weights (out, in), relevance (T, out)."""
    up = np.maximum(x[:, None] * w[None], 0)  # (T, out, in)
    return (up * safe(r, up.sum(2))[:, :, None]).sum(1)


def add_back(a, b, r):
    """Equations 9 and 10: in proportion to the summands, then normalised by the sums of the two parts."""
    parts = [x * safe(r, a + b) for x in (a, b)]
    sizes = [abs(part.sum()) for part in parts]
    return [part * size / sum(sizes) * r.sum() / part.sum() for part, size in zip(parts, sizes, strict=True)]


def attribution_by_hand(net, image, target):
    """Of one image: (2, 2)."""

    def arrays(layer):
        return layer.weight.detach().numpy(), layer.bias.detach().numpy()

    def normed(x, layer):
        w, b = arrays(layer)
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + layer.eps) * w + b

    attention, gradients = [], []

    def keep(module, args):
        args[0].retain_grad()
        attention.append(args[0])

    handles = [block.attn.attn_drop.register_forward_pre_hook(keep) for block in net.blocks]
    for block in net.blocks:
        block.attn.fused_attn = False
    net(image[None])[0, target].backward()
    net.zero_grad()
    gradients = [a.grad[0].numpy() for a in attention]
    for handle in handles:
        handle.remove()

    with torch.no_grad():
        x = net._pos_embed(net.patch_embed(image[None]))[0].numpy()
    steps = []
    for block in net.blocks:
        n1 = normed(x, block.norm1)
        w, b = arrays(block.attn.qkv)
        q, k, v = np.split(n1 @ w.T + b, 3, axis=1)
        heads = []
        for h in range(2):
            part = slice(6 * h, 6 * h + 6)
            logits = q[:, part] @ k[:, part].T / np.sqrt(6)
            a = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            heads.append((part, logits, a, a @ v[:, part]))
        o = np.concatenate([head[3] for head in heads], axis=1)
        wp, bp = arrays(block.attn.proj)
        y = o @ wp.T + bp
        x1 = x + y
        n2 = normed(x1, block.norm2)
        w1, b1 = arrays(block.mlp.fc1)
        g = F.gelu(torch.as_tensor(n2 @ w1.T + b1)).numpy()
        w2, b2 = arrays(block.mlp.fc2)
        m = g @ w2.T + b2
        steps.append((x, n1, w, q, k, v, heads, o, wp, y, x1, n2, w1, g, w2, m))
        x = x1 + m
    w, _ = arrays(net.head)
    start = np.zeros((1, 4))
    start[0, target] = 1
    r = np.zeros_like(x)
    r[:1] = linear_back(normed(x, net.norm)[:1], w, start)  # the norm passes it on
    whole = []
    for step, gradient in zip(reversed(steps), reversed(gradients), strict=True):
        x, n1, w, q, k, v, heads, o, wp, y, x1, n2, w1, g, w2, m = step
        r_x1, r_m = add_back(x1, m, r)
        r_x1 = r_x1 + linear_back(n2, w1, linear_back(g, w2, r_m))
        r_x, r_y = add_back(x, y, r_x1)
        r_o = linear_back(o, wp, r_y)
        r_q, r_k, r_v, mean = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), 0
        for h, (part, logits, a, made) in enumerate(heads):
            s = safe(r_o[:, part], made)
            r_a = a * (s @ v[:, part].T) / 2
            r_v[:, part] = v[:, part] * (a.T @ s) / 2
            mean = mean + np.maximum(gradient[h] * r_a, 0) / 2
            s = safe(r_a, logits) / np.sqrt(6)
            r_q[:, part] = q[:, part] * (s @ k[:, part]) / 2
            r_k[:, part] = k[:, part] * (s.T @ q[:, part]) / 2
        whole.append(np.eye(len(mean)) + mean)
        r = r_x + linear_back(n1, w, np.concatenate([r_q, r_k, r_v], axis=1))
    row = np.eye(len(r))[:1]
    for one in whole:
        row = row @ one
    return row[0, 1:].reshape(2, 2)


def check_attribution(cls=TransformerAttribution):
    net, x = vit(), images(3, 16)
    maps = cls(net).attribute(x, 2)
    for image, found in zip(x, maps, strict=True):
        np.testing.assert_allclose(found, attribution_by_hand(net, image, 2), rtol=1e-3, atol=1e-8)


def test_transformer_attribution_is_the_papers_equations():
    check_attribution()


def test_relevance_of_an_image_does_not_depend_on_the_others():
    """The authors' code sums over the batch at skip connections."""
    net, x = vit(), images(3, 16)
    maps = TransformerAttribution(net).attribute(x, torch.tensor([0, 2, 1]))
    for i, target in enumerate((0, 2, 1)):
        torch.testing.assert_close(TransformerAttribution(net).attribute(x[i : i + 1], target)[0], maps[i])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("share(share(part.abs() * whole, sizes, 0.0), part, 0.0)", "torch.ones_like(part)"),
        ('"norm": unchanged}', "}"),
        ("AlphaBeta(1.0, 0.0, 1e-9, bias=False)", "AlphaBeta(1.0, 0.0, 1e-9)"),
        ("torch.zeros_like(x) if y is None else x * finite(y, rules) for x, y in zip(a, m", "x for x, y in zip(a, m"),
    ],
)
def test_mutations_of_transformer_attribution_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_attribution(mutated("interp_models.explainers.transformers", right, wrong).TransformerAttribution)
