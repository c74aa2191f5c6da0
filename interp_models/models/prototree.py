"""ProtoTree: a soft decision tree whose nodes look for prototypes.

Source: Nauta, van Bree and Seifert, "Neural Prototype Trees for Interpretable Fine-grained Image Recognition", CVPR
2021, sections 3 and 4. The leaf update without gradients is that of section 4.2, algorithm 1, after Kontschieder et
al., "Deep Neural Decision Forests", ICCV 2015. docs/quirks.md (`prototree`) lists the differences from the authors'
code.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.boxes import Size, activation_boxes
from interp_models.core.distributed import summed
from interp_models.core.errors import InputError, unknown
from interp_models.core.outputs import InterpOutput
from interp_models.data.module import DataModule
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.nn.soft_tree import TreeNode, check_memory, children_kept, grown, leaf_depths, log1mexp, route
from interp_models.prototypes.distances import Distance, check_channels, over_cells, product, root, unit
from interp_models.prototypes.push import project
from interp_models.prototypes.sources import Match, Prototypical, Reading, Sources
from interp_models.training.module import MODELS, InterpModule

SHARPNESS = 2.0
"""Factor of squared distances between vectors of norm 1. For prototypes of one cell they are at most 4."""
Decision = Literal["soft", "sample_max", "greedy"]


@MODELS.register("prototree")
class ProtoTree(InterpModule, Prototypical):
    """ProtoTree: a soft decision tree, whose node n sends an image to the right with probability
    g_n = exp(-min over patches of ‖z_hw - p_n‖).

    z = add_on(CNN(x)) are the features, and p_n is the prototype of node n. With `distance=cosine` it is
    g_n = exp(-2 min ‖z_hw - p_n‖²) = exp(-4 (1 - max cos)) of cells that are divided by their norms
    (the second for prototypes of one cell).

    The probability π_l of leaf l is the product over the nodes on its path of g_n (right) or 1 - g_n (left). The class
    probabilities are ŷ = Σ_l π_l softmax(c_l), and the logits are their logarithms. Nodes are numbered as in a heap:
    node n has the children 2n + 1 (left) and 2n + 2 (right).

    The loss is the negative log likelihood. The leaves c are not parameters. After each of the N batches of an epoch
    they become c_l <- ReLU(c_l - c_l(start of the epoch) / N) + Σ_b π_l(b) softmax(c_l)[y_b] onehot(y_b) / ŷ(b)[y_b],
    with the sum over the images b of the batch and their labels y_b.

    Actions for `phases[].on_end`: `prune` removes leaves whose class probabilities are nearly uniform, and nodes that
    then have one child. `project` replaces each prototype by the nearest patch of a training image. The image's class
    must be the most probable class of a leaf below the node.

    Explanations, all sums of the nodes' similarity maps: `posterior` weights each by the probability that the image
    went right at the node, given the target class. `path` takes the nodes of the greedy path where it goes right, the
    same for every class. `mean` is the mean over all nodes that decide, the same for every class.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        depth: depth of the tree, which has 2^depth leaves (paper: 9 for CUB, 11 for Stanford Cars).
        channels: number of channels D of prototypes, and of features after the add-on layer.
        prototype_size: rows and columns of cells of a prototype.
        distance: `l2`, or `cosine`. With `l2` the add-on layer ends in a sigmoid.
        block: name of a submodule of the timm model that becomes the parameter group `block` (paper: the last one).
        prune_factor: f. `prune` removes leaves whose largest class probability is at most
            (1 + (f - 1)(1 - 1/K)) / K (paper: 0.01 for K = 200).
    """

    actions: ClassVar[tuple[str, ...]] = ("reset_optimizer", "prune", "project")
    pushed_by = "project"
    explanations: ClassVar[tuple[str, ...]] = ("posterior", "path", "mean")
    class_maps = True
    small: ClassVar[Mapping[str, Any]] = {**InterpModule.small, "depth": 3, "channels": 4}
    untrained: ClassVar[Mapping[str, Any]] = {"prune_factor": 0.5}  # the leaves are still nearly uniform
    statistics: ClassVar[tuple[str, ...]] = (
        "acc_sample_max",
        "acc_greedy",
        "fidelity_sample_max",
        "fidelity_greedy",
        "path_length_sample_max",
        "path_length_greedy",
        "leaves",
        "leaf_depth_mean",
        "leaf_depth_max",
    )
    leaves: Tensor
    leaf_kept: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        depth: int = 9,
        channels: int = 256,
        prototype_size: tuple[int, int] = (1, 1),
        distance: Distance = "l2",
        block: str | None = None,
        prune_factor: float = 2.0,
    ) -> None:
        super().__init__(num_classes)
        if min(depth, channels, *prototype_size) < 1:
            raise InputError("model.depth, model.channels and model.prototype_size must be at least 1")
        check_channels(distance, channels)
        check_memory(depth, channels * prototype_size[0] * prototype_size[1], num_classes)
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        names = [name for name, _ in self.backbone.trunk.named_modules() if name]
        if block is not None and block not in names:
            raise unknown("submodule of the backbone in model.block:", block, names)
        self.block, self.depth, self.prune_factor = block, depth, prune_factor
        convolution = nn.Conv2d(self.backbone.channels, channels, kernel_size=1, bias=False)
        nn.init.xavier_normal_(convolution.weight, gain=nn.init.calculate_gain("sigmoid"))
        self.cosine = distance == "cosine"
        self.add_on = nn.Sequential(convolution, nn.Identity() if self.cosine else nn.Sigmoid())
        self.prototypes = nn.Parameter(0.5 + 0.1 * torch.randn(2**depth - 1, channels, *prototype_size))
        self.sources = Sources(len(self.prototypes))
        self.register_buffer("leaves", torch.zeros(2**depth, num_classes))
        self.register_buffer("leaf_kept", torch.ones(2**depth, dtype=torch.bool))
        self._leaving = torch.zeros(())

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D, h, w) that prototypes are compared with: in [0, 1], or of norm 1."""
        features: Tensor = self.add_on(self.backbone(images))
        return unit(features) if self.cosine else features

    def _exponents(self, squared: Tensor) -> Tensor:
        """-ln g of squared distances."""
        return SHARPNESS * squared + 1e-7 if self.cosine else root(squared)  # both are above 0

    def similarity(self, distances: Tensor) -> Tensor:
        """g of squared distances."""
        return (-self._exponents(distances)).exp()

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and similarity maps (B, 2^depth - 1, h, w).

        aux has `distances`, which are -ln g (with `l2` the distance to the nearest patch, not squared),
        (B, 2^depth - 1), and as `paths` the probabilities π of the leaves, (B, 2^depth).
        """
        squared = self.distances(self.features(images))
        distances = self._exponents(squared.flatten(2).min(dim=2).values)
        paths = route(-distances, log1mexp(distances), self.leaf_kept).exp()
        probabilities = product(paths, self.leaves.softmax(dim=1))
        # The probability of a class may underflow to 0. Its logarithm must stay finite.
        logits = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
        maps = self.similarity(over_cells(squared, self.prototypes.shape))
        return InterpOutput(logits, maps, {"distances": distances, "paths": paths})

    @property
    def nodes_kept(self) -> Tensor:
        """The nodes that decide, (2^depth - 1,) bool: they have kept leaves below both children."""
        right, left = children_kept(self.leaf_kept)
        return right & left

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Negative log likelihood."""
        return {"nll": F.nll_loss(output.logits, targets)}

    def on_train_epoch_start(self) -> None:
        """Compute the share of the leaves that each batch of the epoch will subtract."""
        self._leaving = self.leaves / self.trainer.num_training_batches

    def observe(self, output: InterpOutput, targets: Tensor) -> None:
        """Update the leaves by the batches of all ranks."""
        paths, probabilities = (x.to(self.leaves.dtype) for x in (output.aux["paths"], output.logits.exp()))
        # Each leaf's share of the probability of the image's class, (B, leaves). It is at most 1, so nothing overflows.
        shares = paths * self.leaves.softmax(dim=1)[:, targets].T / probabilities.gather(1, targets[:, None])
        update = product(shares.T, F.one_hot(targets, self.num_classes))
        self.leaves.copy_((self.leaves - self._leaving).relu() + summed(update))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone`, `block` if there is one, `add_on` and `prototypes`."""
        block = [] if self.block is None else list(self.backbone.trunk.get_submodule(self.block).parameters())
        apart = {id(parameter) for parameter in block}
        groups = {"backbone": [p for p in self.backbone.parameters() if id(p) not in apart]}
        if block:
            groups["block"] = block
        return groups | {"add_on": list(self.add_on.parameters()), "prototypes": [self.prototypes]}

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def decide(self, output: InterpOutput, decision: Decision = "greedy") -> Tensor:
        """The leaf that each image ends in, (B,) int64.

        Args:
            output: return value of `forward`.
            decision: `sample_max` takes the most probable leaf. `greedy` goes right at every node with g_n > 1/2.

        Raises:
            InputError: for `soft`, which uses all leaves.
        """
        if decision == "sample_max":
            return output.aux["paths"].argmax(dim=1)
        if decision != "greedy":
            raise unknown("decision", decision, ("sample_max", "greedy"))
        right = (-output.aux["distances"]).exp() > 0.5
        never = torch.where(right, 0.0, -torch.inf)
        return route(never, torch.where(right, -torch.inf, 0.0), self.leaf_kept).argmax(dim=1)

    def predict(self, output: InterpOutput, decision: Decision = "soft") -> Tensor:
        """Class probabilities (B, K): the weighted mean of all leaves (`soft`), or those of one leaf, see `decide`."""
        if decision == "soft":
            return output.logits.exp()
        return self.leaves.softmax(dim=1)[self.decide(output, decision)]

    def measure(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Statistics of the decisions for one leaf, and of the tree; one value per image (B,) each.

        For `sample_max` and `greedy`: the accuracy, the fidelity (agreement with the soft decision), and the number of
        decisions on the path. For the tree: the number of kept leaves, and the mean and largest depth of them.
        """
        soft = output.logits.argmax(dim=1)
        depths, says = self.leaf_depths(), self.leaves.argmax(dim=1)
        values = {}
        for decision in ("sample_max", "greedy"):
            leaf = self.decide(output, decision)
            values[f"acc_{decision}"] = (says[leaf] == targets).float()
            values[f"fidelity_{decision}"] = (says[leaf] == soft).float()
            values[f"path_length_{decision}"] = depths[leaf].float()
        left = depths[self.leaf_kept].float()
        of_tree = {
            "leaves": torch.tensor(float(len(left))),
            "leaf_depth_mean": left.mean(),
            "leaf_depth_max": left.max(),
        }
        return values | {name: value.to(targets.device).expand(len(targets)) for name, value in of_tree.items()}

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """A weighted sum of the nodes' similarity maps.

        `posterior`: the weight is the probability that the image went right at the node, given the target class.
        `path`: the sum over the nodes of the greedy path where it goes right; 0 if it never does.
        `mean`: the mean over all nodes that decide.

        Returns:
            Maps (B, h, w).
        """
        kind, maps = self.check_kind(kind), output.maps.float()
        if kind == "mean":
            return maps[:, self.nodes_kept].sum(dim=1) / max(1, int(self.nodes_kept.sum()))
        if kind == "path":
            leaf_weights = F.one_hot(self.decide(output), 2**self.depth).float()
        else:
            joint = output.aux["paths"].float() * self.leaves.float().softmax(dim=1)[:, targets].T  # (B, leaves)
            total = joint.sum(dim=1, keepdim=True)  # 0 if no leaf gives the class a chance that float32 holds
            leaf_weights = torch.where(total > 0, joint / total, output.aux["paths"].float())
        weights = [leaf_weights.view(len(maps), 2**level, 2, -1)[:, :, 1].sum(dim=2) for level in range(self.depth)]
        return torch.einsum("bn,bnhw->bhw", torch.cat(weights, dim=1) * self.nodes_kept, maps)

    @torch.no_grad()
    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """The greedy path from the root, or its first n decisions. Prototypes that are present (g_n > 1/2) have a
        box."""
        leaves, probabilities = self.decide(output), (-output.aux["distances"]).exp()
        of_target = self.leaves.softmax(dim=1)[leaves, targets].tolist()
        decides = self.nodes_kept.tolist()
        found = []
        for i, leaf in enumerate(leaves.tolist()):
            number = leaf + 2**self.depth - 1
            path: list[Match] = []
            while number:
                right, number = number % 2 == 0, (number - 1) // 2
                if decides[number]:
                    box = activation_boxes(output.maps[i, [number]], image_size)[0].tolist()
                    word = "present" if right else "absent"
                    text = f"{word}, p = {float(probabilities[i, number]):.2f}"
                    path.insert(0, Match(number, tuple(box) if right else None, text))
            total = f"{len(path)} decision(s) lead to a leaf that gives this class {100 * of_target[i]:.0f} %."
            found.append(Reading(path[:n], total))
        return found

    @property
    def prototype_classes(self) -> Tensor:
        """The classes of each node's prototype, (P, K) bool: those of the leaves below its right child."""
        says = self._says
        right = [says.view(2**level, 2, -1, self.num_classes)[:, 1].any(dim=1) for level in range(self.depth)]
        return torch.cat(right) & self.nodes_kept[:, None]

    @property
    def prototype_weights(self) -> None:
        """None: the prototypes of a tree have no weights."""

    @property
    def _says(self) -> Tensor:
        """The most probable class of each kept leaf, (2^depth, K) bool."""
        return F.one_hot(self.leaves.argmax(dim=1), self.num_classes).bool() & self.leaf_kept[:, None]

    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """For each level of the tree, the prototypes of its nodes that decide."""
        kept = set(self.nodes_kept.nonzero()[:, 0].tolist())
        levels = {f"level-{n}": range(2**n - 1, 2 ** (n + 1) - 1) for n in range(self.depth)}
        return {name: [number for number in nodes if number in kept] for name, nodes in levels.items()}

    def leaf_depths(self) -> Tensor:
        """Number of decisions on the path to each leaf, (2^depth,) int64. Nodes with one child left do not count."""
        return leaf_depths(self.leaf_kept)

    def tree(self, classes: Sequence[str]) -> TreeNode:
        """The tree for drawing: nodes that decide, and kept leaves with their most probable class.

        Args:
            classes: class names by label.
        """
        probabilities, labels = self.leaves.softmax(dim=1).max(dim=1)
        pairs = zip(probabilities.tolist(), labels.tolist(), strict=True)
        return grown(self.leaf_kept, [f"{classes[label]} {100 * chance:.0f} %" for chance, label in pairs])

    def prune(self, data: DataModule) -> None:
        """Remove leaves whose largest class probability is close to 1 / K, see `prune_factor`.

        Raises:
            InputError: if no leaf would be left, as in an untrained model.
        """
        threshold = (1 + (self.prune_factor - 1) * (1 - 1 / self.num_classes)) / self.num_classes
        kept = self.leaf_kept & (self.leaves.softmax(dim=1).amax(dim=1) > threshold)
        if not bool(kept.any()):
            raise InputError("prune: no leaf prefers a class yet; train first, or lower model.prune_factor")
        self.leaf_kept.copy_(kept)

    def project(self, data: DataModule) -> None:
        """Replace each node's prototype by the nearest patch of a training image of a class of a leaf below the node.

        The class of a leaf is its most probable one. `sources` records the image and the patch.

        Raises:
            InputError: if all leaves are uniform, as in an untrained model.
        """
        if bool((self.leaves == self.leaves[:, :1]).all()):
            raise InputError("project: no leaf prefers a class yet; train first")
        below = [self._says.view(2**level, -1, self.num_classes).any(dim=1) for level in range(self.depth)]
        which = self.nodes_kept.nonzero()[:, 0]
        if len(which):  # no node decides if one leaf is left
            project(self, data, torch.cat(below), which)
