"""ProtoTree against a tree of nodes that is walked recursively, and leaf updates against loops."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from interp_models import load
from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.data.module import DataModule
from interp_models.models import prototree
from interp_models.models.protopnet import ProtoPNet
from interp_models.models.prototree import ProtoTree
from interp_models.nn.soft_tree import TreeNode, log1mexp
from interp_models.prototypes.distances import squared_distances, unit
from interp_models.report.tree_drawing import tree_svg
from tests.conftest import TINY, Cub, fit, tiny_config
from tests.models.test_protopnet import angles
from tests.mutation import mutated

K, DEPTH = 3, 3


def model(cls: type[ProtoTree] = ProtoTree, **options: Any) -> ProtoTree:
    """A tree with leaves that know something, in float64."""
    torch.manual_seed(1)
    options = {"depth": DEPTH, "channels": 6, **options}
    net = cls(num_classes=K, backbone=TINY, weights=None, output_stride=16, **options).double().eval()
    net.leaves.copy_(3 * torch.rand_like(net.leaves))
    torch.nn.init.normal_(net.prototypes, 0.5, 0.3)
    return net


@dataclass
class Node:
    """A node or leaf of a tree as one draws it, with its number in the heap and among the leaves."""

    number: int
    leaf: int | None = None
    left: "Node | None" = None
    right: "Node | None" = None


def grown(kept: list[bool], number: int = 0, level: int = 0) -> Node | None:
    """The tree with leaves removed, and every node replaced by its child where that is the only one left."""
    if level == DEPTH:
        leaf = number - (2**DEPTH - 1)
        return Node(number, leaf) if kept[leaf] else None
    left, right = (grown(kept, 2 * number + side, level + 1) for side in (1, 2))
    if left is None or right is None:
        return left or right
    return Node(number, None, left, right)


def walk(node: Node, p: np.ndarray, chance: float = 1.0, depth: int = 0) -> Iterator[tuple[int, float, int]]:
    """(leaf, its probability, its depth), node by node."""
    if node.leaf is not None:
        yield node.leaf, chance, depth
        return
    assert node.left is not None
    assert node.right is not None
    yield from walk(node.left, p, chance * (1 - p[node.number]), depth + 1)
    yield from walk(node.right, p, chance * p[node.number], depth + 1)


def softmax(c: np.ndarray) -> np.ndarray:
    e = np.exp(c)
    return e / e.sum(axis=-1, keepdims=True)


def answers(net: ProtoTree, images: Tensor) -> np.ndarray:
    """p (B, nodes), by loops over patches."""
    with torch.no_grad():
        z, prototypes = net.add_on(net.backbone(images)).numpy(), net.prototypes.numpy()
    p = np.zeros((len(z), len(prototypes)))
    rows, columns = prototypes.shape[2:]
    for i, j in product(range(len(z)), range(len(prototypes))):
        cells = product(range(z.shape[2] - rows + 1), range(z.shape[3] - columns + 1))
        patches = [z[i, :, y : y + rows, x : x + columns] for y, x in cells]
        if net.cosine:
            p[i, j] = np.exp(-2 * min(angles(patch, prototypes[j]) for patch in patches))
        else:
            p[i, j] = np.exp(-min(np.linalg.norm(patch - prototypes[j]) for patch in patches))
    return p


KEPT = [
    [True] * 8,
    [True, False, True, True, True, True, False, False],  # a leaf, and a pair of leaves
    [False, False, False, False, True, False, True, True],  # half of the tree
    [False, False, True, False, False, False, False, False],  # all but one leaf
]


def check_trees(cls: type[ProtoTree]) -> None:
    for kept in KEPT:
        check_tree(cls, kept)


def check_tree(cls: type[ProtoTree] = ProtoTree, kept: list[bool] = KEPT[1], **options: Any) -> None:
    net, images = model(cls, **options), torch.rand(3, 3, 64, 96).double()
    net.leaf_kept.copy_(torch.tensor(kept))
    tree, p = grown(kept), answers(net, images)
    assert tree is not None
    output, says = net(images), softmax(net.leaves.numpy())
    for i in range(3):
        leaves = list(walk(tree, p[i]))
        probabilities = sum(chance * says[leaf] for leaf, chance, _ in leaves)
        np.testing.assert_allclose(output.logits[i].exp().detach(), probabilities, rtol=1e-6)
        found = output.aux["paths"][i].detach().numpy()
        np.testing.assert_allclose([found[leaf] for leaf, _, _ in leaves], [c for _, c, _ in leaves], rtol=1e-6)
        assert found.sum() == pytest.approx(1)
        assert [int(net.leaf_depths()[leaf]) for leaf, _, _ in leaves] == [depth for _, _, depth in leaves]
        best = max(leaves, key=lambda one: one[1])[0]
        greedy = next(leaf for leaf, chance, _ in walk(tree, (p[i] > 0.5).astype(float)) if chance == 1)
        for decision, leaf in (("sample_max", best), ("greedy", greedy)):
            assert int(net.decide(output, decision)[i]) == leaf  # type: ignore[arg-type]
            torch.testing.assert_close(net.predict(output, decision)[i], torch.tensor(says[leaf]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    "options",
    [{}, {"prototype_size": (2, 1)}, {"distance": "cosine"}, {"distance": "cosine", "prototype_size": (1, 2)}],
)
def test_tree_equals_recursion(kept: list[bool], options: dict[str, Any]) -> None:
    check_tree(kept=kept, **options)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('(-output.aux["distances"]).exp() > 0.5', '(-output.aux["distances"]).exp() < 0.5'),
        ("else root(squared)", "else squared"),
        ("product(paths, self.leaves.softmax(dim=1))", "product(paths, self.leaves)"),
    ],
)
def test_mutations_are_rejected(right: str, wrong: str) -> None:
    wrong_tree = mutated("interp_models.models.prototree", right, wrong).ProtoTree
    with pytest.raises(AssertionError):
        check_trees(wrong_tree)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("torch.stack([paths + log_left[:, nodes], paths", "torch.stack([paths + log_right[:, nodes], paths"),
        ("log_right = torch.where(left, log_right, 0.0)", "log_right = torch.where(right, log_right, 0.0)"),
        ("counts = (right & left)", "counts = (right | left)"),
    ],
)
def test_mutations_of_the_routing_are_rejected(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    copy = mutated("interp_models.nn.soft_tree", right, wrong)
    for name in ("route", "leaf_depths"):
        monkeypatch.setattr(prototree, name, getattr(copy, name))
    with pytest.raises(AssertionError):
        check_trees(ProtoTree)


def same_tree(ours: TreeNode, expected: Node, labels: list[str]) -> bool:
    if expected.leaf is not None:
        return ours == TreeNode(-1, labels[expected.leaf])
    assert ours.left is not None
    assert ours.right is not None
    assert expected.left is not None
    assert expected.right is not None
    below = same_tree(ours.left, expected.left, labels) and same_tree(ours.right, expected.right, labels)
    return below and ours.number == expected.number


@pytest.mark.parametrize("kept", KEPT)
def test_the_tree_that_is_drawn(kept: list[bool]) -> None:
    net = model()
    net.leaf_kept.copy_(torch.tensor(kept))
    says = softmax(net.leaves.numpy())
    labels = [f"{'abc'[p.argmax()]} {100 * p.max():.0f} %" for p in says]
    expected = grown(kept)
    assert expected is not None
    assert same_tree(net.tree("abc"), expected, labels)
    pictures = {0: np.zeros((5, 7, 3), np.uint8)}
    svg = ElementTree.fromstring(tree_svg(net.tree(["a", "b", "<c>"]), pictures))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text or "" for text in svg.iter(f"{name}text")]
    assert sum(text.endswith("%") for text in texts) == sum(kept)
    assert len(list(svg.iter(f"{name}path"))) == 2 * (sum(kept) - 1)
    assert len(list(svg.iter(f"{name}image"))) == (expected.number == 0)
    heights = [float(text.get("y", 0)) for text in svg.iter(f"{name}text") if (text.text or "").endswith("%")]
    assert all(b - a >= 40 for a, b in pairwise(sorted(heights))), "leaves overlap"


def test_the_path_of_an_image() -> None:
    """The nodes on the way to the greedy leaf, with what was found where."""
    net, images = model(), torch.rand(6, 3, 64, 64).double()
    torch.nn.init.normal_(net.prototypes, 0.5, 0.15)
    with torch.no_grad():
        net.prototypes[1::2] += 0.4
    net.leaf_kept.copy_(torch.tensor(KEPT[1]))
    output, p = net(images), answers(net, images)
    targets, says = torch.tensor([0, 1, 2, 0, 1, 2]), softmax(net.leaves.numpy())
    words = set()
    readings = net.readings(output, targets, (64, 64))
    for i, found in enumerate(readings):
        node = grown(KEPT[1])
        for match in found.matches:
            assert node is not None
            assert match.prototype == node.number
            right = p[i, node.number] > 0.5
            assert match.text == f"{'present' if right else 'absent'}, p = {p[i, node.number]:.2f}"
            assert (match.box is not None) == right
            words.add(right)
            node = node.right if right else node.left
        assert node is not None
        assert node.leaf == int(net.decide(output)[i])
        count, chance = len(found.matches), 100 * says[node.leaf, targets[i]]
        assert found.total == f"{count} decision(s) lead to a leaf that gives this class {chance:.0f} %."
    assert words == {True, False}
    for short, found in zip(net.readings(output, targets, (64, 64), n=1), readings, strict=True):
        assert short == (found.matches[:1], found.total)  # the total is of all decisions


def route_by_hand(p: tuple[float, ...], kept: tuple[int, ...]) -> list[float]:
    """What the leaves of a tree of depth 2 get, by p of its root, its left and its right node."""
    root, left, right = p
    if not {0, 1} <= set(kept):
        left = float(1 in kept)
    if not {2, 3} <= set(kept):
        right = float(3 in kept)
    if not {0, 1} & set(kept):
        root = 1.0
    return [(1 - root) * (1 - left), (1 - root) * left, root * (1 - right), root * right]


# Leaves say 0, 1, 2 and 0. What the leaves get, in %, with all of them, and without leaf 0:
# image 0:  4   36   33  27    40 33 27     soft 1 (0 has 31); likeliest leaf 1; greedily right and left to leaf 2
# image 1:  8   32   33  27    40 33 27     soft 0 (35), then 1; likeliest leaf 2, then 1; greedily leaf 2
# image 2: 35.7 15.3 4.9 44.1  51 4.9 44.1  soft 0 (80), then 1; likeliest leaf 3, then 1; greedily leaf 0, then 1
# image 3: 20   30   5   45    50 5 45      soft 0 (65), then 1; likeliest leaf 3, then 1; greedily leaf 1: 1/2 is left
ANSWERED, TRUE = [(0.6, 0.9, 0.45), (0.6, 0.8, 0.45), (0.49, 0.3, 0.9), (0.5, 0.6, 0.9)], [1, 2, 0, 0]
STATISTICS: dict[tuple[int, ...], dict[str, list[float]]] = {
    (0, 1, 2, 3): {
        "acc_sample_max": [1, 1, 1, 1],
        "acc_greedy": [0, 1, 1, 0],
        "fidelity_sample_max": [1, 0, 1, 1],
        "fidelity_greedy": [0, 0, 1, 0],
        "path_length_sample_max": [2, 2, 2, 2],
        "path_length_greedy": [2, 2, 2, 2],
        "leaves": [4] * 4,
        "leaf_depth_mean": [2] * 4,
        "leaf_depth_max": [2] * 4,
    },
    (1, 2, 3): {
        "acc_sample_max": [1, 0, 0, 0],
        "acc_greedy": [0, 1, 0, 0],
        "fidelity_sample_max": [1, 1, 1, 1],
        "fidelity_greedy": [0, 0, 1, 1],
        "path_length_sample_max": [1, 1, 1, 1],
        "path_length_greedy": [2, 2, 1, 1],
        "leaves": [3] * 4,
        "leaf_depth_mean": [5 / 3] * 4,
        "leaf_depth_max": [2] * 4,
    },
    (3,): {
        "acc_sample_max": [0, 0, 1, 1],
        "acc_greedy": [0, 0, 1, 1],
        "fidelity_sample_max": [1] * 4,
        "fidelity_greedy": [1] * 4,
        "path_length_sample_max": [0] * 4,
        "path_length_greedy": [0] * 4,
        "leaves": [1] * 4,
        "leaf_depth_mean": [0] * 4,
        "leaf_depth_max": [0] * 4,
    },
}


def check_statistics(cls: type[ProtoTree] = ProtoTree) -> None:
    net = cls(num_classes=3, backbone=TINY, weights=None, depth=2, channels=4).eval()
    net.leaves.copy_(50 * torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    for kept, values in STATISTICS.items():
        net.leaf_kept.copy_(torch.tensor([leaf in kept for leaf in range(4)]))
        paths = torch.tensor([route_by_hand(p, kept) for p in ANSWERED])
        logits = torch.stack([paths[:, 0] + paths[:, 3], paths[:, 1], paths[:, 2]], dim=1).log()
        aux = {"distances": -torch.tensor(ANSWERED, dtype=torch.float64).log(), "paths": paths}
        found = net.measure(InterpOutput(logits, torch.zeros(4, 3, 2, 2), aux), torch.tensor(TRUE))
        assert set(found) == set(net.statistics) == set(values)
        for name, value in values.items():
            assert found[name].tolist() == pytest.approx(value), f"{name} of leaves {kept}"


def test_statistics_by_hand() -> None:
    check_statistics()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(says[leaf] == targets).float()", "(says[leaf] == soft).float()"),
        ("(says[leaf] == soft).float()", "(says[leaf] == targets).float()"),
        ("depths[leaf].float()", "depths[leaf].float() + 1"),
        ("depths[self.leaf_kept].float()", "depths.float()"),
        ("left.mean()", "left.max()"),
        (".exp() > 0.5\n        never", ".exp() >= 0.5\n        never"),
        ("leaf = self.decide(output, decision)", 'leaf = self.decide(output, "greedy")'),
        ("soft = output.logits.argmax(dim=1)", "soft = targets"),
    ],
)
def test_mutations_of_the_statistics_are_rejected(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_statistics(mutated("interp_models.models.prototree", right, wrong).ProtoTree)


def check_leaves(cls: type[ProtoTree] = ProtoTree) -> None:
    """Two batches of an epoch of five, by the loops of the paper's algorithm 1."""
    net = model(cls)
    net._trainer = SimpleNamespace(num_training_batches=5)  # type: ignore[assignment]
    net.on_train_epoch_start()
    c = net.leaves.numpy().copy()
    start = c.copy()
    for _ in range(2):
        images, targets = torch.rand(4, 3, 64, 64).double(), torch.randint(K, (4,))
        output = net(images)
        with torch.no_grad():
            net.observe(output, targets)
        p, says = answers(net, images), softmax(c)
        update = np.zeros_like(c)
        for i, y in enumerate(targets.tolist()):
            pi = {leaf: chance for leaf, chance, _ in walk(grown([True] * 8), p[i])}  # type: ignore[arg-type]
            chance_of_y = sum(pi[leaf] * says[leaf, y] for leaf in pi)
            for leaf in pi:
                update[leaf, y] += pi[leaf] * says[leaf, y] / chance_of_y
        c = np.maximum(c - start / 5, 0) + update
        np.testing.assert_allclose(net.leaves, c, rtol=1e-5)


