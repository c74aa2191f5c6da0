"""The distance of perturbed images in feature space: values by hand, and the rows of an evaluation."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from interp_models import judge
from interp_models.core.distances import DIRECTIONS, Watcher, distance, last_layer
from interp_models.core.errors import NotApplicable
from interp_models.core.passes import counted_passes


class Light(nn.Module):
    """Classes by one feature, the mean of all pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        return self.head(x.mean(dim=(1, 2, 3))[:, None])


def lights(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def sums(net, *batches):
    watcher = Watcher(net, batches[0])
    for batch in batches:
        with watcher.into(["own"]):
            net(batch)
    return watcher.sums["own"]


def test_values_by_hand():
    net = Light()
    clean = sums(net, lights(0.2, 0.6))  # mean 0.4, σ 0.2
    assert distance(clean, clean) == pytest.approx(0, abs=1e-6)
    assert distance(clean, sums(net, lights(0.4, 0.4, 0.4))) == pytest.approx(1)  # without spread
    assert distance(clean, sums(net, lights(0.8, 1.2))) == pytest.approx(0.6 / 0.2, rel=1e-5)  # moved
    assert distance(clean, sums(net, lights(0.0, 0.4))) == pytest.approx(0.2 / 0.2, rel=1e-5)
    assert distance(clean, sums(net, lights(0.1), lights(0.9))) == pytest.approx(np.hypot(0.1, 0.2) / 0.2, rel=1e-5)
    assert distance(sums(net, lights(0.3)), clean) is None  # one clean image has no spread
    assert distance(sums(net, lights(0.3, 0.3)), clean) is None


def test_features_of_many_channels_against_numpy():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    clean, own = torch.rand(9, 3, 4, 4), torch.rand(7, 3, 4, 4) ** 2 + 0.3
    watcher = Watcher(head, clean)
    with watcher.into(["clean"]):
        head(clean)
    with watcher.into(["own", "both"]):
        head(own[:5]), head(own[5:])
    thetas = watcher._directions.numpy().T
    assert thetas.shape == (DIRECTIONS, 48)
    np.testing.assert_allclose(np.linalg.norm(thetas, axis=1), 1, rtol=1e-6)
    squares, spread = [], []
    for theta in thetas:
        a, b = (x.flatten(1).numpy() @ theta for x in (clean, own))
        squares.append((b.mean() - a.mean()) ** 2 + (b.std() - a.std()) ** 2)
        spread.append(a.var())
    expected = np.sqrt(np.mean(squares) / np.mean(spread))
    assert distance(watcher.sums["clean"], watcher.sums["own"]) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(watcher.sums["own"], watcher.sums["both"])


def test_inner_contexts_keep_their_passes_to_themselves():
    net = Light()
    watcher = Watcher(net, lights(0.1))
    with watcher.into(["outer"]):
        net(lights(0.1, 0.2))
        with watcher.into(["inner"]) as seen:
            net(lights(0.3))
        watcher.see_again(seen)
    net(lights(0.9))  # outside
    assert {name: int(own[0]) for name, own in watcher.sums.items()} == {"outer": 3, "inner": 1}
    assert not net.head._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "fc"), ("vit_tiny_patch16_224", "head"), ("convnext_atto", "head.fc")]
)
def test_the_last_layer_is_the_head(name, layer):
    options = {"img_size": 32} if name.startswith("vit") else {}
    net, image = timm.create_model(name, num_classes=3, **options).eval(), torch.rand(1, 3, 32, 32)
    assert last_layer(net, image) == layer
    with counted_passes(net) as passes:
        Watcher(net, image)
    assert passes.images == 0
    with pytest.raises(NotApplicable, match="Flatten has no linear layer or convolution"):
        Watcher(nn.Flatten(), image)


