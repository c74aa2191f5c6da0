"""Scores of many images, passed in batches of a size that suits the device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from interp_models.core.inputs import finite
from interp_models.core.modes import alone, evaluating, full_float32
from interp_models.core.scoring import ScoreFn, logits_of, read_as, resolve_target


def all_scores(score_fn: ScoreFn, images: Tensor, batch: int | None = None) -> Tensor:
    """The scores (B, K) of images, computed in batches of size `batch`; None chooses it by the device."""
    return torch.cat([score_fn(part) for part in torch.split(images, batch or default_batch(images))])


def predicted(model: nn.Module, images: Tensor, scores: Tensor, batch: int | None = None) -> Tensor:
    """The predicted class of each image, int64 (B,): that of the highest probability and so of the highest logit.

    Large logits have probabilities that are equal up to rounding; a sigmoid in float32 is exactly 1 from about 17 on.
    The images whose highest probabilities are equal are passed once more, for their logits.

    Args:
        model: any module that returns logits.
        images: (B, C, H, W).
        scores: their probabilities (B, K), see `all_scores`.
        batch: images per pass; None chooses a size for the device.
    """
    found = scores.argmax(dim=1)
    tied = (scores == scores.amax(dim=1, keepdim=True)).sum(dim=1) > 1
    if bool(tied.any()):
        some = images[tied]
        with (
            alone(model), torch.no_grad(), evaluating(model), full_float32(), read_as(model, some, "probability")
        ):  # fmt: skip
            found[tied] = all_scores(lambda part: logits_of(model(part)), some, batch).argmax(dim=1)
    return found


def scores_of_variants(
    score_fn: ScoreFn,
    images: Tensor,
    count: int,
    variant: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores of the target class for variants of each image, such as masked copies.

    Variants of all images form one sequence, which is passed in batches. So memory does not grow with their number.

    Args:
        score_fn: maps images to class scores.
        images: (B, C, H, W).
        count: number of variants of each image.
        variant: makes variants (m, C, H, W) from positions of images and numbers of variants, both (m,). If all
            variants are of one image, its position comes as (1,).
        target: class of each image, (B,).
        batch: images per pass; None chooses a size for the device.

    Returns:
        (B, count).

    Raises:
        InputError: if a score is NaN or infinite.
    """
    total, size = len(images) * count, batch or default_batch(images)
    # One tensor for all scores: many small ones would fragment the memory.
    scores = torch.empty(total, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32))
    for first in range(0, total, size):
        jobs = torch.arange(first, min(first + size, total), device=images.device)
        b = jobs // count
        of_one = first // count == (first + len(jobs) - 1) // count  # all of one image, which need not be repeated
        found = score_fn(variant(b[:1] if of_one else b, jobs % count))
        if not first:  # only once, because it waits for the device
            target = resolve_target(target, found[:1].expand(len(images), -1))
        scores[first : first + len(jobs)] = found.gather(1, target[b][:, None])[:, 0].to(scores.dtype)
    return finite(scores.view(len(images), count))


def default_batch(images: Tensor) -> int:
    """Batch size for many passes of images of the size of `images`, (..., H, W).

    On a CPU it is four images of 224 pixels per thread, and at most 16. Larger batches are not faster there, because
    memory is mapped again for every pass (see docs/results/speed.md).
    """
    at_224 = min(16, 4 * torch.get_num_threads()) if images.device.type == "cpu" else 128
    return max(1, at_224 * 224**2 // (images.shape[-2] * images.shape[-1]))
