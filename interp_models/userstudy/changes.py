"""Tasks that ask how the model reacts to a change of the image."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.report import visual
from interp_models.report.visual import Picture
from interp_models.userstudy.base import SURE, TASKS, YES_NO, Condition, Item, Question, Shown, Task, Trial
from interp_models.userstudy.pool import SIDE, Pool
from interp_models.userstudy.prediction import beside

GREY = 0.5
"""Value of covered pixels."""
CLEAR = 0.1
"""A field matters most if covering it takes more than covering any other, by this share of it."""
MANY = 4
"""So many times the wanted images are tried."""


def covered(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """A copy of an image (3, H, W) with a grey box (rows from, to, columns from, to)."""
    found = image.clone()
    found[:, box[0] : box[1], box[2] : box[3]] = GREY
    return found


@TASKS.register("counterfactual")
class Counterfactual(Task):
    """Whether the prediction stays when a quarter of the image is covered."""

    intro = (
        "A model named a picture. Then a part was covered in grey. Say whether the model still gives the same name. A "
        "map, if there is one, shows which places it used for the picture that is not covered."
    )
    source = "tutorial, section 3.2.1 (references 75 and 76)"
    no_map = True

    def items(self, wanted: int) -> list[Item]:
        name = self.maps[0]
        stays: list[Item] = []
        changes: list[Item] = []
        for index in self.shuffled(self.pool.indices)[: MANY * wanted]:
            image, prediction = self.pool.image(index, name), self.pool.seen(index).prediction
            boxes = _boxes(image)
            scores = self.pool.scores(torch.stack([covered(image, box) for box in boxes]), name)
            same = (scores.argmax(axis=1) == prediction).tolist()
            for kind, wants_same in ((stays, True), (changes, False)):
                if fitting := [box for box, one in zip(boxes, same, strict=True) if one == wants_same]:
                    kind.append(Item(index, self.shuffled(fitting)[0]))
        if not stays or not changes:
            what = "changes every prediction" if changes else "changes no prediction"
            raise InputError(f"userstudy=counterfactual: covering a quarter of an image {what}; judge more images")
        both = {item.index for item in stays} & {item.index for item in changes}
        half = self.shuffled(sorted(both))  # an image stands once, as one of the two
        keep, drop = set(half[::2]), set(half[1::2])
        stays = [item for item in stays if item.index not in drop]
        changes = [item for item in changes if item.index not in keep]
        return self.balanced(stays, changes, wanted)

    def trial(self, item: Item, condition: Condition) -> Trial:
        pool, name = self.pool, condition["map"]
        changed = covered(pool.image(item.index, name), item.about)
        prediction = pool.seen(item.index, name).prediction
        named = pool.class_name(prediction)
        pictures = [
            beside(self, item.index, name, f"The model says: {named}"),
            Shown(visual.shrunk(visual.to_uint8(changed), SIDE), "The covered picture"),
        ]
        questions = [
            Question("same", f"Does the model still say “{named}” for the covered picture?", YES_NO, "accuracy"),
            Question("sure", "How sure are you?", SURE, "confidence"),
        ]
        same = int(pool.scores(changed[None], name)[0].argmax()) == prediction
        return Trial(pictures, questions, truth={"same": 0 if same else 1})


def _boxes(image: Tensor) -> list[tuple[int, int, int, int]]:
    """Nine boxes with half the sides of the image."""
    height, width = image.shape[-2:]
    tops, lefts = ([0, side // 4, side - side // 2] for side in (height, width))
    return [(top, top + height // 2, left, left + width // 2) for top in tops for left in lefts]


@TASKS.register("features")
class Features(Task):
    """Choose the cell, of three by three, that matters most to the model."""

    intro = (
        "A model named each picture. Choose the numbered field that mattered most: the one whose covering takes most "
        "from the score of the name. A map, if there is one, shows which places the model used."
    )
    source = "Alqaraawi et al. 2020 (tutorial, section 3.2.1)"
    no_map = True
    cells = 3

    def __init__(self, pool: Pool, draw: np.random.Generator) -> None:
        super().__init__(pool, draw)
        self._known: dict[tuple[int, str], NDArray[np.float64]] = {}
        """What covering each cell takes, by image and model."""

    def items(self, wanted: int) -> list[Item]:
        name = self.maps[0]
        by_field: dict[int, list[tuple[float, int]]] = {}  # the lowest number is the clearest image
        for index in self.shuffled(self.pool.indices)[: MANY * wanted]:
            drops = self._drops(index, name)
            second, first = np.sort(drops)[-2:]
            if first > 0 and first - second >= CLEAR * first:
                by_field.setdefault(int(drops.argmax()), []).append((float(second - first), index))
        if not by_field:
            raise InputError("userstudy=features: no image has one field that matters most; judge more images")
        # The clearest image of each field, then the second of each, and so on, while a field has images.
        order = [(place, pair) for pairs in by_field.values() for place, pair in enumerate(sorted(pairs))]
        return self.shuffled([Item(index) for _, (_, index) in sorted(order)[:wanted]])

    def _drops(self, index: int, name: str) -> NDArray[np.float64]:
        """What covering each cell takes from the score of the prediction."""
        key = index, self.pool.parts(name)[0]
        if key in self._known:
            return self._known[key]
        image, prediction = self.pool.image(index, name), self.pool.seen(index, name).prediction
        rows, columns = (
            [round(side * place / self.cells) for place in range(self.cells + 1)] for side in image.shape[-2:]
        )
        boxes = [
            (rows[y], rows[y + 1], columns[x], columns[x + 1]) for y in range(self.cells) for x in range(self.cells)
        ]
        scores = self.pool.scores(torch.stack([image, *(covered(image, box) for box in boxes)]), name)[:, prediction]
        self._known[key] = scores[0] - scores[1:]
        return self._known[key]

    def trial(self, item: Item, condition: Condition) -> Trial:
        pool, name = self.pool, condition["map"]
        seen = pool.seen(item.index, name)
        said = f"The model says: {pool.class_name(seen.prediction)}"
        pictures = [Shown(numbered(pool.picture(item.index, name), self.cells), said)]
        if pool.parts(name)[1] is not None:
            pictures.append(Shown(numbered(pool.overlay(item.index, name), self.cells), "The map"))
        options = [str(number) for number in range(1, self.cells**2 + 1)]
        question = Question("cell", "Which field mattered most?", options, "accuracy")
        return Trial(pictures, [question], truth={"cell": int(self._drops(item.index, name).argmax())})


def numbered(picture: Picture, cells: int) -> Picture:
    """A copy of a picture with a grid and the numbers of its fields, row by row from 1."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for place in range(1, cells):
        x, y = round(image.width * place / cells), round(image.height * place / cells)
        draw.line([(x, 0), (x, image.height)], fill="white", width=2)
        draw.line([(0, y), (image.width, y)], fill="white", width=2)
    for number in range(cells**2):
        x, y = image.width * (number % cells) // cells + 6, image.height * (number // cells) // cells + 4
        draw.text((x, y), str(number + 1), fill="white", stroke_width=2, stroke_fill="black", font_size=16)
    return np.asarray(image)
