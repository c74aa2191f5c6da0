"""Dropping patches of vision transformers: against the transformer's own operations, and values by hand."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from interp_models import METRICS, judge, probabilities
from interp_models.core.errors import NotApplicable
from interp_models.metrics.case import Case
from interp_models.nn.dropping import PatchScores
from tests.contract.metrics import OfPatches


def transformer(name="vit_tiny_patch16_224", size=64, **options):
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=5, img_size=size, depth=3, embed_dim=48, num_heads=3, **options).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return vit


def by_hand(vit, images, kept):
    """The blocks of the transformer on the class token and some patches."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix = tokens[:, : vit.num_prefix_tokens]
    own = torch.stack([row[vit.num_prefix_tokens :][places] for row, places in zip(tokens, kept, strict=True)])
    x = vit.norm_pre(torch.cat([prefix, own], dim=1))
    for block in vit.blocks:
        x = block(x)
    return vit.forward_head(vit.norm(x)).softmax(dim=1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", 64), ("deit3_small_patch16_224", 48), ("vit_small_patch14_reg4_dinov2", 64)],
)
@torch.no_grad()
def test_the_blocks_see_only_the_kept_patches(name, size):
    """64 pixels are 4 patches of 14, and a rest that timm cuts off."""
    vit, images = transformer(name, size), torch.rand(2, 3, size, size)
    scores = PatchScores(vit, images)
    assert scores.grid == (size // 14, size // 14) if "14" in name else (size // 16, size // 16)
    kept = torch.tensor([[3, 1, 7], [0, 8, 2]])
    torch.testing.assert_close(scores(images, kept), by_hand(vit, images, kept))
    every = torch.arange(scores.grid[0] * scores.grid[1]).expand(2, -1)
    torch.testing.assert_close(scores(images, every), probabilities(vit)(images))
    assert not vit.blocks[0]._forward_pre_hooks


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = transformer()

    def forward(self, x):
        return self.vit(x) + self.vit(x.flip(3))


class Of(nn.Module):
    """Something else beside, before or instead of the transformer."""

    def __init__(self, how):
        super().__init__()
        self.vit, self.how = transformer(), how
        self.conv = nn.Sequential(nn.Conv2d(3, 5, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.how(self, x)


OTHERS = {
    "mirrored copies in one batch": lambda m, x: sum(m.vit(torch.cat([x, x.flip(3)])).chunk(2)),
    "mirrored": lambda m, x: m.vit(x.flip(3)),
    "a second network": lambda m, x: m.vit(x) + 9 * m.conv(x),
    "unused": lambda m, x: (m.vit(x), 9 * m.conv(x))[1],
}


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS)
def test_networks_that_see_more_than_the_kept_patches_are_refused(how):
    """The same network with the transformer alone is taken."""
    assert PatchScores(Of(lambda m, x: m.vit(x)), torch.rand(2, 3, 64, 64)).grid == (4, 4)
    with pytest.raises(NotApplicable, match="does not decide by the patches of one transformer alone"):
        PatchScores(Of(how), torch.rand(2, 3, 64, 64))


def test_several_labels():
    vit, images = transformer(), torch.rand(3, 3, 64, 64)
    found = judge(vit, images, ["rollout"], ["patch_dauc"], normalize=None, output="sigmoid")
    assert found.summary["n_undefined"].tolist() == [0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: transformer("beit_base_patch16_224"), "does not work with fewer tokens"),
        (lambda: transformer("eva02_tiny_patch14_224"), "does not work with fewer tokens"),
        (lambda: timm.create_model("resnet18", num_classes=5).eval(), "holds no vision transformer of timm"),
        (Twice, "runs its transformer 2 times for one prediction; expected once"),
    ],
    ids=["relative positions", "rotary positions", "convolutions", "twice"],
)
def test_other_networks_are_refused(make, reason):
    with pytest.raises(NotApplicable, match=reason):
        PatchScores(make(), torch.rand(2, 3, 64, 64))


class Positions(nn.Module):
    """A block that adds something to the token in each place."""

    def __init__(self, block):
        super().__init__()
        self.block, self.attn = block, block.attn

    def forward(self, x, **options):
        place = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]
        return self.block(x + (place > 0) * (place * torch.arange(x.shape[2])).sin(), **options)


