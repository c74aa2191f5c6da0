"""The base of all explainers. Calls leave the model unchanged."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from interp_models.core.choices import Preparation
from interp_models.core.errors import InputError
from interp_models.core.inputs import check_images_for, fitting
from interp_models.core.prepared import class_name, prepare, unwrapped
from interp_models.core.registry import Registry
from interp_models.core.scoring import (
    Score,
    ScoreFn,
    Target,
    default_batch,
    evaluating,
    full_float32,
    per_image,
    resolve_target,
    scores_of,
)
from interp_models.core.traits import Trait

EXPLAINERS: Registry["Explainer"] = Registry("explainer", "interp_models.explainers.EXPLAINERS")


class Explainer(ABC):
    """Explains the scores of any module that maps images (B, 3, H, W) to logits (B, K).

    Calls leave the model as it was, also after an exception: no hook, every submodule in its own mode, `requires_grad`
    and `.grad` untouched. As a context manager it keeps the model in eval mode between calls.

    Args:
        model: any module that returns logits, or an object with a field `logits`.
        score: what is explained, the target's `logit` or its `probability`.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    """Traits that the network must have, see `TRAITS`; for others it raises `NotApplicable`."""
    passes: ClassVar[str] = "1"
    """Forward passes of an image whose class is given, on a network that ends in a mean and a linear layer: a formula
    of the options, of the layer's `channels` and of `windows`, the squares that cover the image."""
    back_to_images: ClassVar[bool] = False
    """Whether the score is differentiated by the images, or by a mask on them: each pass goes back, too."""
    uses_class: ClassVar[bool] = True
    """Whether the map depends on the class. Where the map is the model's own, the model says (`class_maps`)."""
    shown: ClassVar[tuple[Literal["box"], ...]] = ()
    """Ground truth that `attribute` takes as a further argument."""
    small: ClassVar[Mapping[str, Any]] = {}
    """Options that make it fast enough for a test."""
    amplifies_rounding: ClassVar[bool] = False
    """Whether maps of networks with small gradients depend on the last digits of float32: tests compare batches in
    float64."""
    stands_bfloat16: ClassVar[bool] = True
    """Whether the map of passes in bfloat16 is near that of float32."""
    preparation: Preparation = "exact"
    """Preparation of the model for many passes."""

    def __init__(self, model: nn.Module, *, score: Score = "logit") -> None:
        self.model = unwrapped(model)  # a wrapper would skip the hooks, or run them once per device
        self.score: Score = score
        self._stack = ExitStack()

    def attribute(self, inputs: Tensor, target: Target = None, boxes: Tensor | None = None) -> Tensor:
        """One map per image, float32 (B, h, w), on the method's own grid, not normalised; larger matters more.

        Args:
            inputs: images (B, 3, H, W).
            target: class to explain: one for all, one per image (B,), or None for the class of the highest score.
            boxes: ground truth (B, 4), XYXY in pixels; read by methods that are `shown` boxes alone.

        Raises:
            InputError: for images that are no float tensor (B, C, H, W), hold NaN, are not in [0, 1] where the model is
                one of this package, or are of another device or precision than the model; for a class that does not
                exist.
        """
        check_images_for(self.model, inputs)
        # Lightning evaluates in inference mode, whose tensors autograd refuses.
        with torch.inference_mode(False), evaluating(self.model), full_float32(), fitting(self.model, inputs):
            images = inputs.clone() if inputs.is_inference() else inputs.detach()
            targets = None if target is None else per_image(target, len(images))
            size, untouched, version = default_batch(images), images.clone(), images._version
            parts = [
                self._attribute(part, None if targets is None else targets[first : first + size]).detach().float()
                for first, part in zip(range(0, len(images), size), torch.split(images, size), strict=True)
            ]
            if images._version != version:
                images.copy_(untouched)
                raise InputError(
                    f"{class_name(self.model)} changes its images in place: let it work on a clone of them"
                )
        return torch.cat(parts)

    @abstractmethod
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        """Return maps (B, h, w). The model is in eval mode; the images fit one pass."""

    def __enter__(self) -> Self:
        self._stack.enter_context(evaluating(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prepared(self, images: Tensor) -> nn.Module:
        """Return the model prepared for many passes of images like these; call it once per `attribute`."""
        return prepare(self.model, images, self.preparation)

    def score_fn(self, images: Tensor) -> ScoreFn:
        """Return the score function: images -> explained scores of all classes (B, K), by the prepared model."""
        model = self.prepared(images)
        return lambda images: scores_of(model(images), self.score)


def target_scores(output: Any, score: Score, target: Target) -> Tensor:
    """The score of each image's target (B,), with its graph."""
    scores = scores_of(output, score)
    return scores.gather(1, resolve_target(target, scores)[:, None])[:, 0]
