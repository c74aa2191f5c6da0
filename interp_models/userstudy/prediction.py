"""Tasks that ask what the model predicts, and whether it is right."""

from collections.abc import Sequence

import numpy as np

from interp_models.core.errors import InputError
from interp_models.userstudy.base import SURE, TASKS, YES_NO, Condition, Item, Question, Shown, Task, Trial
from interp_models.userstudy.pool import Pool, Seen

KINDS = ((True, True), (False, True), (True, False), (False, False))
"""Whether an example is of the class, and whether the model says so."""
TRIES = 20
"""So often other images are drawn for a trial, if the same ones were drawn before."""


def says(named: str, *, is_one: bool, is_said: bool) -> str:
    """What an example says of a class.

    >>> says("Wren", is_one=True, is_said=False)
    'The model does not say “Wren”. Wrong: it is one.'
    """
    said = f"The model {'says' if is_said else 'does not say'} “{named}”."
    return f"{said} Right." if is_one == is_said else f"{said} Wrong: it is {'one' if is_one else 'another'}."


def beside(task: Task, index: int, name: str, caption: str) -> Shown:
    """An image and, unless the condition shows none, its map, side by side."""
    picture = task.pool.picture(index, name)
    if task.pool.parts(name)[1] is None:
        return Shown(picture, caption)
    return Shown(np.concatenate([picture, task.pool.overlay(index, name)], axis=1), caption)


def set_apart(task: Task, known: Sequence[Seen]) -> set[int]:
    """Indices of images to be examples, which must not be asked about: their captions tell the answer.

    They are one of every pair of class and prediction with several images, and half of the others.
    """
    groups: dict[tuple[int, int], list[Seen]] = {}
    for seen in task.shuffled(known):
        groups.setdefault((seen.label, seen.prediction), []).append(seen)
    singles = [group[0] for group in groups.values() if len(group) == 1]
    return {group[0].index for group in groups.values() if len(group) > 1} | {one.index for one in singles[::2]}


def _of_different_images(
    yes: Sequence[tuple[int, Item]], no: Sequence[tuple[int, Item]], wanted: int
) -> tuple[list[Item], list[Item]]:
    """At most so many items of each group, all of different images; those with most kinds of examples come first."""
    taken: set[int] = set()
    found: tuple[list[Item], list[Item]] = ([], [])
    left = [sorted(group, key=lambda pair: pair[0]) for group in (yes, no)]
    while any(left) and min(map(len, found)) < wanted:
        for group, own in zip(left, found, strict=True):
            while group:
                _, item = group.pop()
                if item.index not in taken:
                    taken.add(item.index)
                    own.append(item)
                    break
    return found


@TASKS.register("simulation")
class Simulation(Task):
    """Forward simulation: from one true positive, false positive, false negative and true negative, predict whether the
    model names another image as of the class; with and without maps, with and without scores."""

    intro = (
        "A model looks for one class. Examples show when it finds the class and when not, rightly or wrongly. Then say "
        "what it does with one more picture. Where a map stands beside a picture, it shows which places the model used."
    )
    source = "Alqaraawi et al. 2020 (tutorial, section 3.2.1 and Fig. 10)"
    no_map = True
    needs_label = True

    def __init__(self, pool: Pool, draw: np.random.Generator) -> None:
        super().__init__(pool, draw)
        self._examples: set[int] = set()
        """Indices of the images that are examples, and never items."""

    def conditions(self) -> list[Condition]:
        return [{"map": name, "scores": scores} for name in self.maps for scores in ("shown", "hidden")]

    def items(self, wanted: int) -> list[Item]:
        known = [seen for index in self.pool.indices if (seen := self.pool.seen(index)).label >= 0]
        self._examples = set_apart(self, known)
        yes: list[tuple[int, Item]] = []  # with the number of kinds of examples
        no: list[tuple[int, Item]] = []
        for wanted_class in sorted({seen.prediction for seen in known}):
            examples = self._groups(wanted_class)
            present = [kind for kind, group in examples.items() if group]
            if {said for _, said in present} != {True, False}:
                continue
            near = {one.label for one in examples[False, False]} | {wanted_class}
            for seen in known:
                says_it = seen.prediction == wanted_class
                if seen.index not in self._examples and (says_it or seen.label in near):
                    (yes if says_it else no).append((len(present), Item(seen.index, wanted_class)))
        items = self.balanced(*_of_different_images(self.shuffled(yes), self.shuffled(no), wanted), wanted)
        if not items:
            raise InputError(
                "userstudy=simulation: no class has images that the model names so and others that it does not, beside "
                "those that are examples; judge more images"
            )
        return items

    def _groups(self, wanted: int) -> dict[tuple[bool, bool], list[Seen]]:
        """The examples by whether they are of a class, and whether the model says so. Of images that are neither, those
        of the classes with which the model confuses this one, if there are some."""
        groups: dict[tuple[bool, bool], list[Seen]] = {kind: [] for kind in KINDS}
        for one in map(self.pool.seen, sorted(self._examples)):
            groups[one.label == wanted, one.prediction == wanted].append(one)
        near = {one.label for one in groups[False, True]} | {one.prediction for one in groups[True, False]}
        alike = [one for one in groups[False, False] if one.label in near]
        groups[False, False] = alike or groups[False, False]
        return groups

    def trial(self, item: Item, condition: Condition) -> Trial:
        pool, name, scores = self.pool, condition["map"], condition["scores"] == "shown"
        named = pool.class_name(item.about)
        examples = []
        for kind, group in self._groups(item.about).items():
            if other := next(iter(group), None):
                score = f" Its score: {100 * self._score(other, item.about, name):.0f} %." if scores else ""
                said = says(named, is_one=kind[0], is_said=kind[1])
                examples.append(beside(self, other.index, name, said + score))
        seen = pool.seen(item.index, name)
        questions = [
            Question("recognised", f"Will the model say “{named}” for this picture?", YES_NO, "accuracy"),
            Question("sure", "How sure are you?", SURE, "confidence"),
        ]
        truth = {"recognised": 0 if seen.prediction == item.about else 1}
        return Trial([beside(self, item.index, name, "")], questions, examples, truth)

    def _score(self, seen: Seen, of_class: int, name: str) -> float:
        return float(self.pool.clean_scores(seen.index, name)[of_class])


