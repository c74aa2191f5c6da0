"""B-CNN's bilinear attention pooling against loops, and its decomposition."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp_models.models.bcnn import BCNN, bilinear_attention_pool, crop_and_drop
from tests.conftest import TINY
from tests.mutation import mutated


def check_bap(pool=bilinear_attention_pool):
    """f[n, c] = (1 / hw) Σ_ij A[n, i, j] F[c, i, j], by loops (tutorial, figure 6)."""
    rng = np.random.default_rng(0)
    features, maps = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 3, 3, 5))
    expected = np.zeros((2, 3, 4))
    for b in range(2):
        for n in range(3):
            for c in range(4):
                for i in range(3):
                    for j in range(5):
                        expected[b, n, c] += maps[b, n, i, j] * features[b, c, i, j] / 15
    np.testing.assert_allclose(pool(torch.tensor(features), torch.tensor(maps)), expected, rtol=1e-10)


def test_pooling_equals_loops():
    check_bap()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".transpose(1, 2) / root", ".transpose(1, 2)"),
        ("return (features", "return -(features"),
        ("@ (maps / root).flatten(2)", "@ maps.flatten(2).softmax(-1)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_bap(mutated("interp_models.models.bcnn", right, wrong).bilinear_attention_pool)


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
    logit = torch.einsum("bnc,nc->b", pooled, net.class_weights[0]) + net.head.bias[0]
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


# The authors' options


@torch.no_grad()
def test_normalised_vectors_by_hand():
    """sign(f) √|f| of all maps together, divided by its length, times 100."""
    net, images = model(normalise=True), torch.rand(2, 3, 64, 64)
    torch.nn.init.normal_(net.attention.weight)
    output = net(images)
    pooled = bilinear_attention_pool(output.aux["features"], output.maps).flatten(1).double().numpy()
    for b in range(2):
        rooted = np.sign(pooled[b]) * np.sqrt(np.abs(pooled[b]))
        expected = 100 * rooted / np.sqrt((rooted**2).sum())
        np.testing.assert_allclose(output.aux["pooled"][b].flatten(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.logits, net.head(output.aux["pooled"].flatten(1)))
    assert net.explanations == ("mean",)
    evidence = net.evidence(output, torch.tensor([3, 1])).sum(dim=1) + net.head.bias[[3, 1]]
    torch.testing.assert_close(evidence, output.logits[[0, 1], [3, 1]], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'class'"):
        net.explain(output, torch.tensor([0, 0]), "class")


def test_centres_by_loops():
    """Two images of one class move its centre twice; the loss sees the centres before."""
    net = model(normalise=True, centre=0.7).train()
    net.backbone.eval()
    images, targets = torch.rand(4, 3, 64, 64), torch.tensor([2, 0, 2, 4])
    net.centres.normal_()
    before = net.centres.clone()
    output = net(images)
    vectors = output.aux["pooled"].flatten(1) / 100
    expected = sum(((vectors[i] - before[c] / before[c].norm()) ** 2).sum() for i, c in enumerate(targets)) / 4
    torch.testing.assert_close(net.loss(output, targets)["centre"], 0.7 * expected)
    with torch.no_grad():
        net.observe(output, targets)
    moved = before.clone()
    for i, c in enumerate(targets):
        moved[c] += 0.05 * (vectors[i].detach() - before[c] / before[c].norm())
    torch.testing.assert_close(net.centres, moved)
    assert "centre" not in net.eval().loss(output, targets)
    with pytest.raises(ValueError, match=r"needs model\.normalise=true"):
        model(centre=1.0)


def cropped_and_dropped(images, maps, drawn, theta):
    """By loops: each image's crop, as its box in pixels, and what is left of it."""
    boxes, left = [], images.clone()
    large = torch.nn.functional.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    height, width = images.shape[2:]
    for b in range(len(images)):
        crop, drop = large[b, drawn[b, 0]], large[b, drawn[b, 1]]
        inside = [(y, x) for y in range(height) for x in range(width) if crop[y, x] >= theta[b, 0] * crop.max()]
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        boxes.append(
            (
                max(0.0, min(xs) - 0.1 * width), max(0.0, min(ys) - 0.1 * height),
                min(width, max(xs) + 1 + 0.1 * width), min(height, max(ys) + 1 + 0.1 * height),
            )
        )  # fmt: skip
        for y in range(height):
            for x in range(width):
                if drop[y, x] >= theta[b, 1] * drop.max():
                    left[b, :, y, x] = 0
    return boxes, left