def test_leaf_updates_equal_loops() -> None:
    check_leaves()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(self.leaves - self._leaving).relu() + summed", "(self.leaves - self._leaving + 0).relu() - summed"),
        ("(self.leaves - self._leaving).relu()", "self.leaves"),
        ("paths * self.leaves.softmax(dim=1)[", "paths * self.leaves["),
        ("/ probabilities.gather(1, targets[:, None])", "* probabilities.gather(1, targets[:, None])"),
    ],
)
def test_mutations_of_the_leaf_update_are_rejected(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_leaves(mutated("interp_models.models.prototree", right, wrong).ProtoTree)


def test_the_probability_of_a_match_by_its_angle() -> None:
    """exp(-4 (1 - cos)): 1 at 0°, exp(-4) at 90°, exp(-8) at 180°; lengths do not matter."""
    net = model(distance="cosine")
    angles = torch.tensor([0.0, 0.5, 1.0]) * torch.pi
    z = torch.stack([angles.cos(), angles.sin()])[None, :, None].double()  # three cells in a row
    found = net.similarity(squared_distances(unit(7 * z), unit(torch.tensor([[[[3.0]], [[0.0]]]]).double())))
    expected = torch.tensor([0.0, -4.0, -8.0]).double().exp()
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=0)


def test_log1mexp() -> None:
    x = torch.tensor([1e-7, 1e-3, 0.5, 0.6931, 0.6932, 1.0, 20.0], dtype=torch.float64, requires_grad=True)
    expected = [float(np.log(-np.expm1(-np.longdouble(v)))) for v in x.tolist()]
    np.testing.assert_allclose(log1mexp(x).detach(), expected, rtol=1e-10)
    (slope,) = torch.autograd.grad(log1mexp(x).sum(), x)
    np.testing.assert_allclose(slope, [1 / np.expm1(v) for v in x.tolist()], rtol=1e-9)
    far = torch.tensor([1e4, 1e-7], requires_grad=True)
    (slope,) = torch.autograd.grad(log1mexp(far).sum(), far)
    assert bool(torch.isfinite(slope).all())


