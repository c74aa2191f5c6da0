"""Relevance of the features of a layer, as class activation maps weigh them."""

import torch
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.core.maps import at_least_float32
from interp_models.core.scoring import Target, logits_of, resolve_target
from interp_models.explainers.base import gradient_of
from interp_models.explainers.captures import captured
from interp_models.explainers.of_layer import OfLayer
from interp_models.explainers.relevance import finite, seeded
from interp_models.explainers.rules import Rules


def relevance_at(
    explainer: OfLayer, rules: Rules, inputs: Tensor, target: Target, *, others: float | None
) -> tuple[Tensor, Tensor]:
    """Feature maps A of the target layer and their relevance, float32 or better (B, C, h, w), by one pass. Relevance
    starts as in `seeded`.

    Raises:
        NotApplicable: if an operation after the layer has no rule, or the score does not depend on the layer.
    """
    layer = explainer.target_layer(inputs)
    with torch.no_grad(), captured(layer, gradient=True) as outputs, rules:
        output = explainer.model(inputs)
    if not outputs:
        raise InputError(f"layer {layer.name} was not used in the forward pass")
    raw, logits = outputs[0], logits_of(output)
    rules.check(logits)
    with torch.enable_grad():
        score = seeded(logits, resolve_target(target, logits.detach()), others)
    m = gradient_of(score, raw, f"layer {layer.name}")
    a, m = layer.feature_map(raw.detach()), layer.feature_map(finite(m, rules))
    a, m = (at_least_float32(x) for x in (a, m))
    return a, a * m