def check_crop_and_drop(function=crop_and_drop):
    torch.manual_seed(3)
    maps = torch.rand(5, 3, 4, 6) ** torch.tensor([1.0, 4.0, 20.0])[:, None, None]
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(60.0) + 0.5, indexing="ij")
    images = torch.stack([x, y, x + y])[None].repeat(5, 1, 1, 1)  # colours say where a pixel was
    state = torch.get_rng_state()
    drawn = torch.multinomial(maps.sum(dim=(2, 3)).sqrt().nan_to_num(0.0, 1.0) + 1e-6, 2, replacement=True)
    theta = torch.tensor([0.4, 0.2]) + torch.tensor([0.2, 0.3]) * torch.rand(5, 2)
    torch.set_rng_state(state)
    crops, drops = function(images, maps)
    boxes, left = cropped_and_dropped(images, maps, drawn, theta)
    torch.testing.assert_close(drops, left)
    for b, (x0, y0, x1, y1) in enumerate(boxes):
        columns = (x0 + (torch.arange(60) + 0.5) * (x1 - x0) / 60).clamp(0.5, 59.5)
        rows = (y0 + (torch.arange(40) + 0.5) * (y1 - y0) / 40).clamp(0.5, 39.5)
        torch.testing.assert_close(crops[b, 0], columns.expand(40, -1), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(crops[b, 1], rows[:, None].expand(-1, 60), rtol=1e-3, atol=1e-2)


def test_crop_and_drop_equal_loops():
    check_crop_and_drop()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("right + left - 1", "right - left"),
        ("affine[:, 1, 1], affine[:, 1, 2] = bottom - top", "affine[:, 1, 1], affine[:, 1, 2] = right - left"),
        ("images * ~high[:, 1:]", "images * high[:, 1:]"),
        ("images * ~high[:, 1:]", "images * ~high[:, :1]"),
        ("for axis in (2, 1))", "for axis in (1, 2))"),
        ("(first / n - 0.1)", "(first / n)"),
        ("(last / n + 0.1)", "((last - 1) / n + 0.1)"),
        (".sqrt().nan_to_num(0.0, 1.0) + 1e-6", " + 1e-6"),
        ("0.4 + 0.2 * uniform[:, 0]", "0.2 + 0.4 * uniform[:, 0]"),
        ("0.2 + 0.3 * uniform[:, 1]", "0.2 + 0.3 * uniform[:, 0]"),
    ],
)
def test_mutations_of_crop_and_drop_are_rejected(right, wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        check_crop_and_drop(mutated("interp_models.models.bcnn", right, wrong).crop_and_drop)


def test_images_without_a_map_are_left():
    images = torch.rand(2, 3, 32, 32)
    crops, drops = crop_and_drop(images, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(crops, images)
    torch.testing.assert_close(drops, images)


def test_the_loss_of_crops_drops_and_effects():
    """CE(raw) / 3 + CE(crop) / 3 + CE(drop) / 3, and the effects of all three, by hand."""
    net = model(crop_drop=True, counterfactual=0.4).train()
    net.backbone.eval()
    images, targets = torch.rand(3, 3, 64, 64), torch.tensor([4, 0, 1])
    output = net(images)
    torch.manual_seed(5)
    terms = net.loss(output, targets)
    torch.manual_seed(5)
    crops, drops = crop_and_drop(images, output.maps)
    guided = net(torch.cat([crops, drops]))
    ce = torch.nn.functional.cross_entropy
    torch.testing.assert_close(terms["ce"], ce(output.logits, targets) / 3)
    both = ce(guided.logits[:3], targets) / 3 + ce(guided.logits[3:], targets) / 3
    torch.testing.assert_close(terms["crop_drop"], both)
    effects = []
    for of in (output, guided):
        fake = 2 * torch.rand_like(of.maps)
        effects.append(of.logits - net.head(bilinear_attention_pool(of.aux["features"], fake).flatten(1)))
    expected = 0.4 * ce(torch.cat(effects), torch.cat([targets, targets, targets]))
    torch.testing.assert_close(terms["counterfactual"], expected)
    assert net.eval().loss(output, targets).keys() == {"ce"}


def test_the_block_comes_before_the_maps():
    net, images = model(block=True), torch.rand(2, 3, 64, 64)
    output = net(images)
    features = net.backbone(images)
    torch.testing.assert_close(output.aux["features"], features)  # what is pooled is the backbone's
    torch.testing.assert_close(output.maps, net.attention(net.block(features)).relu())
    assert len(net.parameter_groups()["attention"]) == 2 + 6


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or shapes that depend on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "_to_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        moved = name != "_to_copy" or {"device"} & {k for k, v in (kwargs or {}).items() if v is not None}
        assert not (name in self.WAITS and moved), name
        return func(*args, **(kwargs or {}))


def test_crop_and_drop_do_not_wait_for_the_device():
    images, maps = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 4, 4)
    with NoSync():
        crop_and_drop(images, maps)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(maps.sum())
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        (maps > 0.5).nonzero()


def test_normalised_features_learn_in_half_precision():
    """The smallest number under the root is 0 in float16, where the slope of a root has no bound."""
    model = BCNN(3, backbone=TINY, weights=None, normalise=True, centre=1.0)
    x = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(x)
        loss = sum(model.loss(output, torch.tensor([0, 1])).values())
    loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    vectors = output.aux["pooled"].flatten(1) / 100
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2), rtol=1e-3, atol=1e-3)


def test_centres_are_of_vectors_without_dropout():
    model = BCNN(3, backbone=TINY, weights=None, normalise=True, centre=1.0, dropout=0.5).train()
    vectors = model(torch.rand(2, 3, 64, 64)).aux["pooled"].flatten(1) / 100
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_maps_that_are_no_numbers_do_not_stop_crop_and_drop():
    """The loss says so, at the end of the epoch."""
    images, maps = torch.rand(2, 3, 16, 16), torch.full((2, 2, 4, 4), torch.nan)
    crops, dropped = crop_and_drop(images, maps)
    assert crops.shape == dropped.shape == images.shape


@pytest.mark.parametrize("option", ["centre", "counterfactual"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_weights_below_zero_or_without_end_are_refused(option, value):
    with pytest.raises(ValueError, match=f"model.{option} must be at least 0, and finite; got"):
        BCNN(3, backbone=TINY, weights=None, normalise=True, **{option: value})


def test_sums_of_half_precision_do_not_overflow():
    """24 is the mean of 56 × 56 products; their sum is above float16's end, 65504."""
    features, maps = torch.full((1, 2, 56, 56), 3.0).half(), torch.full((1, 1, 56, 56), 8.0).half()
    torch.testing.assert_close(bilinear_attention_pool(features, maps), torch.full((1, 1, 2), 24.0).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_no_map_nothing_is_dropped_in_half_precision(dtype):
    images = torch.rand(2, 3, 16, 16)
    _, dropped = crop_and_drop(images, torch.zeros(2, 2, 4, 4, dtype=dtype))
    assert torch.equal(dropped, images)
