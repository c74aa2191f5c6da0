import base64
import dataclasses
import io
import os
import re
import weakref
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from interp_models.report.page import write_report
from interp_models.report.views import ImageView, MapView, RunSummary

NASTY = "a <b> & \"q\" 'x' {{ 1 }} </style>"
PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
RUNS = [
    RunSummary("one", "br_npa", "cub", 0.85123, 5794, 0.9, 50, 0, "best validation epoch"),
    RunSummary(NASTY, "resnet", "cub", None, 5794, 0.8, 50, 1, "last epoch"),
]
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """All elements in order, with their attributes and the text inside them; unbalanced tags are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text("utf-8")
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [outer["tag"] for outer in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, name: str | None = None) -> list[dict[str, Any]]:
        return [
            element
            for element in self.elements
            if element["tag"] == tag and (name is None or name in (element["attrs"].get("class") or "").split())
        ]

    def lines(self, part: int) -> list[list[str]]:
        """The body of one of the page's tables, as text."""
        table = -1
        found: list[list[str]] = []
        for element in self.elements:
            table += element["tag"] == "table"
            if table == part and "tbody" in element["inside"]:
                if element["tag"] == "tr":
                    found.append([])
                if element["tag"] in ("th", "td"):
                    found[-1].append(element["text"])
        return found


def row(explainer: str, metric: str, mean: float | None, std: float | None = 0.1, **other: Any) -> dict[str, Any]:
    base = {"run": "one", "n": 90, "n_undefined": 0, "preset": "standard", "grid": (14, 14), "steps": None}
    base |= {"fill": "zero", "target": "predicted", "scorer": "exact", "higher_is_better": metric not in ("ad", "dauc")}
    return {"explainer": explainer, "metric": metric, "mean": mean, "std": std, **base, **other}


def view(image: np.ndarray = PHOTO, **other: Any) -> ImageView:
    heatmap = np.arange(4.0).reshape(2, 2) - 2
    base: dict[str, Any] = {"image_id": "img.jpg", "label": "Laysan Albatross", "parts": {}}
    base["predictions"] = {"one": ("Laysan Albatross", 0.9312)}
    base["maps"] = [MapView("one", "grad_cam", heatmap, {"ad": 0.125, "dc": None})]
    return ImageView(image, **{**base, **other})


def write(folder: Path, rows: list[dict[str, Any]] | None = None, *views: ImageView, title: str = "T") -> Page:
    write_report(folder / "report.html", title=title, runs=RUNS, rows=rows or [], images=iter(views))
    return Page(folder / "report.html")


def test_runs_are_listed_with_accuracy_in_percent(tmp_path: Path) -> None:
    first, second = write(tmp_path).lines(0)
    assert first == ["one", "85.1", "5794", "90.0", "50", "br_npa", "cub", "0", "best validation epoch"]
    assert second == [NASTY, "–", "5794", "80.0", "50", "resnet", "cub", "1", "last epoch"]


def test_fractions_are_percent_and_curves_decimals(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.36614, 0.2), row("cam", "ag", 0.5, None), row("cam", "dauc", 0.01249, 0.0305)]
    rows += [row("cam", "dc", -0.0001, float("nan")), row("cam", "own", 12.5, 1.0)]
    page = write(tmp_path, rows)
    assert page.lines(1) == [
        ["one"],
        ["cam", "36.6 ± 20.0 best", "50.0 best", "0.012 ± 0.030 best", "0.000 best", "12.500 ± 1.000 best", "90"],
    ]
    heads = [re.sub(r"\s+", " ", element["text"]) for element in page.all("th") if "thead" in element["inside"]][9:]
    assert heads == [
        "Explainer",
        "AD ↓percent",
        "AG ↑percent",
        "DAUC ↓decimal",
        "DC ↑decimal",
        "own ↑decimal",
        "Images",
    ]
    assert [element["text"] for element in page.all("dt")] == ["AD ↓", "AG ↑", "DAUC ↓", "DC ↑"]


def test_best_is_marked_within_each_run_with_all_ties_and_without_favour(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.2004), row("rise", "ad", 0.2001), row("random", "ad", 0.3)]
    rows += [row("cam", "dc", 0.1), row("rise", "dc", None), row("random", "dc", 0.4)]
    rows += [row("cam", "ad", 0.9, run="two"), row("cam", "dc", None, run="two")]
    page = write(tmp_path, rows)
    lines = {tuple(line[:1]): line[1:3] for line in page.lines(1)[:4]}
    assert lines[("cam",)] == ["20.0 ± 10.0 best", "0.100 ± 0.100"]
    assert lines[("rise",)] == ["20.0 ± 10.0 best", "–"]
    assert lines[("random",)] == ["30.0 ± 10.0", "0.400 ± 0.100 best"]
    assert [line[0] for line in page.lines(1)] == ["one", "cam", "rise", "random", "two", "cam"]
    assert [element["text"].split()[0] for element in page.all("td", "best")] == ["20.0", "20.0", "0.400", "90.0"]


