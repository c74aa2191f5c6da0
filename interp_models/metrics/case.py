"""`Case`: what a metric sees of a batch of images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from interp_models.core.distances import Watcher
from interp_models.core.errors import InputError
from interp_models.core.inputs import check_clean, check_images, check_unit, pixel_range
from interp_models.core.scoring import ScoreFn, per_image
from interp_models.core.truth import WORDS as TRUTH
from interp_models.core.truth import Truth
from interp_models.metrics import perturbation

T = TypeVar("T")
WORDS: dict[str, str] = {
    "score_fn": "the model's scores",
    "logit_fn": "the model's logits",
    "explain": "the explainer, to explain other images",
    "correct": "the label of every image",
    "patch_scores": "a vision transformer of timm whose patches can be dropped",
    **TRUTH,
}
"""What a metric can need, in words."""
WRAP = (
    "0 is black; leave Normalize out of your transform, and put it before the model: nn.Sequential(Normalize(mean, "
    "std), model), or normalize=(mean, std)"
)
"""Ending of the message about images outside [0, 1]."""


class PatchScores(Protocol):
    """The scores of a vision transformer that sees only some patches, such as `nn.dropping.PatchScores(model,
    images)`."""

    grid: tuple[int, int]
    """Rows and columns of patches."""

    def __call__(self, images: Tensor, kept: Tensor) -> Tensor:
        """Probabilities (B, K) of images (B, 3, H, W) of which the patches at the positions `kept` (B, k) are seen."""


@dataclass(frozen=True)
class Case:
    """A batch of images with their maps, and whatever else is known of them. A metric says what it `needs`."""

    images: Tensor
    """(B, 3, H, W) in [0, 1]; 0 is black."""
    maps: Tensor
    """(B, h, w); larger values mean more important."""
    target: Tensor | int = 0
    """Class that is explained, of each image (B,) or one for all."""
    score_fn: ScoreFn | None = None
    """Maps images (B, 3, H, W) to class probabilities (B, K), such as `probabilities(model)`."""
    clean: Tensor | None = None
    """Probability of the target for each image (B,), if it is known; saves one pass."""
    truth: Truth = field(default_factory=Truth)
    """Where the object and its parts are."""
    correct: Tensor | None = None
    """Whether the model's prediction is the image's label, (B,): 1, 0, or NaN if the label is unknown."""
    explain: Callable[[Tensor], Tensor] | None = None
    """Maps other versions of the images (B, 3, H, W) to their maps (B, h, w), for the same classes."""
    logit_fn: ScoreFn | None = None
    """Maps images (B, 3, H, W) to logits (B, K), such as `logits(model)`."""
    patch_scores: PatchScores | None = None
    """Maps images and patches to the probabilities for these patches alone; only of a vision transformer."""
    watcher: Watcher | None = None
    """Sees the features of perturbed images, for their distance from clean ones."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Results of `once`."""
    curves: dict[str, Tensor] = field(default_factory=dict)
    """Curves that metrics keep for the page, by key: for every image the fractions of the steps and the scores there,
    (B, 2, T). A metric adds those of its own keys."""

    def keep_curve(self, key: str, fractions: Sequence[float], scores: Tensor) -> None:
        """Keep the curve behind a metric's key.

        Args:
            key: the key.
            fractions: fraction of the image that is changed at each step (T,), rising.
            scores: the target's probability at each step (B, T).
        """
        at = torch.tensor(fractions, dtype=torch.float32).expand(len(scores), -1)
        self.curves[key] = torch.stack([at, scores.detach().float().cpu()], dim=1)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The result of `compute`, which does not depend on the maps. It is computed once for all explainers of the
        same images and targets, if their cases have the same `shared`."""
        own = (self.images, self._targets)
        if name not in self.shared or not all(map(_equal, self.shared[name][:2], own)):
            with self.watched() as features:
                self.shared[name] = (*own, compute(), features)
        found: T = self.shared[name][2]
        if self.watcher is not None:
            self.watcher.see_again(self.shared[name][3])
        return found

    def watched(self, *keys: str) -> AbstractContextManager[Tensor | None]:
        """A context of passes of images that were perturbed for these keys of a metric. Their features count for the
        keys' `distance` (see `core.distances`), and not for that of an outer context. A metric whose keys perturb
        images in different ways uses it; all other passes count for all of its keys."""
        return nullcontext() if self.watcher is None else self.watcher.into(keys)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def known_clean(self) -> Tensor:
        """`clean`, where it is known, as in `MapMetric._score` of a metric that needs scores."""
        assert self.clean is not None
        return self.clean

    @property
    def _scorer(self) -> ScoreFn:
        assert self.score_fn is not None
        return self.score_fn

    @property
    def _targets(self) -> Tensor:
        assert isinstance(self.target, Tensor)  # `checked_case` makes it one
        return self.target

    def scores(self, images: Tensor, batch: int | None = None) -> Tensor:
        """The target's probability (B,) for other versions of the images (B, 3, H, W)."""
        return perturbation.score_all(self._scorer, images, self._targets, batch)

    def curve(
        self, start: Tensor, end: Tensor, cell_ranks: Tensor, counts: Sequence[int], batch: int | None = None
    ) -> Tensor:
        """The target's probability (B, T) while images turn from `start` into `end`; see `perturbation.curve`."""
        return perturbation.curve(self._scorer, start, end, cell_ranks, counts, self._targets, batch)

    def steps(
        self,
        start: Tensor,
        end: Tensor,
        cell_ranks: Tensor,
        first: Sequence[int],
        last: Sequence[int],
        batch: int | None = None,
    ) -> Tensor:
        """The target's probability (B, T) of `start` with some cells of `end`; see `perturbation.steps`."""
        return perturbation.steps(self._scorer, start, end, cell_ranks, first, last, self._targets, batch)

    def without(self, fill: Tensor, cells: Tensor, batch: int | None = None, score_fn: ScoreFn | None = None) -> Tensor:
        """The target's score (B, T) without some cells; see `perturbation.without`.

        Args:
            fill: what removed cells show.
            cells: cells that are removed, (T, h, w) or (B, T, h, w) bool.
            batch: images per forward pass.
            score_fn: maps images to scores; None takes the probabilities.
        """
        score_fn = self._scorer if score_fn is None else score_fn
        return perturbation.without(score_fn, self.images, fill, cells, self._targets, batch)

    def lacks(self, needed: Sequence[str]) -> str:
        """Why a metric that needs this does not apply; empty if all is known."""
        unknown = [need for need in needed if getattr(self.truth if need in TRUTH else self, need) is None]
        # What belongs to the case is named before the ground truth.
        words = [WORDS[need] for need in sorted(unknown, key=lambda need: need in TRUTH)]
        if unknown == ["patch_scores"]:
            return f"needs {words[0]}"
        return f"needs {' and '.join(words)}, which is unknown here" if words else ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def as_case(case: Any, images: Any, maps: Any, target: Any, clean: Any) -> Any:
    """The case of `MapMetric.score`: the given one, or that of a score function with images, maps and targets.

    Raises:
        InputError: for a case with other arguments, which would be ignored.
    """
    given = images is not None or maps is not None or clean is not None or isinstance(target, Tensor) or target != 0
    if given and isinstance(case, Case):
        raise InputError("a metric that takes a Case takes nothing else: images, maps, target and clean belong into it")
    short = images is not None or maps is not None
    return Case(images, maps, target, case, clean) if short else case


def checked_case(case: object) -> Case:
    """Check a case, and bring its tensors to the images' device and to one form.

    Returns:
        The case with float32 maps, a target (B,), and boxes (B, M, 4).

    Raises:
        InputError: if images are not a float tensor in [0, 1], if maps have a wrong shape or contain NaN, and for
            targets, clean scores and ground truth that do not fit the images.
    """
    if not isinstance(case, Case):
        raise InputError(f"a metric takes a Case(images, maps, target, score_fn); got {type(case).__name__}")
    images, correct = case.images, case.correct
    check_images(images, "images")
    check_unit(pixel_range(images, "images"), WRAP, "images")
    perturbation.check_maps(images, case.maps)
    if case.clean is not None:
        check_clean(case.clean, len(images))
    if correct is not None and (not isinstance(correct, Tensor) or correct.shape != (len(images),)):
        raise InputError(f"correct must be a tensor of one number per image, ({len(images)},); got {correct!r}")
    return replace(
        case,
        maps=case.maps.to(images.device).float(),
        target=per_image(case.target, len(images)).to(images.device),
        truth=case.truth.checked(images),
        correct=None if correct is None else correct.to(images.device).float(),
    )
