"""B-CNN: bilinear attention pooling with N maps.

Source: Gomez and Mouchère, "Computing and evaluating saliency maps for image classification: a tutorial", Journal of
Electronic Imaging 32(2), 020801, 2023, section 2.2.2, equations 11 and 12, and figure 6. docs/quirks.md (`bcnn`) lists
the differences from the tutorial's code.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.nn.attention_pooling import attention_filters, bilinear_attention_pool
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.training.module import MODELS, InterpModule, check_fraction


@MODELS.register("bcnn")
class BCNN(InterpModule):
    """B-CNN: features F = CNN(x), maps A = ReLU(conv1x1(F)), pooled features f_n = mean over cells of A_n · F,
    logits = W · [f_1 ... f_N] + b.

    The head is linear in the pooled features f_n, so a logit is exactly a sum over cells and maps:
    logit_k = b_k + Σ_i (1 / h·w) Σ_n A_n(i) <W_k,n, F(i)> over the h · w cells i. The loss is the cross-entropy.

    Explanations: `mean` is the mean of the maps, the same for every class. `class` is the contribution of each cell to
    the target's logit.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        n_maps: number of attention maps N.
        relu: apply a ReLU to the maps. Without it (equation 12 as printed) the sign of a map is arbitrary: the logits
            do not change if a map and its part of W both change sign.
        block: put a residual block of two 3×3 convolutions before the convolution of the maps (the tutorial's code).
        dropout: dropout rate on the pooled features.
        label_smoothing: label smoothing of the cross-entropy.
    """

    additive = True
    tasks = ("classes", "labels")
    offers = ("any_size", "explain", "rescale", "rules")
    explanations: ClassVar[tuple[str, ...]] = ("mean", "class")

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        n_maps: int = 3,
        relu: bool = True,
        block: bool = False,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        if n_maps < 1:
            raise InputError(f"model.n_maps must be at least 1; got {n_maps}")
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        channels = self.backbone.channels
        self.block = BasicBlock(channels, channels) if block else nn.Identity()
        self.attention = attention_filters(channels, n_maps)
        self.relu = relu
        self.signed_maps = not relu
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_maps * channels, num_classes)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and maps (B, N, h, w); aux has `features` and `pooled` features."""
        features = self.backbone(images)
        maps = self.attention(self.block(features))
        maps = F.relu(maps) if self.relu else maps
        pooled = bilinear_attention_pool(features, maps)  # (B, N, C)
        logits = self.head(self.dropout(pooled.flatten(1)))
        return self.output(logits, maps, {"features": features, "pooled": pooled})

    @property
    def head_weights(self) -> Tensor:
        """The head's weights W, (K, N, C)."""
        return self.head.weight.view(self.num_classes, -1, self.backbone.channels)

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"ce": self.cross_entropy(output.logits, targets, self.label_smoothing)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone`, `attention` and `head`."""
        return {
            "backbone": list(self.backbone.parameters()),
            "attention": [*self.block.parameters(), *self.attention.parameters()],
            "head": list(self.head.parameters()),
        }

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The contribution <W_k,n, f_n> of each map n to the logit of the target k, (B, N)."""
        return (output.aux["pooled"] * self.head_weights[targets]).sum(dim=2)

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """`mean`: the mean of the maps. `class`: the contribution of each cell to the target's logit without its bias.

        Returns:
            Maps (B, h, w).
        """
        if self.check_kind(kind) == "mean":
            return output.maps.mean(dim=1)
        features, maps = output.aux["features"].float(), output.maps.float()
        weights = self.head_weights[targets].float()  # (B, N, C)
        per_map = torch.einsum("bnc,bchw->bnhw", weights, features)
        return (maps * per_map).sum(dim=1) / maps[0, 0].numel()
