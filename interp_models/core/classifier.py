"""`Classifier` turns any network into a classifier of images in [0, 1]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.endings import Ending, ending_of, is_left_out
from interp_models.core.errors import InputError
from interp_models.core.inputs import are_probabilities
from interp_models.core.maps import at_least_float32
from interp_models.core.modes import evaluating
from interp_models.core.outputs import LabelLogits, Regression, field_of

KINDS = ("softmax", "sigmoid", "one_logit", "probabilities", "regression")
Output = str | int | Sequence[str | int] | None
"""Type of the option `output`: where logits are in a network's output and what they mean, see `Classifier`."""


class Classifier(nn.Module):
    """Wraps a network so that it normalises images itself and returns logits.

    Images are in [0, 1], where 0 is black.

    Args:
        network: any module that takes images (B, C, H, W). It is not changed.
        mean: mean of each channel, subtracted from the images; None leaves images as they are.
        std: standard deviation of each channel; images are divided by it.
        output: place of the logits in the network's output, meaning of the logits, or both as a pair.
            Place: the name of a field or key, or the position in a tuple. By default it is a tensor (B, K), a field
            `logits`, or the only tensor (B, K) of a tuple or dict.
            Meaning: `softmax` (K exclusive classes, the default), `sigmoid` (K independent labels; the network ends in
            a sigmoid or returns the logits before it), `one_logit` (one value z for two classes: class 1 has the
            probability sigmoid(z), and the logits are -z/2 and z/2), `probabilities` (K exclusive classes; the logits
            are the logarithms of the output), or `regression` (one number z, for explainers only: class 1 is what
            raises it, with the score z, and class 0 what lowers it, with the score -z).

    Raises:
        InputError: for an `output` of another form, and if only one of `mean` and `std` is given.

    >>> Classifier(nn.Flatten(), output="one_logit")(torch.full((1, 1, 1, 1), 2.0)).tolist()
    [[-1.0, 1.0]]
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        output: Output = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise InputError("a classifier needs mean and std, or neither")
        if std is not None and not all(value > 0 for value in std):
            raise InputError(f"std must be above 0; got {list(std)}")
        self.network = network
        self.unit_images = mean is not None
        """Whether images must be in [0, 1]; see `inputs.check_images_for`."""
        self.image_channels = 3 if mean is None else len(list(mean))
        self.register_buffer("mean", None if mean is None else torch.tensor(list(mean)).view(1, -1, 1, 1), False)
        self.register_buffer("std", None if std is None else torch.tensor(list(std)).view(1, -1, 1, 1), False)
        self.where, self.kind, self.declared = _where_and_kind(output)

    def forward(self, images: Tensor) -> Tensor | LabelLogits | Regression:
        """Compute the logits (B, K) of images (B, C, H, W); those of independent labels are `LabelLogits`, and those of
        a regression `Regression`.

        Raises:
            InputError: if the network's output has another form than `output` says.
        """
        images = self.normalised(images)
        found = field_of(self.network(images), self.where, one=self.kind in ("one_logit", "regression"))
        if self.kind == "softmax":
            return found
        if self.kind == "regression":
            z = self._one(found)
            return Regression(torch.cat([-z, z], 1))
        if self.kind == "probabilities":
            if is_left_out():
                return found
            if not are_probabilities(found, max(1e-3, 2 * torch.finfo(found.dtype).eps)):
                raise InputError(
                    "output probabilities: the rows that the network returns are not in [0, 1] with a sum of 1; "
                    "sigmoids of independent labels are output sigmoid, and one value is one_logit"
                )
            wide = at_least_float32(found)
            return wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
        if self._are_probabilities(found, images):
            wide = at_least_float32(found)
            wide = wide.clamp(torch.finfo(wide.dtype).tiny, 1 - torch.finfo(wide.dtype).eps / 2)
            found = wide.log() - (-wide).log1p()
        if self.kind == "one_logit":
            z = self._one(found)
            return torch.cat([-z / 2, z / 2], 1)
        return LabelLogits(found)

    def normalised(self, images: Tensor) -> Tensor:
        """The images as the network takes them."""
        if self.mean is None or self.std is None:
            return images
        if not images.is_floating_point():
            raise InputError(f"images must be floating point numbers in [0, 1]; got {images.dtype}")
        return (images - self.mean.to(images.dtype)) / self.std.to(images.dtype)

    def ending(self, images: Tensor) -> Ending | None:
        """What the network ends in, see `endings.ending_of`; the network is in eval mode."""
        return ending_of(self.network, self.normalised(images[:1]), self.where)

    def _one(self, found: Tensor) -> Tensor:
        if found.dim() == 2 and found.shape[1] != 1:
            raise InputError(f"output {self.kind}: the network returns {found.shape[1]} values per image, not one")
        return found.reshape(-1, 1)

    def _are_probabilities(self, found: Tensor, images: Tensor) -> bool:
        """Whether the network's output has probabilities, as behind a sigmoid, and not logits."""
        low, high = torch.aminmax(found.detach())
        if is_left_out() or not bool((low >= 0) & (high <= 1)):
            return False
        with evaluating(self.network):
            ending = ending_of(self.network, images[:1], self.where)
        return ending is not None and ending.kind != "log_softmax"

    def extra_repr(self) -> str:
        """Normalisation and output, so that a digest of the repr sees them."""
        mean, std = (None if x is None else x.flatten().tolist() for x in (self.mean, self.std))
        return f"mean={mean}, std={std}, output={self.where!r}, {self.kind}"


def _where_and_kind(output: Output) -> tuple[str | int | None, str, bool]:
    """Place, meaning, and whether the meaning was given."""
    parts: list[Any] = [] if output is None else [output] if isinstance(output, str | int) else list(output)
    kinds = [part for part in parts if part in KINDS]
    places = [part for part in parts if part not in KINDS]
    if len(kinds) > 1 or len(places) > 1 or not all(isinstance(place, str | int) for place in places):
        raise InputError(
            f"output must be the name or place of the logits, one of {', '.join(KINDS)}, or both; got {output!r}"
        )
    return (places[0] if places else None), (kinds[0] if kinds else "softmax"), bool(kinds)