def test_undefined_and_missing_scores_are_dashes_that_say_why(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.5, n_undefined=3), row("cam", "dc", float("nan"), None, n_undefined=90)]
    page = write(tmp_path, [*rows, row("rise", "ad", 0.6, n=80)])
    assert page.lines(1)[1:] == [
        ["cam", "50.0 ± 10.0 best3 undefined", "–90 undefined", "90"],
        ["rise", "60.0 ± 10.0", "–", "80"],
    ]
    titles = [element["attrs"]["title"] for element in page.all("span", "none")]
    assert titles == ["unknown", "undefined for every image", "not computed"]  # the first is a run's accuracy


def test_protocols_are_told_apart_only_where_they_differ(tmp_path: Path) -> None:
    assert [element["text"] for element in write(tmp_path, [row("cam", "ad", 0.5)]).all("li")] == [
        "preset standard · grid 14×14 · fill zero · target predicted · scorer exact"
    ]
    rows = [row("cam", "ad", 0.5, steps=float("nan")), row("cam", "dc", 0.5, steps=196.0)]
    rows += [row("cam", "ad", 0.5, run="two"), row("cam", "dc", 0.5, run="two", steps=49.0, grid=7)]
    assert [element["text"] for element in write(tmp_path, rows).all("li")] == [
        "one, two (AD): preset standard · grid 14×14 · fill zero · target predicted · scorer exact",
        "one (DC): preset standard · grid 14×14 · steps 196 · fill zero · target predicted · scorer exact",
        "two (DC): preset standard · grid 7 · steps 49 · fill zero · target predicted · scorer exact",
    ]


def test_each_preset_has_its_table_and_a_cell_has_one_row(tmp_path: Path) -> None:
    page = write(tmp_path, [row("cam", "ad", 0.5), row("cam", "ad", 0.25, preset="other")])
    assert page.lines(1)[1][1] == "50.0 ± 10.0 best"
    assert page.lines(2)[1][1] == "25.0 ± 10.0 best"
    with pytest.raises(ValueError, match=r"two rows for preset 'standard', run 'one', explainer 'cam', metric 'ad'"):
        write(tmp_path, [row("cam", "ad", 0.5), row("cam", "ad", 0.25)])


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    nasty = view(
        image_id=NASTY,
        label=NASTY,
        predictions={NASTY: (NASTY, 0.5)},
        maps=[MapView(NASTY, NASTY, np.eye(2), {NASTY: 0.5})],
        parts={NASTY: np.eye(2)[None]},
    )
    rows = [row(NASTY, NASTY, 0.5, run=NASTY, preset=NASTY, fill=NASTY)]
    page = write(tmp_path, rows, nasty, title=NASTY)
    plain = write(tmp_path, [row("cam", "ad", 0.5)], view(parts={"one": np.eye(2)[None]}))
    assert not page.all("b")
    assert len(page.all("style")) == 1
    assert {element["tag"] for element in page.elements} <= {element["tag"] for element in plain.elements}
    for tag in ("title", "h1", "h3", "h4"):
        assert [element["text"] for element in page.all(tag)] == [NASTY]
    assert page.lines(1) == [[NASTY], [NASTY, "0.500 ± 0.100 best", "90"]]
    assert page.lines(2) == [[NASTY, "0.500"]]
    assert f"Input image {NASTY} of {NASTY}" in [element["attrs"]["alt"] for element in page.all("img")]


def test_no_verdict_without_a_label(tmp_path: Path) -> None:
    """Neither where the label is unknown, nor where the model has other classes than the images."""
    for number, (label, known) in enumerate((("Laysan Albatross", True), ("?", True), ("Laysan Albatross", False))):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "report.html"
        runs = [RUNS[0] if known else dataclasses.replace(RUNS[0], accuracy_judged=None)]
        rows, shown = [row("grad_cam", "ad", 0.5)], view(label=label)
        write_report(path, title="T", runs=runs, rows=rows, images=iter([shown]))
        page = Page(path)
        (article,) = page.all("article")
        assert ("✓ right" in article["text"]) == (number == 0)
        assert "✗ wrong" not in article["text"]
        assert "Laysan Albatross with 93.1%" in re.sub(r"\s+", " ", article["text"])


