"""B-CNN: bilinear attention pooling with N maps.

Tutorial: Gomez and Mouchère, "Computing and evaluating saliency maps for image classification: a tutorial", Journal of
Electronic Imaging 32(2), 020801, 2023, section 2.2.2, equations 11 and 12 and figure 6; bilinear
attention pooling: Hu and Qi 2019 (WS-DAN, arXiv:1901.09891), whose recipe is `normalise`, `centre` and `crop_drop`;
`counterfactual`: Rao et al., "Counterfactual attention learning for fine-grained visual categorization and
re-identification", ICCV 2021 (CAL).
Differs from the tutorial's code in: see docs/quirks.md, `bcnn`.
"""

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from interp_models.core.distributed import gathered
from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.nn.backbone import BUNDLED, Backbone, Weights
from interp_models.training.module import MODELS, InterpModule, check_fraction, check_not_negative


@MODELS.register("bcnn")
class BCNN(InterpModule):
    """Features F = CNN(x), maps A = ReLU(conv1x1(F)), f_n = mean over cells of A_n · F, logits = W · [f_1 ... f_N] + b.

    The head is linear in the pooled features, so a logit is exactly a sum over cells and maps:
    logit_k = b_k + Σ_hw (1/hw) Σ_n A_n(hw) <W_k,n, F(hw)>. `explain(kind="class")` gives that sum's terms per cell.

    With `normalise` the head reads 100 P, P = v / |v| with v = sign(f) √|f|: a sum over maps still, but not over cells.

    Loss: cross-entropy + centre · mean_i ‖P_i - c_yi / |c_yi|‖² + counterfactual · cross-entropy of the logits less
    those of maps drawn from U(0, 2). With `crop_drop` each image is passed again, cropped around one of its maps and
    with another one's place blacked out; cross-entropies of the three are averaged, and all three have an effect.

    Args:
        num_classes: classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`.
        output_stride: see `Backbone`.
        n_maps: attention maps N.
        relu: maps are not below 0. Without it (equation 12 as printed) the function is unchanged when a map and its
            part of W change sign together, so that the sign of a map means nothing.
        block: a residual block of two 3×3 convolutions comes before the maps' convolution (the tutorial's code).
        normalise: see above.
        centre: weight of this term; needs `normalise`. Centres c move by 0.05 of every image's distance from them.
        crop_drop: see the loss.
        counterfactual: weight of this term.
        dropout: on the pooled features.
        label_smoothing: of the cross-entropy.
    """

    additive = True
    explanations: ClassVar[tuple[str, ...]] = ("mean", "class")
    centres: Tensor

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
        normalise: bool = False,
        centre: float = 0.0,
        crop_drop: bool = False,
        counterfactual: float = 0.0,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout, label_smoothing=label_smoothing)
        if n_maps < 1:
            raise InputError(f"model.n_maps must be at least 1; got {n_maps}")
        check_not_negative(centre=centre, counterfactual=counterfactual)
        if centre and not normalise:
            raise InputError("model.centre needs model.normalise=true: its distances are of vectors of length 1")
        self.backbone = Backbone(backbone, weights=weights, output_stride=output_stride)
        channels = self.backbone.channels
        self.block = BasicBlock(channels, channels) if block else nn.Identity()
        self.attention = nn.Conv2d(self.backbone.channels, n_maps, kernel_size=1)
        # All maps start near 1, the average pool of a plain CNN: a random filter on features that are not below 0
        # has one sign all over an image, and a map that starts below 0 everywhere never wakes.
        nn.init.ones_(cast(Tensor, self.attention.bias))
        self.relu = relu
        self.signed_maps = not relu
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_maps * channels, num_classes)
        self.normalise, self.centre, self.crop_drop, self.counterfactual = normalise, centre, crop_drop, counterfactual
        if normalise:
            # no sum over cells; the class variable holds for all other forms
            self.explanations = ("mean",)  # type: ignore[misc]
        if centre:
            self.register_buffer("centres", torch.zeros(num_classes, n_maps * channels))
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K), maps (B, N, h, w); aux holds features and what is pooled of them."""
        features = self.backbone(images)
        maps = self.attention(self.block(features))
        maps = F.relu(maps) if self.relu else maps
        pooled = self._pooled(features, maps)  # (B, N, C)
        aux = {"features": features, "pooled": pooled} | ({"images": images} if self.crop_drop else {})
        return InterpOutput(self._logits(pooled), maps, aux)

    def _pooled(self, features: Tensor, maps: Tensor) -> Tensor:
        """What the head reads, (B, N, C)."""
        pooled = bilinear_attention_pool(features, maps)
        return 100 * unit(pooled) if self.normalise else pooled

    def _logits(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(pooled.flatten(1)))
        return logits

    @property
    def class_weights(self) -> Tensor:
        """The head's weight as (K, N, C)."""
        return self.head.weight.view(self.num_classes, -1, self.backbone.channels)

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, and in training the terms that are asked for."""
        terms, passed, labels = {"ce": self._cross_entropy(output.logits, targets)}, [output], targets
        if self.training and self.crop_drop:
            guided = self(torch.cat(crop_and_drop(output.aux["images"], output.maps.detach())))
            passed, labels = [output, guided], targets.repeat(3)
            terms["ce"] = terms["ce"] / 3
            terms["crop_drop"] = self._cross_entropy(guided.logits, targets.repeat(2)) * 2 / 3
        if self.training and self.counterfactual:
            effects = [of.logits - self._without_attention(of) for of in passed]
            terms["counterfactual"] = self.counterfactual * self._cross_entropy(torch.cat(effects), labels)
        if self.training and self.centre:
            terms["centre"] = self.centre * self._away(output, targets).square().sum(dim=1).mean()
        return terms

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def _without_attention(self, output: InterpOutput) -> Tensor:
        """Logits of the same features by maps of U(0, 2)."""
        chance = 2 * torch.rand_like(output.maps)
        return self._logits(self._pooled(output.aux["features"], chance))

    def observe(self, output: InterpOutput, targets: Tensor) -> None:
        """Move the centres: c_k += 0.05 Σ_i (P_i - c_k / |c_k|) over the images i of class k, on all ranks."""
        if not self.centre:
            return
        rows, labels = gathered(self._away(output, targets)), gathered(targets)
        self.centres.index_add_(0, labels.flatten(), 0.05 * rows.flatten(0, 1).to(self.centres.dtype))

    def _away(self, output: InterpOutput, targets: Tensor) -> Tensor:
        """P_i - c_yi / |c_yi|, (B, N C)."""
        return output.aux["pooled"].flatten(1) / 100 - F.normalize(self.centres[targets], dim=1)

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
        """<W_k,n, f_n> of the target k for each map n, (B, N)."""
        return (output.aux["pooled"] * self.class_weights[targets]).sum(dim=2)

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """(B, h, w): `mean` of the maps, or `class`, the terms of the target's logit, which sum to it less its bias."""
        if self.check_kind(kind) == "mean":
            return output.maps.mean(dim=1)
        features, maps = output.aux["features"].float(), output.maps.float()
        weights = self.class_weights[targets].float()  # (B, N, C)
        per_map = torch.einsum("bnc,bchw->bnhw", weights, features)
        return (maps * per_map).sum(dim=1) / maps[0, 0].numel()


