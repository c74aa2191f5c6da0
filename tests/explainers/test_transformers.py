"""Attention as it is defined, recomputed and in the graph; and what is made of it, by loops over heads in float64."""

from types import MethodType

import numpy as np
import pytest
import timm
import torch
from torch import nn

from interp_models import EXPLAINERS, Classifier
from interp_models.core.errors import NotApplicable
from interp_models.nn.attention import attentions, class_rows, transformer, weights
from tests.conftest import PoolLinear
from tests.mutation import mutated

SIZE = (64, 96)
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
    "no_embed_class": ("vit_tiny_patch16_224", {"no_embed_class": True, "pre_norm": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "rotary": ("vit_small_patch16_rope_224", {}),
}


def vit(variant="plain", depth=3):
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    small = {"img_size": SIZE, "depth": depth, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    net = timm.create_model(name, **small, **options).double().eval()
    for parameter in net.parameters():  # so that heads, blocks and rows differ
        parameter.data += 0.3 * torch.randn_like(parameter) * (parameter.dim() > 1) / parameter.shape[-1] ** 0.5
    return net


def images(n=2):
    return torch.rand(n, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(net, x, target):
    """A and ∂y/∂A of every block, (B, heads, T, T) numpy, by an attention of our own in place of timm's."""
    kept = []

    def attend(self, x, **_):
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim)
        out, a_of_heads = [], []
        for h in range(self.num_heads):
            q, k, v = self.q_norm(qkv[:, :, 0, h]), self.k_norm(qkv[:, :, 1, h]), qkv[:, :, 2, h]
            a = torch.exp(q @ k.transpose(1, 2) / self.head_dim**0.5)
            a = a / a.sum(dim=2, keepdim=True)
            a.retain_grad()
            a_of_heads.append(a)
            out.append(a @ v)
        kept.append(a_of_heads)
        return self.proj(torch.cat(out, dim=2))

    for block in net.blocks:
        block.attn.forward = MethodType(attend, block.attn)
    net(x)[torch.arange(len(x)), target].sum().backward()
    for block in net.blocks:
        del block.attn.forward
    net.zero_grad()
    a = [np.stack([head.detach().numpy() for head in heads], axis=1) for heads in kept]
    g = [
        np.stack([np.zeros(head.shape) if head.grad is None else head.grad.numpy() for head in heads], axis=1)
        for heads in kept
    ]
    return a, g


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_attention_is_that_of_the_graph(variant):
    """Rows of the class token beside fused attention, and the whole matrices, whose rows sum to 1 and whose passes give
    the model's own logits; and everything is as it was."""
    net, x = vit(variant), images()
    layers = attentions(transformer(net))
    expected = net(x)
    fused = [layer.fused_attn for layer in layers]
    with class_rows(layers[-1]) as rows:
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    with weights(layers) as a:
        torch.testing.assert_close(net(x), expected, rtol=1e-8, atol=1e-8)
    assert [layer.fused_attn for layer in layers] == fused
    assert not any(layer.attn_drop._forward_pre_hooks for layer in layers)
    assert len(a) == 3
    assert len(rows) == 1
    for layer in a:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones_like(layer[..., 0]))
    torch.testing.assert_close(rows[0], a[-1][:, :, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["plain", "registers", "qk_norm", "no_embed_class"])
def test_attention_is_the_explicit_softmax(variant):
    net, x = vit(variant), images()
    a, g = by_hand(net, x, torch.tensor([3, 1]))
    with weights(attentions(net)) as found:
        score = net(x)[torch.arange(2), torch.tensor([3, 1])].sum()
    for layer, expected in zip(found, a, strict=True):
        np.testing.assert_allclose(layer.detach(), expected, rtol=1e-6, atol=1e-9)
    gradients = torch.autograd.grad(score, found)
    for gradient, expected in zip(gradients, g, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    with class_rows(attentions(net)[-1]) as rows:
        net(x)
    np.testing.assert_allclose(rows[0].detach(), a[-1][:, :, 0], rtol=1e-6, atol=1e-9)


def expected_maps(name, a, g, prefix, image):
    """(h, w) of one image, head by head."""
    tokens = a[0].shape[-1]
    heads = a[0].shape[1]
    if name == "cls_attention":
        values = sum(a[-1][image, h, 0] for h in range(heads)) / heads
    elif name == "rollout":
        product = np.eye(tokens)
        for layer in a:
            mixed = sum(layer[image, h] for h in range(heads)) / heads + np.eye(tokens)
            product = (mixed / mixed.sum(axis=1)[:, None]) @ product
        values = product[0]
    elif name == "attention_gradcam":
        values = np.zeros(tokens)
        for h in range(heads):
            values += g[-1][image, h, 0, 1:].mean() * a[-1][image, h, 0] / heads
        values = np.maximum(values, 0)
    elif name == "gradsam":
        values = np.zeros(tokens)
        for x, y in zip(a, g, strict=True):
            for h in range(heads):
                for row in range(tokens):
                    values += x[image, h, row] * np.maximum(y[image, h, row], 0) / (len(a) * heads * tokens)
    else:
        relevance = np.eye(tokens)
        for x, y in zip(a, g, strict=True):
            mean = sum(np.maximum(x[image, h] * y[image, h], 0) for h in range(heads)) / heads
            relevance = relevance + mean @ relevance
        values = relevance[0]
    return values[prefix:].reshape(4, 6)


class Probabilities(nn.Module):
    """A transformer that ends in a softmax."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit(x).softmax(dim=1)


@pytest.mark.filterwarnings("ignore:Probabilities returns probabilities")
@pytest.mark.parametrize("name", ["cls_attention", "rollout", "attention_gradcam", "transformer_attribution", "legrad"])
def test_a_softmax_at_the_end_is_told_from_those_that_show_attention(name):
    """Attention is shown by further calls of softmax, which must not be taken for the one that ends the network."""
    net, x = vit(), images()
    expected = EXPLAINERS.build(name, model=net).attribute(x, 1)
    for first in (True, False):  # with and without a pass before
        ended = Probabilities(net)
        if not first:
            EXPLAINERS.build("grad_x_input", model=ended).attribute(x, 1)
        torch.testing.assert_close(EXPLAINERS.build(name, model=ended).attribute(x, 1), expected)


def test_rows_of_rollout_sum_to_one():
    """With all tokens, of random attention whose rows do."""
    a = [torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(dim=-1) for _ in range(4)]
    rows = EXPLAINERS.get("rollout")(vit())._combine(a, [])
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_heads_apart_and_mass():
    """The smallest set of patches that holds the share, found by trying patch by patch."""
    net, x = vit("registers"), images()
    a, _ = by_hand(net, x, torch.tensor([0, 0]))
    means = EXPLAINERS.get("cls_attention")(net).attribute(x)
    heads = [EXPLAINERS.build("cls_attention", {"head": h}, model=net).attribute(x) for h in range(3)]
    torch.testing.assert_close(sum(heads) / 3, means)
    for h in range(3):
        np.testing.assert_allclose(heads[h].flatten(1), a[-1][:, h, 0, 5:], rtol=1e-5)
    for mass in (0.2, 0.6, 1.0):
        shown = EXPLAINERS.build("cls_attention", {"head": 1, "mass": mass}, model=net).attribute(x)
        for whole, kept in zip(heads[1].flatten(1).tolist(), shown.flatten(1).tolist(), strict=True):
            expected = [0.0] * 24
            for patch in sorted(range(24), key=lambda p: -whole[p]):
                if sum(expected) < mass * sum(whole) - 1e-7:
                    expected[patch] = whole[patch]
            assert kept == pytest.approx(expected, abs=1e-7)
    for options, why in (({"head": 3}, "head must be from 0 to 2; got 3"), ({"mass": 0.0}, "mass must be above 0")):
        with pytest.raises(ValueError, match=why):
            EXPLAINERS.build("cls_attention", options, model=net).attribute(x)


NAMES = ["cls_attention", "rollout", "attention_gradcam", "gradsam", "chefer"]


def check(name, cls=None, variant="plain"):
    net, x = vit(variant), images(3)
    target = torch.tensor([1, 3, 0] if variant == "plain" else [4, 4, 0])  # attention Grad-CAM is 0 of the last alone
    a, g = by_hand(net, x, target)
    maps = (cls or EXPLAINERS.get(name))(net).attribute(x, target)
    for i in range(3):
        expected = expected_maps(name, a, g, net.num_prefix_tokens, i)
        assert expected.max() > 1e-5 or i == 2
        np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("variant", ["plain", "registers"])
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_loops_over_heads(name, variant):
    check(name, variant=variant)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("Rollout", "in reversed(a):\n            mixed", "in a:\n            mixed"),
        ("Rollout", "+ torch.eye", "+ 0.5 * torch.eye"),
        ("AttentionGradCAM", "(weight * a[-1][:, :, 0]).mean(dim=1).relu()", "(weight * a[-1][:, :, 0]).mean(dim=1)"),
        ("AttentionGradCAM", "g[-1][:, :, 0, 1:]", "g[-1][:, :, 0]"),
        ("AttentionGradCAM", "blocks = slice(-1, None)", "blocks = slice(1)"),
        ("GradSAM", "x * y.relu()", "(x * y)"),
        ("GradSAM", ".mean(dim=(1, 2))", ".mean(dim=(1, 3))"),
        ("Chefer", "(x * y).relu().mean(dim=1)", "(x * y).mean(dim=1).relu()"),
        ("Chefer", "row = row + row @", "row = row @"),
        ("Chefer", "zip(reversed(a), reversed(g), strict=True)", "zip(a, g, strict=True)"),
    ],
)
def test_mutations_are_rejected(name, right, wrong):
    registered = dict(zip(["Rollout", "AttentionGradCAM", "GradSAM", "Chefer"], NAMES[1:], strict=True))[name]
    with pytest.raises(AssertionError):
        check(registered, getattr(mutated("interp_models.explainers.transformers", right, wrong), name))


@pytest.mark.parametrize("name", NAMES)
def test_networks_without_a_class_token_are_refused(name):
    for net in (PoolLinear(), timm.create_model("test_vit4", img_size=64, class_token=False, global_pool="avg")):
        with pytest.raises(NotApplicable, match="holds no vision transformer"):
            EXPLAINERS.build(name, model=net).attribute(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["gradcam", "layercam", "ablationcam", "scorecam", "activation_map", "eigencam"])
def test_class_activation_maps_read_tokens_as_a_grid(name):
    """The same as of a network that says itself what its map of features is."""

    class Grid(nn.Module):
        """Tokens in and out of a map (B, C, h, w), on which nothing is done."""

        def forward(self, tokens):
            return tokens[:, 5:].transpose(1, 2).unflatten(2, (4, 6))

    class Around(nn.Module):
        """The normalisation before the last attention, by way of the map."""

        def __init__(self, norm):
            super().__init__()
            self.norm, self.grid = norm, Grid()

        def forward(self, tokens):
            tokens = self.norm(tokens)
            return torch.cat([tokens[:, :5], self.grid(tokens).flatten(2).transpose(1, 2)], dim=1)

    net, x = vit("registers").float(), images().float()
    found = EXPLAINERS.build(name, model=net).attribute(x, 2)
    assert found.shape == (2, 4, 6)
    net.blocks[-1].norm1 = Around(net.blocks[-1].norm1)
    expected = EXPLAINERS.build(name, {"layer": "blocks.2.norm1.grid"}, model=net).attribute(x, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found.std()) > 0


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("test_vit", {"global_pool": "avg"}, "classifies by its tokens' 'avg' pool"),
        ("beit_base_patch16_224", {}, "classifies by its tokens' 'avg' pool"),
        ("eva02_tiny_patch14_224", {}, "classifies by its tokens' 'avg' pool"),
        ("xcit_nano_12_p16_224", {}, "holds no vision transformer"),
        ("cait_xxs24_224", {}, "holds no vision transformer"),
        ("convit_tiny", {}, "holds no vision transformer"),
    ],
)
def test_tokens_that_do_not_decide_are_refused(name, options, why):
    net = timm.create_model(name, num_classes=3, **options).eval()
    x = torch.rand(1, 3, *net.default_cfg["input_size"][1:])
    for explainer in NAMES:
        with pytest.raises(NotApplicable, match=why):
            EXPLAINERS.build(explainer, model=net).attribute(x)


@pytest.mark.parametrize(("name", "cells"), [("xcit_nano_12_p16_224", 14), ("vit_wee_patch16_reg1_gap_256", 16)])
def test_maps_of_other_transformers_have_the_images_shape(name, cells):
    """XCiT's convolutions, and tokens without a class token."""
    net = timm.create_model(name, num_classes=3).eval()
    x = torch.rand(1, 3, *net.default_cfg["input_size"][1:])
    assert EXPLAINERS.build("activation_map", model=net).attribute(x).shape == (1, cells, cells)


def test_channels_last_are_read():
    """Swin's last layer gives (B, h, w, C), its patch embedding (B, C, h, w)."""
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
    x = torch.rand(1, 3, 224, 224)
    a = net.forward_features(x).detach().requires_grad_(True)  # (1, 7, 7, 768), after `norm`
    (g,) = torch.autograd.grad(net.forward_head(a)[0, 1], a)
    expected = (g.mean(dim=(1, 2)) * a).sum(dim=3).relu().detach()
    found = EXPLAINERS.build("gradcam", model=net).attribute(x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found = EXPLAINERS.build("gradcam", {"layer": "patch_embed.proj"}, model=net).attribute(x)
    assert found.shape == (1, 56, 56)


def test_layers_that_give_no_cells_are_refused():
    net = vit().float()
    with pytest.raises(
        ValueError, match=r"gives no feature map .* whose cells keep their positions in an image of 64 × 96"
    ):
        EXPLAINERS.build("gradcam", {"layer": "blocks.1.attn.q_norm"}, model=net).attribute(images().float(), 1)


@pytest.mark.parametrize("layer", ["norm", "blocks.2"])
def test_layers_behind_the_last_attention_are_refused(layer):
    """There the class token alone leads to the score."""
    with pytest.raises(NotApplicable, match=f"no gradient path from the score back to layer {layer}"):
        EXPLAINERS.build("gradcam", {"layer": layer}, model=vit().float()).attribute(images().float(), 1)


class Mirrored(nn.Module):
    """The mean over an image and its mirror image."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return (self.net(images) + self.net(images.flip(3))) / 2


@pytest.mark.parametrize("name", NAMES)
def test_two_passes_for_one_decision_are_refused(name):
    with pytest.raises(NotApplicable, match=r"ran 2 times for one prediction; expected once"):
        EXPLAINERS.build(name, model=Mirrored(vit().float())).attribute(images().float(), 1)


@pytest.mark.parametrize("name", NAMES[1:])
def test_little_memory_changes_nothing(name, monkeypatch):
    """Image by image, as large images are passed."""
    net, x, target = vit().float(), images(3).float(), torch.tensor([1, 3, 0])
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    expected = EXPLAINERS.build(name, model=net).attribute(x, target)
    sizes.clear()
    monkeypatch.setattr("interp_models.explainers.transformers.MOST", 1)
    found = EXPLAINERS.build(name, model=net).attribute(x, target)
    assert sizes == [1, 1, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_refusals_name_the_network_and_not_its_wrapper():
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)))
    with pytest.raises(NotApplicable, match="Sequential holds no vision transformer"):
        EXPLAINERS.build("chefer", model=model.eval()).attribute(torch.rand(1, 3, 64, 64))
