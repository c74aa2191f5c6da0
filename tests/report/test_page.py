import base64
import dataclasses
import io
import json
import os
import re
import weakref
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from interp_models.report import visual
from interp_models.report.page import write_report
from interp_models.report.text import latex_table, markdown_table
from interp_models.report.views import ImageView, MapView, RunResults, RunSummary

NASTY = "a <b> & \"q\" 'x' {{ 1 }} </style>"
PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
TRAINED = "12 epochs, 3.0 min, 1 x cpu"
RUNS = [
    RunSummary(
        "one",
        "br_npa",
        "cub",
        0.85123,
        5794,
        0.9,
        50,
        0,
        "best validation epoch",
        training=TRAINED,
    ),
    RunSummary(NASTY, "resnet", "cub", None, 5794, 0.8, 50, 1, "last epoch"),
]
VOID = {"meta", "link", "img", "br", "input"}


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


def results(rows: list[dict[str, Any]], **other: Any) -> list[RunResults]:
    """The results of every run of some rows."""
    runs = dict.fromkeys(row["run"] for row in rows)
    return [RunResults(run, [row for row in rows if row["run"] == run], **other) for run in runs]


def write(
    folder: Path, rows: list[dict[str, Any]] | None = None, *views: ImageView, title: str = "T", **other: Any
) -> Page:
    found = results(rows or [], **other)
    write_report(folder / "report.html", title=title, runs=RUNS, results=found, images=iter(views))
    return Page(folder / "report.html")


def test_runs_are_listed_with_accuracy_in_percent(tmp_path: Path) -> None:
    first, second = write(tmp_path).lines(0)
    assert first == [
        "one",
        "85.1",
        "5794",
        "90.0",
        "50",
        "br_npa",
        "cub",
        "0",
        "best validation epoch",
        "12 epochs, 3.0 min, 1 x cpu",
    ]
    assert second == [NASTY, "–", "5794", "80.0", "50", "resnet", "cub", "1", "last epoch", "–"]


def test_fractions_are_percent_and_curves_decimals(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.36614, low=0.3, high=0.41239), row("cam", "ag", 0.5)]
    rows += [row("cam", "dauc", 0.01249, low=0.0104, high=0.0149), row("cam", "dc", -0.0001)]
    rows += [row("cam", "own", 12.5, rank=2, tied=True)]
    page = write(tmp_path, rows)
    assert page.lines(1) == [
        ["one"],
        ["cam", "36.630.0 to 41.2", "50.0", "0.0120.010 to 0.015", "0.000", "12.500rank 2=", "–", "–", "–", "90"],
    ]
    heads = [re.sub(r"\s+", " ", element["text"]) for element in page.all("th") if "thead" in element["inside"]][10:]
    assert heads == [
        "Explainer", "AD ↓percent", "AG ↑percent", "DAUC ↓decimal", "DC ↑decimal", "own ↑decimal",
        "Mean rankover metrics", "Passesper image", "Secondsper image", "Images",
    ]  # fmt: skip
    assert [element["text"] for element in page.all("dt")] == ["AD ↓", "AG ↑", "DAUC ↓", "DC ↑"]


def test_bold_is_only_what_the_images_tell_from_all_others(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.1, rank=1, tied=False, best=False), row("rise", "ad", 0.2, rank=2, best=False)]
    rows += [row("cam", "dc", 0.1, rank=2), row("rise", "dc", 0.4, rank=1, best=True)]
    rows += [row("cam", "ag", 0.4), row("rise", "ag", 0.1)]  # ranks are unknown
    page = write(tmp_path, rows)
    assert [element["text"] for element in page.all("td", "best")] == ["0.400 bestrank 1"]


