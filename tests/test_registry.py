"""Constructors are schemas: what a config may say of a class, and what is said when it says something else."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from interp_models import EXPLAINERS, METRICS
from interp_models.core.errors import InputError, unknown
from interp_models.core.registry import Registry
from interp_models.core.schema import parse, schema_of


@dataclass
class Step:
    length: int = 1
    rates: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    steps: list[Step] = field(default_factory=list)
    last: Step = field(default_factory=Step)


class Thing:
    """Has one option of every type in use."""

    def __init__(
        self,
        model: object,
        count: int,
        *,
        rate: float = 0.5,
        mode: Literal["slow", "fast"] = "slow",
        size: tuple[int, int] | None = None,
        pair: tuple[int, int] = (1, 2),
        name: str | None = "x",
        flag: bool = False,
        names: list[str] | None = None,
        table: dict[str, float] | None = None,
        anything: Any = None,
        **extra: Any,
    ) -> None:
        self.options = {key: value for key, value in locals().items() if key not in ("self", "model", "extra")}
        self.model = model
        assert not extra


DEFAULTS = {
    "rate": 0.5, "mode": "slow", "size": None, "pair": (1, 2), "name": "x", "flag": False, "names": None, "table": None,
    "anything": None,
}  # fmt: skip


@pytest.fixture
def things() -> Registry[Thing]:
    registry: Registry[Thing] = Registry("thing")
    registry.register("thing")(Thing)
    return registry


def test_defaults_are_the_constructors(things: Registry[Thing]) -> None:
    model = object()
    built = things.build("thing", {"count": 3}, model=model)
    assert built.options == {"count": 3, **DEFAULTS}
    assert built.model is model


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("count", 4, 4),
        ("count", "4", 4),
        ("rate", 1, 1.0),
        ("rate", "1e-3", 0.001),
        ("mode", "fast", "fast"),
        ("size", [3, 4], (3, 4)),
        ("size", None, None),
        ("pair", [5, 6], (5, 6)),
        ("name", None, None),
        ("flag", "true", True),
        ("names", ["a", "b"], ["a", "b"]),
        ("table", {"a": 1}, {"a": 1.0}),
        ("anything", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
    ],
)
def test_values_become_the_declared_types(things: Registry[Thing], key: str, given: Any, expected: Any) -> None:
    options = things.build("thing", {"count": 3, key: given}, model=None).options
    assert options == {"count": 3, **DEFAULTS, key: expected}
    assert type(options[key]) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("count", "many", "thing 'thing'.count: Value 'many' of type 'str' could not be converted to Integer"),
        ("count", 3.5, "thing 'thing'.count: Value '3.5' of type 'float' could not be converted to Integer"),
        ("count", None, "thing 'thing'.count: Incompatible value 'None' for field of type 'int'"),
        ("count", True, "thing 'thing'.count: Value 'True' of type 'bool' could not be converted to Integer"),
        ("rate", "fast", "thing 'thing'.rate: Value 'fast' of type 'str' could not be converted to Float"),
        ("mode", "medium", "thing 'thing'.mode: Invalid value 'medium', expected one of ['slow', 'fast']"),
        ("size", [3], "thing 'thing'.size: expected tuple[int, int] | None, got [3]"),
        ("size", [3, "b"], "thing 'thing'.size: expected tuple[int, int] | None, got [3, 'b']"),
        ("flag", "maybe", "thing 'thing'.flag: Value 'maybe' is not a valid bool (type str)"),
        ("table", {"a": "b"}, "thing 'thing'.table.a: Value 'b' of type 'str' could not be converted to Float"),
    ],
)
def test_wrong_types_say_what_where_and_what_was_expected(
    things: Registry[Thing], key: str, given: Any, expected: str
) -> None:
    with pytest.raises(InputError) as error:
        things.build("thing", {"count": 3, key: given}, model=None)
    assert str(error.value) == expected


def test_missing_value(things: Registry[Thing]) -> None:
    with pytest.raises(InputError, match=r"^thing 'thing': 'count' has no default and must be given$"):
        things.build("thing", {}, model=None)


def test_unknown_option_names_the_nearest(things: Registry[Thing]) -> None:
    with pytest.raises(InputError, match=r"^unknown key in thing 'thing': 'rat'; did you mean 'rate'"):
        things.build("thing", {"count": 3, "rat": 1}, model=None)
    with pytest.raises(
        InputError, match=r"^unknown key in thing 'thing': 'zzz'; known: anything, count, flag, mode, na"
    ):
        things.build("thing", {"count": 3, "zzz": 1}, model=None)


def test_what_the_program_gives_cannot_be_configured(things: Registry[Thing]) -> None:
    with pytest.raises(InputError, match="unknown key in thing 'thing': 'model'"):
        things.build("thing", {"count": 3, "model": "mine"}, model=None)


def test_unknown_name_names_the_nearest(things: Registry[Thing]) -> None:
    with pytest.raises(InputError, match=r"^unknown thing 'thin'; did you mean 'thing'\?$"):
        things.get("thin")
    with pytest.raises(InputError, match=r"^unknown thing 'zebra'; known: thing$"):
        things.build("zebra")
    assert str(unknown("colour", "grey", ["green", "grew"])) == "unknown colour 'grey'; did you mean 'grew' or 'green'?"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("GradCAM", "gradcam"),
        ("grad-cam", "gradcam"),
        ("Grad-CAM++", "gradcam_pp"),
        ("GradCAMPlusPlus", "gradcam_pp"),
        ("GradCAMpp", "gradcam_pp"),
        ("ScoreCAM", "scorecam"),
        ("Eigen CAM", "eigencam"),
        ("IntegratedGradients", "integrated_gradients"),
        ("smooth_grad", "smoothgrad"),
        ("RISE", "rise"),
    ],
)
def test_spellings_count_as_one_name(given: str, meant: str) -> None:
    assert EXPLAINERS.get(meant)
    with pytest.raises(InputError) as error:
        EXPLAINERS.get(given)
    assert str(error.value) == f"unknown explainer {given!r}; did you mean {meant!r}?"


def test_names_that_differ_in_signs_alone_are_both_offered() -> None:
    assert str(unknown("layer", "AB", ["a.b", "a_b", "c"])) == "unknown layer 'AB'; did you mean 'a.b' or 'a_b'?"


def test_a_registry_shows_its_names(things: Registry[Thing]) -> None:
    things.register("another")(Plan)
    assert list(things) == things.names() == ["another", "thing"]
    assert len(things) == 2
    assert "thing" in things
    assert "Thing" not in things
    assert repr(things) == "<thing registry: another, thing>"


def test_metrics_are_found_by_what_they_give() -> None:
    for name in METRICS:
        for key in (name, *METRICS.get(name).keys):
            assert key in METRICS
            assert type(METRICS.build(key, {"max_steps": 3})) is METRICS.get(name)
    assert type(METRICS.build("dauc")).__name__ == "DeletionInsertion"
    assert METRICS.get("ai") is METRICS.get("iic") is METRICS.get("masked_confidence")
    assert list(METRICS) == METRICS.names() == sorted(METRICS)
    assert {"deletion_insertion", "masked_confidence"} <= set(METRICS)
    with pytest.raises(InputError, match=r"^unknown metric 'DAUC'; did you mean 'dauc'\?$"):
        METRICS.build("DAUC")


def test_options_builds_nothing() -> None:
    class Bomb:
        def __init__(self, fuse: int = 1) -> None:
            raise AssertionError("built")

    registry: Registry[Bomb] = Registry("bomb")
    registry.register("bomb")(Bomb)
    assert registry.options("bomb", {"fuse": 2}) == {"fuse": 2}
    with pytest.raises(InputError, match="did you mean 'fuse'"):
        registry.options("bomb", {"fus": 2})


def test_duplicates_raise(things: Registry[Thing]) -> None:
    with pytest.raises(InputError, match="thing 'thing' is already registered by"):
        things.register("thing")(Plan)
    assert things.get("thing") is Thing


def test_names_match_patterns() -> None:
    registry: Registry[Any] = Registry("kind")
    for name in ("b_two", "a_one", "a_two"):
        registry.register(name)(type(name, (), {}))
    assert registry.names() == ["a_one", "a_two", "b_two"]
    assert registry.names("*_two") == ["a_two", "b_two"]
    assert registry.names("c*") == []


def test_defaults_are_not_shared() -> None:
    class Holder:
        def __init__(self, items: tuple[int, ...] = (1,), table: dict[str, int] | None = None) -> None:
            self.items = items

    registry: Registry[Holder] = Registry("holder")
    registry.register("holder")(Holder)
    given = {"table": {"a": 1}}
    registry.build("holder", given)
    assert given == {"table": {"a": 1}}
    assert registry.build("holder").items == (1,)


def test_lists_of_dataclasses() -> None:
    steps = [{"length": 2, "rates": {"head": 1}}, {}]
    assert parse(Plan, {"steps": steps, "last": {"length": 9}}, "plan") == {
        "steps": [Step(2, {"head": 1.0}), Step(1, {})],
        "last": Step(9, {}),
    }
    assert parse(Plan, {"steps": [Step(3)], "last": Step(4)}, "plan") == {"steps": [Step(3)], "last": Step(4)}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"step": []}, "unknown key in plan: 'step'; did you mean 'steps'?"),
        ({"steps": [{}, {"lenght": 1}]}, "unknown key in plan.steps[1]: 'lenght'; did you mean 'length'?"),
        ({"last": {"rate": {}}}, "unknown key in plan.last: 'rate'; did you mean 'rates'?"),
        (
            {"steps": [{"rates": {"a": "b"}}]},
            "plan.steps[0].rates.a: Value 'b' of type 'str' could not be converted to Float",
        ),
        ({"steps": {"length": 1}}, "plan.steps: expected a list, got {'length': 1}"),
        ({"steps": "many"}, "plan.steps: expected a list, got 'many'"),
        ({"steps": [1]}, "plan.steps[0]: expected keys and values (length, rates), got 1"),
        ({"last": None}, "plan.last: expected keys and values (length, rates), got None"),
    ],
)
def test_errors_in_nested_dataclasses_say_where(node: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse(Plan, node, "plan")
    assert str(error.value) == expected


def test_schema_keeps_order_and_leaves_out_what_is_given() -> None:
    fields = schema_of(Thing, given=("model",)).__dataclass_fields__  # type: ignore[attr-defined]
    assert list(fields) == ["count", *DEFAULTS]
    assert fields["size"].type == tuple[int, int] | None
