"""The base class of all explainers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.choices import Preparation
from interp_models.core.eager import eagerly
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.inputs import check_images_for, fitting
from interp_models.core.known import unchanging
from interp_models.core.modes import alone, evaluating, full_float32
from interp_models.core.norms import gradients
from interp_models.core.prepared import class_name, prepare, unwrapped
from interp_models.core.registry import Registry
from interp_models.core.scoring import (
    Score,
    ScoreFn,
    Target,
    finite_logits,
    logits_of,
    per_image,
    read_as,
    resolve_target,
    scores_of,
)
from interp_models.core.traits import Trait
from interp_models.core.truth import Kind, Truth

EXPLAINERS: Registry["Explainer"] = Registry("explainer", "interp_models.explainers.EXPLAINERS")


class Explainer(ABC):
    """Abstract: computes saliency maps of any module that maps images (B, 3, H, W) to logits (B, K).

    A subclass implements `_attribute`, and sets the class attributes below where they differ from their defaults.

    A call leaves the model unchanged, also after an exception: hooks are removed, every submodule returns to its own
    mode, and `requires_grad` and `.grad` keep their values. As a context manager, an explainer keeps the model in eval
    mode between calls.

    Args:
        model: any module that returns logits, or an object with a field `logits`.
        score: explain the target's `logit` or its `probability`.
    """

    needs: ClassVar[tuple[Trait, ...]] = ()
    """Traits that the network must have, see `TRAITS`. The explainer raises `NotApplicable` for other networks."""
    passes: ClassVar[str] = "1"
    """Forward passes per image if the class is given, on a network that ends in mean pooling and a linear layer. It is
    a formula: it may use the names of options, `channels` (of the layer), `windows` (squares that cover the image) and
    `selected` (feature maps that the method chooses)."""
    back_to_images: ClassVar[bool] = False
    """Whether each pass also goes backward to the images, or to a mask on them."""
    uses_class: ClassVar[bool] = True
    """Whether the map depends on the class. For `intrinsic`, the model decides (`class_maps`)."""
    shown: ClassVar[tuple[Kind, ...]] = ()
    """Ground truth that `attribute` takes as a further argument."""
    small: ClassVar[Mapping[str, Any]] = {}
    """Options that make it fast enough for a test."""
    amplifies_rounding: ClassVar[bool] = False
    """Whether float32 rounding can visibly change the map of a network with small gradients. Tests then compare
    batches in float64."""
    stands_bfloat16: ClassVar[bool] = True
    """Whether maps computed in bfloat16 are close to those computed in float32."""
    score: Score = "logit"
    """What is explained; see the constructor."""
    preparation: Preparation = "exact"
    """How the model is prepared for many passes, see `Preparation`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        made = vars(cls).get("__init__")
        if made is not None:  # a dataclass gets its own later: see `ByFields`

            @wraps(made)
            def checked(self: Any, *args: Any, **given: Any) -> None:
                check_choices(made, given)
                made(self, *args, **given)

            cls.__init__ = checked  # type: ignore[method-assign]

    def __init__(self, model: nn.Module, *, score: Score = "logit") -> None:
        check_choices(Explainer.__init__, {"score": score})
        self.model = unwrapped(model)  # with a wrapper, hooks are skipped or run once per device
        self.score = score
        self._stack = ExitStack()

    def attribute(self, inputs: Tensor, target: Target = None, truth: Truth | None = None) -> Tensor:
        """Compute one saliency map per image.

        Args:
            inputs: images (B, 3, H, W).
            target: class to explain: one for all images, one per image (B,), or None for the predicted class.
            truth: where the objects are; only used by explainers that show it (`shown`).

        Returns:
            Maps (B, h, w), float32, on the method's own grid and not normalised. Larger values mean more important.

        Raises:
            InputError: if the images are not a float tensor (B, C, H, W), contain NaN, are not in [0, 1] for a model of
                this package, or have another device or precision than the model; or if a class does not exist.
            NotApplicable: if the method cannot explain this model, or if a map is not finite.
        """
        check_images_for(self.model, inputs)
        # Lightning evaluates in inference mode. Autograd refuses tensors that were made in it.
        with (
            alone(self.model), torch.inference_mode(False), evaluating(self.model), full_float32(), unchanging(),
            fitting(self.model, inputs), eagerly(self.model),
            nullcontext() if self.passes == "0" else read_as(self.model, inputs, self.score),
        ):  # fmt: skip
            images = inputs.clone() if inputs.is_inference() else inputs.detach()
            targets = None if target is None else per_image(target, len(images))
            size, untouched, version = default_batch(images), images.clone(), images._version
            try:
                parts = []
                for first, part in zip(range(0, len(images), size), torch.split(images, size), strict=True):
                    with finite_logits(part, first):
                        found = self._attribute(part, None if targets is None else targets[first : first + size])
                    check_form(found, len(part), type(self).__name__)
                    parts.append(found.detach().float())
            finally:
                changed = images._version != version
                if changed:
                    images.copy_(untouched)
            if changed:
                raise InputError(
                    f"{class_name(self.model)} changes its images in place; let its forward work on a clone"
                )
        maps = torch.cat(parts)
        check_maps(maps, class_name(self.model))
        return maps

    @abstractmethod
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        """Return maps (B, h, w). The model is in eval mode, and the images fit into one pass."""

    def __enter__(self) -> Self:
        self._stack.enter_context(evaluating(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prepared(self, images: Tensor) -> nn.Module:
        """Return a copy of the model that is faster at many passes. Call this once per `_attribute`."""
        return prepare(self.model, images, self.preparation)

    def score_fn(self, images: Tensor) -> ScoreFn:
        """Return a function of images: the explained scores of all classes (B, K), by the prepared model."""
        model = self.prepared(images)
        return lambda images: scores_of(model(images), self.score)

    def scored(self, images: Tensor, target: Target) -> tuple[ScoreFn, Tensor, Tensor]:
        """The function of `score_fn`, the images' scores of all classes (B, K), and the class of each image (B,).

        The predicted class is that of the highest logit: probabilities of large logits are equal up to rounding.
        """
        model = self.prepared(images)
        output = model(images)
        targets = resolve_target(target, logits_of(output).detach())
        return lambda images: scores_of(model(images), self.score), scores_of(output, self.score), targets


@dataclass(eq=False, repr=False)
class ByFields(Explainer, ABC):
    """Abstract: an explainer whose fields are its options.

    Subclasses with options of their own are dataclasses with `kw_only=True`. They check options in `__post_init__`.
    """

    model: nn.Module
    """Any module that returns logits."""

    def __post_init__(self) -> None:
        super().__init__(self.model, score=self.score)
        check_choices(type(self), vars(self))


def check_choices(hinted: Any, given: Mapping[str, Any]) -> None:
    """Raise `InputError` if an option that is given is none of the literals of its type hint.

    >>> def draw(*, kind: Literal["sum", "mean"]) -> None: ...
    >>> check_choices(draw, {"kind": "mean"})
    >>> check_choices(draw, {"kind": "max"})
    Traceback (most recent call last):
    interp_models.core.errors.InputError: kind must be one of sum, mean; got 'max'
    """
    for name, hint in get_type_hints(hinted).items():
        if get_origin(hint) is Literal and name in given and given[name] not in get_args(hint):
            raise InputError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}; got {given[name]!r}")


def check_form(found: object, count: int, name: str) -> None:
    """Raise `InputError` unless `found`, which the explainer `name` returned for so many images, is maps (B, h, w)."""
    if not isinstance(found, Tensor) or found.dim() != 3 or len(found) != count:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{name}._attribute must return a tensor (B, h, w) of {count} maps; got {what}")


def check_maps(maps: Tensor, name: str) -> None:
    """Raise `NotApplicable` if maps (B, h, w) of the model `name` hold NaN or infinite values.

    Logits were found to be finite (`finite_logits`), so it was a gradient or a value in between. It waits for the
    device once.
    """
    if maps.numel() and not bool(torch.stack(torch.aminmax(maps)).isfinite().all()):
        first = int((~maps.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise NotApplicable(
            f"the map of image {first} is not finite: a gradient or another value in {name} is infinite or NaN; a "
            "square root at 0, for example, has an infinite gradient"
        )


def target_scores(output: Any, score: Score, target: Target) -> Tensor:
    """The score of each image's target class (B,), with its autograd graph.

    Args:
        output: return value of the model: logits (B, K), or an object with a field `logits`.
        score: `logit` or `probability`.
        target: class: one for all images, one per image (B,), or None for the predicted class.
    """
    scores = scores_of(output, score)
    targets = resolve_target(target, logits_of(output).detach())  # probabilities of large logits are equal
    return scores.gather(1, targets[:, None])[:, 0]


def gradient_of(total: Tensor, x: Tensor, what: str, *, again: bool = False) -> Tensor:
    """The gradient of a total score, a scalar, with respect to x.

    Args:
        total: the sum of the explained scores, with its autograd graph.
        x: a tensor of the graph.
        what: what x is, for the message.
        again: whether to keep the graph for another gradient.

    Raises:
        NotApplicable: if the score does not depend on x through differentiable operations.
    """
    gradient = None
    if total.requires_grad:
        (gradient,) = gradients(total, [x], again=again)
    if gradient is None:
        raise no_path(what)
    return gradient


def no_path(what: str) -> NotApplicable:
    """The refusal of a model whose score does not depend on something through differentiable operations."""
    return NotApplicable(f"no gradient path from the score back to {what}")