def test_controls_costs_and_mean_ranks_stand_beside_the_scores(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.5), row("random", "ad", 0.6)]
    costs = {"cam": {"passes": 1.0, "seconds": 0.0123}, "random": {"passes": 0.0, "seconds": None}}
    ranks = {"cam": (1.25, 0.5), "random": (1.75, 0.5)}
    page = write(tmp_path, rows, costs=costs, mean_ranks=ranks, controls=["random"])
    assert page.lines(1)[1:] == [
        ["cam", "50.0", "1.2 ± 0.5", "1", "0.0123", "90"],
        ["random control", "60.0", "1.8 ± 0.5", "0", "–", "90"],
    ]


def test_metrics_are_grouped_by_what_they_judge(tmp_path: Path) -> None:
    page = write(tmp_path, [row("cam", "gini", 0.5), row("cam", "energy", 0.5), row("cam", "ad", 0.5)])
    heads = [e["attrs"].get("data-family") for e in page.all("th") if "data-family" in e["attrs"]]
    assert heads == ["faithfulness", "localisation", "form"]
    boxes = [e["attrs"]["value"] for e in page.all("input") if e["attrs"].get("value") in heads]
    assert boxes == heads
    assert not write(tmp_path, [row("cam", "ad", 0.5)]).all("fieldset", "families")


def test_undefined_and_missing_scores_are_dashes_that_say_why(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.5, n_undefined=3), row("cam", "dc", float("nan"), None, n_undefined=90)]
    page = write(tmp_path, [*rows, row("rise", "ad", 0.6, n=80)])
    assert page.lines(1)[1:] == [
        ["cam", "50.03 undefined", "–90 undefined", "–", "–", "–", "90"],
        ["rise", "60.0", "–", "–", "–", "–", "80"],
    ]
    titles = [element["attrs"]["title"] for element in page.all("span", "none")]
    assert [title for title in titles if title != "unknown"] == ["undefined for every image", "not computed"]


def protocols(page: Page) -> list[str]:
    return [
        line for (element,) in [page.all("ul", "protocol")] for line in element["text"].strip().splitlines() if line
    ]


def test_protocols_are_told_apart_only_where_they_differ(tmp_path: Path) -> None:
    assert protocols(write(tmp_path, [row("cam", "ad", 0.5)])) == [
        "preset standard · grid 14×14 · fill zero · target predicted · scorer exact"
    ]
    rows = [row("cam", "ad", 0.5, steps=float("nan")), row("cam", "dc", 0.5, steps=196.0)]
    rows += [row("cam", "ad", 0.5, run="two"), row("cam", "dc", 0.5, run="two", steps=49.0, grid=7)]
    assert protocols(write(tmp_path, rows)) == [
        "one, two (AD): preset standard · grid 14×14 · fill zero · target predicted · scorer exact",
        "one (DC): preset standard · grid 14×14 · steps 196 · fill zero · target predicted · scorer exact",
        "two (DC): preset standard · grid 7 · steps 49 · fill zero · target predicted · scorer exact",
    ]


def test_each_preset_has_its_table_and_a_cell_has_one_row(tmp_path: Path) -> None:
    page = write(tmp_path, [row("cam", "ad", 0.5), row("cam", "ad", 0.25, preset="other")])
    assert page.lines(1)[1][1] == "50.0"
    assert page.lines(2)[1][1] == "25.0"
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
    page = write(tmp_path, rows, nasty, title=NASTY, left_out={NASTY: NASTY})
    plain = write(tmp_path, [row("cam", "ad", 0.5)], view(parts={"one": np.eye(2)[None]}), left_out={"a": "b"})
    assert not page.all("b")
    assert len(page.all("style")) == 1
    assert {element["tag"] for element in page.elements} <= {element["tag"] for element in plain.elements}
    for tag in ("title", "h1", "h4"):
        assert [element["text"] for element in page.all(tag)] == [NASTY]
    assert NASTY in [element["text"] for element in page.all("h3")]
    assert page.lines(1) == [[NASTY], [NASTY, "0.500", "–", "–", "–", "90"]]
    assert f"Input image {NASTY} of {NASTY}" in [element["attrs"]["alt"] for element in page.all("img")]
    (data,) = scripts(page)
    assert (
        data["id"] == data["classes"][0] == data["runs"][0]["run"] == data["runs"][0]["maps"][0]["explainer"] == NASTY
    )
    assert shared(page)["metrics"][0]["key"] == NASTY
    (article,) = page.all("article")
    assert json.loads(article["attrs"]["data-classes"]) == [NASTY]