def test_gradients_stay_finite_in_float32_and_when_pruned() -> None:
    """Also where a patch matches a prototype exactly, and where a leaf's probability underflows."""
    net = model().float()
    net.leaf_kept.copy_(torch.tensor(KEPT[2]))
    net.leaves[:] = torch.eye(3).repeat(3, 1)[:8] * 200  # other classes underflow
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        net.prototypes[:, :, 0, 0] = net.features(images)[0, :, 1, 1]
    output = net(images)
    torch.stack(list(net.loss(output, torch.tensor([0, 1])).values())).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)
    assert bool(torch.isfinite(output.logits).all())


def test_explanations() -> None:
    net, images, targets = model(), torch.rand(2, 3, 64, 96).double(), torch.tensor([2, 0])
    net.leaf_kept.copy_(torch.tensor(KEPT[1]))
    tree, p, output = grown(KEPT[1]), answers(net, images), net(images)
    assert tree is not None
    maps, says = output.maps.detach().float().numpy(), softmax(net.leaves.numpy())

    def rights(node: Node, leaf: int) -> list[int] | None:
        """Numbers of the nodes on the path to a leaf at which it goes right."""
        if node.leaf is not None:
            return [] if node.leaf == leaf else None
        for child, own in ((node.left, []), (node.right, [node.number])):
            below = rights(child, leaf)  # type: ignore[arg-type]
            if below is not None:
                return own + below
        return None

    def nodes(node: Node) -> list[int]:
        return [] if node.leaf is not None else [node.number, *nodes(node.left), *nodes(node.right)]  # type: ignore[arg-type]

    for i, y in enumerate(targets.tolist()):
        leaves = list(walk(tree, p[i]))
        total = sum(chance * says[leaf, y] for leaf, chance, _ in leaves)
        posterior = np.zeros(maps.shape[2:])
        for leaf, chance, _ in leaves:
            for n in rights(tree, leaf) or []:
                posterior += chance * says[leaf, y] / total * maps[i, n]
        path = rights(tree, int(net.decide(output)[i])) or []
        expected = {
            "posterior": posterior,
            "path": sum((maps[i, n] for n in path), np.zeros(maps.shape[2:])),
            "mean": np.mean([maps[i, n] for n in nodes(tree)], axis=0),
        }
        for kind, value in expected.items():
            np.testing.assert_allclose(net.explain(output, targets, kind)[i].detach(), value, rtol=1e-5, err_msg=kind)


