"""Distances, the search for nearest patches and boxes, against loops."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.boxes import activation_boxes
from interp_models.core.errors import InputError
from interp_models.core.maps import upsampled
from interp_models.data.base import Sample
from interp_models.prototypes import search as prototypes
from interp_models.prototypes.boxes import receptive_spans
from interp_models.prototypes.distances import squared_distances, unit
from interp_models.prototypes.search import Patches, _over_ranks, nearest_patches, without_duplicates
from tests.mutation import mutated

SIZES = [(1, 1), (2, 1), (2, 3)]


def loops(z: Tensor, p: Tensor) -> np.ndarray:
    """Σ over channels and cells of the squared difference, one patch and prototype at a time."""
    (b, _, h, w), (n, _, a, c) = z.shape, p.shape
    d = np.zeros((b, n, h - a + 1, w - c + 1))
    for i, j, y, x in product(*map(range, d.shape)):
        d[i, j, y, x] = ((z[i, :, y : y + a, x : x + c] - p[j]) ** 2).sum()
    return d


def check_distances(distances: Callable[[Tensor, Tensor], Tensor] = squared_distances) -> None:
    for size in SIZES:
        z, p = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.randn(3, 5, *size, dtype=torch.float64)
        np.testing.assert_allclose(distances(z, p), loops(z, p), rtol=1e-9)


def test_cells_without_a_direction_are_orthogonal_to_all_and_get_no_gradient() -> None:
    """Frozen networks with ReLUs have cells of zeros; dividing by their norm gave gradients of 1e11."""
    z = torch.tensor([[[[3.0, 0.0, 1e-9]], [[4.0, 0.0, 0.0]]]], requires_grad=True)  # (1, 2, 1, 3)
    p = torch.tensor([[[[3.0]], [[4.0]]], [[[4.0]], [[-3.0]]], [[[-6.0]], [[-8.0]]]])
    distances = squared_distances(unit(z), unit(p), cosine=True)
    assert distances.flatten(1).tolist()[0] == pytest.approx([0, 2, 2, 2, 2, 2, 4, 2, 2], abs=1e-6)
    (distances * torch.rand(3, 1, 1)).sum().backward()
    assert z.grad is not None
    assert z.grad[0, :, 0, 0].abs().max() > 0.01
    assert z.grad[0, :, 0, 1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_distances_equal_loops() -> None:
    check_distances()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("energy - 2 * product", "energy - product"),
        ("energy - 2 * product", "energy + 2 * product"),
        ("+ norms[:, None, None]", ""),
        ("divisor_override=1", "divisor_override=2"),
    ],
)
def test_mutations_are_rejected(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_distances(mutated("interp_models.prototypes.distances", right, wrong).squared_distances)


def test_prototypes_larger_than_the_map() -> None:
    with pytest.raises(InputError, match="prototypes of 1 × 5 cells do not fit on a map of 4 × 4"):
        squared_distances(torch.rand(1, 2, 4, 4), torch.rand(3, 2, 1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_match_is_near_zero_also_under_autocast(dtype: torch.dtype) -> None:
    z = torch.rand(1, 128, 3, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        d = squared_distances(z, z[:, :, 1:2, 1:2])
    assert d.dtype == torch.float32
    assert float(d[0, 0, 1, 1]) < 1e-4
    assert float(d.flatten(2).topk(2, largest=False).values[0, 0, 1]) > 1


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[Sample]:
    """Images in order; their indices are 10, 11, ..."""
    index = torch.arange(len(images)) + 10
    parts = zip(images.split(size), labels.split(size), index.split(size), strict=True)
    return [Sample(x, y, i) for x, y, i in parts]


def of_cells(distances: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """For each cell the smallest distance of a patch that covers it, by loops."""
    rows, columns = distances.shape
    found = np.full((rows + size[0] - 1, columns + size[1] - 1), np.inf)
    for y, x in np.ndindex(rows, columns):
        covered = found[y : y + size[0], x : x + size[1]]
        covered[:] = np.minimum(covered, distances[y, x])
    return found


def brute_force(z: Tensor, p: Tensor, labels: Tensor, allowed: Tensor | None, k: int) -> list[list[Any]]:
    """Per prototype: (distance, image, cell, label) of the best patch of each image, sorted."""
    d = loops(z, p)
    rows = []
    for j in range(len(p)):
        fits = [i for i in range(len(z)) if allowed is None or allowed[j, labels[i]]]
        best = [(d[i, j].min(), i + 10, int(d[i, j].argmin()), int(labels[i])) for i in fits]
        rows.append(sorted(best)[:k])
    return rows


def test_a_patch_with_a_cell_of_zeros_is_no_prototype() -> None:
    """It would be the nearest if all others point away; then it would be as far from everything."""
    z = torch.full((2, 2, 2, 3), 0.0)
    z[0, 0, :, 0] = -1.0  # the only cells with a direction: they point away
    p = torch.tensor([[[[1.0]], [[0.0]]]])
    found = nearest_patches(lambda x: x, batches_of(z, torch.tensor([0, 0]), 2), p, k=2, cosine=True)
    assert found.image.tolist() == [[10, -1]]
    assert found.cell.tolist()[0][0] == 0
    assert found.distance.tolist() == [[4.0, torch.inf]]
    wide = nearest_patches(lambda x: x, batches_of(z, torch.tensor([0, 0]), 2), p.repeat(1, 1, 2, 1), cosine=True)
    assert (wide.cell.tolist(), wide.distance.tolist()) == ([[0]], [[8.0]])
    wide = nearest_patches(lambda x: x, batches_of(z, torch.tensor([0, 0]), 2), p.repeat(1, 1, 1, 2), cosine=True)
    assert wide.image.tolist() == [[-1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("restricted", [True, False])
def test_nearest_patches_equal_brute_force(size: tuple[int, int], batch: int, k: int, restricted: bool) -> None:
    z = torch.randn(9, 5, 4, 6, dtype=torch.float64)
    z[7] = z[2]  # ties between images
    z[1, :, 3] = z[1, :, 0]  # and between cells
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 2, 2])
    p = torch.randn(6, 5, *size, dtype=torch.float64)
    p[1] = z[2, :, : size[0], : size[1]]
    p[4] = z[1, :, : size[0], : size[1]] if size[0] == 1 else p[4]
    allowed = torch.arange(6)[:, None] % 3 == torch.arange(3)
    allowed[5, 0] = True
    found = nearest_patches(lambda x: x, batches_of(z, labels, batch), p, allowed if restricted else None, k)
    for j, row in enumerate(brute_force(z, p, labels, allowed if restricted else None, k)):
        n = len(row)
        assert found.image[j].tolist() == [r[1] for r in row] + [-1] * (k - n)
        assert found.cell[j].tolist()[:n] == [r[2] for r in row]
        assert found.label[j].tolist() == [r[3] for r in row] + [-1] * (k - n)
        np.testing.assert_allclose(found.distance[j, :n], [r[0] for r in row], atol=1e-12)
        assert bool(found.distance[j, n:].isinf().all())
        for i, (_, image, cell, _) in enumerate(row):
            y, x = divmod(cell, 6 - size[1] + 1)
            patch = z[image - 10, :, y : y + size[0], x : x + size[1]]
            assert torch.equal(found.vector[j, i].view_as(patch), patch)
            np.testing.assert_allclose(
                found.distances[j, i], of_cells(loops(z[image - 10][None], p)[0, j], size), atol=1e-12
            )


def test_patches_keep_no_memory_of_images() -> None:
    """What is kept is small tensors, not views of the features of whole batches."""
    z = torch.randn(8, 5, 40, 40)
    found = nearest_patches(lambda x: x, batches_of(z, torch.zeros(8, dtype=torch.long), 4), torch.randn(2, 5, 1, 1))
    assert sum(x.untyped_storage().nbytes() for x in found) < z.nbytes / 4


def test_no_two_prototypes_take_one_patch() -> None:
    """Prototype 0 is nearer to patch (7, 3); 1 takes its second; 2 shares the image but not the cell."""
    inf = torch.inf
    patches = SimpleNamespace(
        distance=torch.tensor([[1.0, 5.0], [2.0, 3.0], [2.5, 9.0], [0.5, inf]]),
        image=torch.tensor([[7, 8], [7, 9], [7, 9], [7, -1]]),
        cell=torch.tensor([[3, 0], [3, 1], [4, 1], [3, 0]]),
    )
    assert without_duplicates(patches).tolist() == [1, 1, 0, 0]  # type: ignore[arg-type]
    patches.distance[0, 1] = inf
    patches.image[0, 1] = -1
    assert without_duplicates(patches).tolist() == [-1, 1, 0, 0]  # type: ignore[arg-type]


def check_upsampled(function: Callable[[Tensor, tuple[int, int]], Any] = upsampled) -> None:
    maps = torch.randn(70, 4, 6, dtype=torch.float64)
    expected = F.interpolate(maps[:, None], size=(30, 18), mode="bicubic", align_corners=False)[:, 0]
    parts = list(function(maps, (30, 18)))
    assert max(len(part) for part in parts) == 64
    np.testing.assert_allclose(torch.cat(parts), expected, atol=1e-5)


def test_upsampled_maps_are_torchs() -> None:
    check_upsampled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_upsampled()
    for right, wrong in (('mode="bicubic"', 'mode="bilinear"'), ("rows @ some", "rows.flip(0) @ some")):
        with pytest.raises(AssertionError):
            check_upsampled(mutated("interp_models.core.maps", right, wrong).upsampled)


@pytest.mark.parametrize("size", [(20, 30), (33, 21)])  # 5 % falls between pixels and on one
def test_activation_boxes_are_numpys_percentile(size: tuple[int, int]) -> None:
    maps = torch.randn(70, 4, 5)
    boxes = activation_boxes(maps, size)
    for m, box in zip(maps, boxes.tolist(), strict=True):
        large = F.interpolate(m[None, None], size=size, mode="bicubic", align_corners=False)[0, 0].numpy()
        y, x = np.nonzero(large >= np.percentile(large.astype(np.float64), 95))
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_receptive_spans_of_convolutions() -> None:
    """Kernel 3, stride 2, padding 1, then kernel 3, stride 1, padding 1: cell i sees pixels 2i - 3 to 2i + 3."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Softplus(), nn.Conv2d(8, 8, 3, padding=1), nn.Softplus()
    )
    rows, columns = receptive_spans(net, torch.rand(1, 3, 12, 16))
    for spans, n, length in ((rows, 6, 12), (columns, 8, 16)):
        assert spans.tolist() == [[max(0, 2 * i - 3), min(length, 2 * i + 4)] for i in range(n)]


def test_ranks_agree_on_what_they_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of two ranks, ties going to the image that comes first in the data, wherever it was found."""
    inf = torch.inf

    def patches(distance: list[list[float]], image: list[list[int]]) -> Patches:
        n = torch.tensor(image)
        return Patches(torch.tensor(distance), n, n % 3, n * 2, n[..., None].float(), n[..., None, None].float())

    ranks = [
        patches([[1.0, 4.0], [2.0, inf]], [[6, 0], [4, -1]]),
        patches([[1.0, 3.0], [inf, inf]], [[5, 9], [-1, -1]]),
    ]
    fields = iter([torch.stack(pair) for pair in zip(*ranks, strict=True)])
    monkeypatch.setattr(prototypes, "gathered", lambda x: next(fields))
    best = _over_ranks(ranks[0], 2)
    assert best.image.tolist() == [[5, 6], [4, -1]]
    assert best.label.tolist() == [[2, 0], [1, -1]]
    assert best.vector[0, :, 0].tolist() == [5, 6]
