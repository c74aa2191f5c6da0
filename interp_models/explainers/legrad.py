"""LeGrad: the gradient of the target's score, read at each block, with respect to that block's attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.norms import gradients
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Score, Target, logits_of, resolve_target, scores_of
from interp_models.explainers.base import EXPLAINERS
from interp_models.explainers.transformers import OfAttention, once
from interp_models.nn.attention import weights


@EXPLAINERS.register("legrad")
class LeGrad(OfAttention):
    """LeGrad: the mean over blocks l, heads and rows of ReLU(∂s^l/∂A^l) (Bousselham et al., ICCV 2025).

    A^l is the attention of block l. s^l is the target's score when every token after the last block is replaced by the
    mean of block l's output tokens. The map is not multiplied by the attention itself. One pass gives the scores of all
    blocks.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
        layers: number of blocks, counted from the last, that are used; None uses all.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(self, model: nn.Module, *, layers: int | None = None, score: Score = "logit") -> None:
        super().__init__(model, score=score)
        if layers is not None and layers < 1:
            raise InputError(f"legrad: layers must be at least 1; got {layers}")
        self.blocks = slice(None if layers is None else -layers, None)

    def _passed(
        self, vit: Any, layers: list[Any], inputs: Tensor, target: Target
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        read, tokens = list(vit.blocks)[self.blocks], list[Tensor]()

        @own_thread
        def keep(block: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            tokens.append(output)
            if block is not read[-1]:
                return None
            # The rest of the network sees the images, then the images again for each block, by that block's mean token.
            means = [x.mean(dim=1, keepdim=True).expand(-1, x.shape[1], -1) for x in tokens]
            return torch.cat([output, *means])

        handles = [block.register_forward_hook(keep) for block in read]
        try:
            with torch.enable_grad(), weights(layers) as a:
                output = self.model(inputs)
                scores = scores_of(output, self.score)
        finally:
            for handle in handles:
                handle.remove()
        once(a, len(layers))
        if len(scores) != len(inputs) * (1 + len(a)):
            raise NotApplicable(
                f"{class_name(self.model)} returned {len(scores)} rows of logits for {len(inputs) * (1 + len(a))} rows "
                "of tokens; legrad needs one row of logits per row of tokens"
            )
        _, *of_blocks = torch.split(scores, len(inputs))
        targets = resolve_target(target, logits_of(output).detach()[: len(inputs)])[:, None]
        found = []
        for attention, of_block in zip(a, of_blocks, strict=True):
            score = of_block.gather(1, targets).sum()
            g = None
            if score.requires_grad:
                (g,) = gradients(score, [attention], again=True)
            if g is None:
                raise NotApplicable("no gradient path from the score of a block back to its attention")
            found.append(g)
        return a, found

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        return torch.stack([x.relu().mean(dim=(1, 2)) for x in g]).mean(dim=0)
