"""A vision transformer, explained by the attention of its class token.

Sources: Dosovitskiy et al., "An image is worth 16×16 words", ICLR 2021; attention maps as in Caron et al., "Emerging
properties in self-supervised vision transformers" (DINO), ICCV 2021. Tutorial: Gomez and Mouchère 2023, section 2.2.1,
equation 10. docs/quirks.md (`vit_cls`) lists the differences.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import timm
from torch import Tensor, nn

from interp_models.core.errors import InputError, NotApplicable, first_line, unknown
from interp_models.core.outputs import InterpOutput
from interp_models.nn.attention import attentions, class_rows, on_grid, patch_size, transformer
from interp_models.nn.backbone import Weights, create, pixel_statistics, weights_path
from interp_models.nn.weights import load_file
from interp_models.training.module import MODELS, InterpModule, check_fraction
from interp_models.training.optimizers import layer_decay_hints


@MODELS.register("vit_cls")
class ViTCLS(InterpModule):
    """Vision transformer: logits = W · (class token after the last block) + b, with the attention of the class token in
    the last block as maps, A_h = softmax(q_cls Kᵀ / √d).

    The columns of class, register and distillation tokens are left out of the maps, so a map sums to less than 1. A
    distilled transformer classifies by the mean of its class token and its distillation token; the maps are those of
    the class token. Images may have any size that is a multiple of the patch size: position embeddings are
    interpolated. Attention stays fused, except in a last block with rotary position embedding. The loss is the
    cross-entropy.

    Explanations: `mean` or `max` over the heads h, the same for every class.

    Args:
        num_classes: number of classes K.
        backbone: a timm vision transformer with a class token.
        weights: `timm` (timm's hub), the path of a file of weights, or None for random weights.
        drop_path: stochastic depth: the drop rate of the last block. Rates grow linearly from 0 at the first block.
        layer_decay: factor d of layer-wise learning-rate decay. The last block's learning rate is multiplied by d, the
            block before it by d², and so on down to the patch embedding.
        dropout: dropout rate on the class token.
        label_smoothing: label smoothing of the cross-entropy.
    """

    mean: Tensor
    std: Tensor
    explanations: ClassVar[tuple[str, ...]] = ("mean", "max")
    tasks = ("classes", "labels")
    offers = ("any_size", "attention", "explain", "rescale", "rules")
    small: ClassVar[Mapping[str, Any]] = {"backbone": "test_vit", "weights": None}

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "vit_small_patch16_224",
        weights: Weights = "timm",
        drop_path: float = 0.1,
        layer_decay: float = 0.75,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(drop_path=drop_path, dropout=dropout, label_smoothing=label_smoothing)
        if not 0 < layer_decay <= 1:
            raise InputError(f"model.layer_decay must be above 0 and at most 1; got {layer_decay}")
        self.backbone = _trunk(backbone, weights, drop_path)
        mean, std = pixel_statistics(self.backbone)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.backbone.num_features, num_classes)
        nn.init.zeros_(self.head.bias)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.layer_decay, self.label_smoothing = layer_decay, label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and maps (B, heads, h, w).

        Raises:
            InputError: if the images are not a whole number of patches.
        """
        side = patch_size(self.backbone)
        if images.shape[2] % side[0] or images.shape[3] % side[1]:
            raise InputError(
                f"images of {images.shape[2]} × {images.shape[3]} pixels are not a whole number of patches of "
                f"{side[0]} × {side[1]}"
            )
        with class_rows(attentions(self.backbone)[-1]) as rows:
            tokens = self.backbone.forward_features((images - self.mean) / self.std)
        token = self.backbone.forward_head(tokens, pre_logits=True)
        size = (images.shape[2], images.shape[3])
        return self.output(self.head(self.dropout(token)), on_grid(self.backbone, rows[0], size))

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"ce": self.cross_entropy(output.logits, targets, self.label_smoothing)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone` and `head`."""
        return {"backbone": list(self.backbone.parameters()), "head": list(self.head.parameters())}

    def optimizer_hints(self) -> dict[nn.Parameter, tuple[float, bool]]:
        """Layer-wise learning-rate decay. Biases, norms, position embeddings and special tokens have no weight
        decay."""
        hints = layer_decay_hints(self.backbone, self.layer_decay)
        return {**hints, self.head.bias: (1.0, False)}

    @property
    def feature_layer(self) -> nn.Module:
        """The module whose output are the tokens that enter the last block's attention, (B, T, C)."""
        layer: nn.Module = self.backbone.blocks[-1].norm1
        return layer

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """`mean` or `max` of the maps over heads, (B, h, w), the same for every class."""
        return output.maps.mean(dim=1) if self.check_kind(kind) == "mean" else output.maps.amax(dim=1)


def _trunk(name: str, weights: str | None, drop_path: float) -> Any:
    """Create a timm vision transformer without its classifier, whose class token represents the image."""
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path, "dynamic_img_size": True}
    path = weights_path(name, weights)
    try:
        trunk = create(name, options, pretrained=weights == "timm")
        transformer(trunk)
    except TypeError:
        raise InputError(
            f"timm model {name!r} cannot be the backbone of vit_cls: it is not a vision transformer for images of any "
            "size"
        ) from None
    except NotApplicable as error:
        raise InputError(f"timm model {name!r} cannot be the backbone of vit_cls: {error}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"timm model {name!r} cannot be the backbone of vit_cls: {first_line(error)}") from None
    if path is not None:
        load_file(trunk, path)
    return trunk
