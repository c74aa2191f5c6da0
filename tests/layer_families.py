"""The layer that class activation maps read in families of networks; writes a table to docs/layers.md.

timm's families (the smallest model of each), torchvision's classification models, and the image classifiers of Hugging
Face's transformers, with random weights.

python -m tests.layer_families [timm | torchvision | transformers ...]
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interp_models.core.errors import InputError, first_line
from interp_models.core.norms import gradients
from interp_models.explainers import EXPLAINERS
from interp_models.explainers.forms import tensor_of
from interp_models.explainers.layers import Layer, target_layer
from tests.trunk_families import MOST, families, millions, smallest

TABLE = Path(__file__).parents[1] / "docs" / "layers.md"
SOURCES = ("timm", "torchvision", "transformers")
SMALL = {
    "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "hidden_size": 48, "intermediate_size": 96,
    "num_attention_heads": 3,
}  # fmt: skip
"""Options of transformers' configs that make a model small."""
STRIPES, DRAWS = 5, 2
"""Most stripes of cells whose gradients are compared, and random combinations of the features of each."""
ORDERED = 0.9
"""Least correlation between the places of stripes of cells and those of their gradients."""


def named(source: str) -> dict[str, Callable[[], nn.Module]]:
    """Functions that build the models of a source, by name."""
    if source == "timm":
        return {family: (lambda family=family: _of_timm(smallest(family))) for family in families()}
    if source == "torchvision":
        from torchvision import models

        return {name: (lambda name=name: _of_torchvision(name)) for name in models.list_models(module=models)}
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as names

    return {name: (lambda name=name: _of_transformers(name)) for name in names}


def _of_timm(name: str) -> nn.Module:
    if (size := millions(name)) > MOST:
        raise TooLargeError(size)
    made: nn.Module = timm.create_model(name, num_classes=10)
    return made


def _of_torchvision(name: str) -> nn.Module:
    from torchvision import models

    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    size = models.get_model_weights(name).DEFAULT.meta["num_params"] / 1e6
    if size > MOST:
        raise TooLargeError(size)
    made: nn.Module = models.get_model(name, weights=None, num_classes=10, **options)
    return made


