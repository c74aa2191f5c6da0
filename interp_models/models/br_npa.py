"""BR-NPA: bilinear representative non-parametric attention.

Paper: Gomez, Ling, Fréour and Mouchère, "BR-NPA: a non-parametric high-resolution attention model to improve the
interpretability of attention", Pattern Recognition 131, 2022. Tutorial: Gomez and Mouchère 2023, section 2.2.4.
High resolution is `output_stride`, and its training `distillation` from a run of low resolution.
Differs from the authors' code in: see docs/quirks.md, `br_npa`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.training.module import MODELS, InterpModule, check_fraction

EPSILON = 1e-5
"""Added to norms."""


@MODELS.register("br_npa")
class BRNPA(InterpModule):
    """Features v_i = CNN(x) at cell i, of norm |v_i|. For n = 1 ... N: the representative i* is the cell of the highest
    score, at first the norm; s_i = max(0, cos(v_i, v_i*)); the map is a_n(i) = s_i / Σ_j s_j and the part vector
    r_n = Σ_i a_n(i) v_i; then every score is multiplied by 1 - s_i. logits = W · [r_1 ... r_N] + b.

    There is nothing to be learnt between backbone and W. Parts come in the order of their salience. As the head is
    linear, a logit is exactly a sum over cells and parts: logit_k = b_k + Σ_i Σ_n a_n(i) <W_k,n, v_i>;
    `explain(kind="class")` gives its terms per cell, `salience` the mean over parts of a_n(i) |v_i|, for every class
    the same.

    Args:
        num_classes: classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`; 8 is the paper's high resolution.
        n_parts: N.
        dropout: on the part vectors.
        label_smoothing: of the cross-entropy.
    """

    additive = True
    explanations: ClassVar[tuple[str, ...]] = ("salience", "class")
    offers = ("explain", "rescale_tail")

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        n_parts: int = 3,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        if n_parts < 1:
            raise InputError(f"model.n_parts must be at least 1; got {n_parts}")
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        self.n_parts = n_parts
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_parts * self.backbone.channels, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K), maps (B, N, h, w) of sum 1; aux holds features and vectors."""
        features = self.backbone(images)
        vectors, maps = parts(features, self.n_parts)
        vectors = self.dropout(vectors)
        return InterpOutput(self.head(vectors.flatten(1)), maps, {"features": features, "vectors": vectors})

    @property
    def weight_by_part(self) -> Tensor:
        """The head's weight as (K, N, C)."""
        return self.head.weight.view(self.num_classes, self.n_parts, -1)

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"ce": F.cross_entropy(output.logits, targets, label_smoothing=self.label_smoothing)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone` and `head`."""
        return {"backbone": list(self.backbone.parameters()), "head": list(self.head.parameters())}

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """<W_k,n, r_n> of the target k for each part n, (B, N)."""
        return (output.aux["vectors"] * self.weight_by_part[targets]).sum(dim=2)

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """a_n(i) |v_i| of the first three parts: red, green and blue in the order of salience."""
        return (output.maps * norms(output.aux["features"]))[:, :3]

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """(B, h, w): `salience`, or `class`, the terms of the target's logit, which sum to it less its bias."""
        features, maps = output.aux["features"].float(), output.maps.float()
        if self.check_kind(kind) == "salience":
            return (maps * norms(features)).mean(dim=1)
        weights = self.weight_by_part[targets].float()  # (B, N, C)
        return (maps * torch.einsum("bnc,bchw->bnhw", weights, features)).sum(dim=1)


def norms(features: Tensor) -> Tensor:
    """|v_i| of features (B, C, h, w): (B, 1, h, w)."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return length


def parts(features: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Part vectors (B, n, C) and their maps (B, n, h, w), which sum to 1, of features (B, C, h, w).

    Scores choose the representatives and are not differentiated; vectors and similarities are.
    """
    vectors = features.flatten(2).transpose(1, 2)  # (B, cells, C)
    length = torch.linalg.vector_norm(vectors, dim=2) + EPSILON
    score, images, maps = length.detach(), torch.arange(len(vectors), device=vectors.device), []
    for _ in range(n):
        chosen = score.argmax(dim=1)
        representative = vectors[images, chosen] / length[images, chosen][:, None]  # (B, C)
        similarity = F.relu((vectors @ representative[:, :, None])[:, :, 0] / length)
        maps.append(similarity / similarity.sum(dim=1, keepdim=True).clamp(min=EPSILON))
        score = score * (1 - similarity.detach())
    attention = torch.stack(maps, dim=1)  # (B, n, cells)
    return attention @ vectors, attention.view(len(vectors), n, *features.shape[2:])
