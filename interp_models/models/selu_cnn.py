"""The CNN for MNIST of Nielsen et al. on combinations of gradient methods: two convolutions and two linear layers."""

from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput
from interp_models.training.module import MODELS, InterpModule, check_fraction


@MODELS.register("selu_cnn")
class SeluCNN(InterpModule):
    """A small CNN for grey images: logits = W₂ · SELU(W₁ · F + b₁) + b₂, with the features F = CNN(x).

    CNN is two 3 × 3 convolutions of 32 and 64 channels, each with SELU and 2 × 2 max pooling. The hidden layer has 128
    units and dropout (Nielsen et al., figure 1). The loss is the cross-entropy. The model's own map is the activation
    map, the mean of F over channels. Colours are averaged to grey.

    Args:
        num_classes: number of classes K.
        image_size: height and width of the images in pixels, at least 4.
        dropout: dropout rate on the hidden layer.

    Raises:
        InputError: for smaller images.
    """

    explanations: ClassVar[tuple[str, ...]] = ("activation",)
    tasks = ("classes", "labels")
    offers = ("explain", "rescale", "rescale_tail", "rules")
    signed_maps = True  # SELU has negative values
    small = MappingProxyType({"image_size": 64})

    def __init__(self, num_classes: int, *, image_size: int = 28, dropout: float = 0.5) -> None:
        super().__init__(num_classes)
        check_fraction(dropout=dropout)
        if image_size < 4:
            raise InputError(f"image_size must be at least 4; got {image_size}")
        self.image_size = image_size
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SELU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.SELU(), nn.MaxPool2d(2),
        )  # fmt: skip
        cells = (image_size // 4) ** 2
        self.head = nn.Sequential(
            nn.Linear(64 * cells, 128), nn.SELU(), nn.Dropout(dropout), nn.Linear(128, num_classes)
        )

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and the activation map (B, 1, H / 4, W / 4)."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise InputError(
                f"selu_cnn takes images of {self.image_size} x {self.image_size} pixels (model.image_size); got "
                f"{images.shape[2]} x {images.shape[3]}"
            )
        features = self.features(images.mean(dim=1, keepdim=True))
        return self.output(self.head(features.flatten(1)), features.mean(dim=1, keepdim=True))

    def loss(self, output: InterpOutput, targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"ce": self.cross_entropy(output.logits, targets)}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """`backbone` and `head`."""
        return {"backbone": list(self.features.parameters()), "head": list(self.head.parameters())}

    @property
    def feature_layer(self) -> nn.Module:
        """The convolutions."""
        return self.features

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """The activation map (B, h, w), the same for every class."""
        self.check_kind(kind)
        return output.maps[:, 0]
