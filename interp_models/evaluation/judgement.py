"""`Judgement`, the result of `judge`: values per image, means with intervals, maps, tables and the page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from interp_models.core.errors import InputError
from interp_models.core.files import whole
from interp_models.evaluation.tables import Tables, read_tables

if TYPE_CHECKING:
    import pandas as pd

    from interp_models.report.views import RunSummary

PICTURES = "pictures.npz"
"""File of the pictures for the page, in the folder of a judgement."""
DESCRIBED = ("name", "model", "dataset", "same_classes")
"""What this file says of the model; see `summary_of`."""


@dataclass(frozen=True, repr=False)
class Judgement:
    """The result of `judge`: values, means, maps and pictures of the judged images."""

    tables: Tables
    """All tables; the properties below read them."""
    summary_of_model: "RunSummary"
    """Name, data set and accuracy of the model, for the page."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty if unknown."""
    pictures: Mapping[int, NDArray[np.uint8]] | None = None
    """Some images (H, W, 3) by index, for the page."""

    @property
    def per_image(self) -> "pd.DataFrame":
        """Values per image: a row per explainer, metric and image (and label, if each of several labels is explained).

        Columns: `image_id`, `index`, `label` (-1 if unknown; for several labels it is `labels`, their list),
        `prediction`, `confidence` (probability of the prediction), `target_class`, `probability` (of the target class),
        `value` (NaN if undefined), and the protocol.
        """
        return self.tables.per_image

    @property
    def maps(self) -> Mapping[str, NDArray[np.float32]]:
        """The maps of every explainer by label: (N, h, w) on the explainer's own grid, sorted by index of the image. If
        each of several labels is explained, they are then sorted by class; `tables.listing` names both."""
        return self.tables.maps

    @property
    def left_out(self) -> Mapping[str, str]:
        """Explainers that do not apply to the model or the images: the reason by label. Metrics whose ground truth is
        unknown: the reason by key."""
        return {**self.tables.left_out, **self.tables.unmeasured}

    @property
    def summary(self) -> "pd.DataFrame":
        """Means: a row per explainer and metric.

        Columns: `mean` over the images where the metric is defined, its 95 % interval `low` to `high` (see
        `statistics.interval`), `n` images of which `n_undefined` have no value, `higher_is_better`, the comparison with
        the other explainers (`rank`, `tied`, `best`, `control`, `p` and `superiority`, see `statistics.compare`), the
        `distance` of perturbed images from the clean ones (see `core.distances.distance`), and the explainer's costs
        per image: `passes` through the model and `seconds`. If several explainers read the same layer, they share a
        pass; the pass and its time count for each of them. If each of several labels is explained, the values of an
        image are averaged first, and its costs are summed.
        """
        import pandas as pd

        keys = (
            "explainer", "metric", "mean", "low", "high", "n", "n_undefined", "higher_is_better", "rank", "tied",
            "best", "control", "p", "superiority", "distance",
        )  # fmt: skip
        rows = [
            {**{key: row.get(key) for key in keys}, **self.tables.costs.get(row["explainer"], {})}
            for row in self.tables.rows
        ]
        return pd.DataFrame(rows)

    @property
    def differences(self) -> "pd.DataFrame":
        """Paired differences from the reference: a row per other explainer and metric, see `differences.Difference`.

        Columns: `mean` of the explainer's value minus the reference's over the common images, its interval `low` to
        `high`, `n` common images, `p`, `superiority`, and the `verdict` (better, worse, unclear, or same).
        """
        import pandas as pd

        return pd.DataFrame(self.tables.differences)

    @property
    def answer(self) -> str:
        """The answer in words: which explainers can be told from the reference, by which metrics, and what limits the
        answer. Empty if there is nothing to compare."""
        from interp_models.evaluation.answer import in_words

        return in_words(self.tables.rows, self.tables.differences)

    def __repr__(self) -> str:
        """The table of means and the answer."""
        from interp_models.report.text import text_table

        return "\n\n".join(filter(None, [text_table(self.tables.rows), self.answer]))

    def _repr_html_(self) -> str:
        """The answer and the table of means, for notebooks."""
        from interp_models.report.notebook import html_table

        return html_table(self.tables.rows, self.tables.costs, self.answer)

    def to_markdown(self) -> str:
        """The table of means with their 95 % intervals in Markdown. An explainer that the images tell from all others
        is bold."""
        from interp_models.report.text import markdown_table

        return markdown_table(self.tables.rows, self.tables.costs)

    def to_latex(self) -> str:
        """The same table in LaTeX; it needs the package booktabs."""
        from interp_models.report.text import latex_table

        return latex_table(self.tables.rows, self.tables.costs)

    def report(self, path: str | Path, n_images: int = 60) -> Path:
        """Write a self-contained HTML page with the tables and with maps over images.

        Args:
            path: the file; in a folder it is named `report.html`. A leading `~` is the home folder.
            n_images: maximum number of images to show, at least 0, spread evenly over those with pictures.

        Returns:
            The path of the page.

        Raises:
            InputError: if the judgement has no pictures, or if `n_images` is below 0.
        """
        from interp_models.evaluation.comparison import Compared, Shown, write_page

        if self.pictures is None:
            raise InputError("the page needs pictures, and there are none; judge the images again")
        if n_images < 0:
            raise InputError(f"n_images must be at least 0; got {n_images}")
        pictures = self.pictures
        path = Path(path).expanduser()
        path = path / "report.html" if path.is_dir() else path
        one = Compared(self.summary_of_model, self.tables, self.class_name, lambda index: Shown(pictures[index]))
        write_page([one], path, n_images, sorted(pictures))
        return path

    def class_name(self, label: int) -> str:
        """The name of a class, or its number if names are unknown; `?` for an unknown label (-1).

        The images' labels can go beyond the model's classes; such a label N is shown as `class N`.
        """
        if label < 0:
            return "?"
        if not self.classes:
            return str(label)
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    @classmethod
    def load(cls, folder: str | Path) -> "Judgement":
        """Load the result of `judge` from its `folder`.

        Raises:
            InputError: if the folder has no finished judgement.
        """
        folder = Path(folder).expanduser()
        tables = read_tables(folder)
        pictures, classes, about = read_pictures(folder)
        return cls(tables, summary_of(tables, **about), classes, pictures)


