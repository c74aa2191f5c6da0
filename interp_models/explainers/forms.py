"""How a layer's output holds a feature map: channels first or last, or tokens of cells."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor

from interp_models.nn.attention import to_map

Reshape = Any
"""Type of the option `reshape`, how a layer's output becomes a feature map (B, C, h, w): `nchw` (as it is), `nhwc`
(from (B, h, w, C)), `tokens` (from (B, T, C)), a function that only moves or drops values, or None to find out."""
KINDS = ("nchw", "nhwc", "tokens")

MOST_OTHERS = 8
"""Most class, register and distillation tokens beside the tokens of the patches."""


@dataclass(frozen=True)
class Form:
    """How a layer's output holds a feature map."""

    kind: Literal["nchw", "nhwc", "tokens", "function"]
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of cells, for tokens."""
    prefix: int = 0
    """Number of tokens before those of the cells."""
    suffix: int = 0
    """Number of tokens after those of the cells."""
    function: Callable[[Tensor], Tensor] | None = None

    def to_map(self, output: Tensor) -> Tensor:
        """The output as a feature map (B, C, h, w)."""
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            cells = output[:, self.prefix : output.shape[1] - self.suffix].transpose(1, 2)
            return cells.reshape(*cells.shape[:2], *self.grid)
        return output if self.function is None else self.function(output)

    def replaced(self, output: Tensor, features: Tensor) -> Tensor:
        """The output with the features (B, C, h, w) in place of its own; `output` may be of one image only."""
        if self.kind == "nchw":
            return features.clone()  # the next layer may work in place
        one = output[:1]
        places = self.to_map(torch.arange(one.numel(), device=output.device).view_as(one)).flatten()
        rows = output.flatten(1).expand(len(features), -1).clone()
        return rows.index_copy(1, places, features.flatten(1).to(rows.dtype)).view(-1, *output.shape[1:])

    def cells(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the map in an output of this shape per image."""
        if self.kind == "tokens":
            return self.grid
        return (shape[0], shape[1]) if self.kind == "nhwc" else (shape[1], shape[2])


def possible_forms(shape: tuple[int, ...], image: tuple[int, ...]) -> Iterator[Form]:
    """The forms of a feature map that are possible for an output of this shape, for an image (C, H, W).

    Tokens that fill a grid of exactly the image's aspect ratio come first, then those with few other tokens: the
    cells of a map without its first or last row keep their order, too.

    >>> [(form.grid, form.prefix) for form in possible_forms((17, 8), (3, 64, 64))][:2]
    [((4, 4), 1), ((4, 4), 0)]
    """
    _, height, width = image
    if len(shape) == 3:
        (h, w), last = shape[1:], shape[:2]
        if h * w > 1 and h <= height and w <= width:
            yield Form("nchw")
        if last[0] * last[1] > 1 and last[0] <= height and last[1] <= width and fits(last, (height, width)):
            yield Form("nhwc")
    if len(shape) == 2:
        exact: list[Form] = []
        inexact: list[Form] = []
        for others in range(min(MOST_OTHERS, shape[0] - 2) + 1):
            cells = shape[0] - others
            h = round((cells * height / width) ** 0.5)
            if others < cells and h and cells % h == 0 and fits((h, cells // h), (height, width)):
                kept = exact if h * width == cells // h * height else inexact
                kept += [Form("tokens", (h, cells // h), others - suffix, suffix) for suffix in range(others + 1)]
        yield from (*exact, *inexact)


def fits(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether a grid has the image's aspect ratio, up to one cell."""
    (height, width), (h, w) = size, grid
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def patches(vit: Any, size: tuple[int, int]) -> Form:
    """The form of a timm vision transformer's tokens, for images of a size."""
    known = ref(vit)  # a form is cached as long as the model lives, which it must not keep alive
    return Form("function", function=lambda tokens: to_map(known(), tokens, size))


def tensor_of(output: Any) -> Tensor | None:
    """A module's output, or the first of several; None if it is no tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def swapped(output: Any, tensor: Tensor) -> Any:
    """A module's output with another tensor in the place that `tensor_of` reads."""
    if not isinstance(output, tuple | list):
        return tensor
    others = [tensor, *output[1:]]
    return type(output)(*others) if hasattr(output, "_fields") else type(output)(others)