def test_pruning_takes_leaves_without_a_class() -> None:
    net = model(prune_factor=1.3)  # above (1 + 0.3 * 2 / 3) / 3 = 0.4
    net.leaves.copy_(torch.tensor([[0.0, 0.0, x] for x in (0.0, 0.2, 0.28, 0.29, 1.0, 3.0, 0.1, 0.0)]))
    net.prune(None)  # type: ignore[arg-type]
    largest = softmax(net.leaves.numpy()).max(axis=1)
    assert (
        net.leaf_kept.tolist()
        == [bool(v > 0.4) for v in largest]
        == [False, False, False, True, True, True, False, False]
    )


def data_of(root: Path) -> DataModule:
    options = {"image_size": 64, "batch_size": 4, "num_workers": 0, "val_fraction": 0.0}
    return DataModule(dataset={"name": "cub", "root": str(root)}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_projection_is_constrained_to_the_classes_below(tiny_cub: Cub, distance: str) -> None:
    net, data = model(distance=distance), data_of(tiny_cub.root)
    net.leaf_kept.copy_(torch.tensor(KEPT[1]))
    old, kept = net.prototypes.detach().clone(), net.nodes_kept
    tree = grown(KEPT[1])

    def below(node: Node) -> set[int]:
        if node.leaf is not None:
            return {int(net.leaves[node.leaf].argmax())}
        return below(node.left) | below(node.right)  # type: ignore[arg-type]

    def check(node: Node) -> None:
        if node.leaf is not None:
            return
        candidates = []
        for position in range(len(dataset)):
            sample = dataset[0, position]
            if sample.label in below(node):
                with torch.no_grad():
                    z = net.features(sample.image[None].as_subclass(Tensor).double())[0]
                for y, x in product(range(z.shape[1]), range(z.shape[2])):
                    vector = old[node.number, :, 0, 0]
                    d = float((z[:, y, x] - (vector / vector.norm() if net.cosine else vector)).norm())
                    candidates.append((d, sample.index, y, x, z[:, y, x]))
        _, index, y, x, patch = min(candidates, key=lambda one: one[0])
        torch.testing.assert_close(net.prototypes[node.number, :, 0, 0].detach(), patch, rtol=0, atol=1e-9)
        assert (int(net.sources.image[node.number]), *net.sources.cell[node.number].tolist()) == (index, y, x)
        for child in (node.left, node.right):
            check(child)  # type: ignore[arg-type]

    dataset = data.dataset("train", augment=False)
    net.project(data)
    assert tree is not None
    check(tree)
    assert torch.equal(net.prototypes[~kept], old[~kept])
    assert bool((net.sources.image[~kept] == -1).all())
    assert bool((net.sources.image[kept] >= 0).all())


@pytest.mark.parametrize("cls", [ProtoTree, ProtoPNet])
def test_one_number_has_no_direction(cls: type[ProtoTree] | type[ProtoPNet]) -> None:
    options: dict[str, Any] = {"backbone": TINY, "weights": None}
    cls(3, channels=2, distance="cosine", **options)
    cls(3, channels=1, distance="l2", **options)
    with pytest.raises(InputError, match=r"model.channels must be at least 2 with model.distance=cosine"):
        cls(3, channels=1, distance="cosine", **options)


def test_untrained_trees_are_refused(tiny_cub: Cub) -> None:
    net = ProtoTree(3, backbone=TINY, weights=None, output_stride=16, depth=2, channels=4)
    for action in (net.prune, net.project):
        with pytest.raises(InputError, match="train first"):
            action(data_of(tiny_cub.root))


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"model.depth=2000: .* need \d+ GiB"):
        model(depth=2000)
    with pytest.raises(InputError, match=r"model.depth=40: .* need \d+ GiB"):
        ProtoTree(200, depth=40, backbone=TINY, weights=None)
    with pytest.raises(InputError, match=r"model\.block"):
        ProtoTree(3, depth=2, backbone=TINY, weights=None, block="layer9")


