"""Paired differences from a reference, and the answer in words that is made of them."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from interp_models.evaluation.answer import answer
from interp_models.evaluation.differences import Difference, differences, reference_of, same_maps
from interp_models.evaluation.statistics import paired_tests

ZEROS = np.zeros(8)
RISING = np.arange(1.0, 9.0)


def found(values: dict[str, np.ndarray], higher: bool = True, same: tuple[str, ...] = ()) -> dict[str, Difference]:
    """Differences from `own` by one metric."""
    of_metric = {name: {"dauc": own} for name, own in values.items()}
    each = differences(of_metric, paired_tests(of_metric), "own", {"dauc": higher}, same)
    return {one.explainer: one for one in each}


def test_a_difference_is_that_of_the_pairs() -> None:
    own, other = np.random.default_rng(0).random((2, 20))
    one = found({"own": own, "a": other})["a"]
    assert one.mean == pytest.approx((other - own).mean())
    assert one.low < one.mean < one.high
    assert one.p == pytest.approx(stats.wilcoxon(other, own, method="exact").pvalue)
    assert (one.n, one.superiority, one.reference) == (20, (other > own).mean(), "own")
    assert one.verdict == "unclear"


@pytest.mark.parametrize("higher", [True, False])
def test_the_verdict_follows_the_direction_of_the_metric(higher: bool) -> None:
    each = found({"own": ZEROS, "up": RISING, "down": -RISING}, higher)
    assert each["up"].p == each["down"].p == 2 / 2**8  # exact, and three equal values adjust to themselves
    verdicts = [each["up"].verdict, each["down"].verdict]
    assert verdicts == (["better", "worse"] if higher else ["worse", "better"])


def test_p_is_that_of_the_tests_of_all_pairs() -> None:
    rng = np.random.default_rng(1)
    values = {name: {key: rng.random(10) for key in ("dauc", "dc")} for name in ("own", "a", "b")}
    tests = paired_tests(values)
    each = differences(values, tests, "own", {"dauc": False, "dc": True})
    assert [one.p for one in each] == [tests.p[one.metric, frozenset((one.explainer, "own"))] for one in each]
    assert len(each) == 4


def test_only_common_images_count() -> None:
    own, other = RISING.copy(), RISING + 1
    own[0], other[1] = np.nan, np.nan
    one = found({"own": own, "a": other})["a"]
    assert (one.n, one.mean) == (6, 1.0)
    nothing = found({"own": np.full(3, np.nan), "a": np.ones(3), "b": np.ones(3)})
    assert [(d.n, d.mean, d.low, d.p, d.verdict) for d in nothing.values()] == [(0, None, None, None, "unclear")] * 2


def test_nothing_is_said_where_a_few_images_decide_the_mean() -> None:
    """Eleven images say better, one says much worse: the ranks tell them apart, the mean points the other way."""
    away = np.r_[np.ones(11), -1000.0]
    one = found({"own": np.zeros(12), "a": away})["a"]
    assert one.p < 0.05
    assert one.mean < 0
    assert one.verdict == "unclear"
    assert found({"own": np.zeros(12), "a": np.abs(away)})["a"].verdict == "better"


def test_same_maps_are_those_equal_up_to_scale_and_rounding() -> None:
    own = np.random.default_rng(0).random((3, 4, 4), dtype=np.float32)
    other = own.copy()
    other[2, 0, 0] += 0.01
    maps = {"own": own, "scaled": 3 * own + 1, "other": other, "fine": own.repeat(2, 1), "flat": np.ones_like(own)}
    assert same_maps(maps) == [["own", "scaled"]]
    assert same_maps({"own": own, "flat": np.ones_like(own)}) == []
    assert found({"own": ZEROS, "scaled": RISING}, same=("scaled",))["scaled"].verdict == "same"


def test_the_reference_is_the_own_map_or_gradcam() -> None:
    names = {"random": "random", "cam": "gradcam", "mine": "intrinsic", "rise": "rise"}
    assert reference_of(names, None) == "mine"
    assert reference_of(names, "rise") == "rise"
    assert reference_of({"random": "random", "rise": "rise", "cam": "gradcam"}, "gone") == "cam"
    assert reference_of({"random": "random", "rise": "rise"}, None) == "rise"
    assert reference_of({"random": "random", "fakecam": "fakecam"}, None) is None
    assert reference_of({"rise": "rise"}, None) is None


NAMES = {"intrinsic": "intrinsic", "gradcam": "gradcam", "rise": "rise", "random": "random"}


def rows(
    names: dict[str, str] = NAMES, n: int = 100, grid: str = "7x7", steps: int | None = 49, **means: list[float]
) -> list[dict[str, Any]]:
    """Rows of DAUC and AD; every explainer but the control is told from it by DAUC, and none by AD."""
    means = means or {key: [0.1 * place for place in range(len(names))] for key in ("dauc", "ad")}
    return [
        {
            "run": "bird", "explainer": label, "options": {"name": name}, "metric": key, "mean": mean, "n": n,
            "n_undefined": 0, "grid": grid, "steps": steps, "higher_is_better": False,
            "control": None if name == "random" else "random",
            "p": None if name == "random" else 0.01 if key == "dauc" else 0.5,
        }
        for key, of_key in means.items()
        for (label, name), mean in zip(names.items(), of_key, strict=True)
    ]  # fmt: skip


def said(verdicts: dict[str, dict[str, str]], table: list[dict[str, Any]] | None = None, n: int = 100) -> Any:
    """The answer for verdicts by explainer and metric, against the own map."""
    each = [
        {"explainer": name, "metric": key, "reference": "intrinsic", "verdict": verdict, "n": n}
        for name, of_metric in verdicts.items()
        for key, verdict in of_metric.items()
    ]
    return answer(rows() if table is None else table, each)


UNCLEAR = {"dauc": "unclear", "ad": "unclear"}


@pytest.mark.parametrize(
    ("gradcam", "expected"),
    [
        (UNCLEAR, "On these 100 images, no metric of faithfulness tells bird's own map from `gradcam`."),
        (
            {"dauc": "worse", "ad": "unclear"},
            "On these 100 images, bird's own map is more faithful than `gradcam` by DAUC. By AD they cannot be told "
            "apart.",
        ),
        ({"dauc": "better", "ad": "better"}, "bird's own map is less faithful than `gradcam` by DAUC and AD."),
        (
            {"dauc": "worse", "ad": "better"},
            "bird's own map is more faithful than `gradcam` by DAUC and less faithful by AD.",
        ),
        ({"dauc": "same", "ad": "same"}, "On these 100 images, bird's own map and `gradcam` are the same map."),
    ],
)
def test_the_headline_says_what_the_tests_say(gradcam: dict[str, str], expected: str) -> None:
    found = said({"gradcam": gradcam, "rise": UNCLEAR, "random": {"dauc": "worse", "ad": "better"}})
    assert expected in found.headline
    assert any("`rise`" in line and line.startswith("Told apart by no metric: ") for line in found.groups)
    assert not any("random" in line for line in found.groups)


def test_other_explainers_are_grouped_by_how_metrics_agree() -> None:
    better, both = {"dauc": "better", "ad": "unclear"}, {"dauc": "better", "ad": "worse"}
    names = {"gradcam": "gradcam", "rise": "rise", "lime": "lime", "cam": "cam"}
    each = [
        {"explainer": name, "metric": key, "reference": "gradcam", "verdict": verdict, "n": 100}
        for name, of_metric in {"rise": better, "lime": both, "cam": UNCLEAR}.items()
        for key, verdict in of_metric.items()
    ]
    found = answer(rows(names), each)
    assert found.headline == "On these 100 images, some metric of faithfulness tells `rise` and `lime` from `gradcam`."
    assert found.groups == [
        "More faithful by at least one metric, and less by none: `rise`.",
        "More faithful by some metrics, and less by others: `lime`.",
        "Told apart by no metric: `cam`.",
    ]
    assert answer(rows(names), []) is None


def test_localisation_does_not_count_as_faithfulness() -> None:
    each = {"gradcam": {"dauc": "unclear", "energy": "worse"}}
    table = rows(dauc=[0.1, 0.2, 0.3, 0.4], energy=[0.1, 0.2, 0.3, 0.4])
    assert "no metric of faithfulness tells bird's own map from `gradcam`" in said(each, table).headline
    assert said({"gradcam": {"energy": "worse"}}, table).headline == "No metric of faithfulness was computed."


def test_notes_name_what_limits_the_answer() -> None:
    verdicts = dict.fromkeys(("gradcam", "rise", "random"), UNCLEAR)
    assert said(verdicts).notes == ["By AD these 100 images tell no explainer from `random`."]
    led = rows(dauc=[0.1, 0.2, 0.3, 0.4], ad=[0.4, 0.3, 0.2, 0.1])
    note = "By AD a control has the best mean: a good value does not show a good explanation."
    assert note in said(verdicts, led).notes
    tied = rows(dauc=[0.1, 0.2, 0.3, 0.4], ad=[0.1, 0.3, 0.2, 0.1])
    assert not any("best mean" in note for note in said(verdicts, tied).notes)
    few = "Curves have only 16 steps, one for each cell of the maps."
    assert few in said(verdicts, rows(grid="4x4", steps=16)).notes
    assert few not in said(verdicts, rows(grid="4x4", steps=205)).notes  # curves by pixels
    lacking = rows()
    lacking[0]["n_undefined"] = 10  # of the reference
    assert said(verdicts, lacking, n=90).notes[-1] == (
        "Not every value is defined for `intrinsic`: compared on common images, 90 at least."
    )


def test_an_explainer_without_a_value_is_not_called_untold() -> None:
    nothing = {"dauc": "unclear", "ad": "unclear"}
    names = {"gradcam": "gradcam", "dead": "rise", "random": "random"}
    each = [
        {"explainer": name, "metric": key, "reference": "gradcam", "verdict": v, "n": 0 if name == "dead" else 100}
        for name in ("dead", "random")
        for key, v in nothing.items()
    ]
    assert answer(rows(names), each).groups == ["Without a common image: `dead`."]
    of_nothing = rows(names)
    for row in of_nothing:
        if row["explainer"] != "random":
            row |= {"mean": None, "p": None, "n_undefined": 100}
    notes = answer(of_nothing, each).notes
    assert not any("tell no explainer" in note or "best mean" in note for note in notes)


def test_controls_are_the_answer_if_there_is_nothing_else() -> None:
    names = {"gradcam": "gradcam", "random": "random"}
    each = [
        {"explainer": "random", "metric": key, "reference": "gradcam", "verdict": verdict, "n": 100}
        for key, verdict in (("dauc", "worse"), ("ad", "unclear"))
    ]
    found = answer(rows(names), each)
    assert found.headline == "On these 100 images, some metric of faithfulness tells `random` from `gradcam`."
    assert found.groups == ["Less faithful by at least one metric, and more by none: `random`."]


@pytest.mark.parametrize("n", [1, 5, 6, 29, 30])
def test_notes_say_what_the_number_of_images_allows(n: int) -> None:
    verdicts = dict.fromkeys(("gradcam", "rise", "random"), UNCLEAR)
    notes = said(verdicts, rows(n=n), n=n).notes
    if n == 1:
        assert notes == ["One image says nothing about others."]
        return
    smallest = stats.wilcoxon(np.arange(1, n + 1), method="exact").pvalue
    if n == 5:
        assert smallest == 0.0625
        assert notes == [
            "5 images cannot tell explainers apart: the test's smallest p-value is 0.062. Judge more images."
        ]
    elif n < 30:
        first = (
            f"{n} images are few: the test's smallest p-value is {smallest:.2g}, before the adjustment for 12 tests."
        )
        assert notes[0].startswith(first)
    else:
        assert not any("p-value" in note for note in notes)
