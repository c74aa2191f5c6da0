"""The model's own map as an explainer."""

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name
from interp_models.core.protocols import explains_itself
from interp_models.core.scoring import Target, logits_of, resolve_target
from interp_models.explainers.base import EXPLAINERS, Explainer


@EXPLAINERS.register("intrinsic")
class Intrinsic(Explainer):
    """The model's own explanation: `model.explain(model(inputs), target, kind)`.

    Args:
        model: a model with `explain`, such as every architecture of this package.
        kind: one of the model's `explanations`; None takes the first.

    Raises:
        NotApplicable: for a model that does not explain itself.
    """

    needs = ("explain",)

    def __init__(self, model: nn.Module, *, kind: str | None = None) -> None:
        super().__init__(model)
        if not explains_itself(self.model):
            why = f"{class_name(self.model)} has no method explain()"
            raise NotApplicable(f"explainer 'intrinsic' needs a model that explains itself; {why}")
        self.kind = kind

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        assert explains_itself(self.model)
        output = self.model(inputs)
        return self.model.explain(output, resolve_target(target, logits_of(output)), self.kind)
