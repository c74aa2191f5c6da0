"""BR-NPA: bilinear representative non-parametric attention.

Source: Gomez, Ling, Fréour and Mouchère, "BR-NPA: a non-parametric high-resolution attention model to improve the
interpretability of attention", Pattern Recognition 131, 2022. Tutorial: Gomez and Mouchère 2023, section 2.2.4.
`output_stride` sets the resolution; the paper trains a model of high resolution by `distillation` from one of low
resolution. docs/quirks.md (`br_npa`) lists the differences from the authors' code.
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
"""Added to norms, against division by 0."""


@MODELS.register("br_npa")
class BRNPA(InterpModule):
    """BR-NPA: attention maps from similarities between feature vectors, without parameters; logits = W · [r_1 ... r_N]
    + b of the part vectors r_n.

    v_i = CNN(x) is the feature vector at cell i. At first, the score of a cell is the norm |v_i|. For n = 1 ... N:

    1. The representative i* is the cell with the highest score.
    2. The similarity of each cell is s_i = max(0, cos(v_i, v_i*)).
    3. The map is a_n(i) = s_i / Σ_j s_j, and the part vector is r_n = Σ_i a_n(i) v_i.
    4. Every score is multiplied by 1 - s_i.

    So parts come in the order of their salience. The head is linear, so a logit is exactly a sum over cells and parts:
    logit_k = b_k + Σ_i Σ_n a_n(i) <W_k,n, v_i>. The loss is the cross-entropy.

    Explanations: `salience` is the mean over parts of a_n(i) |v_i|, the same for every class. `class` is the
    contribution of each cell to the target's logit.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`; 8 is the paper's high resolution.
        n_parts: number of parts N.
        dropout: dropout rate on the part vectors.
        label_smoothing: label smoothing of the cross-entropy.
    """

    additive = True
    explanations: ClassVar[tuple[str, ...]] = ("salience", "class")
    tasks = ("classes", "labels")
    offers = ("any_size", "explain", "rescale", "rescale_tail", "rules")

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
        """Images (B, 3, H, W) -> logits (B, K) and maps (B, N, h, w), which sum to 1; aux has `features` and part
        `vectors`."""
        features = self.backbone(images)
        vectors, maps = parts(features, self.n_parts)
        vectors = self.dropout(vectors)
        return self.output(self.head(vectors.flatten(1)), maps, {"features": features, "vectors": vectors})

    @property
    def head_weights(self) -> Tensor:
        """The head's weights W, (K, N, C)."""
        return self.head.weight.view(self.num_classes, self.n_parts, -1)

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"ce": self.cross_entropy(output.logits, targets, self.label_smoothing)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone` and `head`."""
        return {"backbone": list(self.backbone.parameters()), "head": list(self.head.parameters())}

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The contribution <W_k,n, r_n> of each part n to the logit of the target k, (B, N)."""
        return (output.aux["vectors"] * self.head_weights[targets]).sum(dim=2)

    def display(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """a_n(i) |v_i| of the first three parts, for red, green and blue."""
        return (output.maps * norms(output.aux["features"]))[:, :3]

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """`salience`: the mean over parts of a_n(i) |v_i|. `class`: the contribution of each cell to the target's logit
        without its bias.

        Returns:
            Maps (B, h, w).
        """
        features, maps = output.aux["features"].float(), output.maps.float()
        if self.check_kind(kind) == "salience":
            return (maps * norms(features)).mean(dim=1)
        weights = self.head_weights[targets].float()  # (B, N, C)
        return (maps * torch.einsum("bnc,bchw->bnhw", weights, features)).sum(dim=1)


def norms(features: Tensor) -> Tensor:
    """Norms |v_i| of features (B, C, h, w): (B, 1, h, w)."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return length


def parts(features: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Part vectors (B, n, C), and their maps (B, n, h, w), which sum to 1, for features (B, C, h, w).

    Scores only choose the representatives, and have no gradient. Vectors and similarities have one.
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
