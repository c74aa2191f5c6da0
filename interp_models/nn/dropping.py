"""Scores of a vision transformer for some of an image's patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import NotApplicable
from interp_models.core.known import known_of, unchanging
from interp_models.core.passes import uncounted
from interp_models.core.prepared import Prepared, class_name, copied
from interp_models.core.scoring import probabilities
from interp_models.nn.attention import find_transformer, on_grid, patch_size

TOLERANCE = 1e-3
"""Largest change of log-probabilities, in units of their spread over classes, by another order of the tokens."""


class PatchScores:
    """The probabilities of a vision transformer that sees only some patches of each image.

    The other patches are dropped behind the embedding, which gives tokens their positions: the blocks get fewer tokens,
    and no pixel is changed (Naseer et al., NeurIPS 2021; Jain et al., ICLR 2022).

    Args:
        model: a vision transformer of timm, or a module that contains one.
        images: images (B, 3, H, W) of the size that all have.

    Raises:
        NotApplicable: if there is no such transformer, or if its blocks depend on the order or the number of tokens.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        vit = find_transformer(model)
        if vit is None:
            raise NotApplicable(f"{class_name(model)} holds no vision transformer of timm")
        self._model, self._vit, self._scores = model, vit, probabilities(model)
        name, known = ("patches", *images.shape[2:]), known_of(model)
        if name not in known:
            with uncounted():
                known[name] = self._look_in_float32(images[:2]) if self._rounds(images) else self._look(images[:2])
        self.grid, fault = known[name]
        """Rows and columns of patches."""
        if fault:
            raise NotApplicable(fault)

    def _rounds(self, images: Tensor) -> bool:
        """Whether passes are in half precision, whose rounding hides if the order of the tokens matters."""
        return images.dtype in (torch.float16, torch.bfloat16) or bool(getattr(self._model, "autocasts", False))

    def _look_in_float32(self, images: Tensor) -> tuple[tuple[int, int], str]:
        """`_look` at a copy in float32."""
        whole = copied(self._model.model if isinstance(self._model, Prepared) else self._model).float().eval()
        try:
            return PatchScores(whole, images.float()).grid, ""
        except NotApplicable as error:
            return (0, 0), str(error)

    @property
    def of_labels(self) -> bool:
        """Whether the probabilities are of independent labels."""
        return bool(getattr(self._scores, "of_labels", False))

    def __call__(self, images: Tensor, kept: Tensor) -> Tensor:
        """Probabilities (B, K) of images (B, 3, H, W).

        Args:
            images: the images.
            kept: positions of the patches that the blocks see, row by row from 0, int64 (B, k).
        """
        prefix = self._vit.num_prefix_tokens

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            tokens = args[0]
            if len(tokens) != len(kept):
                return None  # a pass of one image, to find out what the model ends in
            patches = tokens[:, prefix:]
            chosen = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
            return (torch.cat([tokens[:, :prefix], chosen], dim=1), *args[1:])

        with self._hooked(keep):
            return self._scores(images)

    @contextmanager
    def _hooked(self, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
        """A context with a hook before the first block."""
        with unchanging():
            known_of(self._model)  # of the model without the hook
            handle = self._vit.blocks[0].register_forward_pre_hook(own_thread(hook))
            try:
                yield
            finally:
                handle.remove()

    def _look(self, images: Tensor) -> tuple[tuple[int, int], str]:
        """The grid of patches, and why they cannot be dropped; "" if they can."""
        tokens: list[Tensor] = []
        whole = self._scores(images).log()
        with self._hooked(lambda _, args: tokens.append(args[0][:1, :, 0])):
            self._scores(images)
        if len(tokens) != 1:
            why = f"runs its transformer {len(tokens)} times for one prediction; expected once"
            return (0, 0), f"{class_name(self._model)} {why}"
        rows, columns = on_grid(self._vit, tokens[-1], (images.shape[2], images.shape[3])).shape[1:]
        fault = self._fault(images, whole, torch.arange(rows * columns).view(rows, columns))
        return (rows, columns), fault and f"{class_name(self._model)} {fault}"

    def _fault(self, images: Tensor, whole: Tensor, places: Tensor) -> str:
        """Why patches cannot be dropped; "" if they can.

        Args:
            images: (B, 3, H, W).
            whole: their log-probabilities (B, K).
            places: positions of the patches, (rows, columns).
        """

        def of(kept: Tensor, seen: Tensor = images) -> Tensor:
            """Log-probabilities of the patches at some positions."""
            return self(seen, kept.flatten().to(images.device).expand(len(images), -1)).log()

        backwards = places.flatten().flip(0)
        try:
            turned = of(backwards)
            of(backwards[1:])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the network raises
            return "does not work with fewer tokens"
        spread = whole.clamp(min=-80).std(dim=1, keepdim=True)
        if bool(((whole - turned).abs() > TOLERANCE * (spread + TOLERANCE)).any()):
            return "gives tokens their positions in its blocks, not in its embedding"
        # The scores of some patches must not change with the pixels of the others.
        quarter = places[: -(-places.shape[0] // 2), : -(-places.shape[1] // 2)]
        height, width = (n * side for n, side in zip(quarter.shape, patch_size(self._vit), strict=True))
        other = 1 - images
        other[:, :, :height, :width] = images[:, :, :height, :width]
        if bool(((of(quarter) - of(quarter, other)).abs() > TOLERANCE).any()):
            return "does not decide by the patches of one transformer alone"
        return ""
