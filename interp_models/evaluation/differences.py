"""How explainers differ from one reference on the same images: what the page's answer and its forest plot show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from interp_models.evaluation.statistics import Floats, PairedTests, Values, interval, paired, superiority
from interp_models.explainers.controls import is_control

Verdict = Literal["better", "worse", "unclear", "same"]
VERDICTS: dict[int, Verdict] = {1: "better", -1: "worse", 0: "unclear"}
CLOSEST = 1e-4
"""Maps whose values, scaled to [0, 1], differ by no more are the same map up to rounding and scale."""


@dataclass(frozen=True)
class Difference:
    """The paired difference of an explainer from the reference by one metric."""

    explainer: str
    metric: str
    reference: str
    mean: float | None
    """Mean of the explainer's value minus the reference's, over the common images; None if there is none."""
    low: float | None
    """Lower end of its 95 % interval, or None, see `statistics.interval`. It is not adjusted, as `p` is."""
    high: float | None
    """Upper end of the interval."""
    n: int
    """Number of images where both are defined."""
    p: float | None
    """p-value of the signed-rank test, see `statistics.paired_tests`."""
    superiority: float | None
    """Share of the common images where the explainer is better than the reference; ties count half."""
    verdict: Verdict
    """`better` or `worse` than the reference if p < 0.05, and mean and signed ranks have the same sign; `same` if both
    maps are the same; else `unclear`."""


def reference_of(names: Mapping[str, str], wanted: str | None) -> str | None:
    """Label of the explainer that the others are compared with.

    Args:
        names: registered name of each explainer by label.
        wanted: label that was asked for; it counts if it is among the explainers.

    Returns:
        The wanted one; else the model's own map (`intrinsic`), else Grad-CAM, else the first that is not a control.
        None if there is only one explainer, or only controls.

    >>> reference_of({"rise": "rise", "gradcam": "gradcam"}, None)
    'gradcam'
    """
    if len(names) < 2:
        return None
    if wanted in names:
        return wanted
    for favourite in ("intrinsic", "gradcam"):
        if found := [label for label, name in names.items() if name == favourite]:
            return found[0]
    return next((label for label, name in names.items() if not is_control(name)), None)


def differences(
    values: Values, tests: PairedTests, reference: str, higher_is_better: Mapping[str, bool], same: Sequence[str] = ()
) -> list[Difference]:
    """Compare every other explainer with the reference, by every metric.

    Args:
        values: values per image (n,) by explainer and metric, NaN where undefined.
        tests: the tests of all pairs, see `statistics.paired_tests`.
        reference: label of the reference.
        higher_is_better: direction of each metric.
        same: labels of explainers whose maps are those of the reference, see `same_maps`.
    """
    found = []
    for label, of_metric in values.items():
        for key, own in of_metric.items() if label != reference else ():
            ours, other = paired(own, values[reference][key])
            if not len(ours):
                found.append(Difference(label, key, reference, None, None, None, 0, None, None, "unclear"))
                continue
            p, away, higher = tests.p[key, frozenset((label, reference))], ours - other, higher_is_better[key]
            low, high = interval(away)
            told = tests.told(key, label, reference) * (1 if higher else -1)
            verdict: Verdict = "same" if label in same else VERDICTS[told]
            share = superiority(ours, other, higher_is_better=higher)
            mean, n = float(away.mean()), len(ours)
            found.append(Difference(label, key, reference, mean, low, high, n, p, share, verdict))
    return found


def same_maps(maps: Mapping[str, NDArray[np.float32]]) -> list[list[str]]:
    """Groups of at least two explainers whose maps are the same, up to rounding and scale.

    Args:
        maps: maps (N, h, w) by explainer.
    """
    groups: list[list[str]] = []
    for label, own in maps.items():
        known = next((group for group in groups if _same(own, maps[group[0]])), None)
        if known is None:
            groups.append([label])
        else:
            known.append(label)
    return [group for group in groups if len(group) > 1]


def _same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    pairs = zip(a, b, strict=True)
    return a.shape == b.shape and all(np.abs(_scaled(x) - _scaled(y)).max() <= CLOSEST for x, y in pairs)


def _scaled(map: NDArray[np.float32]) -> Floats:
    """A map (h, w), scaled to [0, 1]; 0 if it is constant."""
    low, high = float(map.min()), float(map.max())
    scaled: Floats = (map.astype(np.float64) - low) / ((high - low) or 1.0)
    return scaled
