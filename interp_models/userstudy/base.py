"""The base class of the tasks that people do, and the trials that they are made of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from interp_models.core.registry import Registry
from interp_models.report.visual import Picture
from interp_models.userstudy.pool import Pool

YES_NO = ("yes", "no")
SURE = ("1 (guessed)", "2", "3", "4", "5 (certain)")


@dataclass(frozen=True)
class Question:
    """A question with options to choose from or, without options, for a whole number from 0 to 100."""

    key: str
    """Name of the question within its trial."""
    text: str
    options: Sequence[str] = ()
    measure: str = ""
    """Name of what the answers measure; several questions can measure the same. Empty takes the key."""


@dataclass(frozen=True)
class Shown:
    """A picture (H, W, 3) with the line below it."""

    picture: Picture
    caption: str = ""


@dataclass(frozen=True)
class Trial:
    """What a participant sees and is asked at once."""

    pictures: Sequence[Shown]
    questions: Sequence[Question]
    examples: Sequence[Shown] = ()
    """Pictures that come before, such as predictions to learn from."""
    truth: Mapping[str, int] = field(default_factory=dict)
    """The right answer by key of the question: the place of the option, or the number. Of a question without one,
    options are a scale: the first counts 1."""
    stands_for: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The explainer that each option stands for, by key of a question that asks for a preference."""


@dataclass(frozen=True)
class Item:
    """What a trial is about; each participant sees it once, under one condition."""

    index: int
    """Index of the image, or of the first of several."""
    about: Any = None
    """What a task must know beside; it is written to `study.json`."""


Condition = Mapping[str, str]
"""The levels of the factors that are varied: `map` is a name of `Pool.sources`, and a task can have further factors."""


class Task(ABC):
    """Abstract: a task of a study with people. A subclass implements `items` and `trial`.

    Args:
        pool: the judged images with their maps.
        draw: the random numbers of this study.
    """

    intro: ClassVar[str]
    """What participants read first."""
    source: ClassVar[str]
    """Where the task was described."""
    no_map: ClassVar[bool] = False
    """Whether one condition shows no map, so that the use of the maps can be seen."""
    needs_label: ClassVar[bool] = False
    """Whether each image must have one known class of the model."""
    needs_classes: ClassVar[bool] = False
    """Whether maps of several classes are shown. Explainers whose maps do not depend on the class are left out."""
    judged_maps: ClassVar[bool] = True
    """Whether an item is one image with the map that metrics judge, so that people can be compared with metrics."""
    several_models: ClassVar[bool] = False
    """Whether the maps of several models can be compared in one study, and maps of other classes than the predicted."""

    def __init__(self, pool: Pool, draw: np.random.Generator) -> None:
        self.pool, self.draw = pool, draw
        self.maps = pool.sources(no_map=self.no_map, of_class=self.needs_classes)
        """The levels of `map`."""

    def conditions(self) -> list[Condition]:
        """All conditions. The default varies the map alone."""
        return [{"map": name} for name in self.maps]

    @abstractmethod
    def items(self, wanted: int) -> list[Item]:
        """At most so many items, those with different right answers about equally often."""

    @abstractmethod
    def trial(self, item: Item, condition: Condition) -> Trial:
        """The trial of an item under a condition."""

    def shuffled(self, values: Sequence[Any]) -> list[Any]:
        """The values in a random order."""
        return [values[int(place)] for place in self.draw.permutation(len(values))]

    def balanced(self, one: Sequence[Any], other: Sequence[Any], wanted: int) -> list[Any]:
        """At most so many values, as many of one group as of the other: else one answer would be right more often."""
        each = min(len(one), len(other), (wanted + 1) // 2)
        return self.in_turns([self.shuffled(one)[:each], self.shuffled(other)[:each]], min(wanted, 2 * each))

    def in_turns(self, groups: Sequence[Sequence[Any]], wanted: int) -> list[Any]:
        """At most so many values, one of each group in turn, each group in a random order. If a group ends, the others
        go on."""
        left = [self.shuffled(group) for group in groups]
        found: list[Any] = []
        while len(found) < wanted and any(left):
            found += [group.pop() for group in left if group]
        return found[:wanted]


TASKS: Registry[Task] = Registry("user study", "interp_models.userstudy.TASKS")
