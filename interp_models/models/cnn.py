"""The plain CNN, as a baseline: backbone, mean pooling and a linear classifier."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.modes import evaluating
from interp_models.core.outputs import InterpOutput
from interp_models.nn.backbone import BUNDLED, Backbone, Weights, weights_path
from interp_models.nn.weights import classifiers, find
from interp_models.nn.weights_file import read
from interp_models.training.module import MODELS, InterpModule, check_fraction


class Source(NamedTuple):
    """The file that a head's weights came from."""

    file: Path
    classes: list[str] | None
    """Names of its classes in order; None if the file does not contain them."""


@MODELS.register("cnn")
class CNN(InterpModule):
    """Plain CNN: logits = W · (mean over cells of F) + b, with the features F = CNN(x).

    The loss is the cross-entropy. The model's own map is the activation map, the mean of F over channels (Gomez and
    Mouchère 2023, section 3.1.3).

    Args:
        num_classes: number of classes K.
        backbone: timm model, see `Backbone`.
        weights: see `Backbone`. The classifier of a file is loaded, too, if it has K classes and this model then gives
            the file's logits. Class k of the file becomes class k.
        output_stride: see `Backbone`.
        dropout: dropout rate on the pooled features.
        label_smoothing: label smoothing of the cross-entropy.
    """

    explanations: ClassVar[tuple[str, ...]] = ("activation",)
    tasks = ("classes", "labels")
    offers = ("any_size", "explain", "mean_and_linear", "rescale", "rescale_tail", "rules")
    signed_maps = True  # not every timm backbone ends in a ReLU

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
        path = weights_path(backbone, weights)
        self._asked = None if weights == "bundled" else path  # those of ImageNet have other classes, as all know
        self.head_source = None if path is None else load_head(self.head, self.backbone, backbone, path)
        """The file that the head's weights came from; None if they are random."""

    def forward(self, images: Tensor) -> InterpOutput:
        """Images (B, 3, H, W) -> logits (B, K) and the activation map (B, 1, h, w)."""
        features = self.backbone(images)
        logits = self.head(self.dropout(features.mean(dim=(2, 3))))
        return self.output(logits, features.mean(dim=1, keepdim=True))

    def keep_head(self, classes: list[str]) -> str | None:
        """Reset a head that was loaded from a file if its classes are not those of the data.

        Args:
            classes: class names of the data, in order.

        Returns:
            A message about the head; None without a file of weights.
        """
        if self.head_source is None:
            return None if self._asked is None else f"head starts at random: {self._asked} has none that fits"
        file, own = self.head_source
        if own is None:
            return f"head from {file}; its classes are assumed to be in the order of the data's"
        if own == classes:
            return f"head from {file}, with the same classes"
        self.head_source = None
        self.head.reset_parameters()
        a, b = next((a, b) for a, b in zip(own, classes, strict=True) if a != b)
        return f"head not taken from {file}: it has other classes, {a!r} in place of {b!r}"

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

    def explain(self, output: InterpOutput, targets: Tensor, kind: str | None = None) -> Tensor:
        """The activation map (B, h, w), the same for every class."""
        self.check_kind(kind)
        return output.maps[:, 0]


def load_head(head: nn.Linear, backbone: Backbone, name: str, path: Path) -> Source | None:
    """Load a file's classifier into a head.

    It is only loaded if it has as many classes, and if mean pooling and this head give the logits of the file's model.

    Args:
        head: linear layer with as many outputs as the data have classes.
        backbone: backbone with the file's weights.
        name: timm name of the backbone.
        path: path of the file.

    Returns:
        The source; None if the head was left unchanged.
    """
    content = read(path)
    written = content.get("interp_models")
    if isinstance(written, Mapping):
        if written["config"]["model"]["name"] != "cnn":
            return None
        state = {key: content["state_dict"][f"head.{key}"] for key in ("weight", "bias")}
        if any(state[key].shape != value.shape for key, value in head.state_dict().items()):
            return None
        head.load_state_dict(state)
        return Source(path, written.get("classes"))
    whole = find(backbone.trunk, content, path).state
    names = classifiers(backbone.trunk)
    state = {key: whole[f"{n}.{key}"].float() for n in names for key in ("weight", "bias") if f"{n}.{key}" in whole}
    if len(names) != 1 or any(k not in state or state[k].shape != v.shape for k, v in head.state_dict().items()):
        return None
    if not _same_logits(backbone, state, name, whole):
        return None
    head.load_state_dict(state)
    return Source(path, None)


@torch.no_grad()
def _same_logits(backbone: Backbone, head: dict[str, Tensor], name: str, whole: dict[str, Tensor]) -> bool:
    """Whether mean pooling and the head give the logits of timm's whole model, so that no layer lies between them."""
    try:
        model: Any = timm.create_model(name, num_classes=len(head["bias"]))
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in whole.items() if k in own and v.shape == own[k].shape}, strict=False)
        images = torch.randn(2, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        expected = model.eval()(images)
        with evaluating(backbone):
            found = F.linear(backbone.features(images).mean(dim=(2, 3)), head["weight"], head["bias"])
    except Exception:  # timm's model has another form of head
        return False
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3, atol=1e-3 * float(found.std()))
