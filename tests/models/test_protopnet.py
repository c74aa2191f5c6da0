"""ProtoPNet against loops: logits, losses, the push with its provenance, the last layer, pruning."""

import copy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models import load
from interp_models.core.errors import InputError
from interp_models.data.module import DataModule
from interp_models.models.protopnet import ProtoPNet, add_on_layers
from interp_models.prototypes import push as projection
from tests.conftest import TINY, Cub, fit, tiny_config
from tests.mutation import mutated

LRS = dict.fromkeys(("backbone", "add_on", "prototypes"), 3e-3)
LAST = {"last_layer": 1e-2}


def model(cls: type[ProtoPNet] = ProtoPNet, **options: Any) -> ProtoPNet:
    """3 classes of 2 prototypes, in float64, with a last layer that is not as at the start."""
    torch.manual_seed(0)
    options = {"prototypes_per_class": 2, "channels": 6, **options}
    net = cls(num_classes=3, backbone=TINY, weights=None, output_stride=16, **options).double().eval()
    torch.nn.init.normal_(net.last_layer.weight)
    return net


def angles(patch: np.ndarray, prototype: np.ndarray) -> float:
    """2 - 2 cos, summed over the cells of a patch and a prototype, (D, a, b); the cos of a cell of zeros is 0."""
    pairs = zip(patch.reshape(len(patch), -1).T, prototype.reshape(len(patch), -1).T, strict=True)
    return sum(2 - 2 * (u @ v / (np.linalg.norm(u) * np.linalg.norm(v)) if u.any() else 0) for u, v in pairs)


