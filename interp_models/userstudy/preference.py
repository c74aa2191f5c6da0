"""The task that asks which of two maps is better."""

import itertools

from interp_models.core.errors import InputError
from interp_models.userstudy.base import TASKS, Condition, Item, Question, Shown, Task, Trial


@TASKS.register("preference")
class Preference(Task):
    """Which of two maps explains the decision better; each pair stands in both orders."""

    intro = "Two maps show which places of a picture a model used to name it. Choose the one that explains it better."
    source = "Jeyakumar et al. 2020 (tutorial, section 3.2.2)"

    def conditions(self) -> list[Condition]:
        names = self.maps
        if len(names) < 2:
            raise InputError(f"userstudy=preference compares maps, but there is one alone: {names[0]}")
        pairs = self.shuffled(list(itertools.combinations(names, 2)))
        return [{"map": left, "beside": right} for pair in pairs for left, right in (pair, pair[::-1])]

    def items(self, wanted: int) -> list[Item]:
        return [Item(index) for index in self.shuffled(self.pool.indices)[:wanted]]

    def trial(self, item: Item, condition: Condition) -> Trial:
        left, right = condition["map"], condition["beside"]
        seen = self.pool.seen(item.index, left)
        said = f"The model says: {self.pool.class_name(seen.prediction)}"
        pictures = [
            Shown(self.pool.overlay(item.index, left), "Left"),
            Shown(self.pool.picture(item.index, left), said),
            Shown(self.pool.overlay(item.index, right), "Right"),
        ]
        question = Question("better", "Which map explains the decision better?", ("left", "right"), "preference")
        return Trial(pictures, [question], stands_for={"better": (left, right)})