def scripts(page: Page) -> list[dict[str, Any]]:
    """What the script knows of each image."""
    return [json.loads(element["text"]) for element in page.all("script", "data")]


def shared(page: Page) -> dict[str, Any]:
    (found,) = [json.loads(e["text"]) for e in page.all("script") if e["attrs"].get("id") == "shared"]
    return found


def test_no_verdict_without_a_label(tmp_path: Path) -> None:
    """Neither where the label is unknown, nor where the model has other classes than the images."""
    for number, (label, known) in enumerate((("Laysan Albatross", True), ("?", True), ("Laysan Albatross", False))):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "report.html"
        runs = [RUNS[0] if known else dataclasses.replace(RUNS[0], accuracy_judged=None)]
        rows, shown = [row("grad_cam", "ad", 0.5)], view(label=label)
        write_report(path, title="T", runs=runs, results=results(rows), images=iter([shown]))
        page = Page(path)
        (article,) = page.all("article")
        assert ("✓ right" in article["text"]) == (number == 0)
        assert "✗ wrong" not in article["text"]
        assert "Laysan Albatross with 93.1%" in re.sub(r"\s+", " ", article["text"])


def test_an_image_has_its_label_predictions_maps_and_scores(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        [row("grad_cam", "ad", 0.5), row("grad_cam", "dc", 0.5)],
        view(predictions={"two": ("Sooty Albatross", 0.5), "one": ("Laysan Albatross", 0.9312)}),
    )
    (article,) = page.all("article")
    text = re.sub(r"\s+", " ", article["text"])
    assert "img.jpgtrue labelLaysan Albatross" in text
    assert "one predicted Laysan Albatross with 93.1% ✓ right" in text
    assert "two predicted Sooty Albatross with 50.0% ✗ wrong" in text
    assert text.index("one predicted") < text.index("two predicted")  # the order of the runs
    assert json.loads(article["attrs"]["data-classes"]) == ["Laysan Albatross"]
    runs = [element["attrs"] for element in page.all("div", "run")]
    assert [(run["data-run"], run["data-right"], run["data-confidence"]) for run in runs] == [
        ("one", "true", "0.9312"), ("two", "false", "0.5"),
    ]  # fmt: skip
    (data,) = scripts(page)
    assert [metric["key"] for metric in shared(page)["metrics"]] == ["ad", "dc"]
    assert data["runs"][0]["maps"][0]["scores"] == [0.125, None]
    assert data["runs"][1]["maps"] == []


def decoded(map: dict[str, Any]) -> np.ndarray:
    """The values of a map in [0, 1], as the script reads them."""
    if "bytes" in map:
        return np.frombuffer(base64.b64decode(map["bytes"]), np.uint8).reshape(map["size"]) / 255
    kind, data = map["jpeg"].split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) / 255


def test_maps_are_written_as_they_are_coloured(tmp_path: Path) -> None:
    coarse, fine = np.arange(12.0).reshape(3, 4), np.repeat(np.repeat(np.eye(14), 8, 0), 8, 1)
    signed = np.array([[1.0, 0.0], [-4.0, 2.0]])
    maps = [MapView("one", name, own, {}) for name, own in (("a", coarse), ("b", fine), ("c", signed))]
    (data,) = scripts(write(tmp_path, [], view(maps=maps)))
    a, b, c = data["runs"][0]["maps"]
    np.testing.assert_allclose(decoded(a), coarse / 11, atol=0.002)
    np.testing.assert_allclose(decoded(c), [[0.625, 0.5], [0.0, 0.75]], atol=0.002)  # 0 is the middle
    assert (a["colours"], b["colours"], c["colours"]) == (visual.CMAP, visual.CMAP, visual.SIGNED)
    found = decoded(b)
    assert found.shape == (96, 96)
    assert np.corrcoef(found.ravel(), visual.resize(fine, (96, 96)).ravel())[0, 1] > 0.98
    table = np.frombuffer(base64.b64decode(shared(write(tmp_path))["colours"][visual.CMAP]), np.uint8).reshape(256, 3)
    assert (table[[0, 255]] == matplotlib.colormaps[visual.CMAP]([0, 255], bytes=True)[:, :3]).all()