@TASKS.register("correctness")
class Correctness(Task):
    """Whether the model's prediction is right."""

    intro = "A model named each picture. Say whether the name is right. A map, if there is one, shows what it used."
    source = "tutorial, section 3.2.1 (reference 81); HIVE (Kim et al. 2022)"
    no_map = True
    needs_label = True

    def items(self, wanted: int) -> list[Item]:
        seen = [one for index in self.pool.indices if (one := self.pool.seen(index)).label >= 0]
        right = [one for one in seen if one.right]
        wrong = [one for one in seen if not one.right]
        if not right or not wrong:
            raise InputError(
                f"userstudy=correctness: all predictions are {'right' if right else 'wrong'}; judge more images"
            )
        return [Item(one.index) for one in self.balanced(right, wrong, wanted)]

    def trial(self, item: Item, condition: Condition) -> Trial:
        name = condition["map"]
        seen = self.pool.seen(item.index, name)
        said = f"The model says: {self.pool.class_name(seen.prediction)}"
        questions = [
            Question("right", "Is the model right?", YES_NO, "accuracy"),
            Question("sure", "How sure are you?", SURE, "confidence"),
        ]
        return Trial([beside(self, item.index, name, said)], questions, truth={"right": 0 if seen.right else 1})


@TASKS.register("model_accuracy")
class ModelAccuracy(Task):
    """Estimate the share of right predictions from eight images."""

    intro = (
        "A model named eight pictures. Estimate how many percent of the names are right. Maps, if there are some, show "
        "which places the model used."
    )
    source = "tutorial, section 3.2.1 (references 77 to 80)"
    no_map = True
    needs_label = True
    judged_maps = False
    together = 8

    def items(self, wanted: int) -> list[Item]:
        seen = [one for index in self.pool.indices if (one := self.pool.seen(index)).label >= 0]
        right, wrong = [one.index for one in seen if one.right], [one.index for one in seen if not one.right]
        fewest, most = max(0, self.together - len(wrong)), min(self.together, len(right))
        if fewest == most:
            raise InputError("userstudy=model_accuracy: all predictions are right or all are wrong; judge more images")
        if fewest > most:
            raise InputError(
                f"userstudy=model_accuracy shows {self.together} images at once, but {len(seen)} are known"
            )
        found: dict[frozenset[int], Item] = {}  # the same images are not shown twice
        for count in [round(count) for count in np.linspace(fewest, most, wanted)]:
            for _ in range(TRIES):
                indices = self.shuffled(self.shuffled(right)[:count] + self.shuffled(wrong)[: self.together - count])
                if frozenset(indices) not in found:
                    found[frozenset(indices)] = Item(indices[0], tuple(indices))
                    break
        return list(found.values())

    def trial(self, item: Item, condition: Condition) -> Trial:
        name, pool = condition["map"], self.pool
        seen = [pool.seen(index, name) for index in item.about]
        pictures = [beside(self, one.index, name, pool.class_name(one.prediction)) for one in seen]
        share = round(100 * sum(one.right for one in seen) / len(seen))
        question = Question("percent", "How many percent of these names are right (0 to 100)?", measure="error")
        return Trial(pictures, [question], truth={"percent": share})
