"""Attention, norms and gated units as single operations, for rules that follow those."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.explainers.calls import Call
from interp_models.explainers.rules import Rules


class Decomposed(Rules):
    """Abstract: rules that follow a compound operation through its single operations."""

    def attention(self, call: Call) -> Any:
        """Attention, by its single operations."""
        found = attended(call)
        if found is None:
            return call.refused(f"has {call.name} in a form that {self.method} has no rule for")
        with self:
            return found()

    def gated(self, call: Call) -> Any:
        """A gated linear unit, by its single operations."""
        with self:
            one, gate = call.args[0].chunk(2, dim=call.arg(1, "dim", -1))
            return one * gate.sigmoid()


def epsilon_of(call: Call) -> float:
    """What a norm adds before it divides."""
    place = {"layer_norm": 4, "group_norm": 4, "instance_norm": 7, "rms_norm": 3}.get(call.name, 0)
    found = call.arg(place, "eps")
    return torch.finfo(call.args[0].dtype).eps if found is None else float(found)


def normed(call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """What a norm divides, the mean square that it divides by, its gain and its shift; None for another norm."""
    x = call.args[0] if call.args else call.kwargs["input"]
    if call.name in ("layer_norm", "rms_norm"):
        dims = tuple(range(-len(call.arg(1, "normalized_shape")), 0))
        gain, shift = call.arg(2, "weight"), call.arg(3, "bias") if call.name == "layer_norm" else None
        centred = x - x.mean(dim=dims, keepdim=True) if call.name == "layer_norm" else x
        return centred, (centred * centred).mean(dim=dims, keepdim=True), gain, shift
    if call.name == "group_norm":
        groups, gain, shift = call.arg(1, "num_groups"), call.arg(2, "weight"), call.arg(3, "bias")
        parted = x.reshape(len(x), groups, -1)
        centred = parted - parted.mean(dim=2, keepdim=True)
        square = (centred * centred).mean(dim=2, keepdim=True).expand_as(parted).reshape(x.shape)
        per_channel = [one if one is None else one.view(-1, *(1,) * (x.dim() - 2)) for one in (gain, shift)]
        return centred.reshape(x.shape), square, per_channel[0], per_channel[1]
    return None


def attended(call: Call) -> Callable[[], Any] | None:
    """Attention as single operations, to run under the rules; None for another form of it."""
    if call.name == "scaled_dot_product_attention":
        q, k, v = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
        if call.arg(5, "is_causal", False) or call.kwargs.get("enable_gqa"):
            return None
        mask, scale = call.arg(3, "attn_mask"), call.kwargs.get("scale")
        return lambda: _attend(q, k, v, mask, scale)
    x, key, value, dim, heads, weight, bias = ([*call.args] + [None] * 7)[:7]
    plain_form = (
        x is key
        and key is value
        and weight is not None
        and not any(
            call.kwargs.get(name) is not None
            for name in ("key_padding_mask", "attn_mask", "static_k", "static_v", "q_proj_weight")
        )
    )
    extra = list(call.args[7:10])
    if not plain_form or any(one is not None and one is not False for one in extra) or len(call.args) < 13:
        return None
    out_weight, out_bias = call.args[11], call.args[12]
    needed = call.kwargs.get("need_weights", True)

    def run() -> Any:
        length, batch, _ = x.shape
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        q, k, v = (one.reshape(length, batch, heads, dim // heads).permute(1, 2, 0, 3) for one in (q, k, v))
        made = _attend(q, k, v, None, None).permute(2, 0, 1, 3).reshape(length, batch, dim)
        return F.linear(made, out_weight, out_bias), None

    return None if needed else run


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    a = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else a + mask
    return a.softmax(dim=-1) @ v