def test_noise_of_both_signs_is_averaged_before_it_is_coloured(tmp_path: Path) -> None:
    """Each fine cell has a large value of either sign; only their mean says where the evidence lies."""
    sign = np.where(np.indices((192, 192)).sum(axis=0) % 2, 1.0, -1.0)
    noisy = sign + np.r_[np.full(96, 0.1), np.full(96, -0.1)][:, None]
    (data,) = scripts(write(tmp_path, [], view(maps=[MapView("one", "a", noisy, {})])))
    found = decoded(data["runs"][0]["maps"][0])
    assert found[:40].mean() > 0.9
    assert found[-40:].mean() < 0.1


def test_the_script_knows_how_alike_maps_and_metrics_are(tmp_path: Path) -> None:
    up, down = np.arange(4.0).reshape(2, 2), -np.arange(4.0).reshape(2, 2)
    scores = [{"ad": 0.1, "dc": 0.9}, {"ad": 0.2, "dc": 0.8}, {"ad": 0.3, "dc": 0.1}]
    maps = [MapView("one", name, own, s) for name, own, s in zip("abc", (up, down, 0 * up), scores, strict=True)]
    rows = [row(name, key, 0.5) for name in "abc" for key in ("ad", "dc")]
    (data,) = scripts(write(tmp_path, rows, view(maps=maps)))
    assert data["runs"][0]["alike"] == [-1.0, None, None]  # a constant map is like nothing
    assert data["runs"][0]["agreement"] == 1.0  # low drops and high correlations rank them alike


def test_curves_of_an_image_are_bytes(tmp_path: Path) -> None:
    curves = {"dauc": np.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]]), "iauc": np.array([[0.0, 1.0], [np.nan, np.nan]])}
    maps = [MapView("one", "a", np.eye(2), {"dauc": 0.4}, curves)]
    (data,) = scripts(write(tmp_path, [row("a", "dauc", 0.4)], view(maps=maps)))
    found = data["runs"][0]["maps"][0]["curves"]
    assert set(found) == {"dauc"}
    assert (found["dauc"]["from"], found["dauc"]["to"]) == (0.0, 1.0)
    assert list(base64.b64decode(found["dauc"]["scores"])) == [255, 51, 0]


def test_a_wrong_prediction_has_the_map_of_the_true_class_beside_it(tmp_path: Path) -> None:
    maps = [MapView("one", "a", np.eye(2), {}, of_label=1 - np.eye(2))]
    (data,) = scripts(write(tmp_path, [], view(maps=maps)))
    found = data["runs"][0]["maps"][0]
    assert decoded(found).tolist() == np.eye(2).tolist()
    assert decoded(found["label"]).tolist() == (1 - np.eye(2)).tolist()


def uris(page: Page) -> list[str]:
    """Every picture of the page, of its elements and of its data."""
    found = [element["attrs"]["src"] for element in page.all("img")]
    for data in scripts(page):
        for run in data["runs"]:
            found += [panel["uri"] for panel in run["panels"]] + ([run["input"]] if run["input"] else [])
    return found


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), float)


def test_several_own_maps_are_drawn_as_red_green_and_blue(tmp_path: Path) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    left = np.repeat([[1.0, -1.0]], 2, axis=0)
    page = write(tmp_path, [], view(grey, maps=[], parts={"one": np.stack([left, -left, 0 * left])}))
    image, rgb = map(picture, uris(page))
    assert np.abs(image - 128).max() <= 2
    assert rgb[:, :8, 0].mean() > 180 > 60 > rgb[:, :8, 1].mean()
    assert rgb[:, -8:, 1].mean() > 180 > 60 > rgb[:, -8:, 0].mean()
    assert scripts(page)[0]["runs"][0]["panels"][0]["remark"] == "red, green, blue"