def test_an_image_has_its_label_predictions_maps_and_scores(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        [row("grad_cam", "ad", 0.5)],
        view(predictions={"two": ("Sooty Albatross", 0.5), "one": ("Laysan Albatross", 0.9312)}),
    )
    (article,) = page.all("article")
    text = re.sub(r"\s+", " ", article["text"])
    assert "img.jpgtrue labelLaysan Albatross" in text
    assert "one predicted Laysan Albatross with 93.1% ✓ right" in text
    assert "two predicted Sooty Albatross with 50.0% ✗ wrong" in text
    assert text.index("one predicted") < text.index("two predicted")  # the order of the runs
    assert [element["attrs"]["alt"] for element in page.all("img")] == [
        "Input image img.jpg of Laysan Albatross",
        "grad_cam of one on img.jpg",
    ]
    assert page.lines(2) == [["grad_cam", "12.5", "–"]]
    assert page.all("span", "none")[-1]["attrs"]["title"] == "undefined for this image"


def pictures(page: Page) -> list[np.ndarray]:
    found = []
    for element in page.all("img"):
        kind, data = element["attrs"]["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float))
    return found


def test_pictures_show_what_they_should(tmp_path: Path) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    left = np.repeat([[1.0, -1.0]], 2, axis=0)
    parts = np.stack([left, -left, 0 * left])
    maps = [MapView("one", "cam", left, {}), MapView("one", "cam", left + 1, {})]
    page = write(tmp_path, [], view(grey, maps=maps, parts={"one": parts}))
    image, signed, overlay, rgb = pictures(page)
    assert np.abs(image - 128).max() <= 2
    assert signed[:, :8, 0].mean() > 20 + signed[:, :8, 2].mean()  # red for
    assert signed[:, -8:, 2].mean() > 20 + signed[:, -8:, 0].mean()  # blue against
    assert overlay[:, :8].mean() > 128 > 80 > overlay[:, -8:].mean()
    assert rgb[:, :8, 0].mean() > 180 > 60 > rgb[:, :8, 1].mean()
    assert rgb[:, -8:, 1].mean() > 180 > 60 > rgb[:, -8:, 0].mean()
    assert "red, green, blue" in page.text


def test_large_pictures_shrink_with_their_shape(tmp_path: Path) -> None:
    page = write(tmp_path, [], view(np.zeros((448, 224, 3), np.uint8)))
    assert [picture.shape for picture in pictures(page)] == [(224, 112, 3)] * 2


@pytest.mark.parametrize(
    ("heatmap", "remark"), [(np.ones((2, 2)), "constant map"), (np.array([[np.nan, 1.0]]), "not drawn: some values")]
)
def test_a_map_that_shows_nothing_says_so(heatmap: np.ndarray, remark: str, tmp_path: Path) -> None:
    page = write(tmp_path, [], view(maps=[MapView("one", "cam", heatmap, {})]))
    assert remark in page.all("figcaption")[1]["text"]
    assert len(pictures(page)) == 2


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = write(tmp_path, [row("cam", "ad", 0.5)], view(parts={"one": np.eye(2)[None]}), view())
    assert not re.search(r"https?://|@import|url\(|javascript:", page.text)
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"data:|#", element["attrs"].get(name, "#")), element
    assert len(page.all("img")) == 5
    assert not page.all("script")
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert all(element["attrs"].get("alt") for element in page.all("img"))
    assert all(element["attrs"].get("scope") for element in page.all("th"))
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))


def test_a_page_without_anything_is_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", title="T", runs=[], rows=[], images=[])
    text = Page(tmp_path / "report.html").text
    assert "No explanation was scored." in text
    assert "No pictures were kept." in text


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_page(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def images() -> Iterator[ImageView]:
        yield view()
        assert len(list(tmp_path.iterdir())) == 2  # the new page is under way
        raise error

    with pytest.raises(error):
        write_report(path, title="T", runs=RUNS, rows=[], images=images())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, title="T", runs=RUNS, rows=[], images=[])
    assert path.read_text("utf-8").rstrip().endswith("</html>")
    assert list(tmp_path.iterdir()) == [path]


def test_images_are_not_kept(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def images() -> Iterator[ImageView]:
        for _ in range(8):
            assert sum(image() is not None for image in alive) <= 2  # the one that the template holds, and the last
            image = PHOTO.copy()
            alive.append(weakref.ref(image))
            yield view(image)

    write_report(tmp_path / "report.html", title="T", runs=RUNS, rows=[], images=images())
    assert len(alive) == 8


def test_a_file_name_that_is_no_utf8_does_not_cost_the_page(tmp_path: Path) -> None:
    page = write(tmp_path, [], view(image_id=os.fsdecode(b"caf\xe9.jpg")))
    assert page.all("h3")[0]["text"] == r"caf\udce9.jpg"
