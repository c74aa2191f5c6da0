"""Attention maps of timm's vision transformers, as they are computed, or computed again beside fused attention."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable


def find_transformer(model: nn.Module) -> Any:
    """The vision transformer of timm within a model, with blocks of attention over its patches' tokens; or None."""
    for part in model.modules():
        blocks, embedding = getattr(part, "blocks", None), getattr(part, "patch_embed", None)
        if not isinstance(blocks, nn.Module) or not hasattr(embedding, "feat_ratio"):
            continue
        layers = [getattr(block, "attn", None) for block in blocks.children()]
        if layers and all(hasattr(layer, "attn_drop") and hasattr(layer, "fused_attn") for layer in layers):
            return part if hasattr(part, "num_prefix_tokens") else None
    return None


def transformer(model: nn.Module) -> Any:
    """The vision transformer within a model, whose class token decides.

    Raises:
        NotApplicable: if there is none.
    """
    found, name = find_transformer(model), type(model).__name__
    if found is None or getattr(found, "cls_token", None) is None:
        raise NotApplicable(f"{name} holds no vision transformer of timm with a class token")
    if (pool := getattr(found, "global_pool", None)) not in ("token", ""):  # "" leaves it to who reads the tokens
        raise NotApplicable(f"{name} decides by its tokens' {pool!r} pool, not by the class token")
    return found


def attentions(vit: Any) -> list[Any]:
    """The attention of every block, the first one first."""
    return [block.attn for block in vit.blocks]


def patch_size(vit: Any) -> tuple[int, int]:
    """Pixels of a token, down and across; a network before the patches counts."""
    side: tuple[int, int] = vit.patch_embed.feat_ratio(as_scalar=False)
    return side


def on_grid(vit: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of tokens (..., T) on the grid of patches (..., h, w), without class, register and distillation tokens.

    Args:
        vit: the transformer.
        tokens: a value per token.
        size: of the images in pixels.

    Raises:
        NotApplicable: if the tokens are not those of the patches of such images.
    """
    values = tokens[..., vit.num_prefix_tokens :]
    side = patch_size(vit)
    for rows, columns in ((size[0] // side[0], size[1] // side[1]), (-(-size[0] // side[0]), -(-size[1] // side[1]))):
        if rows * columns == values.shape[-1]:  # images that patches do not fill are cut or padded
            return values.reshape(*values.shape[:-1], rows, columns)
    raise NotApplicable(
        f"{values.shape[-1]} tokens of {type(vit).__name__} are no grid of patches of images of {size[0]} × {size[1]}"
    )


def to_map(vit: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, T, C) as a map of features (B, C, h, w); see `on_grid`."""
    return on_grid(vit, tokens.transpose(1, 2), size)


def to_tokens(vit: Any, features: Tensor, tokens: Tensor) -> Tensor:
    """A map (B, C, h, w) as tokens (B, T, C) again, with the other tokens of `tokens`, of as many images or of one."""
    others = tokens[:, : vit.num_prefix_tokens].expand(len(features), -1, -1)
    return torch.cat([others, features.flatten(2).transpose(1, 2)], dim=1)


def is_plain(attention: Any) -> bool:
    """Whether it is softmax(q kᵀ / √d) of what its norms of q and k give: no rotation, no bias."""
    kind = type(attention)
    homes = ("timm.layers.attention", "timm.models.vision_transformer")  # by timm's version
    return kind.__name__ == "Attention" and kind.__module__ in homes


@contextmanager
def class_rows(attention: Any) -> Iterator[list[Tensor]]:
    """While open, the rows of the class token (B, heads, T) of every pass, softmax(q_cls Kᵀ / √d) (tutorial, equation
    10), are appended to the list. Attention stays fused where q and k can be read; the rows have their gradients."""
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

    handles = [attention.q_norm.register_forward_hook(keep_q), attention.k_norm.register_forward_hook(keep_k)]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weights(layers: list[Any]) -> Iterator[list[Tensor]]:
    """While open, attention (B, heads, T, T) of these layers, in the order of the pass, is appended to the list; it is
    not fused, and part of the graph, which begins at the first one if it has not before."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = args[0]
        if torch.is_grad_enabled() and not a.requires_grad:
            a = a.detach().requires_grad_(True)
        found.append(a)
        return (a,)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "fused_attn", layer.fused_attn)
            layer.fused_attn = False
            stack.callback(layer.attn_drop.register_forward_pre_hook(note).remove)
        yield found