def test_rows_of_an_evaluation():
    """Deletion of one cell after the other, and of each cell alone: the light of every image is known."""
    torch.manual_seed(1)
    net, images = Light().eval(), torch.rand(3, 3, 8, 8)
    options = {"metrics": ["dauc", "iauc", "monotonicity"], "grid": (2, 2), "normalize": None}
    found = judge(net, images, explainers=["random", "center_gaussian"], **options).summary
    clean = images.numpy().mean(axis=(1, 2, 3))
    cells = images.numpy().reshape(3, 3, 2, 4, 2, 4).mean(axis=(1, 3, 5)).reshape(3, 4) / 4  # light of each cell

    def expected(perturbed):
        moved = (np.mean(perturbed) - clean.mean()) ** 2 + (np.std(perturbed) - clean.std()) ** 2
        return np.sqrt(moved) / clean.std()

    of = found.set_index(["explainer", "metric"])["distance"]
    alone = (clean[:, None] - cells).ravel()
    for explainer in ("random", "center_gaussian"):  # the second one takes the passes of the first
        assert of[explainer, "monotonicity"] == pytest.approx(expected(alone), rel=1e-3)
    maps = judge(net, images, explainers=["random"], **options).maps["random"]
    order = np.argsort(-maps.reshape(3, 2, -1, 2, maps.shape[2] // 2).mean(axis=(2, 4)).reshape(3, 4), axis=1)
    deleted = clean[:, None] - np.cumsum(np.take_along_axis(cells, order, axis=1), axis=1)
    assert of["random", "dauc"] == pytest.approx(expected(deleted), rel=1e-3)
    assert of["random", "iauc"] != pytest.approx(expected(deleted), rel=1e-3)


class Outer(nn.Module):
    """A network that contains another."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


class ChannelsLast(nn.Module):
    """A linear layer of each pixel."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.permute(0, 2, 3, 1)).mean(dim=(1, 2))


def test_networks_without_hooks_and_layers_with_channels_last():
    """Parts of TorchScript have no distance, but values; channels last have the distance of their features."""
    images, options = torch.rand(3, 3, 8, 8), {"metrics": ["dauc"], "grid": (2, 2), "normalize": None}
    scripted = judge(Outer(torch.jit.script(Light().eval())), images, explainers=["random"], **options).summary
    assert scripted["distance"].isna().all()
    assert 0 < scripted["mean"][0] < 1
    torch.manual_seed(0)
    last = ChannelsLast().eval()
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last.head).eval()
    both = [judge(net, images, explainers=["random"], **options).summary["distance"][0] for net in (last, pooled)]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_probes_of_an_unclear_output_do_not_count():
    """Outputs between 0 and 1 are looked at twice; the batch size changes nothing."""
    net = Light().eval()
    net.head = nn.Linear(1, 1)
    nn.init.constant_(net.head.bias, 0.5)
    nn.init.constant_(net.head.weight, 0.1)
    images = torch.rand(4, 3, 8, 8)
    options = {"metrics": ["dauc"], "grid": (2, 2), "normalize": None, "output": "one_logit"}
    found = [judge(net, images, ["center_gaussian"], batch_size=n, **options).summary["distance"][0] for n in (1, 4)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_clean_images_count_once_for_each_label_that_is_explained():
    """Of an image with two labels, clean and perturbed images count twice; of one without a label, neither does."""
    torch.manual_seed(1)
    net, images = Light().eval(), torch.rand(4, 3, 8, 8)
    options = {"metrics": ["ad"], "explainers": ["center_gaussian"], "grid": (2, 2), "normalize": None}
    labels = [[0, 1], [1], [], [0]]
    found = judge(net, images, labels=labels, target="label", **options).summary
    expected = judge(net, images[[0, 0, 1, 3]], **options).summary
    assert found["distance"].item() == pytest.approx(expected["distance"].item(), rel=1e-6)


def test_the_clean_pass_of_idsds_is_no_perturbed_image():
    torch.manual_seed(1)
    net, images = Light().eval(), torch.rand(3, 3, 8, 8)
    options = {"metrics": ["idsds"], "explainers": ["center_gaussian"], "normalize": None, "grid": (4, 4)}
    found = judge(net, images, **options).summary
    clean = images.mean(dim=(1, 2, 3))
    cells = images.view(3, 3, 4, 2, 4, 2).mean(dim=(1, 3, 5)).view(3, 16) / 16
    alone = clean[:, None] - cells
    moved = (alone.mean() - clean.mean()) ** 2 + (alone.std(correction=0) - clean.std(correction=0)) ** 2
    assert found["distance"].item() == pytest.approx(float(moved.sqrt() / clean.std(correction=0)), rel=1e-3)


def test_equal_features_have_no_distance_though_they_are_rounded():
    torch.manual_seed(0)
    along = 1e3 * torch.ones(5, DIRECTIONS, dtype=torch.float64)
    along[0] += 1e-4  # a float32 of this size has steps of 6e-5

    def of(rows):
        return torch.cat([torch.tensor([float(len(rows))]), rows.sum(dim=0), rows.square().sum(dim=0)])

    assert distance(of(along), of(along + 1)) is None
    along[0] += 1
    assert distance(of(along), of(along + 1)) == pytest.approx(1 / 0.4, rel=1e-3)


def test_features_are_those_of_the_last_layer_whatever_the_preparation():
    """A network that ends in a convolution with batch norm and ReLU, which the exact copy computes in one kernel."""
    torch.manual_seed(0)

    def block(i, o):
        return nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()

    net = nn.Sequential(*block(3, 8), *block(8, 8), *block(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    net[7].weight.data *= 30  # so that outputs are no probabilities
    images = torch.rand(4, 3, 32, 32)
    options = {"metrics": ["ad"], "explainers": ["center_gaussian"], "normalize": None}
    found = [judge(net, images, preparation=how, **options).summary["distance"].item() for how in ("exact", "none")]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert last_layer(net, images[:1]) == "6"


def test_features_that_are_not_finite_have_no_distance():
    clean, perturbed = torch.rand(5, DIRECTIONS).double(), torch.rand(5, DIRECTIONS).double()

    def of(rows):
        return torch.cat([torch.tensor([float(len(rows))]), rows.sum(dim=0), rows.square().sum(dim=0)])

    assert distance(of(clean), of(perturbed)) > 0
    perturbed[2, 3] = torch.nan
    assert distance(of(clean), of(perturbed)) is None