def test_groups_with_a_block_apart() -> None:
    net = ProtoTree(3, depth=2, backbone=TINY, weights=None)
    names = [name for name, module in net.backbone.trunk.named_modules() if name and list(module.parameters())]
    net = ProtoTree(3, depth=2, backbone=TINY, weights=None, block=names[-1])
    block = set(net.backbone.trunk.get_submodule(names[-1]).parameters())
    groups = net.parameter_groups()
    assert set(groups["block"]) == block
    assert set(groups["backbone"]) == set(net.backbone.parameters()) - block


def test_training_prunes_projects_and_comes_back_from_its_checkpoint(tiny_cub: Cub, tmp_path: Path) -> None:
    lrs = dict.fromkeys(("backbone", "add_on", "prototypes"), 1e-3)
    phases = [{"epochs": 6, "lrs": lrs, "on_end": ["prune", "project"], "select": "last"}]
    config = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), phases=phases)
    config["model"] = {"name": "prototree", "backbone": TINY, "weights": None, "output_stride": 16}
    config["model"] |= {"channels": 8, "depth": 4, "prune_factor": 1.02}
    net = load(fit(config))[0]
    assert isinstance(net, ProtoTree)
    assert float(net.leaves.max()) > 0.1
    assert int(net.nodes_kept.sum()) > 1
    assert bool((net.sources.image[net.nodes_kept] >= 0).all())