def test_positions_in_the_blocks_are_refused():
    vit = transformer()
    vit.blocks[1] = Positions(vit.blocks[1])
    with pytest.raises(NotApplicable, match="positions in its blocks"):
        PatchScores(vit, torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_positions(dtype):
    """In half precision another order of the tokens changes scores by rounding alone; positions are still found."""
    vit, images = transformer(), torch.rand(2, 3, 64, 64)
    kept = torch.arange(16).expand(2, -1)
    scores = PatchScores(vit.to(dtype), images.to(dtype))(images.to(dtype), kept)
    torch.testing.assert_close(scores.float(), PatchScores(vit.float(), images)(images, kept), atol=0.02, rtol=0)
    vit.blocks[1] = Positions(vit.blocks[1])
    with pytest.raises(NotApplicable, match="VisionTransformer gives tokens their positions in its blocks"):
        PatchScores(vit.to(dtype), images.to(dtype))


@pytest.mark.parametrize("preparation", ["bfloat16", "none"])
def test_the_reason_why_patches_cannot_be_dropped_is_told(preparation):
    vit, images = transformer(), torch.rand(2, 3, 64, 64)
    options = {"explainers": ["random"], "metrics": ["ad", "patch_dauc"], "preparation": preparation}
    assert not judge(vit, images, normalize=None, **options).left_out
    vit.blocks[1] = Positions(vit.blocks[1])
    found = judge(vit, images, normalize=None, **options)
    assert "gives tokens their positions in its blocks" in found.left_out["patch_dauc"]


def test_curves_by_hand():
    """Three patches of the values 3, 1, 0 / 4: the score is their sum over 4, so it falls by what is dropped."""
    images = torch.zeros(1, 3, 4, 12)
    images[:, :, :, :4], images[:, :, :, 4:8] = 3 / 4, 1 / 4

    def net(x):
        light = x[:, 0, 0, ::4].sum(dim=1)
        return torch.stack([light, 1 - light], dim=1)

    case = Case(images, torch.tensor([[[9.0, 5.0, 2.0]]]), 0, net, patch_scores=OfPatches(net, (1, 3)))
    values = METRICS.build("patch_dropping").score(case)
    assert float(values["patch_dauc"]) == pytest.approx((1 / 2 + 1 / 4 + 0 / 2) / 2)  # all, the last two, the last
    assert float(values["patch_iauc"]) == pytest.approx((1 / 2 + 1 + 3 / 8) / 2)  # all, the first two, the first
    other = Case(images, torch.tensor([[[2.0, 5.0, 9.0]]]), 0, net, patch_scores=OfPatches(net, (1, 3)))
    turned = METRICS.build("patch_dropping").score(other)
    assert float(turned["patch_dauc"]) == pytest.approx(float(values["patch_iauc"]))
    single = Case(images, torch.tensor([[[2.0, 5.0, 9.0]]]), 0, net, patch_scores=OfPatches(net, (1, 1)))
    assert all(bool(value.isnan()) for value in METRICS.build("patch_dropping").score(single).values())


def test_a_map_that_is_equal_for_all_patches_is_undefined():
    """A chequerboard within each patch says nothing about patches; it does about cells."""
    vit, images = transformer(), torch.rand(2, 3, 64, 64)
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float()
    maps = torch.stack([board, board + torch.arange(8)])
    case = Case(images, maps, 0, probabilities(vit), patch_scores=PatchScores(vit, images))
    for value in METRICS.build("patch_dauc", {"grid": (8, 8)}).score(case).values():
        assert value.isnan().tolist() == [True, False]


@torch.no_grad()
def test_judged_with_other_metrics_and_left_out_elsewhere(capsys):
    vit, images = transformer(), torch.rand(3, 3, 64, 64)
    found = judge(vit, images, explainers=["rollout"], metrics=["patch_dauc", "dauc"], normalize=None)
    table = found.per_image[found.per_image["metric"] == "patch_dauc"]
    maps, target = found.maps["rollout"], found.per_image["target_class"].to_numpy()[:3]
    for row in range(3):
        order = torch.as_tensor(np.argsort(-maps[row].ravel(), kind="stable").copy())
        scores = [by_hand(vit, images[row : row + 1], order[None, k:])[0, target[row]] for k in range(16)]
        expected = np.trapezoid(torch.stack(scores).double().numpy(), dx=1 / 15)
        np.testing.assert_allclose(table["value"].to_numpy()[row], expected, rtol=1e-4)
    conv = timm.create_model("resnet18", num_classes=5).eval()
    judge(conv, images, explainers=["random"], metrics=["patch_dauc", "dauc"], normalize=None)
    line = "left out patch_dauc: ResNet holds no vision transformer of timm\n"
    assert capsys.readouterr().err.endswith(line)
