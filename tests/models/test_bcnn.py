"""B-CNN against the tutorial's steps, and its decomposition."""

import pytest
import torch

from interp_models.models.bcnn import BCNN
from interp_models.nn.attention_pooling import bilinear_attention_pool
from tests.conftest import TINY


def model(**options):
    torch.manual_seed(0)
    net = BCNN(num_classes=5, backbone=TINY, weights=None, output_stride=16, **options).eval()
    torch.nn.init.normal_(net.attention.bias)  # maps that differ
    return net


@pytest.mark.parametrize("relu", [True, False])
@torch.no_grad()
def test_logits_follow_the_papers_steps(relu):
    """Concatenate the pooled vectors of all maps and apply the linear layer, as in figure 6."""
    net, images = model(relu=relu), torch.rand(2, 3, 64, 96)
    output = net(images)
    features = net.backbone(images)
    weight, bias = net.attention.weight[:, :, 0, 0], net.attention.bias
    maps = torch.einsum("nc,bchw->bnhw", weight, features) + bias[:, None, None]
    maps = maps.clamp(min=0) if relu else maps
    assert relu == bool((maps >= 0).all())
    pooled = torch.stack([(maps[:, n : n + 1] * features).mean(dim=(2, 3)) for n in range(3)], 1).flatten(1)
    torch.testing.assert_close(output.maps, maps)
    torch.testing.assert_close(output.logits, torch.nn.functional.linear(pooled, net.head.weight, net.head.bias))
    torch.testing.assert_close(net.explain(output, torch.zeros(2, dtype=torch.long)), maps.mean(1))


@torch.no_grad()
def test_class_decomposition_sums_to_the_logit():
    net, images = model(), torch.rand(3, 3, 64, 64)
    output = net(images)
    for target in torch.tensor([[0, 1, 2], [3, 4, 0]]):
        terms = net.explain(output, target, "class")
        logit = output.logits.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(terms.sum(dim=(1, 2)) + net.head.bias[target], logit, rtol=1e-5, atol=1e-6)
    whole = net.explain(output, torch.zeros(3, dtype=torch.long), "class")
    # Each term is the cell's own: with one cell's features removed, the pooled logit loses just that cell's term.
    features, maps = output.aux["features"].clone(), output.maps
    features[:, :, 1, 2] = 0
    pooled = bilinear_attention_pool(features, maps)
    logit = torch.einsum("bnc,nc->b", pooled, net.head_weights[0]) + net.head.bias[0]
    torch.testing.assert_close(output.logits[:, 0] - logit, whole[:, 1, 2], rtol=1e-4, atol=1e-6)


def test_without_relu_the_sign_of_a_map_means_nothing():
    """Why ReLU is the default: flip a map and its part of the head, and the logits stay."""
    net, images = model(relu=False), torch.rand(2, 3, 64, 64)
    before = net(images)
    with torch.no_grad():
        net.attention.weight[1] *= -1
        net.attention.bias[1] *= -1
        net.head.weight[:, net.backbone.channels : 2 * net.backbone.channels] *= -1
    after = net(images)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.maps[:, 1], -before.maps[:, 1])


def test_no_map_starts_dead():
    torch.manual_seed(0)
    net = BCNN(num_classes=5, backbone=TINY, weights=None, output_stride=16).eval()
    assert bool((net(torch.rand(4, 3, 64, 64)).maps.amax(dim=(2, 3)) > 0).all())


def test_the_block_comes_before_the_maps():
    net, images = model(block=True), torch.rand(2, 3, 64, 64)
    output = net(images)
    features = net.backbone(images)
    torch.testing.assert_close(output.aux["features"], features)  # what is pooled is the backbone's
    torch.testing.assert_close(output.maps, net.attention(net.block(features)).relu())
    assert len(net.parameter_groups()["attention"]) == 2 + 6
