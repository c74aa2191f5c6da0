"""DP-Net: classification by discriminative parts.

Source: Sicre, Zhang, Dejasmin, Daaloul, Ayache and Artières, "DP-Net: Learning Discriminative Parts for Image
Recognition", ICIP 2023 (arXiv:2404.15037), and the formulas of its slides. There is no public code. docs/quirks.md
(`dpnet`) lists our choices where the slides state nothing.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.prototypes.parts import PartModel
from interp_models.training.module import MODELS, InterpModule, check_fraction, check_not_negative


@MODELS.register("dpnet")
class DPNet(InterpModule, PartModel):
    """DP-Net: parts u_p of norm 1, scores s_pr = <u_p, x_r> in regions x_r of CNN(x), b_p = max_r s_pr, logits = V b.

    The regions are the cells of CNN(x), and the means over windows of cells. A logit is exactly the sum of the
    contributions V_kp b_p of the P parts. Each class has q parts of its own.

    The loss is the cross-entropy and three constraints on the parts, each with a weight:

    - complementary: (1 / P²) Σ_{i≠j} (u_i · u_j)². It makes parts different from each other.
    - covering: (1 / (R ln P)) Σ_r H(softmax_p(s_pr / τ)), in [0, 1]. It is the mean entropy over the R regions, and
      makes each region belong to few parts.
    - specific: (1 / (P (K - 1))) Σ |V_kp| over classes k and parts p of other classes. It makes a class depend on its
      own parts.

    Explanations: `class` is Σ_p V_kp s_pr at cell r for the target k. `mean` is the mean of the scores over parts.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        parts_per_class: q = P / K.
        windows: sides of the windows in cells; 1 is a single cell. Windows larger than the map are left out. If all
            are, the largest square that fits is used.
        complementary: weight of the complementary term.
        covering: weight of the covering term.
        specific: weight of the class-specific term.
        temperature: τ of the covering term.
        dropout: dropout rate on b.
        label_smoothing: label smoothing of the cross-entropy.
    """

    additive = True
    signed_maps = True
    explanations: ClassVar[tuple[str, ...]] = ("class", "mean")
    class_maps = True
    tasks = ("classes", "labels")
    offers = ("any_size", "explain", "rescale", "rescale_tail", "rules")

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        parts_per_class: int = 10,
        windows: tuple[int, ...] = (1, 2, 3),
        complementary: float = 0.0,
        covering: float = 0.0,
        specific: float = 0.0,
        temperature: float = 1.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        check_not_negative(complementary=complementary, covering=covering, specific=specific)
        if parts_per_class < 1 or not windows or min(windows) < 1 or not 0 < temperature < math.inf:
            raise InputError(
                "model needs parts_per_class >= 1, windows of at least 1 cell and a finite temperature > 0; got "
                f"{parts_per_class}, {list(windows)} and {temperature}"
            )
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        self.windows = sorted(set(windows))
        self.parts = nn.Parameter(torch.randn(parts_per_class * num_classes, self.backbone.channels))
        self.head = nn.Linear(len(self.parts), num_classes, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.complementary, self.covering, self.specific = complementary, covering, specific
        self.temperature, self.label_smoothing = temperature, label_smoothing
        own = torch.arange(num_classes)[:, None] == torch.arange(len(self.parts)) // parts_per_class
        self.register_buffer("own", own, persistent=False)
        """Whether a part belongs to a class, (K, P) bool."""

    own: Tensor

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K), and as maps the scores of the cells (B, P, h, w); aux has the scores of
        all `regions` (B, P, R), and b as `best` (B, P)."""
        maps = F.conv2d(self.backbone(images), F.normalize(self.parts, dim=1)[:, :, None, None])
        regions = torch.cat([scores.flatten(2) for _, scores in self.pooled(maps)], dim=2)
        best = regions.amax(dim=2)
        return self.output(self.head(self.dropout(best)), maps, {"regions": regions, "best": best})

    def pooled(self, maps: Tensor) -> list[tuple[int, Tensor]]:
        """For each side of windows, the side and the scores (B, P, h', w') of its regions.

        <u, mean of x> is the mean of <u, x>, so they are means of the scores of the cells.
        """
        sides = [side for side in self.windows if side <= min(maps.shape[2:])] or [min(maps.shape[2:])]
        return [(side, maps if side == 1 else F.avg_pool2d(maps, side, stride=1)) for side in sides]

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy `ce`, and the constraints whose weight is not 0."""
        terms = {"ce": self.cross_entropy(output.logits, targets, self.label_smoothing)}
        if self.complementary:
            terms["complementary"] = self.complementary * complementary(self.parts)
        if self.covering:
            terms["covering"] = self.covering * covering(output.aux["regions"] / self.temperature)
        if self.specific:
            terms["specific"] = self.specific * specific(self.head.weight, self.own)
        return terms

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone`, `parts` and `head`."""
        return {
            "backbone": list(self.backbone.parameters()),
            "parts": [self.parts],
            "head": list(self.head.parameters()),
        }

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    @property
    def part_weights(self) -> Tensor:
        """V, (K, P)."""
        return self.head.weight

    def best(self, output: InterpOutput) -> Tensor:
        """b, (B, P)."""
        best: Tensor = output.aux["best"]
        return best

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The contribution V_kp b_p of each part p to the logit of the target k, (B, P)."""
        return output.aux["best"] * self.head.weight[targets]

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The positive scores of the three parts that contribute most to the target's logit."""
        most = self.evidence(output, targets).topk(min(3, output.maps.shape[1]), dim=1).indices
        return output.maps.gather(1, most[:, :, None, None].expand(-1, -1, *output.maps.shape[2:])).relu()

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """`class`: Σ_p V_kp s_pr at cell r for the target k. `mean`: the mean of the scores over parts.

        Returns:
            Maps (B, h, w).
        """
        if self.check_kind(kind) == "mean":
            return output.maps.mean(dim=1)
        return torch.einsum("bp,bphw->bhw", self.head.weight[targets].float(), output.maps.float())

    def boxes(self, output: InterpOutput) -> Tensor:
        """The best region of each part, (B, P, 4), XYXY in fractions of the image."""
        height, width = output.maps.shape[2:]
        corners = []
        for side, scores in self.pooled(output.maps):
            rows, columns = scores.shape[2:]
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            corners.append(torch.stack([x, y, x + side, y + side], dim=2).flatten(0, 1))
        scale = torch.tensor([width, height, width, height])
        return (torch.cat(corners) / scale).to(output.maps.device)[output.aux["regions"].argmax(dim=2)]


def complementary(parts: Tensor) -> Tensor:
    """(1 / P²) Σ_{i≠j} (u_i · u_j)², where u_i are the rows of parts (P, C) divided by their norms; in [0, 1)."""
    unit = F.normalize(parts, dim=1)
    gram = unit.T @ unit if len(unit) > unit.shape[1] else unit @ unit.T  # both have the same norm: take the smaller
    return (gram.square().sum() - unit.square().sum(dim=1).square().sum()) / len(parts) ** 2


def covering(scores: Tensor) -> Tensor:
    """Mean over regions of the entropy of softmax_p of scores (B, P, R), divided by ln P; in [0, 1], 0 for one part."""
    log = scores.float().log_softmax(dim=1)
    return -(log.exp() * log).sum(dim=1).mean() / math.log(max(2, scores.shape[1]))


def specific(weights: Tensor, own: Tensor) -> Tensor:
    """Mean |V_kp| over all pairs of a class and a part of another class, for weights V (K, P) and own (K, P) bool."""
    return (weights.abs() * ~own).sum() / (~own).sum()
