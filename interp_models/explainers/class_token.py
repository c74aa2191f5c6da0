"""Whether a vision transformer predicts by its class token alone, as methods that read its attention need it."""

from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.eager import own_thread
from interp_models.core.errors import NotApplicable
from interp_models.core.known import known_of
from interp_models.core.norms import gradients
from interp_models.core.passes import uncounted
from interp_models.core.prepared import class_name
from interp_models.core.protocols import explains_itself
from interp_models.explainers.places import EXPLAINED, order
from interp_models.explainers.traces import traced
from interp_models.nn.attention import to_map


def check_transformer(model: nn.Module, vit: Any, inputs: Tensor) -> None:
    """Raise `NotApplicable` unless a prediction is made by the class token of a timm vision transformer, which is used
    once, without other parts beside it, and whose patches keep their positions in the image.

    The result is cached as that of `target_layer`.
    """
    known, key = known_of(model), ("transformer", id(vit), tuple(inputs.shape[1:]))
    if key not in known:
        with uncounted(), torch.inference_mode(False):
            known[key] = why_not(model, vit, inputs[:1].detach().clone())
    if known[key] is not None:
        raise NotApplicable(known[key])


def why_not(model: nn.Module, vit: Any, image: Tensor) -> str | None:
    """Why methods of a timm vision transformer cannot explain a model; None if they can."""
    name, size = class_name(model), (image.shape[2], image.shape[3])
    last = next(name for name, part in model.named_modules() if part is vit.blocks[-1])
    trace = traced(model, image, only=last)
    if len(trace.outputs) != 1:
        return f"the transformer ran {len(trace.outputs)} times for one prediction; expected once"
    if trace.score is None:
        return f"no gradient flows through {name}, so it is unknown what it reads of its transformer"
    output = trace.outputs[0]
    if not trace.holds_all(output):
        return f"{name} does not predict by one transformer alone, but also by parts beside it"
    if explains_itself(model):
        return None
    gradient = None
    if output.tensor is not None:
        (gradient,) = gradients(trace.score, [output.tensor], again=True)
    if gradient is None or not bool(gradient[:, 0].any()) or bool(gradient[:, vit.num_prefix_tokens :].any()):
        return f"{name} does not predict by the class token of its transformer alone"
    entered: list[Tensor] = []

    def enters(module: nn.Module, args: Any) -> None:
        entered.append(args[0])

    def read(images: Tensor) -> Tensor:
        handle = vit.blocks[-1].register_forward_pre_hook(own_thread(enters))
        try:
            with torch.no_grad():
                for part in torch.split(images, default_batch(images)):
                    model(part)
        finally:
            handle.remove()
        tokens = torch.cat(entered)
        entered.clear()
        return to_map(vit, tokens, size)

    grid = tuple(read(image).shape[2:])
    if (share := order(image, (grid[0], grid[1]), read)) is not None and share < EXPLAINED:
        return f"the patches of {name}'s transformer do not keep their positions in the image"
    return None


def reads_class_token(vit: Any) -> bool:
    """Whether it is timm's `VisionTransformer` with blocks that normalise before attention, read by its class token."""
    known = any(kind.__name__ == "VisionTransformer" for kind in type(vit).__mro__)
    block = type(vit.blocks[-1]).__name__ == "Block"
    return known and block and getattr(vit, "cls_token", None) is not None and vit.global_pool in ("token", "")
