"""Tasks that ask for the class of an image."""

from interp_models.core.errors import InputError
from interp_models.userstudy.base import TASKS, Condition, Item, Question, Shown, Task, Trial
from interp_models.userstudy.prediction import beside

CHOICES = 4
"""Number of classes to choose from."""
LETTERS = "ABCDEFGH"


@TASKS.register("class_name")
class ClassName(Task):
    """Name the class of an image that the model names rightly, out of four; an example of each is shown."""

    intro = "Choose the right name of each picture. A map, if there is one, shows which places a model used to find it."
    source = "tutorial, section 3.2.1 (references 77 to 80)"
    no_map = True
    needs_label = True

    def items(self, wanted: int) -> list[Item]:
        pool = self.pool
        by_class: dict[int, int] = {}  # the example of each class, which is never asked about
        for index in self.shuffled(pool.indices):
            if (label := pool.seen(index).label) >= 0:
                by_class.setdefault(label, index)
        usable = [seen for index in pool.indices if (seen := pool.seen(index)).right and by_class[seen.label] != index]
        if len(by_class) < 2 or not usable:
            raise InputError(
                "userstudy=class_name needs two classes, and two images of one that is named rightly; judge more images"
            )
        groups: dict[int, list[Item]] = {}
        for seen in usable:
            others = self.shuffled([label for label in by_class if label != seen.label])[: CHOICES - 1]
            chosen = self.shuffled([seen.label, *others])
            shown = [by_class[label] for label in chosen]
            groups.setdefault(seen.label, []).append(Item(seen.index, (chosen, shown)))
        return self.in_turns(list(groups.values()), wanted)

    def trial(self, item: Item, condition: Condition) -> Trial:
        pool, name = self.pool, condition["map"]
        classes, shown = item.about
        names = [pool.class_name(label) for label in classes]
        examples = [Shown(pool.picture(index, name), text) for index, text in zip(shown, names, strict=True)]
        right = classes.index(pool.seen(item.index, name).label)
        question = Question("class", "Which is the name of this picture?", names, "accuracy")
        return Trial([beside(self, item.index, name, "")], [question], examples, {"class": right})


class OfFour(Task):
    """Abstract: shows the maps of the true class and of the three others with the highest scores."""

    needs_label = True
    needs_classes = True
    judged_maps = False

    def items(self, wanted: int) -> list[Item]:
        known = [index for index in self.pool.indices if self.pool.seen(index).label >= 0]
        right = [index for index in known if self.pool.seen(index).right]
        found, first = [], self.maps[0]
        for index in self.in_turns([right, [index for index in known if index not in right]], wanted):
            scores = self.pool.clean_scores(index, first)
            label = self.pool.seen(index).label
            others = [int(place) for place in (-scores).argsort() if place != label][: CHOICES - 1]
            found.append(Item(index, self.shuffled([label, *others])))
        if not found:
            raise InputError("userstudy: no image has a known class")
        return found

    def _maps(self, item: Item, name: str, captions: list[str]) -> list[Shown]:
        maps = self.pool.class_maps(item.index, name, item.about)
        drawn = [self.pool.drawn(item.index, name, map) for map in maps]
        return [Shown(self.pool.picture(item.index, name), "The picture"), *map(Shown, drawn, captions)]


@TASKS.register("agreement")
class Agreement(OfFour):
    """Rate the explanation of each of four classes, then choose the class."""

    intro = (
        "For each picture you see four names, and for each a map of the places that speak for it. Rate how convincing "
        "each map is, then choose the right name."
    )
    source = "HIVE (Kim et al. 2022), agreement"

    def trial(self, item: Item, condition: Condition) -> Trial:
        names = [self.pool.class_name(label) for label in item.about]
        right = item.about.index(self.pool.seen(item.index, condition["map"]).label)
        scale = ("1 (not at all)", "2", "3", "4 (very)")
        questions = [
            Question(
                f"rating{place}",
                f"How convincing is the map for “{text}”?",
                scale,
                f"rating of the {'right class' if place == right else 'other classes'}",
            )
            for place, text in enumerate(names)
        ]
        questions.append(Question("class", "Which is the right name?", names, "accuracy"))
        return Trial(self._maps(item, condition["map"], names), questions, truth={"class": right})


@TASKS.register("distinction")
class Distinction(OfFour):
    """Choose the map of the right class among those of four classes, without their names."""

    intro = (
        "For each picture you see four maps. Each shows the places that speak for one name; one of the names is right, "
        "but you do not see them. Choose the map of the right name."
    )
    source = "HIVE (Kim et al. 2022), distinction"

    def trial(self, item: Item, condition: Condition) -> Trial:
        letters = list(LETTERS[: len(item.about)])
        right = item.about.index(self.pool.seen(item.index, condition["map"]).label)
        question = Question("map", "Which map is that of the right name?", letters, "accuracy")
        pictures = self._maps(item, condition["map"], [f"Map {letter}" for letter in letters])
        return Trial(pictures, [question], truth={"map": right})