def _of_transformers(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    config = AutoConfig.for_model(name, num_labels=10)
    for key, value in SMALL.items():
        if isinstance(getattr(config, key, None), int) and not hasattr(config, "hidden_sizes"):
            setattr(config, key, value)
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[name]
    config.architectures = [known if isinstance(known, str) else known[0]]
    made: nn.Module = AutoModelForImageClassification.from_config(config)
    size = sum(p.numel() for p in made.parameters()) / 1e6
    if size > MOST:
        raise TooLargeError(size)
    return made


class TooLargeError(Exception):
    """A model with more than `MOST` million parameters."""


def verdict(make: Callable[[], nn.Module]) -> str:
    """The layer of a model and its grid, or the reason why none is taken.

    Raises:
        AssertionError: if maps do not lie on the image.
    """
    torch.manual_seed(0)
    try:
        model = make()
    except TooLargeError as error:
        return f"not tried: {error.args[0]:.0f} million parameters"
    except Exception as error:  # libraries that some models need are missing
        return f"not tried: {type(error).__name__}: {first_line(error)}"
    revived(model)
    size = next((side for side in sides(model) if why_not(model, side) is None), None)
    if size is None:
        return f"not tried: {why_not(model, 224)}"
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        adapted(model, images)
    try:
        layer = target_layer(model, None, images)
        saliency = EXPLAINERS.build("hirescam", model=model).attribute(images, 1)
    except InputError as error:
        return f"refused: {error}"
    check(model, layer, images)
    rows, columns = saliency.shape[1:]
    form = {"nchw": "", "nhwc": ", channels last", "tokens": ", tokens", "function": ", tokens"}[layer.form.kind]
    return f"`{layer.name}`, {rows} × {columns}{form}"


def sides(model: nn.Module) -> Iterator[int]:
    """Sizes of images to try."""
    for found in (getattr(model, "default_cfg", None), getattr(model, "config", None)):
        size = found.get("input_size") if isinstance(found, dict) else getattr(found, "image_size", None)
        if size is not None:
            yield int(size[-1] if isinstance(size, tuple | list) else size)
    yield from (224, 256, 299, 64)


def why_not(model: nn.Module, side: int) -> str | None:
    """The reason why a model takes no square images of this size; None if it takes them."""
    try:
        with torch.no_grad():
            model.eval()(torch.rand(1, 3, side, side))
    except Exception as error:  # networks raise errors of many types
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def revived(model: nn.Module) -> None:
    """Replace first values that stop the signal: zeros of classifiers and residual scales, small scales."""
    for weight in model.parameters():
        if weight.dim() == 1 and 0 < float(weight.abs().max()) < 1e-2 and float(weight.std()) < 1e-6:
            weight.data.fill_(1.0)
        elif weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    for part in model.modules():
        if isinstance(part, _BatchNorm) and part.weight is not None:
            nn.init.ones_(part.weight)


def adapted(model: nn.Module, images: Tensor) -> None:
    """Set batch norm's statistics to those of these images, which keeps the signal of a random network."""
    parts = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    for part in parts:
        part.momentum = 1.0
        part.train()
    model(torch.cat([images, images.flip(2)]))
    model.eval()


def check(model: nn.Module, layer: Layer, images: Tensor) -> None:
    """Each row of cells has its gradient in its own rows of the image, and each column in its own columns.

    The search for the layer uses changes of pixels and never this gradient. A random combination of the features of a
    stripe of cells is differentiated by the pixels. The centres of the squared gradients must lie in the stripes'
    order: their correlation with the stripes' places is at least `ORDERED`.

    Raises:
        AssertionError: if they do not.
    """
    generator = torch.Generator().manual_seed(1)
    pixels = images[:1].clone().requires_grad_()
    features = features_of(model, layer, pixels)
    for axis in (2, 3):
        cells, side = features.shape[axis], images.shape[axis]
        if cells == 1:
            continue
        stripes = torch.arange(cells).tensor_split(min(cells, STRIPES))
        centres = []
        for stripe in stripes:
            some, found = features.index_select(axis, stripe), torch.zeros(side)
            for _ in range(DRAWS):
                weights = torch.randn(some.shape, generator=generator)
                (gradient,) = gradients((some * weights).sum(), [pixels], again=True)
                found += gradient.square().sum(dim=(0, 1, 5 - axis))
            assert float(found.sum()) > 0, f"no pixel changes the cells {stripe.tolist()} of axis {axis}"
            centres.append(float(found @ torch.arange(side).float() / found.sum()))
        own = torch.stack([stripe.float().mean() for stripe in stripes])
        together = float(torch.corrcoef(torch.stack([own, torch.tensor(centres)]))[0, 1])
        assert together >= ORDERED, f"centres of the gradients, axis {axis}: {[round(c) for c in centres]} of {side}"


def features_of(model: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    """The feature map of a layer, with its graph."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(tensor_of(output).clone())

    handle = layer.module.register_forward_hook(keep)
    try:
        model(images.clone())
    finally:
        handle.remove()
    return layer.feature_map(outputs[layer.use])


def listed() -> dict[tuple[str, str], str]:
    """Verdict of each family of the table, by source and name."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {(row[0], row[1].strip("`")): row[2] for row in rows if row[0] in SOURCES}


def main(sources: list[str]) -> None:
    """Write the table; rows of other sources stay."""
    rows = listed() if TABLE.is_file() else {}
    for source in sources or SOURCES:
        rows = {key: said for key, said in rows.items() if key[0] != source}
        for name, make in named(source).items():
            try:
                said = verdict(make)
            except AssertionError as error:
                said = f"WRONG: {error}"
            rows[source, name] = said
            print(f"{source} {name}: {said}", flush=True)
    head = TABLE.read_text().partition("| Source")[0].rstrip() + "\n\n"
    lines = ["| Source | Family | Layer and grid |", "| --- | --- | --- |"]
    lines += [f"| {source} | `{name}` | {said} |" for (source, name), said in sorted(rows.items())]
    TABLE.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
