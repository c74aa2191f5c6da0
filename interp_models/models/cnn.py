"""The black box of the comparison: backbone, average pool, linear classifier.

Its own map is the activation map of the tutorial (Gomez et al., JEI 2023, section 3.1.3): the mean of the feature maps.
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.backbones import BUNDLED, Backbone, Weights
from interp_models.outputs import InterpOutput
from interp_models.training.module import MODELS, InterpModule, check_fraction


@MODELS.register("cnn")
class CNN(InterpModule):
    """Plain fine-tuning: logits = W · mean over cells of F + b.

    Args:
        num_classes: classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        dropout: on the pooled features.
        label_smoothing: of the cross-entropy.
    """

    explanations: ClassVar[tuple[str, ...]] = ("activation",)
    signed_maps = True  # not every timm trunk ends in a ReLU

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.backbone.channels, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and the activation map (B, 1, h, w)."""
        features = self.backbone(images)
        logits = self.head(self.dropout(features.mean(dim=(2, 3))))
        return InterpOutput(logits, features.mean(dim=1, keepdim=True))

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

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """The activation map (B, h, w), the same for every class."""
        self.check_kind(kind)
        return output.maps[:, 0]
