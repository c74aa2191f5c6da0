"""Networks that were not trained here, made from a timm name or by a function, and the transform of their images."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError, first_line
from interp_models.core.plugins import import_plugins
from interp_models.core.prepared import class_name, unwrapped
from interp_models.core.schema import parse
from interp_models.core.written import PathText
from interp_models.evaluation.normalisation import classifier_of, data_config

FORMS = "timm:NAME, package.module:function or FILE.py:function"


@dataclass
class NetworkConfig:
    """A network that was not trained here.

    Options about images that are null come from the network's timm data config. A network without one gets timm's
    defaults: mean and standard deviation of ImageNet, 224 pixels, bicubic, crop 0.875.
    """

    timm: str | None = None
    """Name of a timm model; either this or `factory` must be given."""
    weights: PathText | None = "timm"
    """Weights of a timm model: `timm` (from timm's hub), `bundled`, a file, or null for random weights."""
    factory: str | None = None
    """`package.module:function` or `FILE.py:function`; the function takes no arguments and returns the network with its
    weights loaded."""
    name: str | None = None
    """Name in tables; null takes the name of the timm model or of the function."""
    output: Any = None
    """How to read logits from the network's output, see `interp_models.Classifier`; null if it is one."""
    normalize: Any = "auto"
    """Normalisation of images in [0, 1]: `auto`, `imagenet`, a pair [mean, std] of three numbers each, or `none` if the
    network normalises images itself. `auto` is the rule of `interp_models.judge`: the data config of a timm model,
    nothing for an `interp_models.Classifier` and for a model of this package, and `imagenet` for others."""
    image_size: int | None = None
    """Side of the images in pixels."""
    crop_pct: float | None = None
    """Side of the crop ÷ side of the resized image."""
    interpolation: str | None = None
    """Interpolation of the resize: `bilinear` or `bicubic`."""


class Network(NamedTuple):
    """A network that takes images in [0, 1] of a fixed size."""

    name: str
    model: Classifier
    image_size: int
    transform: dict[str, Any]
    """Name and options of the registered transform that prepares its images."""
    described: str
    """Kind of network, for the page."""


def network_config(item: Any) -> NetworkConfig:
    """Parse an item of `networks=`: `timm:NAME`, `package.module:function`, `FILE.py:function`, or keys and values.

    Raises:
        InputError: for any other form, if not exactly one of `timm` and `factory` is given, or if `output` is neither
            text, nor a whole number, nor a list.
    """
    if isinstance(item, str):
        before, colon, after = item.partition(":")
        if not (before and colon and after):
            raise InputError(f"networks: expected {FORMS}, or keys and values; got {item}")
        item = {"timm": after} if before == "timm" else {"factory": item}
    if not isinstance(item, Mapping):
        raise InputError(f"networks: expected {FORMS}, or keys and values; got {item!r}")
    config = NetworkConfig(**parse(NetworkConfig, item, "networks"))
    if (config.timm is None) == (config.factory is None):
        raise InputError("networks: each one needs either timm or factory")
    if not isinstance(config.output, str | int | list | tuple | None):
        raise InputError(
            f"networks: output must be the name or place of the logits, their meaning, or both; got {config.output!r}"
        )
    return config


def build_network(config: NetworkConfig) -> Network:
    """Build the network of a config, in eval mode.

    Raises:
        InputError: if it cannot be built or its weights cannot be loaded, for a name that cannot be a folder's, and
            for options of the normalisation and the output that a `Classifier` or a model of this package has already.
    """
    made = _of_timm(config.timm, config.weights) if config.timm else _of_factory(str(config.factory))
    name = config.name or (config.timm if config.timm else str(config.factory).rpartition(":")[2])
    if not name.strip("."):
        raise InputError(f"networks: the name {name!r} cannot be that of a folder; give another with name=")
    bare = unwrapped(made)
    about = data_config(bare.network if isinstance(bare, Classifier) else bare)
    known = {key: value for key in ("crop_pct", "interpolation") if (value := getattr(config, key)) is not None}
    transform = {"name": "shorter_side", **{key: about[key] for key in ("crop_pct", "interpolation", "crop_mode")}}
    model = _classifier(made, name, config)
    size = config.image_size or int(about["input_size"][-1])
    described = f"timm {config.timm}" if config.timm else class_name(made)
    return Network(name, model, size, {**transform, **known}, described)


def _classifier(made: nn.Module, name: str, config: NetworkConfig) -> Classifier:
    """The network as a `Classifier` in eval mode, normalised by the rule of `judge`."""
    bare = unwrapped(made)
    of_ours = not isinstance(bare, Classifier) and getattr(bare, "unit_images", False)
    if of_ours and config.normalize not in ("auto", "none", None):
        raise InputError(f"networks: {name} normalises images itself; leave normalize out, got {config.normalize!r}")
    try:
        model = classifier_of(made, config.normalize, config.output, from_files=True)
    except InputError as error:
        raise InputError(f"networks: {name}: {error}") from None
    return (model if isinstance(model, Classifier) else Classifier(model)).eval()


def _of_timm(name: str, weights: str | None) -> nn.Module:
    import timm

    from interp_models.core.errors import unknown
    from interp_models.nn.backbone import BUNDLED, create, weights_path
    from interp_models.nn.weights import with_classifier

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    path = weights_path(name, weights)
    if path is not None:
        return with_classifier(name, path)
    try:
        made: nn.Module = create(name, {}, pretrained=weights == "timm")
    except InputError as error:
        why = str(error).rpartition("; ")[0]
        also = ", `bundled` those of the extra demo" if name == BUNDLED else ""
        raise InputError(
            f"{why}; networks=[{{timm: {name}, weights: FILE}}] takes a file's weights{also}, and null random ones"
        ) from None
    except Exception as error:
        raise InputError(f"timm model {name!r} cannot be built: {first_line(error)}") from None
    return made


def _of_factory(factory: str) -> nn.Module:
    made = imported(factory)()
    if not isinstance(made, nn.Module):
        raise InputError(f"{factory} must return a torch.nn.Module; it returned {type(made).__name__}")
    return made


def imported(name: str) -> Callable[[], Any]:
    """Import the function `package.module:function` or `FILE.py:function`; its errors become `InputError`."""
    place, _, function = name.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not have the working folder on its path
    try:
        import_plugins([place])
    except InputError as error:
        raise InputError(str(error).replace(f"plugin {place}", name)) from None
    module = sys.modules[Path(place).stem if place.endswith(".py") else place]
    if not callable(getattr(module, function, None)):
        raise InputError(f"{name}: {place} has no function {function!r}")

    def call() -> Any:
        try:
            return getattr(module, function)()
        except InputError:
            raise
        except Exception as error:  # the user's code can raise any error
            raise InputError(f"{name} failed: {type(error).__name__}: {first_line(error)}") from error

    return call
