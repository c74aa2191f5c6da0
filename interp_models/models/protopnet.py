"""ProtoPNet: this looks like that.

Source: Chen et al., "This Looks Like That: Deep Learning for Interpretable Image Recognition", NeurIPS 2019. Tutorial:
Gomez and Mouchère 2023, section 2.2.3, equations 13 to 18. Options give two variants: prototypes of several cells
(Singh and Yow, "An interpretable deep learning model for covid-19 detection with chest x-ray images", 2021,
Gen-ProtoPNet), and a last layer of +1 and -1 (Singh and Yow, "These do not look like those", 2021, NP-ProtoPNet).
docs/quirks.md (`protopnet`) lists the differences from the authors' code.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.boxes import Size, activation_boxes
from interp_models.core.distributed import in_order
from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.data.module import DataModule
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.prototypes.distances import Distance, check_channels, over_cells, product, unit
from interp_models.prototypes.push import project
from interp_models.prototypes.search import nearest_patches
from interp_models.prototypes.sources import Match, Prototypical, Reading, Sources
from interp_models.training.last_layer import fit_on_cached
from interp_models.training.module import MODELS, InterpModule

EPSILON = 1e-4
"""ε of the log activation. It limits the activation to ln(1 / ε) = 9.21."""


@MODELS.register("protopnet")
class ProtoPNet(InterpModule, Prototypical):
    """ProtoPNet: features z = add_on(CNN(x)), similarities s_p = max over patches of act(‖z_hw - p‖²) to prototypes p,
    logits = W · s. With `distance=cosine`, z_hw and p are divided by their norms, so that ‖z_hw - p‖² = 2 - 2 cos.

    Each prototype belongs to one class. W starts at 1 for prototypes of the class, and at `wrong_weight` for others. It
    has no bias, so a logit is exactly the sum of similarity × weight over prototypes.

    Loss: cross-entropy + cluster · mean_i min_{p of y_i} d_ip - separation · mean_i min_{p not of y_i} d_ip
    + l1 · Σ |W_kp| over classes k and prototypes p of other classes. d_ip is the squared distance between prototype p
    and the nearest patch of image i, and y_i is the image's label.

    Actions for `phases[].on_end`: `push` replaces each prototype by the nearest patch of a training image of its class.
    `fit_last_layer` trains W on the similarities of un-augmented images. `prune` removes prototypes whose nearest
    training patches belong to other classes, as those of the background do.

    Explanations, all from the prototypes' similarity maps: `class` is their sum, weighted by the target's row of W.
    `best` is the map of the target's own prototype with the highest similarity × weight. `mean` is their mean, the same
    for every class.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        prototypes_per_class: P / K, with P the number of prototypes.
        channels: number of channels D of prototypes, and of features after the add-on layers.
        prototype_size: rows and columns of cells of a prototype.
        distance: `l2` or `cosine`.
        add_on: `regular` has two layers, `bottleneck` halves the channels step by step. With `l2` both end in a
            sigmoid.
        activation: act(d) of the squared distance d: `log` is ln((d + 1) / (d + 1e-4)), `linear` is -d.
        class_specific: prototypes belong to classes. Otherwise patches of all classes attract every prototype, there is
            no separation term, and l1 covers all weights.
        wrong_weight: initial weight of prototypes of other classes (NP-ProtoPNet: -1, with `last_layer` in no `lrs`).
        cluster: weight of the cluster term.
        separation: weight of the separation term.
        l1: weight of the l1 term.
        unique: `push` gives no patch to two prototypes.
        last_layer_steps: steps of `fit_last_layer`, one batch each (paper: 45,000 on CUB). 5000 steps can move a weight
            from -0.5 to 0.
        last_layer_lr: learning rate of `fit_last_layer`, which uses Adam.
        prune_neighbours: number of nearest training patches that `prune` looks at (paper: 6).
        prune_least: `prune` removes prototypes with fewer patches of their own class among these (paper: 3).
    """

    additive = True
    actions: ClassVar[tuple[str, ...]] = ("reset_optimizer", "push", "fit_last_layer", "prune")
    pushed_by, after_push = "push", ("last_layer",)
    offers = ("any_size", "explain", "rescale")
    explanations: ClassVar[tuple[str, ...]] = ("class", "best", "mean")
    class_maps = True
    untrained: ClassVar[Mapping[str, Any]] = {"prune_least": 0}
    class_identity: Tensor
    kept: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        prototypes_per_class: int = 10,
        channels: int = 128,
        prototype_size: tuple[int, int] = (1, 1),
        distance: Distance = "l2",
        add_on: Literal["regular", "bottleneck"] = "regular",
        activation: Literal["log", "linear"] = "log",
        class_specific: bool = True,
        wrong_weight: float = -0.5,
        cluster: float = 0.8,
        separation: float = 0.08,
        l1: float = 1e-4,
        unique: bool = False,
        last_layer_steps: int = 10_000,
        last_layer_lr: float = 1e-4,
        prune_neighbours: int = 6,
        prune_least: int = 3,
    ) -> None:
        super().__init__(num_classes)
        if min(prototypes_per_class, channels, *prototype_size) < 1:
            raise InputError("model.prototypes_per_class, model.channels and model.prototype_size must be at least 1")
        if not 0 <= prune_least <= prune_neighbours or not prune_neighbours:
            raise InputError(f"model.prune_least={prune_least} must be from 0 to prune_neighbours={prune_neighbours}")
        check_channels(distance, channels)
        if last_layer_steps < 0 or not 0 <= last_layer_lr < torch.inf:
            raise InputError("model.last_layer_steps and model.last_layer_lr must be 0 or more")
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        self.cosine = distance == "cosine"
        self.add_on = add_on_layers(self.backbone.channels, channels, add_on)
        if self.cosine:
            self.add_on[-1] = nn.Identity()
        p = num_classes * prototypes_per_class
        self.prototypes = nn.Parameter(torch.rand(p, channels, *prototype_size) - 0.5 * self.cosine)
        self.last_layer = nn.Linear(p, num_classes, bias=False)
        own = torch.arange(p) // prototypes_per_class == torch.arange(num_classes)[:, None]  # (K, P)
        self.register_buffer("class_identity", own, persistent=False)
        with torch.no_grad():
            self.last_layer.weight.copy_(torch.where(own, 1.0, wrong_weight))
        self.register_buffer("kept", torch.ones(p, dtype=torch.bool))
        self.sources = Sources(p)
        self.log_activation, self.signed_maps = activation == "log", activation != "log"
        self.class_specific, self.unique = class_specific, unique
        self.cluster, self.separation, self.l1 = cluster, separation, l1
        self.last_layer_steps, self.last_layer_lr = last_layer_steps, last_layer_lr
        self.prune_neighbours, self.prune_least = prune_neighbours, prune_least

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> features (B, D, h, w) that prototypes are compared with: in [0, 1], or of norm 1."""
        features: Tensor = self.add_on(self.backbone(images))
        return unit(features) if self.cosine else features

    def similarity(self, distances: Tensor) -> Tensor:
        """Activation of squared distances d: ln((d + 1) / (d + ε)) or -d."""
        return ((distances + 1) / (distances + EPSILON)).log() if self.log_activation else -distances

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and similarity maps (B, P, h, w); aux has `distances` and
        `similarities` of the nearest patches, (B, P) each."""
        distances = self.distances(self.features(images))
        nearest = distances.flatten(2).min(dim=2).values
        similarities = self.similarity(nearest)
        logits = product(similarities * self.kept, self.last_layer.weight.T)  # the sum of evidence also under autocast
        maps = self.similarity(over_cells(distances, self.prototypes.shape))
        return InterpOutput(logits, maps, {"distances": nearest, "similarities": similarities})

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy `ce`, `cluster`, `separation` (below 0) and `l1`."""
        own = self.class_identity[targets]  # (B, P)
        distances = output.aux["distances"].masked_fill(~self.kept, torch.inf)
        if not self.class_specific:
            terms = {"cluster": self.cluster * distances.min(dim=1).values.mean()}
        else:
            to_own = distances.masked_fill(~own, torch.inf).min(dim=1).values
            to_other = distances.masked_fill(own, torch.inf).min(dim=1).values
            # The distance is infinite if all of these prototypes are pruned.
            to_own, to_other = (x.masked_fill(x.isinf(), 0.0) for x in (to_own, to_other))
            terms = {"cluster": self.cluster * to_own.mean(), "separation": -self.separation * to_other.mean()}
        return self._classification(output.logits, self.last_layer.weight, targets) | terms

    def _classification(self, logits: Tensor, weights: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The terms that depend on the last layer's weights (K, P)."""
        penalised = weights * (self.kept & ~self.class_identity if self.class_specific else self.kept)
        return {"ce": F.cross_entropy(logits, targets), "l1": self.l1 * penalised.abs().sum()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone`, `add_on`, `prototypes` and `last_layer`."""
        return {
            "backbone": list(self.backbone.parameters()),
            "add_on": list(self.add_on.parameters()),
            "prototypes": [self.prototypes],
            "last_layer": list(self.last_layer.parameters()),
        }

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The contribution of each prototype to the target's logit, similarity × weight, (B, P)."""
        return output.aux["similarities"] * self.kept * self.last_layer.weight[targets]

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """`class`: the sum of similarity maps, weighted by the target's row of W. `best`: the map of the target's own
        prototype with the most evidence. `mean`: the mean of all maps.

        Returns:
            Maps (B, h, w).
        """
        maps = output.maps.float()
        kind = self.check_kind(kind)
        if kind == "class":
            return torch.einsum("bp,bphw->bhw", self.kept * self.last_layer.weight[targets].float(), maps)
        if kind == "mean":
            return maps[:, self.kept].mean(dim=1)
        own = self.class_identity[targets] & self.kept
        best = self.evidence(output, targets).masked_fill(~own, -torch.inf).argmax(dim=1)
        chosen = maps[torch.arange(len(maps), device=maps.device), best]
        return chosen * own.any(dim=1)[:, None, None]  # 0 for a class whose prototypes are all pruned

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The similarity maps of the three prototypes with the most evidence for the target."""
        best = self._strongest(output, targets, 3)
        return output.maps[torch.arange(len(best), device=best.device)[:, None], best]

    def _strongest(self, output: InterpOutput, targets: Tensor, n: int) -> Tensor:
        """Numbers of the n prototypes with the most evidence for the target, (B, n); fewer if fewer are left."""
        evidence = self.evidence(output, targets).masked_fill(~self.kept, -torch.inf)
        return evidence.topk(min(n, int(self.kept.sum())), dim=1).indices

    @torch.no_grad()
    def readings(self, output: InterpOutput, targets: Tensor, image_size: Size, n: int | None = None) -> list[Reading]:
        """The n prototypes (by default 5) with the most evidence for the target.

        Each has the text similarity × weight = evidence, and a box around the 5 % of the image's pixels with the
        highest activation. The evidence of all prototypes sums to the logit.
        """
        everything, best = self.evidence(output, targets), self._strongest(output, targets, n or 5)
        evidence = everything.gather(1, best)
        found = []
        for i, (values, numbers) in enumerate(zip(evidence.tolist(), best.tolist(), strict=True)):
            boxes = activation_boxes(output.maps[i, numbers], image_size).tolist()
            similarities = output.aux["similarities"][i, numbers].tolist()
            weights = self.last_layer.weight[targets[i], numbers].tolist()
            texts = [f"{s:.2f} × {w:.2f} = {e:.2f}" for s, w, e in zip(similarities, weights, values, strict=True)]
            matches = [Match(p, tuple(box), text) for p, box, text in zip(numbers, boxes, texts, strict=True)]
            logit, rest = float(everything[i].sum()), int(self.kept.sum()) - len(matches)
            total = f"These add {sum(values):.2f}, {rest} others {logit - sum(values):z.2f}: the logit is {logit:.2f}."
            found.append(Reading(matches, total))
        return found

    @property
    def prototype_classes(self) -> Tensor:
        """The class of each prototype, (P, K) bool: its own; without `class_specific`, that of its largest weight."""
        heaviest = F.one_hot(self.last_layer.weight.argmax(dim=0), self.num_classes).bool()
        return (self.class_identity.T if self.class_specific else heaviest) & self.kept[:, None]

    @property
    def prototype_weights(self) -> Tensor:
        """W (K, P)."""
        return self.last_layer.weight

    def prototype_sheets(self, classes: Sequence[str]) -> dict[str, list[int]]:
        """The prototypes of each class that are not pruned."""
        own = self.class_identity & self.kept
        return {name: own[label].nonzero()[:, 0].tolist() for label, name in enumerate(classes)}

    @torch.no_grad()
    def push(self, data: DataModule) -> None:
        """Replace each prototype by the nearest patch of an un-augmented training image of its class.

        `sources` records the image and the patch. Without `class_specific`, images of all classes are searched.

        Raises:
            InputError: if a class has no training image or, with `unique`, too few of them.
        """
        allowed = self.class_identity.T if self.class_specific else None
        project(self, data, allowed, unique=self.unique)

    def fit_last_layer(self, data: DataModule) -> None:
        """Train W on the similarities of un-augmented training images, which are computed once.

        The steps equal those of a training phase without augmentation that only trains W, with everything in eval mode
        and a new Adam: they use the same batches in the same order.
        """
        found = []
        with torch.no_grad():
            for batch in data.loader("train", augment=False):
                nearest = self.distances(self.features(batch.image.to(self.device)))
                found.append(self.similarity(nearest.flatten(2).amin(dim=2)) * self.kept)
        similarities = in_order(torch.cat(found), len(data.train_indices))
        labels = torch.as_tensor(data.train_images.labels, device=self.device)[data.train_indices]

        def loss(weights: Tensor, batch: list[int]) -> Tensor:
            terms = self._classification(F.linear(similarities[batch], weights), weights, labels[batch])
            return torch.stack(list(terms.values())).sum()

        steps, lr = self.last_layer_steps, self.last_layer_lr
        weights = fit_on_cached(self.last_layer.weight, loss, data, self.current_epoch + 1, steps, lr)
        self.last_layer.weight.data.copy_(weights)

    @torch.no_grad()
    def prune(self, data: DataModule) -> None:
        """Remove prototypes with fewer than `prune_least` patches of their own class among the `prune_neighbours`
        nearest training patches. Removed prototypes no longer contribute to logits.

        Raises:
            InputError: if no prototype would be left.
        """
        images = data.loader("train", augment=False)
        patches = nearest_patches(self.features, images, self.vectors, k=self.prune_neighbours, cosine=self.cosine)
        own = self.class_identity.int().argmax(dim=0)  # (P,)
        kept = self.kept & ((patches.label == own[:, None]).sum(dim=1) >= self.prune_least)
        if not bool(kept.any()):
            raise InputError("prune: no prototype would be left; train longer, or lower model.prune_least")
        self.kept.copy_(kept)


def add_on_layers(features: int, channels: int, kind: Literal["regular", "bottleneck"]) -> nn.Sequential:
    """1×1 convolutions from the backbone's features to the prototypes' channels, ending in a sigmoid.

    Args:
        features: channels of the backbone.
        channels: channels of the prototypes.
        kind: `regular` or `bottleneck`, see `ProtoPNet`.
    """
    if kind == "regular":
        widths = [features, channels, channels]
    else:
        widths = [features]
        while widths[-1] > channels or len(widths) == 1:
            width = max(channels, widths[-1] // 2)
            widths += [width, width]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        convolution = nn.Conv2d(before, after, kernel_size=1)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has one
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())