def test_leaves_stay_finite() -> None:
    """Also where an image's class is known to no leaf that it is likely to reach."""
    net = model().float()
    net.leaves.copy_(torch.tensor([[120.0, 0.0, 0.0]]).expand(8, 3))
    net._leaving = torch.zeros_like(net.leaves)
    images, targets = torch.rand(6, 3, 64, 64), torch.full((6,), 1)
    with torch.no_grad():
        net.observe(net(images), targets)
    assert bool(torch.isfinite(net.leaves).all())


def test_maps_of_a_class_that_no_leaf_knows() -> None:
    net = model().float()
    net.leaves.copy_(torch.tensor([[200.0, 0.0, 0.0]]).expand(8, 3))
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([1, 2])
    assert bool(torch.isfinite(net.explain(net(images), targets)).all())
    net.leaf_kept[1:] = False  # one leaf: no node decides
    assert bool((net.explain(net(images), targets, "mean") == 0).all())


def test_two_classes_can_be_pruned() -> None:
    net = ProtoTree(2, backbone=TINY, weights=None, depth=1, channels=4)
    net.leaves.copy_(torch.tensor([[500.0, 0.0], [0.1, 0.0]]))
    net.prune(None)  # type: ignore[arg-type]
    assert net.leaf_kept.tolist() == [True, False]


def test_probabilities_under_autocast() -> None:
    net = model().float()
    torch.nn.init.normal_(net.leaves)
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = net(images).logits.exp()
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4), rtol=1e-5, atol=1e-5)
