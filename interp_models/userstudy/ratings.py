"""Tasks that rate a map on a scale."""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from interp_models.core.errors import InputError
from interp_models.userstudy.base import TASKS, Condition, Item, Question, Shown, Task, Trial

LEVELS = ("very low", "low", "medium", "high", "very high")


class Rating(Task, ABC):
    """Abstract: shows an image with a map and asks one question with a scale."""

    question: ClassVar[str]
    scale: ClassVar[Sequence[str]]
    measure: ClassVar[str] = "rating"
    several_models = True

    def items(self, wanted: int) -> list[Item]:
        return [Item(index) for index in self.shuffled(self.pool.indices)[:wanted]]

    def trial(self, item: Item, condition: Condition) -> Trial:
        name = condition["map"]
        seen = self.pool.seen(item.index, name)
        said = f"The model says: {self.pool.class_name(seen.prediction, name)} ({100 * seen.confidence:.0f} %)"
        other = seen.explained != seen.prediction
        of_class = f"The map of: {self.pool.class_name(seen.explained, name)}" if other else "The map"
        pictures = [
            Shown(self.pool.picture(item.index, name), said),
            Shown(self.pool.overlay(item.index, name), of_class),
        ]
        return Trial(pictures, [Question("rating", self.question, self.scale, self.measure)])


@TASKS.register("quality")
class Quality(Rating):
    """The quality of the model's decision, as the map shows it, from 1 to 10."""

    intro = "A map shows which places of a picture a model used to name it. Rate how good its reasons are."
    source = "Mohseni et al. 2018 (tutorial, section 3.2.2)"
    question = "How good is the model's decision, judged by the places that the map shows?"
    scale = ("1 (very bad)", *map(str, range(2, 10)), "10 (very good)")


@TASKS.register("coverage")
class Coverage(Rating):
    """How well the map covers the object, from 1 to 5."""

    intro = "A map shows which places of a picture a model used. Say how much of the object it covers."
    source = "Samuel et al. 2021; Petsiuk et al. 2018 (tutorial, section 3.2.2)"
    question = "How well does the map cover the object and its parts?"
    scale = ("1 (not at all)", "2", "3", "4", "5 (completely)")


@TASKS.register("discriminability")
class Discriminability(Rating):
    """How well the features that the map shows tell the class from others, from 1 to 5; for experts."""

    intro = "You know the classes. A map shows which places a model used. Say how well these set the class apart."
    source = "tutorial, section 3.2.2 (references 68 and 69)"
    question = "How well do the features that the map shows tell this class from similar ones?"
    scale = ("1 (not at all)", "2", "3", "4", "5 (very well)")


@TASKS.register("visual_coherence")
class VisualCoherence(Rating):
    """Visual coherence in five levels: the map is on the object and does not spill into the background."""

    intro = "A map shows which places of a picture a model used. Say how well it keeps to the object."
    source = "combination of saliency methods (Nielsen), Table I"
    question = (
        "Visual coherence: the important places lie within the object, with sharp edges and little spillover into the "
        "background. It is …"
    )
    scale = LEVELS


@TASKS.register("edge_differentiation")
class EdgeDifferentiation(Rating):
    """Edge differentiation in five levels: the map lets the object be told from the rest of the image."""

    intro = "A map shows which places of a picture a model used. Say how well its edges set off the object."
    source = "combination of saliency methods (Nielsen), Table II"
    question = "Edge differentiation: with this map, the object is easily told from the rest of the picture. It is …"
    scale = LEVELS


@TASKS.register("justification")
class Justification(Rating):
    """How far the maps of the true and of the predicted class justify an error, from 1 to 5."""

    intro = (
        "All these pictures were named wrongly by a model. One map shows what speaks for the right name, another what "
        "speaks for the model's. Say how far the maps justify the error."
    )
    source = "Samuel et al. 2021 (tutorial, section 3.2.2 and Fig. 11)"
    question = "How far do the maps justify that the model chose the wrong name?"
    scale = ("1 (not at all)", "2", "3", "4", "5 (fully)")
    needs_label = True
    needs_classes = True
    judged_maps = False
    several_models = False

    def items(self, wanted: int) -> list[Item]:
        pool = self.pool
        first = [(name, pool.seen(index, name)) for index in pool.indices for name in self.maps]
        right = {seen.index for _, seen in first if seen.right or seen.label < 0}  # by any of the models
        wrong = [index for index in pool.indices if index not in right]
        if not wrong:
            raise InputError("userstudy=justification: no image is named wrongly by all models; judge more images")
        return [Item(index) for index in self.shuffled(wrong)[:wanted]]

    def trial(self, item: Item, condition: Condition) -> Trial:
        pool, name = self.pool, condition["map"]
        seen = pool.seen(item.index, name)
        label, prediction = pool.class_maps(item.index, name, [seen.label, seen.prediction])
        pictures = [
            Shown(pool.picture(item.index, name), "The picture"),
            Shown(pool.drawn(item.index, name, label), f"The right name: {pool.class_name(seen.label)}"),
            Shown(pool.drawn(item.index, name, prediction), f"The model's name: {pool.class_name(seen.prediction)}"),
        ]
        return Trial(pictures, [Question("rating", self.question, self.scale, self.measure)])
