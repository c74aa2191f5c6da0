"""Knowledge distillation: the student learns from the labels and from the teacher's logits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.digests import weights_digest
from interp_models.core.errors import InputError
from interp_models.core.scoring import logits_of


class Distillation:
    """Changes the loss L of a student to λ T² KL(softmax(t / T) ‖ softmax(s / T)) + (1 - λ) L.

    t and s are the logits of teacher and student; the divergence is averaged over the batch.

    Source: Hinton, Vinyals and Dean 2015, section 2; BR-NPA, section 3.3.

    This class is not a module. So the teacher is neither among the student's parameters nor in its checkpoints, and
    it is never trained.

    Args:
        teacher: a trained classifier of the same classes; it is put into eval mode and frozen.
        temperature: T.
        weight: λ.

    Raises:
        InputError: unless 0 < T < ∞ and 0 <= λ <= 1.
    """

    def __init__(self, teacher: nn.Module, *, temperature: float, weight: float) -> None:
        if not 0 < temperature < math.inf or not 0 <= weight <= 1:
            raise InputError(
                f"distillation needs a finite temperature > 0 and weight from 0 to 1; got {temperature} and {weight}"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.digest = weights_digest(teacher)
        """Digest of the teacher's weights; a resumed training needs the same teacher."""
        self.temperature, self.weight = temperature, weight

    def terms(self, terms: dict[str, Tensor], logits: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The terms of the loss with distillation.

        Args:
            terms: the terms of the student's own loss.
            logits: logits of the student, (B, K).
            images: the images, (B, 3, H, W) in [0, 1].

        Returns:
            The student's terms times 1 - λ, and the term `distillation`.
        """
        with torch.no_grad():
            taught = logits_of(self.teacher.to(images)(images)) / self.temperature
        learnt = F.log_softmax(logits / self.temperature, dim=1)
        apart = F.kl_div(learnt, F.log_softmax(taught, dim=1), reduction="batchmean", log_target=True)
        own = {name: (1 - self.weight) * term for name, term in terms.items()}
        return {**own, "distillation": self.weight * self.temperature**2 * apart}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        """Return itself: copies of the student share one teacher."""
        return self