def bilinear_attention_pool(features: Tensor, maps: Tensor) -> Tensor:
    """Weighted average pool of features (B, C, h, w) by each of the maps (B, N, h, w): (B, N, C), divided by h·w."""
    # The order of the product matters to the gradient's memory layout: with the maps first, the gradient of a single
    # image's features has strides that batch norm's backward on CPU misreads (torch 2.12).
    root = math.sqrt(maps[0, 0].numel())  # half before and half after the sum, which in float16 would overflow
    return (features.flatten(2) @ (maps / root).flatten(2).transpose(1, 2)).transpose(1, 2) / root


def unit(pooled: Tensor) -> Tensor:
    """sign(f) √|f| of pooled features (B, N, C), divided by the length of all of an image's."""
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))  # float16 has no 1e-12
    rooted = pooled.sign() * (pooled.abs() + 1e-12).sqrt()  # whose slope at 0 would be infinite
    return F.normalize(rooted.flatten(1), dim=1).view_as(pooled)


@torch.no_grad()
def crop_and_drop(images: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) cropped around a map, and with the place of a map blacked out (WS-DAN, section 3.2).

    Two maps of (B, N, h, w) are drawn for each image, with chances like the roots of their sums. The crop is the box,
    a tenth of the image wider on each side, of where the first is at least θ of its highest value, θ ~ U(0.4, 0.6),
    stretched to the whole image; black is where the second is at least θ, θ ~ U(0.2, 0.5).
    """
    size, maps = (images.shape[2], images.shape[3]), maps.float()  # float16 has no 1e-12
    # An image may have no map, and a training that diverges maps that are no numbers, of which the loss tells.
    chances = maps.clamp(min=0).sum(dim=(2, 3)).sqrt().nan_to_num(0.0, 1.0) + 1e-6
    drawn = torch.multinomial(chances, 2, replacement=True)
    chosen = maps.gather(1, drawn[:, :, None, None].expand(-1, -1, *maps.shape[2:]))
    large = F.interpolate(chosen, size=size, mode="bilinear", align_corners=False)
    uniform = torch.rand(len(images), 2, device=images.device)
    theta = torch.stack([0.4 + 0.2 * uniform[:, 0], 0.2 + 0.3 * uniform[:, 1]], dim=1)
    highest = large.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)  # of no map nothing is high
    high = large >= theta[:, :, None, None] * highest  # (B, 2, H, W)
    (top, bottom), (left, right) = (_ends(high[:, 0].any(dim=axis)) for axis in (2, 1))
    affine = torch.zeros(len(images), 2, 3, device=images.device)
    affine[:, 0, 0], affine[:, 0, 2] = right - left, right + left - 1
    affine[:, 1, 1], affine[:, 1, 2] = bottom - top, bottom + top - 1
    grid = F.affine_grid(affine.to(images.dtype), list(images.shape), align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops, images * ~high[:, 1:]


def _ends(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row (B, n) of marks begins and ends, a tenth wider, in fractions of n."""
    n, marks = inside.shape[1], inside.int()
    first, last = marks.argmax(dim=1), n - marks.flip(1).argmax(dim=1)
    return (first / n - 0.1).clamp(min=0), (last / n + 0.1).clamp(max=1)
