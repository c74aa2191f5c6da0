"""Sizes of report pages, and the times of Chromium to open them and to scroll through them.

python -m benchmarks.pages

Pages have one model, pictures of 224 pixels and maps of 7 × 7 cells; a fifth of the explainers have maps as fine as the
picture. Times are medians of `--pairs` fresh browsers, whose pages take turns. *Open* ends when the pictures near the
window are drawn. Scrolling moves the window by 120 pixels per frame, over at most 400 frames.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import Row, Value, plain_parser, write
from benchmarks.tables import show
from interp_models.report.page import write_report
from interp_models.report.views import ImageView, MapView, RunResults, RunSummary
from tests import drive_page

METRICS = ("ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic")
OPENED = """
const done = arguments[0], images = document.querySelector('#images');
images.scrollIntoView();
const drawn = () => document.querySelectorAll('.view canvas').length
  ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(drawn);
drawn();
"""
SCROLLED = """
const done = arguments[0], gaps = [];
let last = performance.now(), frames = 0;
const step = now => {
  gaps.push(now - last); last = now;
  window.scrollBy({top: 120, behavior: 'instant'});
  const end = window.scrollY + window.innerHeight >= document.body.scrollHeight - 2;
  ++frames < 400 && !end ? requestAnimationFrame(step) : done(gaps.slice(1));
};
requestAnimationFrame(step);
"""


def views(images: int, explainers: Sequence[str]) -> Iterator[ImageView]:
    """Views with random maps."""
    rng, at = np.random.default_rng(0), np.linspace(0, 1, 50)
    for number in range(images):
        small = rng.integers(0, 256, (14, 14, 3), np.uint8)
        maps = []
        for place, name in enumerate(explainers):
            side = 224 if place % 5 == 4 else 7
            scores: dict[str, float | None] = {key: rng.random() for key in METRICS}
            curves = {key: np.stack([at, rng.random(50)]) for key in ("dauc", "iauc")}
            maps.append(MapView("run", name, rng.random((side, side)), scores, curves))
        picture = small.repeat(16, 0).repeat(16, 1)
        yield ImageView(picture, f"{number}.jpg", f"class {number % 20}", {"run": ("class 0", rng.random())}, maps, {})


def results(images: int, explainers: Sequence[str]) -> RunResults:
    """Random results of one model."""
    rng = np.random.default_rng(1)
    protocol = {"preset": "gomez2023", "grid": "7x7", "steps": 49, "fill": "black", "target": "prediction"}
    protocol |= {"scorer": "exact", "n": images, "n_undefined": 0}
    rows: list[dict[str, Any]] = [
        {"run": "run", "explainer": name, "metric": key, "mean": rng.random(), "std": 0.1, "low": 0.0, "high": 1.0}
        | {"rank": 1, "tied": True, "higher_is_better": True, "options": {"name": name}, **protocol}
        for name in explainers
        for key in METRICS
    ]
    away = [
        {"explainer": row["explainer"], "metric": row["metric"], "reference": explainers[0], "mean": 0.1, "low": 0.0}
        | {"high": 0.2, "n": images, "p": 0.5, "superiority": 0.5, "verdict": "unclear"}
        for row in rows
        if row["explainer"] != explainers[0]
    ]
    return RunResults("run", rows, differences=away, headline="Nothing can be told apart.")


def opened(path: Path) -> tuple[float, list[float]]:
    """Milliseconds until the page is open, and between frames while it scrolls, in a fresh browser."""
    with drive_page.browser() as session:
        session.protocol(
            "Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False
        )
        session.open(path.resolve().as_uri())
        time: float = session("POST", "/execute/async", {"script": OPENED, "args": []})
        return time, session("POST", "/execute/async", {"script": SCROLLED, "args": []})


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = plain_parser(__doc__)
    p.add_argument("--images", type=int, nargs="+", default=[50, 200, 500], help="numbers of images")
    p.add_argument("--explainers", type=int, nargs="+", default=[4, 20], help="numbers of explainers")
    p.add_argument("--pairs", type=int, default=3, help="browsers for each page")
    args = p.parse_args(argv)
    args.command = " ".join(["python -m benchmarks.pages", *(sys.argv[1:] if argv is None else argv)])
    if drive_page.CHROMIUM is None or drive_page.CHROMEDRIVER is None:
        p.error("needs Chromium: apt-get install chromium chromium-driver")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        pages: dict[str, Path] = {}
        for explainers in args.explainers:
            names = [f"method {number}" for number in range(explainers)]
            for images in args.images:
                what = f"{images} images, {explainers} explainers"
                pages[what] = Path(folder) / f"{what}.html"
                summary = RunSummary("run", "cnn", "random", None, 0, 0.5, images, 0, "last epoch")
                found = [results(images, names)]
                write_report(pages[what], title=what, runs=[summary], results=found, images=views(images, names))
        measured = [{what: opened(path) for what, path in pages.items()} for _ in range(args.pairs)]
        for what, path in pages.items():
            gaps = [gap for one in measured for gap in one[what][1]]
            rows += [
                Value(f"{what}: size", path.stat().st_size / 1e6, "MB"),
                Value(f"{what}: open", median(one[what][0] for one in measured) / 1000, "s"),
                Value(f"{what}: frames while scrolling, median", median(gaps), "ms"),
                Value(f"{what}: frames while scrolling, 95th percentile", float(np.percentile(gaps, 95)), "ms"),
            ]
    return write("pages", args, "random pictures", rows)


if __name__ == "__main__":
    print(show(main()))
