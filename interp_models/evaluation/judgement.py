"""What judging maps found: values per image, means with their uncertainty, maps, and a page of it all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from interp_models.core.errors import InputError
from interp_models.core.files import whole
from interp_models.evaluation.tables import Tables, read_tables

if TYPE_CHECKING:
    import pandas as pd

    from interp_models.report.views import RunSummary

PICTURES = "pictures.npz"
"""The pictures that a page shows, in the folder of a judgement."""


@dataclass(frozen=True)
class Judgement:
    """The result of `judge`."""

    tables: Tables
    summary_of_model: "RunSummary"
    classes: tuple[str, ...] = ()
    """Names of the classes, where they are known."""
    pictures: Mapping[int, NDArray[np.uint8]] | None = None
    """Some images (H, W, 3) by their index, for the page."""

    @property
    def per_image(self) -> "pd.DataFrame":
        """A row per explainer, metric and image: image_id, index, label (-1 where there is none), prediction,
        confidence, target_class, probability (of it), value (NaN where it is undefined), and the protocol."""
        return self.tables.per_image

    @property
    def maps(self) -> Mapping[str, NDArray[np.float32]]:
        """The maps (N, h, w) of every explainer on its own grid, by label, in the order of the images' indices."""
        return self.tables.maps

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why explainers do not apply to the model or the images, by label."""
        return self.tables.left_out

    @property
    def summary(self) -> "pd.DataFrame":
        """A row per explainer and metric: mean over the images where the metric is defined, its 95 % interval (low,
        high; see `tables.interval`), n images, n_undefined of them, and what the explainer costs per image: `passes`
        through the model and `seconds`. Several explainers that read one layer share a pass, which is counted for each
        and takes time of the first alone."""
        import pandas as pd

        keys = ("explainer", "metric", "mean", "low", "high", "n", "n_undefined", "higher_is_better")
        rows = [
            {**{key: row[key] for key in keys}, **self.tables.costs.get(row["explainer"], {})}
            for row in self.tables.rows
        ]
        return pd.DataFrame(rows)

    def to_markdown(self) -> str:
        """The table of means with half the width of their 95 % intervals, in Markdown; the best of each metric is
        bold."""
        from interp_models.report.text import markdown_table

        return markdown_table(self.tables.rows, self.tables.costs)

    def to_latex(self) -> str:
        """The same table in LaTeX, for the package booktabs."""
        from interp_models.report.text import latex_table

        return latex_table(self.tables.rows, self.tables.costs)

    def report(self, path: str | Path, n_images: int = 60) -> Path:
        """Write the page `path` (html, self-contained): tables, and maps over images.

        Args:
            path: of the page; a folder gets `report.html`.
            n_images: most images that are shown, spread evenly over those whose pictures are there.

        Raises:
            InputError: if no pictures are there, as of a judgement whose folder lost them.
        """
        from interp_models.evaluation.comparison import Compared, Shown, write_page

        if self.pictures is None:
            raise InputError("the page needs pictures, and there are none; judge the images again")
        pictures = self.pictures
        path = Path(path)
        path = path / "report.html" if path.is_dir() else path
        one = Compared(self.summary_of_model, self.tables, self.class_name, lambda index: Shown(pictures[index]))
        write_page([one], path, n_images, sorted(pictures))
        return path

    def class_name(self, label: int) -> str:
        """The name of a class, or its number; `?` for a label that is not known."""
        return "?" if label < 0 else self.classes[label] if self.classes else str(label)

    @classmethod
    def load(cls, folder: str | Path) -> "Judgement":
        """What `judge` has left in a folder.

        Raises:
            InputError: if the folder holds no finished judgement.
        """
        from interp_models.report.views import RunSummary

        folder = Path(folder)
        tables = read_tables(folder)
        pictures, classes, about = read_pictures(folder)
        return cls(tables, RunSummary(**about), classes, pictures)


def read_pictures(folder: Path) -> tuple[dict[int, NDArray[np.uint8]], tuple[str, ...], dict[str, Any]]:
    """Pictures by index, names of classes, and what is said of the model, as `write_pictures` left them."""
    try:
        with np.load(folder / PICTURES) as file:
            pictures = {int(key): file[key] for key in file.files if key.isdigit()}
            about = json.loads(str(file["about"]))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no judgement of judge() ({error})") from None
    return pictures, tuple(about.pop("classes")), about


def write_pictures(
    folder: Path, pictures: Mapping[int, NDArray[np.uint8]], classes: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Keep pictures by index, names of classes, and what is said of the model."""
    text = json.dumps({**about, "classes": list(classes)})
    with whole(folder / PICTURES) as path, path.open("wb") as file:
        arrays: dict[str, Any] = {str(key): value for key, value in pictures.items()}
        np.savez_compressed(file, about=np.asarray(text), **arrays)
