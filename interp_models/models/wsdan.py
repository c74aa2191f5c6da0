"""WS-DAN: bilinear attention pooling, trained with class centres, attention cropping and attention dropping.

Source: Hu and Qi, "See better before looking closer: weakly supervised data augmentation network for fine-grained
visual classification", 2019, arXiv:1901.09891. docs/quirks.md (`wsdan`) lists the differences from the unofficial code.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.nn.attention_pooling import Centres, attention_filters, crop_and_drop, pooled_vectors
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.training.module import MODELS, InterpModule, check_fraction, check_not_negative


@MODELS.register("wsdan")
class WSDAN(InterpModule):
    """WS-DAN: normalised bilinear attention pooling. In training, the attention maps also crop and mask the images.

    Features F = CNN(x), maps A = ReLU(conv1x1(F)), f_n = mean over cells of A_n · F, v = sign(f) √|f|, P = v / |v|,
    logits = W · 100 P + b. The square root makes a logit a sum over maps, but not over cells.

    Loss: cross-entropy + centre · mean_i ‖P_i - c_yi / |c_yi|‖², where c_k is the centre of class k and y_i is the
    label of image i. With `crop_drop` each image is also passed cropped around a region of one map, and with a region
    of another map set to black. The cross-entropies of the three are averaged.

    The explanation `mean` is the mean of the maps, the same for every class.

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        n_maps: number of attention maps N.
        normalise: the head reads 100 P; otherwise it reads f.
        centre: weight of the centre term; needs `normalise`. Each image moves its class centre by 0.05 of their
            difference.
        crop_drop: add cropped and masked images to the loss.
        dropout: dropout rate on the pooled features.
        label_smoothing: label smoothing of the cross-entropy.
    """

    additive = True
    offers = ("any_size", "explain", "rescale")
    explanations: ClassVar[tuple[str, ...]] = ("mean",)
    amplifies_rounding = True  # the slope of √|f| is up to 5e5 where f is near 0

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        output_stride: int | None = None,
        n_maps: int = 32,
        normalise: bool = True,
        centre: float = 1.0,
        crop_drop: bool = True,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        if n_maps < 1:
            raise InputError(f"model.n_maps must be at least 1; got {n_maps}")
        check_not_negative(centre=centre)
        if centre and not normalise:
            raise InputError("model.centre needs model.normalise=true: its loss compares vectors of length 1")
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        channels = self.backbone.channels
        self.attention = attention_filters(channels, n_maps)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_maps * channels, num_classes)
        self.centres = Centres(num_classes, n_maps * channels)
        self.normalise, self.centre, self.crop_drop = normalise, centre, crop_drop
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and maps (B, N, h, w); aux has `images`, `features` and the `pooled`
        input of the head (B, N, C)."""
        features = self.backbone(images)
        maps = F.relu(self.attention(features))
        pooled = pooled_vectors(features, maps, normalise=self.normalise)  # (B, N, C)
        aux = {"images": images, "features": features, "pooled": pooled}
        return InterpOutput(self.head(self.dropout(pooled.flatten(1))), maps, aux)

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy `ce`; in training also `crop_drop` and `centre` if they are switched on."""
        terms = {"ce": self._cross_entropy(output.logits, targets)}
        if self.training and self.crop_drop:
            guided = self(torch.cat(crop_and_drop(output.aux["images"], output.maps.detach())))
            terms["ce"] = terms["ce"] / 3
            terms["crop_drop"] = self._cross_entropy(guided.logits, targets.repeat(2)) * 2 / 3
        if self.training and self.centre:
            terms["centre"] = self.centre * self.centres(self._vectors(output), targets)
        return terms

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _vectors(self, output: InterpOutput) -> Tensor:
        """P, (B, N · C)."""
        vectors: Tensor = output.aux["pooled"].flatten(1) / 100
        return vectors

    def observe(self, output: InterpOutput, targets: Tensor) -> None:
        """Move the class centres."""
        if self.centre:
            self.centres.move(self._vectors(output), targets)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone`, `attention` and `head`."""
        return {
            "backbone": list(self.backbone.parameters()),
            "attention": list(self.attention.parameters()),
            "head": list(self.head.parameters()),
        }

    @property
    def feature_layer(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def evidence(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """The contribution of each map n to the logit of the target k, 100 <W_k,n, P_n>, (B, N)."""
        weights = self.head.weight.view(self.num_classes, -1, self.backbone.channels)[targets]
        return (output.aux["pooled"] * weights).sum(dim=2)

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """The mean of the maps (B, h, w), the same for every class."""
        self.check_kind(kind)
        return output.maps.mean(dim=1)