def summary_of(tables: Tables, name: str, model: str, dataset: str, same_classes: bool) -> "RunSummary":
    """The summary of a judged model, for the page.

    Args:
        tables: its tables.
        name: its name.
        model: its class name.
        dataset: name of the images.
        same_classes: whether the images' labels are classes of the model, so that its accuracy has a meaning.
    """
    from interp_models.report.views import RunSummary

    return RunSummary(
        name=name,
        model=model,
        dataset=dataset,
        accuracy=None,
        n=0,
        accuracy_judged=tables.accuracy if same_classes else None,
        n_judged=tables.listing["index"].nunique(),
        without_label=tables.without_label,
        seed=None,
        selection="as given",
    )


def read_pictures(folder: Path) -> tuple[dict[int, NDArray[np.uint8]], tuple[str, ...], dict[str, Any]]:
    """Read pictures by index, names of classes and what is said of the model, as written by `write_pictures`."""
    try:
        with (folder / PICTURES).open("rb") as raw, np.load(raw) as file:
            pictures = {int(key): file[key] for key in file.files if key.isdigit()}
            written = json.loads(str(file["about"]))
        about = {key: written[key] for key in DESCRIBED}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{folder} holds no judgement of judge() ({error})") from None
    return pictures, tuple(written["classes"]), about


def write_pictures(
    folder: Path, pictures: Mapping[int, NDArray[np.uint8]], classes: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write pictures by index, names of classes and what is said of the model (`DESCRIBED`) to a folder."""
    text = json.dumps({**about, "classes": list(classes)})
    with whole(folder / PICTURES) as path, path.open("wb") as file:
        arrays: dict[str, Any] = {str(key): value for key, value in pictures.items()}
        np.savez_compressed(file, about=np.asarray(text), **arrays)