def test_large_pictures_shrink_with_their_shape(tmp_path: Path) -> None:
    page = write(tmp_path, [], view(np.zeros((448, 224, 3), np.uint8)))
    assert [picture(uri).shape for uri in uris(page)] == [(224, 112, 3)]


def test_an_input_of_its_own_is_shown_only_where_it_differs(tmp_path: Path) -> None:
    crop = PHOTO[:16, :16]
    two = {"one": ("a", 0.5), "two": ("a", 0.5)}
    page = write(tmp_path, [], view(own={"one": PHOTO, "two": crop}, predictions=two))
    first, second = scripts(page)[0]["runs"]
    assert first["input"] is None
    assert picture(second["input"]).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("heatmap", "remark"), [(np.ones((2, 2)), "constant map"), (np.array([[np.nan, 1.0]]), "not drawn: some values")]
)
def test_a_map_that_shows_nothing_says_so(heatmap: np.ndarray, remark: str, tmp_path: Path) -> None:
    (data,) = scripts(write(tmp_path, [], view(maps=[MapView("one", "cam", heatmap, {})])))
    assert remark in data["runs"][0]["maps"][0]["remark"]


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    page = write(tmp_path, [row("cam", "ad", 0.5)], view(parts={"one": np.eye(2)[None]}), view())
    text = page.text.replace('"http://www.w3.org/2000/svg"', "")  # the name of SVG's elements, which nobody loads
    assert not re.search(r"https?://|@import|url\(|javascript:", text)
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert re.match(r"data:|#", element["attrs"].get(name, "#")), element
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in uris(page))
    (policy,) = [e["attrs"]["content"] for e in page.all("meta") if e["attrs"].get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert all(element["attrs"].get("alt") for element in page.all("img"))
    assert all(element["attrs"].get("scope") for element in page.all("th"))
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))


def test_tables_can_be_saved_as_they_are_in_the_files(tmp_path: Path) -> None:
    rows = [row("cam", "ad", 0.5, 0.25, low=0.4, high=0.6), row("<rise>", "ad", 0.6, 0.25, low=0.5, high=0.7)]
    costs = {"cam": {"passes": 1.0, "seconds": 0.5}}
    page = write(tmp_path, rows, costs=costs)
    saved = [json.loads(e["text"]) for e in page.all("script") if e["attrs"].get("type") == "text/plain"]
    assert saved[1:] == [
        markdown_table(rows, costs),
        latex_table(rows, costs),
        latex_table(rows, costs, deviations=True),
    ]
    table = pd.read_csv(io.StringIO(saved[0]))
    assert table["mean"].tolist() == [0.5, 0.6]
    assert table["explainer"].tolist() == ["cam", "<rise>"]
    assert table["seconds"].tolist()[0] == 0.5
    assert r"50.0 $\pm$ 25.0" in saved[3]
    assert "50.0 [40.0, 60.0]" in saved[2]
    names = [e["text"] for e in page.all("button") if "data-ending" in e["attrs"]]
    assert names == ["CSV", "Markdown", "LaTeX with intervals", "LaTeX with ± std"]


def test_a_page_without_anything_is_whole(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", title="T", runs=[], results=[], images=[])
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
        write_report(path, title="T", runs=RUNS, results=[], images=images())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(path, title="T", runs=RUNS, results=[], images=[])
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

    write_report(tmp_path / "report.html", title="T", runs=RUNS, results=[], images=images())
    assert len(alive) == 8


def test_a_file_name_that_is_no_utf8_does_not_cost_the_page(tmp_path: Path) -> None:
    page = write(tmp_path, [], view(image_id=os.fsdecode(b"caf\xe9.jpg")))
    assert r"caf\udce9.jpg" in [element["text"] for element in page.all("h3")]