def numbers(net: ProtoPNet, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances (B, P, h', w'), similarities (B, P) and logits (B, K) by loops over patches, with logarithms."""
    with torch.no_grad():
        z, p = net.add_on(net.backbone(images)).numpy(), net.prototypes.numpy()
        w = net.last_layer.weight.numpy()
    (b, _, h, wide), (n, _, rows, columns) = z.shape, p.shape
    d = np.zeros((b, n, h - rows + 1, wide - columns + 1))
    for i, j, y, x in product(*map(range, d.shape)):
        patch = z[i, :, y : y + rows, x : x + columns]
        d[i, j, y, x] = angles(patch, p[j]) if net.cosine else ((patch - p[j]) ** 2).sum()
    s = np.zeros((b, n))
    for i, j in product(range(b), range(n)):
        values = [np.log((v + 1) / (v + 1e-4)) if net.log_activation else -v for v in d[i, j].ravel()]
        s[i, j] = max(values)
    return d, s, np.array([[sum(s[i, j] * w[k, j] for j in range(n)) for k in range(3)] for i in range(b)])


def check_numbers(cls: type[ProtoPNet] = ProtoPNet, **options: Any) -> None:
    net, images, targets = model(cls, **options), torch.rand(4, 3, 64, 96).double(), torch.tensor([0, 2, 1, 2])
    d, _, logits = numbers(net, images)
    output = net(images)
    np.testing.assert_allclose(output.logits.detach(), logits, rtol=1e-6)
    nearest = d.reshape(4, 6, -1).min(axis=2)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    own = [[2 * y, 2 * y + 1] for y in targets.tolist()]
    other = [[j for j in range(6) if j not in mine] for mine in own]
    w = net.last_layer.weight.detach().numpy()
    expected = {
        "ce": -np.mean([np.log(probabilities[i, y]) for i, y in enumerate(targets.tolist())]),
        "cluster": 0.8 * np.mean([nearest[i, js].min() for i, js in enumerate(own)]),
        "separation": -0.08 * np.mean([nearest[i, js].min() for i, js in enumerate(other)]),
        "l1": 1e-4 * sum(abs(w[k, j]) for k in range(3) for j in range(6) if j // 2 != k),
    }
    terms = {name: float(term.detach()) for name, term in net.loss(output, targets).items()}
    assert terms == pytest.approx(expected, rel=1e-6)
    net.class_specific = False
    terms = {name: float(term.detach()) for name, term in net.loss(output, targets).items()}
    expected = {"ce": expected["ce"], "cluster": 0.8 * nearest.min(axis=1).mean(), "l1": 1e-4 * np.abs(w).sum()}
    assert terms == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"prototype_size": (2, 1)}, {"activation": "linear"}, {"distance": "cosine"},
     {"distance": "cosine", "prototype_size": (1, 2), "add_on": "bottleneck"}],
)  # fmt: skip
def test_logits_and_losses(options: dict[str, Any]) -> None:
    check_numbers(**options)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self.cluster * to_own.mean()", "self.cluster * to_own.sum()"),
        ("-self.separation * to_other", "self.separation * to_other"),
        ("masked_fill(~own, torch.inf)", "masked_fill(own, torch.inf)"),
        ("self.kept & ~self.class_identity if", "self.kept if"),
        ("(distances + 1) / (distances + EPSILON)", "(distances + EPSILON) / (distances + 1)"),
        ("EPSILON = 1e-4", "EPSILON = 1e-3"),
    ],
)
def test_mutations_are_rejected(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_numbers(mutated("interp_models.models.protopnet", right, wrong).ProtoPNet)


def test_last_layer_at_the_start() -> None:
    for wrong in (-0.5, -1.0):
        net = ProtoPNet(3, backbone=TINY, weights=None, prototypes_per_class=2, channels=4, wrong_weight=wrong)
        assert net.last_layer.weight.tolist() == [[1.0 if j // 2 == k else wrong for j in range(6)] for k in range(3)]


def test_add_on_layers() -> None:
    def widths(kind: Any, features: int) -> list[tuple[int, int]]:
        layers = add_on_layers(features, 16, kind)
        assert isinstance(layers[-1], torch.nn.Sigmoid)
        assert [type(layer).__name__ for layer in layers[:-1]] == (["Conv2d", "ReLU"] * len(layers))[: len(layers) - 1]
        return [(c.in_channels, c.out_channels) for c in layers if isinstance(c, torch.nn.Conv2d)]

    assert widths("regular", 100) == [(100, 16), (16, 16)]
    assert widths("bottleneck", 100) == [(100, 50), (50, 50), (50, 25), (25, 25), (25, 16), (16, 16)]
    assert widths("bottleneck", 8) == [(8, 16), (16, 16)]


def test_explanations_are_sums_over_prototypes() -> None:
    net, images, targets = model(), torch.rand(2, 3, 64, 96).double(), torch.tensor([2, 0])
    net.kept[[1, 4]] = False
    output = net(images)
    d, s, _ = numbers(net, images)
    maps, w = np.log((d + 1) / (d + 1e-4)), net.last_layer.weight.detach().numpy()
    kept, own = [0, 2, 3, 5], {2: [5], 0: [0]}
    evidence = net.evidence(output, targets).detach().numpy()
    for i, y in enumerate(targets.tolist()):
        np.testing.assert_allclose(evidence[i], [s[i, j] * w[y, j] * (j in kept) for j in range(6)], rtol=1e-6)
        np.testing.assert_allclose(output.logits[i, y].item(), sum(s[i, j] * w[y, j] for j in kept), rtol=1e-6)
        expected = {
            "class": sum(w[y, j] * maps[i, j] for j in kept),
            "best": maps[i, own[y][0]],
            "mean": sum(maps[i, j] for j in kept) / 4,
        }
        for kind, value in expected.items():
            found = net.explain(output, targets, kind)[i].detach()
            np.testing.assert_allclose(found, value, rtol=1e-5, err_msg=kind)
    net.kept[:] = True
    evidence = net.evidence(net(images), targets).detach().numpy()
    for i, y in enumerate(targets.tolist()):  # of the two own ones that with more evidence
        best = 2 * y + int(evidence[i, 2 * y + 1] > evidence[i, 2 * y])
        np.testing.assert_allclose(net.explain(net(images), targets, "best")[i].detach(), maps[i, best], rtol=1e-5)


def check_readings(net: ProtoPNet, n: int) -> None:
    """The texts are the numbers of loops, and what they add is the logit."""
    images, targets = torch.rand(3, 3, 64, 96).double(), torch.tensor([2, 0, 1])
    _, s, _ = numbers(net, images)
    w, kept, output = net.last_layer.weight.detach().numpy(), net.kept.tolist(), net(images)
    for i, found in enumerate(net.readings(output, targets, (64, 96), n)):
        y = int(targets[i])
        evidence = {j: s[i, j] * w[y, j] for j in range(6) if kept[j]}
        best = sorted(evidence, key=lambda j: -evidence[j])[:n]
        assert [match.prototype for match in found.matches] == best
        for match, j in zip(found.matches, best, strict=True):
            assert match.text == f"{s[i, j]:.2f} × {w[y, j]:.2f} = {evidence[j]:.2f}"
            large = F.interpolate(output.maps[i, [j]][None].float(), (64, 96), mode="bicubic")[0, 0].detach().numpy()
            rows, columns = np.nonzero(large >= np.percentile(large.astype(np.float64), 95))
            assert match.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        these, logit = sum(evidence[j] for j in best), output.logits[i, y].item()
        others = f"{len(evidence) - len(best)} others {logit - these:z.2f}"
        assert found.total == f"These add {these:.2f}, {others}: the logit is {logit:.2f}."


@pytest.mark.parametrize("options", [{}, {"activation": "linear"}])
@pytest.mark.parametrize("n", [2, 5])
def test_readings_come_to_the_logit(options: dict[str, Any], n: int) -> None:
    check_readings(model(**options), n)


@pytest.mark.parametrize("n", [3, 5])
def test_pruned_prototypes_are_not_read(n: int) -> None:
    net = model()
    net.kept[[1, 2, 4]] = False
    check_readings(net, n)


def data_of(root: Path, **options: Any) -> DataModule:
    options = {"image_size": 64, "batch_size": 4, "num_workers": 0, "val_fraction": 0.0, **options}
    return DataModule(dataset={"name": "cub", "root": str(root)}, **options)


@torch.no_grad()
def patches_of(net: ProtoPNet, data: DataModule) -> list[tuple[int, int, int, int, Tensor]]:
    """(label, index, row, column, patch) of every patch of the un-augmented training images, one image at a time."""
    found = []
    rows, columns = net.prototypes.shape[2:]
    dataset = data.dataset("train", augment=False)
    for position in range(len(dataset)):
        sample = dataset[0, position]
        z = net.features(sample.image[None].as_subclass(Tensor).to(net.prototypes.dtype))[0]
        for y, x in product(range(z.shape[1] - rows + 1), range(z.shape[2] - columns + 1)):
            found.append((sample.label, sample.index, y, x, z[:, y : y + rows, x : x + columns]))
    return found


@pytest.mark.parametrize("options", [{}, {"prototype_size": (2, 1)}, {"class_specific": False}])
def test_prototypes_become_the_nearest_patches(tiny_cub: Cub, options: dict[str, Any]) -> None:
    net, data = model(**options), data_of(tiny_cub.root)
    old = net.prototypes.detach().clone()
    patches = patches_of(net, data)
    net.push(data)
    for j, p in enumerate(net.prototypes.detach()):
        mine = [patch for patch in patches if patch[0] == j // 2 or not net.class_specific]
        label, index, row, column, patch = min(mine, key=lambda one: float((one[4] - old[j]).square().sum()))
        torch.testing.assert_close(p, patch, rtol=0, atol=1e-9)
        assert (int(net.sources.image[j]), *net.sources.cell[j].tolist()) == (index, row, column)
        assert label == j // 2 or not net.class_specific
        x0, y0, x1, y1 = net.sources.receptive_box[j].tolist()
        assert x0 <= 16 * column < 16 * (column + options.get("prototype_size", (1, 1))[1]) <= x1 <= 64
        assert y0 <= 16 * row < y1 <= 64
        image = data.dataset("train", augment=False)[0, int(np.flatnonzero(data.train_indices == index)[0])].image
        pixels = image[None].as_subclass(Tensor).double()
        other = pixels.clone()
        other[:, :, y0:y1, x0:x1] += 0.3  # the patch sees the box ...
        with torch.no_grad():
            size = net.prototypes.shape[2:]
            at = (0, slice(None), slice(row, row + size[0]), slice(column, column + size[1]))
            assert float((net.features(other)[at] - p).abs().max()) > 1e-6
            outside = torch.rand_like(pixels)
            outside[:, :, y0:y1, x0:x1] = pixels[:, :, y0:y1, x0:x1]  # ... and nothing else
            torch.testing.assert_close(net.features(outside)[at], p, rtol=0, atol=1e-9)
    assert (
        int(net.sources.images)
        == data.fingerprint("train", contents=True)
        != data_of(tiny_cub.root, val_fraction=0.25).fingerprint("train")
    )


def test_the_activation_box_surrounds_the_upper_twentieth(tiny_cub: Cub) -> None:
    net, data = model(), data_of(tiny_cub.root)
    old = copy.deepcopy(net)
    net.push(data)
    dataset = data.dataset("train", augment=False)
    for j, box in enumerate(net.sources.activation_box.tolist()):
        position = int(np.flatnonzero(data.train_indices == int(net.sources.image[j]))[0])
        with torch.no_grad():
            maps = old(dataset[0, position].image[None].as_subclass(Tensor).double()).maps[:, j : j + 1]
        large = F.interpolate(maps.float(), size=(64, 64), mode="bicubic", align_corners=False)[0, 0].numpy()
        y, x = np.nonzero(large >= np.percentile(large.astype(np.float64), 95))
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_unique_prototypes_of_no_class(tiny_cub: Cub, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many patches are kept at first, the same ones are taken."""
    pushed = []
    for few in (1, 2, 100):
        monkeypatch.setattr(projection, "FEW", few)
        net = model(unique=True, class_specific=False)
        with torch.no_grad():
            net.prototypes[:5] = net.prototypes[0]  # five want the same patches
        net.push(data_of(tiny_cub.root))
        pushed.append(torch.cat([net.sources.image[:, None], net.sources.cell], dim=1))
    assert len(pushed[0].unique(dim=0)) == 6
    assert torch.equal(pushed[0], pushed[1])
    assert torch.equal(pushed[0], pushed[2])


def test_unique_prototypes(tiny_cub: Cub) -> None:
    net, data = model(unique=True), data_of(tiny_cub.root)
    with torch.no_grad():
        net.prototypes[1::2] = net.prototypes[::2]  # pairs that want the same patch
    twins = copy.deepcopy(net)
    twins.unique = False
    twins.push(data)
    net.push(data)
    where = torch.cat([net.sources.image[:, None], net.sources.cell], dim=1)
    assert len(where.unique(dim=0)) == 6
    assert torch.equal(twins.prototypes[::2], twins.prototypes[1::2])
    assert torch.equal(net.prototypes[::2], twins.prototypes[::2])


def test_a_class_without_images_is_named(tiny_cub: Cub) -> None:
    net, data = model(), data_of(tiny_cub.root)
    labels = np.asarray(data.train_images.labels)
    data.train_indices = data.train_indices[labels[data.train_indices] != 1]
    before = net.prototypes.detach().clone()
    with pytest.raises(InputError, match=data.classes[1]):
        net.push(data)
    assert torch.equal(net.prototypes, before)


def test_pruning_looks_at_the_nearest_images(tiny_cub: Cub) -> None:
    net, data = model(prune_neighbours=4, prune_least=2), data_of(tiny_cub.root)
    net.push(data)
    expected = []
    patches = patches_of(net, data)
    for j, p in enumerate(net.prototypes.detach()):
        best: dict[int, tuple[float, int]] = {}
        for label, index, _, _, patch in patches:
            distance = float((patch - p).square().sum())
            best[index] = min(best.get(index, (distance, label)), (distance, label))
        nearest = sorted(best.values())[:4]
        expected.append(sum(label == j // 2 for _, label in nearest) >= 2)
    assert len(set(expected)) == 2, "nothing to tell apart"
    images = torch.rand(2, 3, 64, 64).double()
    all_of_them = net.evidence(net(images), torch.tensor([1, 1]))
    net.prune(data)
    assert net.kept.tolist() == expected
    rest = (all_of_them * torch.tensor(expected)).sum(dim=1)
    torch.testing.assert_close(net(images).logits[:, 1], rest)


def config_of(root: Path, out: Path, phases: list[dict[str, Any]], **model_options: Any) -> dict[str, Any]:
    config = tiny_config(root, out=str(out), phases=phases, optimizer={"name": "adam"})
    config["model"] = {"name": "protopnet", "backbone": TINY, "weights": None, "output_stride": 16, "channels": 8}
    config["model"] |= {"prototypes_per_class": 2, "last_layer_lr": 1e-2, **model_options}
    config["data"] |= {"val_fraction": 0.0, "augment": False}
    return config


def test_cached_last_layer_takes_the_steps_of_the_uncached(tiny_cub: Cub, tmp_path: Path) -> None:
    """Adam on cached similarities ends where three epochs over the images end."""
    first = {"epochs": 1, "lrs": LRS, "on_end": ["push"]}
    last = {"name": "last", "epochs": 3, "lrs": LAST, "eval_modules": ["backbone", "add_on"]}
    uncached = fit(config_of(tiny_cub.root, tmp_path / "a", [first, last]))
    steps = torch.load(uncached / "checkpoints/last.ckpt", weights_only=True)["global_step"] * 3 // 4
    first = {"epochs": 1, "lrs": LRS, "on_end": ["push", "fit_last_layer"]}
    cached = fit(config_of(tiny_cub.root, tmp_path / "b", [first], last_layer_steps=steps))
    a, b = (load(run)[0].state_dict() for run in (uncached, cached))
    start = ProtoPNet(3, backbone=TINY, weights=None, prototypes_per_class=2).last_layer.weight
    assert float((a["last_layer.weight"] - start).detach().abs().max()) > 1e-2
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m)


def test_the_logit_is_its_evidence_under_autocast() -> None:
    net, targets = model().float(), torch.tensor([2, 0, 1])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(torch.rand(3, 3, 64, 64))
        evidence = net.evidence(output, targets)
    torch.testing.assert_close(
        evidence.sum(dim=1), output.logits.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )


def test_losses_are_finite_when_classes_lost_their_prototypes() -> None:
    net, images = model(), torch.rand(3, 3, 64, 64).double()
    net.kept[2:] = False  # those of class 0 are left
    for targets in (torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)):
        assert all(bool(torch.isfinite(term)) for term in net.loss(net(images), targets).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_least": 7}, "model.prune_least=7 must be from 0 to prune_neighbours=6"),
        ({"prune_least": -1}, "model.prune_least=-1 must be"),
        ({"last_layer_steps": -1}, "must be 0 or more"),
        ({"last_layer_lr": float("nan")}, "must be 0 or more"),
        ({"prune_least": 0, "prune_neighbours": 0}, "must be from 0 to prune_neighbours=0"),
        ({"last_layer_lr": -1e-3}, "must be 0 or more"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(**options)


def test_maps_of_larger_prototypes_lie_where_their_patches_are() -> None:
    """A prototype that is the patch of 2 x 3 cells at row 1 and column 2 has its highest similarity in all of them."""
    net, images = model(prototype_size=(2, 3)), torch.rand(1, 3, 64, 96).double()
    with torch.no_grad():
        net.prototypes[4] = net.features(images)[0, :, 1:3, 2:5]
        output = net(images)
    highest = output.maps[0, 4] > output.maps[0, 4].max() - 1e-6
    assert output.maps.shape[2:] == net.features(images).shape[2:]
    assert highest.nonzero().tolist() == [[r, c] for r in (1, 2) for c in (2, 3, 4)]


@pytest.mark.parametrize(("name", "action"), [("protopnet", "push"), ("prototree", "project")])
@pytest.mark.parametrize("select", ["every", "last"])
def test_training_refuses_to_select_epochs_without_a_push(
    tiny_cub: Cub, tmp_path: Path, name: str, action: str, select: str
) -> None:
    phases: list[dict[str, Any]] = [{"epochs": 2, "lrs": LRS, "on_end": [action], "select": select}]
    config = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=phases)
    config["model"] = {"name": name, "backbone": TINY, "weights": None, "channels": 4}
    if name == "prototree":
        config["model"]["depth"] = 1
    if select == "last":
        fit(config)
    else:
        with pytest.raises(InputError, match=r"phases\[0\].select=every"):
            fit(config)
        assert not (tmp_path / "run").exists()
    if name == "protopnet" and select == "last":  # the last layer can go on, if the trunk's statistics stay
        last = {"name": "last", "epochs": 1, "lrs": LAST}
        with pytest.raises(InputError, match=r"phases\[1\].select=every: .*'backbone.trunk.*' changes"):
            fit(config | {"phases": [*phases, last], "out": str(tmp_path / "b")})
        fit(config | {"phases": [*phases, {**last, "eval_modules": ["backbone"]}], "out": str(tmp_path / "c")})
