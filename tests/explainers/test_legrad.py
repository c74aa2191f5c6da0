"""LeGrad: each block's score by an attention of our own, row by row in float64; the whole beside torchcam."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from interp_models import EXPLAINERS, InputError, NotApplicable
from interp_models.explainers.legrad import LeGrad
from tests.explainers.test_transformers import images, vit
from tests.mutation import mutated


def one_block(net: nn.Module, block: nn.Module, x: Tensor, c: int) -> np.ndarray:
    """The mean over heads and rows of ReLU(∂s/∂A), (T,), for one image's tokens (T, C) before a block."""
    attn, heads = block.attn, []
    t = len(x)
    qkv = attn.qkv(block.norm1(x)).view(t, 3, attn.num_heads, attn.head_dim)
    out, total = [], np.zeros(t)
    for h in range(attn.num_heads):
        q, k = attn.q_norm(qkv[:, 0, h]), attn.k_norm(qkv[:, 1, h])
        a = (q @ k.T / attn.head_dim**0.5).softmax(dim=1).detach().requires_grad_(True)
        heads.append(a)
        out.append(a @ qkv[:, 2, h])
    y = x + block.ls1(attn.proj(torch.cat(out, dim=1)))
    y = y + block.ls2(block.mlp(block.norm2(y)))
    pooled = net.fc_norm(net.norm(y.mean(dim=0)))
    s = (net.head(pooled) + net.head_dist(pooled))[c] / 2 if hasattr(net, "head_dist") else net.head(pooled)[c]
    for g in torch.autograd.grad(s, heads):
        for row in g:
            total += np.maximum(row.numpy(), 0)
    return total / (attn.num_heads * t)


def written_out(net: nn.Module, image: Tensor, c: int, last: int) -> np.ndarray:
    before: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda module, args: before.append(args[0][0].detach())) for b in net.blocks]
    net(image[None])
    for handle in handles:
        handle.remove()
    pairs = list(zip(net.blocks, before, strict=True))[-last:]
    return np.mean([one_block(net, block, x, c) for block, x in pairs], axis=0)[net.num_prefix_tokens :].reshape(4, 6)


def check(cls: type, variant: str = "plain") -> None:
    net, x = vit(variant), images()
    for last, options in ((3, {}), (2, {"layers": 2})):
        found = cls(net, **options).attribute(x, torch.tensor([3, 1])).numpy()
        for i, c in enumerate((3, 1)):
            np.testing.assert_allclose(found[i], written_out(net, x[i], c, last), rtol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "registers", "qk_norm", "no_embed_class", "distilled"])
def test_gradients_of_each_blocks_own_score(variant: str) -> None:
    check(LeGrad, variant)


def test_the_oracle_can_fail() -> None:
    for right, wrong in (
        ("x.mean(dim=1, keepdim=True)", "x[:, :1]"),
        ("x.relu().mean", "x.abs().mean"),
        ("-layers, None", "layers, None"),
        (
            "_, *of_blocks = torch.split(scores, len(inputs))",
            "of_blocks = torch.split(scores, len(inputs)); of_blocks = [of_blocks[0], *of_blocks[2:]]",
        ),
    ):
        with pytest.raises((AssertionError, IndexError, InputError, ValueError)):
            check(mutated("interp_models.explainers.legrad", right, wrong).LeGrad)


class Outer(nn.Module):
    """A head outside of the transformer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head, net.head = net.head, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_the_head_may_be_outside_of_the_transformer() -> None:
    expected = LeGrad(vit()).attribute(images(), 2)
    torch.testing.assert_close(LeGrad(Outer(vit())).attribute(images(), 2), expected)


class Joined(nn.Module):
    """Its rows depend on each other's number."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[: len(x)]


def test_a_network_that_fixes_the_number_of_rows_is_refused() -> None:
    with pytest.raises(NotApplicable, match="Joined returned 2 rows of logits for 8 rows of tokens"):
        LeGrad(Joined(vit())).attribute(images())
    with pytest.raises(InputError, match="legrad: layers must be at least 1"):
        LeGrad(vit(), layers=0)


def test_beside_torchcam() -> None:
    """The same weights in torchvision's transformer, which torchcam reads."""
    methods = pytest.importorskip("torchcam.methods")
    if not hasattr(methods, "LeGrad"):
        pytest.skip("torchcam has no LeGrad")
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5
    ).eval()
    ours = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=5
    ).eval()
    with torch.no_grad():
        nn.init.normal_(theirs.heads.head.weight)
        ours.cls_token.copy_(theirs.class_token)
        ours.pos_embed.copy_(theirs.encoder.pos_embedding)
        ours.patch_embed.proj.load_state_dict(theirs.conv_proj.state_dict())
        ours.norm.load_state_dict(theirs.encoder.ln.state_dict())
        ours.head.load_state_dict(theirs.heads.head.state_dict())
        for mine, block in zip(ours.blocks, theirs.encoder.layers, strict=True):
            mine.norm1.load_state_dict(block.ln_1.state_dict())
            mine.norm2.load_state_dict(block.ln_2.state_dict())
            mine.attn.qkv.weight.copy_(block.self_attention.in_proj_weight)
            mine.attn.qkv.bias.copy_(block.self_attention.in_proj_bias)
            mine.attn.proj.load_state_dict(block.self_attention.out_proj.state_dict())
            mine.mlp.fc1.load_state_dict(block.mlp[0].state_dict())
            mine.mlp.fc2.load_state_dict(block.mlp[3].state_dict())
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    with methods.LeGrad(theirs, list(theirs.encoder.layers)) as cam:
        scores = theirs(x)
        expected = cam.compute_cams([1, 4], scores, normalized=False)[0]
    found = EXPLAINERS.build("legrad", model=ours).attribute(x, torch.tensor([1, 4]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
