"""Attention maps of timm's vision transformers, read during a forward pass, also if attention is fused."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.endings import more_calls
from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name

PATCHES = "patches"
"""`global_pool` of transformers whose patch tokens become a feature map, see `Backbone`."""


def find_transformer(model: nn.Module) -> Any:
    """The timm vision transformer within a model; None if there is none.

    It has blocks of attention over the tokens of image patches.
    """
    for part in model.modules():
        blocks, embedding = getattr(part, "blocks", None), getattr(part, "patch_embed", None)
        if not isinstance(blocks, nn.Module) or not hasattr(embedding, "feat_ratio"):
            continue
        layers = [getattr(block, "attn", None) for block in blocks.children()]
        if layers and all(hasattr(layer, "attn_drop") and hasattr(layer, "fused_attn") for layer in layers):
            return part if hasattr(part, "num_prefix_tokens") else None
    return None


def transformer(model: nn.Module) -> Any:
    """The timm vision transformer within a model, if its class token feeds the classifier.

    Raises:
        NotApplicable: if there is none, or if it pools its tokens instead.
    """
    found, name = find_transformer(model), class_name(model)
    if found is None or getattr(found, "cls_token", None) is None:
        raise NotApplicable(f"{name} holds no vision transformer of timm with a class token")
    if (pool := getattr(found, "global_pool", None)) not in ("token", ""):  # "": the caller pools the tokens
        what = "patch tokens" if pool == PATCHES else f"tokens' {pool!r} pool"
        raise NotApplicable(f"{name} classifies by its {what}, not by the class token")
    return found


def attentions(vit: Any) -> list[Any]:
    """The attention modules of all blocks, in order."""
    return [block.attn for block in vit.blocks]


def patch_size(vit: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels, including the stride of a network before the patches."""
    side: tuple[int, int] = vit.patch_embed.feat_ratio(as_scalar=False)
    return side


def on_grid(vit: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Arrange values of tokens (..., T) on the grid of patches (..., h, w).

    Class, register and distillation tokens are dropped.

    Args:
        vit: the transformer.
        tokens: one value per token.
        size: height and width of the images in pixels.

    Raises:
        NotApplicable: if the number of tokens does not fit images of this size.
    """
    values = tokens[..., vit.num_prefix_tokens :]
    side = patch_size(vit)
    for rows, columns in ((size[0] // side[0], size[1] // side[1]), (-(-size[0] // side[0]), -(-size[1] // side[1]))):
        if rows * columns == values.shape[-1]:  # timm crops or pads an image of broken patches
            return values.reshape(*values.shape[:-1], rows, columns)
    raise NotApplicable(
        f"the {values.shape[-1]} tokens of {type(vit).__name__} do not form the grid of patches of images of "
        f"{size[0]} × {size[1]}"
    )


def to_map(vit: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, T, C) as a feature map (B, C, h, w); see `on_grid`."""
    return on_grid(vit, tokens.transpose(1, 2), size)


def to_tokens(vit: Any, features: Tensor, tokens: Tensor) -> Tensor:
    """A feature map (B, C, h, w) as tokens (B, T, C). The class and other prefix tokens come from `tokens`, which may
    be of one image."""
    others = tokens[:, : vit.num_prefix_tokens].expand(len(features), -1, -1)
    return torch.cat([others, features.flatten(2).transpose(1, 2)], dim=1)


def is_plain(attention: Any) -> bool:
    """Whether the attention is softmax(q kᵀ / √d) of the outputs of `q_norm` and `k_norm`: without rotary position
    embedding and bias."""
    kind = type(attention)
    homes = ("timm.layers.attention", "timm.models.vision_transformer")  # depends on timm's version
    return kind.__name__ == "Attention" and kind.__module__ in homes


@contextmanager
def class_rows(attention: Any) -> Iterator[list[Tensor]]:
    """While open, append the class token's attention of every pass to the list: softmax(q_cls Kᵀ / √d), (B, heads, T)
    (tutorial, equation 10). The attention stays fused if q and k can be read. The rows are part of the autograd
    graph."""
    rows: list[Tensor] = []
    if not is_plain(attention):
        with weights([attention]) as whole:
            yield rows
            rows += [a[:, :, 0] for a in whole]
        return
    seen: dict[str, Tensor] = {}

    def keep_q(module: nn.Module, args: Any, q: Tensor) -> None:
        seen["q"] = q[:, :, :1]

    def keep_k(module: nn.Module, args: Any, k: Tensor) -> None:
        rows.append(((seen.pop("q") * attention.scale) @ k.transpose(-2, -1))[:, :, 0].softmax(dim=-1))

    hooks = [(attention.q_norm, own_thread(keep_q)), (attention.k_norm, own_thread(keep_k))]
    handles = [part.register_forward_hook(hook) for part, hook in hooks]
    try:
        with more_calls(1):
            yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weights(layers: list[Any]) -> Iterator[list[Tensor]]:
    """While open, append the attention (B, heads, T, T) of these layers to the list, in the order of the pass. The
    layers do not use fused attention. The attention is part of the autograd graph, which starts there if need be."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = args[0]
        if torch.is_grad_enabled() and not a.requires_grad:
            a = a.detach().requires_grad_(True)
        found.append(a)
        return (a,)

    with ExitStack() as stack:
        stack.enter_context(more_calls(sum(bool(layer.fused_attn) for layer in layers)))
        for layer in layers:
            stack.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False
            stack.callback(layer.attn_drop.register_forward_pre_hook(own_thread(note)).remove)
        yield found
