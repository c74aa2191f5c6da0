"""Bilinear attention pooling and crop and drop against loops."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp_models.nn.attention_pooling import bilinear_attention_pool, crop_and_drop
from tests.mutation import mutated


def check_bap(pool=bilinear_attention_pool):
    """f[n, c] = (1 / hw) Σ_ij A[n, i, j] F[c, i, j], by loops (tutorial, figure 6)."""
    rng = np.random.default_rng(0)
    features, maps = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 3, 3, 5))
    expected = np.zeros((2, 3, 4))
    for b in range(2):
        for n in range(3):
            for c in range(4):
                for i in range(3):
                    for j in range(5):
                        expected[b, n, c] += maps[b, n, i, j] * features[b, c, i, j] / 15
    np.testing.assert_allclose(pool(torch.tensor(features), torch.tensor(maps)), expected, rtol=1e-10)


def test_pooling_equals_loops():
    check_bap()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".transpose(1, 2) / root", ".transpose(1, 2)"),
        ("return (features", "return -(features"),
        ("@ (maps / root).flatten(2)", "@ maps.flatten(2).softmax(-1)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_bap(mutated("interp_models.nn.attention_pooling", right, wrong).bilinear_attention_pool)


def cropped_and_dropped(images, maps, drawn, theta):
    """By loops: each image's crop, as its box in pixels, and what is left of it."""
    boxes, left = [], images.clone()
    large = torch.nn.functional.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    height, width = images.shape[2:]
    for b in range(len(images)):
        crop, drop = large[b, drawn[b, 0]], large[b, drawn[b, 1]]
        inside = [(y, x) for y in range(height) for x in range(width) if crop[y, x] >= theta[b, 0] * crop.max()]
        ys, xs = [y for y, _ in inside], [x for _, x in inside]
        boxes.append(
            (
                max(0.0, min(xs) - 0.1 * width), max(0.0, min(ys) - 0.1 * height),
                min(width, max(xs) + 1 + 0.1 * width), min(height, max(ys) + 1 + 0.1 * height),
            )
        )  # fmt: skip
        for y in range(height):
            for x in range(width):
                if drop[y, x] >= theta[b, 1] * drop.max():
                    left[b, :, y, x] = 0
    return boxes, left


def check_crop_and_drop(function=crop_and_drop):
    torch.manual_seed(3)
    maps = torch.rand(5, 3, 4, 6) ** torch.tensor([1.0, 4.0, 20.0])[:, None, None]
    y, x = torch.meshgrid(torch.arange(40.0) + 0.5, torch.arange(60.0) + 0.5, indexing="ij")
    images = torch.stack([x, y, x + y])[None].repeat(5, 1, 1, 1)  # colours say where a pixel was
    state = torch.get_rng_state()
    drawn = torch.multinomial(maps.sum(dim=(2, 3)).sqrt().nan_to_num(0.0, 1.0) + 1e-6, 2, replacement=True)
    theta = torch.tensor([0.4, 0.2]) + torch.tensor([0.2, 0.3]) * torch.rand(5, 2)
    torch.set_rng_state(state)
    crops, drops = function(images, maps)
    boxes, left = cropped_and_dropped(images, maps, drawn, theta)
    torch.testing.assert_close(drops, left)
    for b, (x0, y0, x1, y1) in enumerate(boxes):
        columns = (x0 + (torch.arange(60) + 0.5) * (x1 - x0) / 60).clamp(0.5, 59.5)
        rows = (y0 + (torch.arange(40) + 0.5) * (y1 - y0) / 40).clamp(0.5, 39.5)
        torch.testing.assert_close(crops[b, 0], columns.expand(40, -1), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(crops[b, 1], rows[:, None].expand(-1, 60), rtol=1e-3, atol=1e-2)


def test_crop_and_drop_equal_loops():
    check_crop_and_drop()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("right + left - 1", "right - left"),
        ("affine[:, 1, 1], affine[:, 1, 2] = bottom - top", "affine[:, 1, 1], affine[:, 1, 2] = right - left"),
        ("images * ~high[:, 1:]", "images * high[:, 1:]"),
        ("images * ~high[:, 1:]", "images * ~high[:, :1]"),
        ("for axis in (2, 1))", "for axis in (1, 2))"),
        ("(first / n - 0.1)", "(first / n)"),
        ("(last / n + 0.1)", "((last - 1) / n + 0.1)"),
        (".sqrt().nan_to_num(0.0, 1.0) + 1e-6", " + 1e-6"),
        ("0.4 + 0.2 * uniform[:, 0]", "0.2 + 0.4 * uniform[:, 0]"),
        ("0.2 + 0.3 * uniform[:, 1]", "0.2 + 0.3 * uniform[:, 0]"),
    ],
)
def test_mutations_of_crop_and_drop_are_rejected(right, wrong):
    with pytest.raises((AssertionError, RuntimeError)):
        check_crop_and_drop(mutated("interp_models.nn.attention_pooling", right, wrong).crop_and_drop)


def test_images_without_a_map_are_left():
    images = torch.rand(2, 3, 32, 32)
    crops, drops = crop_and_drop(images, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(crops, images)
    torch.testing.assert_close(drops, images)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or shapes that depend on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "_to_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        moved = name != "_to_copy" or {"device"} & {k for k, v in (kwargs or {}).items() if v is not None}
        assert not (name in self.WAITS and moved), name
        return func(*args, **(kwargs or {}))


def test_crop_and_drop_do_not_wait_for_the_device():
    images, maps = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 4, 4)
    with NoSync():
        crop_and_drop(images, maps)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        float(maps.sum())
    with pytest.raises(AssertionError, match="nonzero"), NoSync():
        (maps > 0.5).nonzero()


def test_maps_that_are_no_numbers_do_not_stop_crop_and_drop():
    """The loss says so, at the end of the epoch."""
    images, maps = torch.rand(2, 3, 16, 16), torch.full((2, 2, 4, 4), torch.nan)
    crops, dropped = crop_and_drop(images, maps)
    assert crops.shape == dropped.shape == images.shape


def test_sums_of_half_precision_do_not_overflow():
    """24 is the mean of 56 × 56 products; their sum is above float16's end, 65504."""
    features, maps = torch.full((1, 2, 56, 56), 3.0).half(), torch.full((1, 1, 56, 56), 8.0).half()
    torch.testing.assert_close(bilinear_attention_pool(features, maps), torch.full((1, 1, 2), 24.0).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_no_map_nothing_is_dropped_in_half_precision(dtype):
    images = torch.rand(2, 3, 16, 16)
    _, dropped = crop_and_drop(images, torch.zeros(2, 2, 4, 4, dtype=dtype))
    assert torch.equal(dropped, images)
