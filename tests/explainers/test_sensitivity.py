"""Sobol' indices and HSIC, against known indices, definitions written out, and functions of one cell."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS, InputError
from interp_models.explainers.sensitivity import HSIC, Sobol


class OfCells(nn.Module):
    """Logits (0, f(m)) of the brightness m of the cells of an image; a white image shows the mask itself."""

    def __init__(self, f: Any, cells: int) -> None:
        super().__init__()
        self.f, self.pool = f, nn.AdaptiveAvgPool2d(cells)

    def forward(self, x: Tensor) -> Tensor:
        m = self.pool(x.mean(dim=1, keepdim=True)).flatten(1)
        return torch.stack([torch.zeros(len(x), dtype=x.dtype), self.f(m)], dim=1)


def white(side: int = 8) -> Tensor:
    return torch.ones(1, 3, side, side, dtype=torch.float64)


def test_sobol_indices_of_ishigamis_function() -> None:
    """Total indices of sin x1 + a sin² x2 + b x3⁴ sin x1, x in [-π, π]³, have a closed form; the fourth cell has 0."""
    a, b = 7.0, 0.1

    def ishigami(m: Tensor) -> Tensor:
        x = math.pi * (2 * m - 1)
        return x[:, 0].sin() + a * x[:, 1].sin() ** 2 + b * x[:, 2] ** 4 * x[:, 0].sin()

    one = 0.5 * (1 + b * math.pi**4 / 5) ** 2
    two, both = a**2 / 8, b**2 * math.pi**8 * (1 / 18 - 1 / 50)
    total = one + two + both
    expected = [(one + both) / total, two / total, both / total, 0.0]
    found = Sobol(OfCells(ishigami, 2), designs=4096, cells=2).attribute(white(), 1).flatten()
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("seed", [0, 3])
def test_sobol_is_jansens_estimator_written_out(seed: int) -> None:
    def f(m: Tensor) -> Tensor:
        return m[:, 0] * m[:, 3] + (3 * m[:, 5]).sin() - m[:, 7]

    explainer = Sobol(OfCells(f, 3), designs=8, cells=3, seed=seed)
    found = explainer.attribute(white(9), 1).flatten()
    masks = explainer._masks()
    a, c = masks[:8], masks[8:].reshape(9, 8, 9)
    of_a = f(torch.tensor(a)).numpy()
    variance = ((of_a - of_a.mean()) ** 2).sum() / 7
    for cell in range(9):
        changed = [k for k in range(9) if not np.array_equal(c[cell, :, k], a[:, k])]
        assert changed == [cell]
        of_c = f(torch.tensor(c[cell])).numpy()
        squares = sum((x - y) ** 2 for x, y in zip(of_a, of_c, strict=True))
        assert float(found[cell]) == pytest.approx(squares / 16 / variance, 1e-5)


def test_cells_of_an_additive_function_have_their_share() -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, -3.0], dtype=torch.float64)
    model = OfCells(lambda m: m @ weights, 2)
    found = Sobol(model, designs=2048, cells=2).attribute(white(), 1).flatten()
    np.testing.assert_allclose(found, weights**2 / (weights**2).sum(), atol=0.01)
    found = HSIC(model, samples=2000, cells=2).attribute(white(), 1).flatten()
    assert found.argsort().tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("seed", [0, 3])
def test_hsic_is_its_definition_written_out(seed: int) -> None:
    def f(m: Tensor) -> Tensor:
        return m[:, 0] * m[:, 3] + (3 * m[:, 5]).sin() - m[:, 7]

    explainer = HSIC(OfCells(f, 3), samples=21, cells=3, seed=seed)
    found = explainer.attribute(white(9), 1).flatten()
    masks = explainer._masks()
    assert masks.sum(axis=0).tolist() == [10] * 9
    y = f(torch.tensor(masks)).numpy()
    width = np.median([abs(p - q) for p, q in itertools.combinations(y, 2)])
    kernel = np.array([[math.exp(-((p - q) ** 2) / (2 * width**2)) for q in y] for p in y])
    h = np.eye(21) - 1 / 21
    for cell in range(9):
        same = np.array([[float(p == q) for q in masks[:, cell]] for p in masks[:, cell]])
        assert float(found[cell]) == pytest.approx(np.trace(same @ h @ kernel @ h) / 21**2, 1e-5)


@pytest.mark.parametrize(("name", "options"), [("sobol", {"designs": 32}), ("hsic", {"samples": 300})])
def test_the_only_cell_that_matters_is_found(name: str, options: Any) -> None:
    model = OfCells(lambda m: (5 * m[:, 6]).tanh(), 3)
    for score in ("logit", "probability"):
        found = EXPLAINERS.build(name, {**options, "cells": 3, "score": score}, model=model).attribute(white(9), 1)
        others = found.flatten()[[0, 1, 2, 3, 4, 5, 7, 8]]
        assert float(found[0, 2, 0]) > 20 * float(others.abs().max())


@pytest.mark.parametrize("name", ["sobol", "hsic"])
def test_a_score_that_no_mask_changes_has_a_map_of_zeros(name: str) -> None:
    small = dict(EXPLAINERS.get(name).small)
    flat, steep = OfCells(lambda m: 0 * m[:, 0], 2), OfCells(lambda m: m[:, 0], 2)
    assert EXPLAINERS.build(name, small, model=steep).attribute(white(), 1).any()
    assert not EXPLAINERS.build(name, small, model=flat).attribute(white(), 1).any()


def test_hsic_of_a_score_that_few_masks_change() -> None:
    """It is above 0 only where two cells are visible, so that most pairs of masks have equal scores."""
    model = OfCells(lambda m: 3 * m[:, 1] * m[:, 2], 2)
    explainer = HSIC(model, samples=400, cells=2)
    y = 3 * explainer._masks()[:, 1:3].prod(axis=1)
    assert np.median(np.abs(y[:, None] - y)) == 0
    found = explainer.attribute(white(), 1).flatten()
    assert float(found[1:3].min()) > 20 * float(found[[0, 3]].max())


def test_refusals() -> None:
    model = OfCells(lambda m: m[:, 0], 2)
    with pytest.raises(InputError, match="designs must be a power of 2, at least 2; got 12"):
        Sobol(model, designs=12)
    with pytest.raises(InputError, match="samples must be at least 2; got 1"):
        HSIC(model, samples=1)
    with pytest.raises(InputError, match="cells must be at most the side of the images; got 9"):
        HSIC(model, cells=9).attribute(white(), 1)
